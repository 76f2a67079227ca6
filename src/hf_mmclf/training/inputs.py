"""Inputs of a training run, made from its arguments: configuration, rows, tokenizer, model and processor."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.arguments import DataArguments, changed_fields, idle_arguments
from ..data.augmentation import AugmentationArguments
from ..data.collator import Preprocessing
from ..data.prepare import PreparedData, prepare_data, presence, references_of
from ..data.reachability import check_reachable
from ..data.streaming import Stream, open_stream
from ..data.tables import check_source
from ..data.tokenizer import load_tokenizer
from ..evaluation.report import FIGURES
from ..evaluation.thresholds import check_objective
from ..model.backbones_mmclf import text_encoder
from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.processing_mmclf import MMClfProcessor
from ..presets import config_from_preset, get_preset
from .arguments import ARCHITECTURE, MMClfTrainingArguments, ModelArguments
from .continuation import StartingModel
from .losses import MultiLabelLoss

logger = logging.get_logger(__name__)


@dataclasses.dataclass
class TrainingInputs:
    """
    Rows, model and preprocessing of a training run.

    Args:
        prepared ([`PreparedData`]):
            The rows of all splits, without `train` if training rows are streamed.
        train_rows (`Dataset`):
            The training rows or, for a stream, its first rows.
        stream ([`Stream`], *optional*):
            The streamed training rows.
        model ([`MMClfForImageTextClassification`]):
            The model, with the labels in its configuration.
        preprocessing ([`Preprocessing`]):
            The transforms, the collator and the processor.
        tokenizer_source (`str`, *optional*):
            A description of the tokenizer's source.
        missing (`dict[str, dict[str, int]]`):
            The number of rows without an image and without a text, by split.
    """

    prepared: PreparedData
    train_rows: Dataset
    stream: Stream | None
    model: MMClfForImageTextClassification
    preprocessing: Preprocessing
    tokenizer_source: str | None
    missing: dict[str, dict[str, int]]


def check_arguments(args: MMClfTrainingArguments) -> None:
    """Raise `ValueError` for a loss, a threshold objective or a metric that would fail only after training."""
    weights = (args.positive_weight_power, args.positive_weight_cap)
    MultiLabelLoss(args.loss, torch.ones(1), 2, *weights, args.label_smoothing_factor)
    check_objective(args.threshold_objective or "micro", args.threshold_beta, args.threshold_precision)
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if args.load_best_model_at_end and metric not in FIGURES:
        raise ValueError(f"metric_for_best_model is {metric!r}; expected one of {', '.join(FIGURES)}")


def prepare_inputs(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
) -> TrainingInputs:
    """
    Read the rows and build the model, with all checks. Nothing is written.

    Args:
        model_args ([`ModelArguments`]):
            The architecture and its initial weights.
        data_args ([`DataArguments`]):
            The rows.
        augmentation ([`AugmentationArguments`]):
            Random changes of training rows, which must be of a kind that the model reads.
        args ([`MMClfTrainingArguments`]):
            The seed, and for a stream the settings of the data loader, which are adapted.

    Returns:
        [`TrainingInputs`]: The inputs of the run.

    Raises:
        `ValueError`, `OSError`: If arguments contradict each other, rows cannot be read, or weights or the tokenizer
            cannot be loaded.
    """
    finished = StartingModel.load(model_args) if model_args.init_from else None
    config = finished.config(model_args) if finished else build_config(model_args)
    warn_of_idle(config, model_args, augmentation)
    _check_starts(model_args, data_args, config)
    stream = None
    if data_args.streaming:
        args.accelerator_config.dispatch_batches = False  # each process decodes its own images
        stream, prepared = open_stream(data_args, config.has_image, config.has_text, args.seed)
    else:
        prepared = prepare_data(data_args, config.has_image, config.has_text)
    train_rows = stream.head if stream else prepared.splits["train"]
    _report_rows(prepared, data_args.bad_images)
    if finished:
        tokenizer, source = finished.processor.tokenizer, config.has_text and f"that of {finished.name}"
    else:
        tokenizer, source = build_tokenizer(model_args, config, train_rows)
    settle_labels(config, prepared, train_rows, model_args.min_labels)
    missing = settle_missing(config, prepared, train_rows)
    model = finished.start(config) if finished else build_model(config, model_args, tokenizer, prepared)
    processor = finished.processor if finished else build_processor(model, model_args, tokenizer)
    for part, weights in (("image", config.image_weights), ("text", config.text_weights)):
        if weights:
            logger.info(f"{part} backbone: {'random weights' if weights == 'scratch' else f'pretrained, {weights}'}")
    if source:
        logger.info(f"tokenizer: {source}")
    trained = model.num_parameters(only_trainable=True)
    logger.info(f"parameters: {model.num_parameters():,}, of which {trained:,} train")
    bad_images = "error" if args.cache_features else data_args.bad_images  # a cache must not keep what is not there
    preprocessing = Preprocessing(processor, prepared.folder, bad_images)
    return TrainingInputs(prepared, train_rows, stream, model, preprocessing, source, missing)


def warn_of_idle(config: MMClfConfig, args: ModelArguments, augmentation: AugmentationArguments) -> None:
    """Warn of arguments that have no effect. One file of arguments may serve models with one and two backbones."""
    recipe = get_preset(args.preset).recipe if args.preset else {}
    of_images = ("image_size", "image_weights", "unfrozen_image_stages", "image_tokens")
    of_images += ("crop_scale", "flip", "vertical_flip", "rotation", "color_jitter")
    of_texts = ("max_tokens", "text_weights", "unfrozen_text_layers", "tokenizer", "vocab_size")
    of_texts += ("swap_words", "drop_words")
    of_pairs = ("learned_missing", "modality_dropout", "modality_classifiers")
    of_queries, of_others = ("fusion_layers", "fusion_heads"), ("fusion_norm", "projection_norm")
    both, queries = config.has_image and config.has_text, config.fusion == "label_queries"
    is_trained = args.tokenizer == "train" or (args.tokenizer is None and args.backbone_weights()["text"] is None)
    rules = [
        (config.has_image, of_images, "the model has no image backbone"),
        (config.has_text, of_texts, "the model has no text backbone"),
        (both, of_pairs, "the model has one backbone"),
        # Label queries are a fusion that serves one backbone too.
        (both or queries, ("fusion", "width"), "the model has one backbone"),
        (both or queries or not config.has_image, ("image_tokens",), "the model has one backbone"),
        (queries, of_queries, f"the fusion {config.fusion} has no such option"),
        (both and not queries, of_others, "label queries and models with one backbone have no such option"),
        (is_trained or not config.has_text, ["vocab_size"], "the tokenizer is not trained"),
    ]
    for sentence in idle_arguments(changed_fields(args, recipe) | changed_fields(augmentation, recipe), rules):
        logger.warning(sentence)


def _check_starts(args: ModelArguments, data_args: DataArguments, config: MMClfConfig) -> None:
    """Check that rows are there, that tokenizer and text weights fit, and that the Hub can be reached if needed."""
    for given in (data_args.data, data_args.validation_data, data_args.test_data):
        check_source(given)
    if args.init_from:
        return
    weights, needed = args.backbone_weights(), []
    if config.has_text:
        own = args.text_backbone or config.text_backbone
        tokenizer = args.tokenizer or ("train" if weights["text"] is None else own)
        if tokenizer == "train" and weights["text"] is not None:
            raise ValueError(
                "--tokenizer train gives every word piece a new id, which pretrained text weights do not know; add "
                "--from_scratch, or leave --tokenizer out to use the backbone's own"
            )
        needed += [own] if weights["text"] == "hub" else []
        needed += [tokenizer] if tokenizer != "train" else []
    if config.has_image and weights["image"] == "hub":
        needed.append(config.image_backbone)
    for name in dict.fromkeys(needed):
        check_reachable(name)


def _report_rows(prepared: PreparedData, bad_images: str) -> None:
    logger.info(f"Rows: {', '.join(f'{name} {len(split):,}' for name, split in prepared.splits.items())}")
    logger.info(f"  splits: {prepared.split_source}; labels: {', '.join(prepared.labels.names)}")
    if prepared.bad_images:
        logger.warning(f"  {len(prepared.bad_images):,} images cannot be read")
    for where, reason in prepared.bad_images:
        logger.warning(f"  image {'left out' if bad_images == 'skip' else 'taken as missing'}: {where}: {reason}")


def build_config(args: ModelArguments) -> MMClfConfig:
    """
    Return the preset's configuration with the changes of the arguments. Labels and vocabulary are not set yet.

    Raises:
        `ValueError`: If no preset is named, or if a value does not fit the configuration.
        `OSError`: If the configuration of the text encoder cannot be loaded.
    """
    if args.preset is None:
        raise ValueError("ModelArguments.preset is None; name a preset, or let parse_arguments choose one")
    given = {field.name: getattr(args, field.name) for field in ARCHITECTURE}
    changes = {name: value for name, value in given.items() if value is not None}
    for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
        if given[name] == -1:
            changes[name] = None  # which trains the whole backbone
    if args.image_backbone is not None:
        changes["image_backbone"] = None if args.image_backbone == "none" else args.image_backbone
        changes["image_backbone_args"] = None
    if args.text_backbone == "none":
        changes |= {"text_backbone": None, "text_config": None}
    elif args.text_backbone is not None:
        folder = Path(args.text_backbone)
        changes["text_backbone"] = folder.name if folder.is_dir() else args.text_backbone
        changes["text_config"] = _read_text_config(args.text_backbone)
    return config_from_preset(args.preset, **changes)


def _read_text_config(source: str) -> dict[str, Any]:
    """Read the configuration of a text encoder on the Hub or in a folder."""
    check_reachable(source)
    try:
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, "text_config", config)  # of CLIP, SigLIP, their relatives and finished models
        if config is None:
            raise ValueError(f"{source}: a model without a text backbone")
        text_encoder(config)  # raises its error before rows are read
        return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    except ValueError:  # TinyBERT, BERT-tiny and other BERTs are older than the key model_type
        values, _ = PreTrainedConfig.get_config_dict(source)
        if "model_type" in values or "type_vocab_size" not in values:
            raise
        return BertConfig(**values).to_dict()  # loading weights of another encoder into it is an error


def build_tokenizer(
    args: ModelArguments, config: MMClfConfig, rows: Dataset
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """
    Load or train the tokenizer, which is the same in every process.

    Args:
        args ([`ModelArguments`]):
            The name of the tokenizer, or how to train it.
        config ([`MMClfConfig`]):
            The configuration of the model.
        rows (`Dataset`):
            The training rows, for a tokenizer that is trained.

    Returns:
        `tuple`: The tokenizer and a description of its source, or twice `None` for a model without texts.

    Raises:
        `ValueError`: If the tokenizer knows no words.
        `OSError`: If the tokenizer cannot be loaded.
    """
    if not config.has_text:
        return None, None
    pretrained = args.backbone_weights()["text"] is not None
    source = args.tokenizer or (args.text_backbone or config.text_backbone if pretrained else "train")
    # The configuration names the class of the backbone's own tokenizer, which old repositories do not.
    own = config.text_config if source in (args.text_backbone, config.text_backbone) else None
    return load_tokenizer(source, filter(None, rows["text"][:]), args.vocab_size, own)


def settle_labels(
    config: MMClfConfig, prepared: PreparedData, train_rows: Dataset, min_labels: int | None = None
) -> None:
    """
    Write the labels into the configuration, and `min_labels`: 1 if every training row has a label, else 0.

    Args:
        config ([`MMClfConfig`]):
            The configuration to change.
        prepared ([`PreparedData`]):
            The labels.
        train_rows (`Dataset`):
            The training rows. If they are the first rows of a stream, `min_labels` stays 0.
        min_labels (`int`, *optional*):
            The value that the user gave; the configuration has it already.

    Raises:
        `ValueError`: If there are fewer labels than `min_labels`.
    """
    config.id2label = dict(enumerate(prepared.labels.names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.label_ids = list(prepared.labels.ids)
    if config.min_labels > config.num_labels:
        raise ValueError(f"--min_labels is {config.min_labels}, but there are {config.num_labels} labels")
    if min_labels is None:
        references = references_of(train_rows)
        known = references[(references >= 0).all(1)]
        has_all_rows = "train" in prepared.splits
        config.min_labels = int(has_all_rows and len(known) > 0 and (known == 1).any(1).all())
        if config.min_labels:
            logger.info("  every training row has a label, so every prediction gets at least one (min_labels 1)")


def settle_missing(config: MMClfConfig, prepared: PreparedData, train_rows: Dataset) -> dict[str, dict[str, int]]:
    """
    Count the rows without an image or a text, and write `learned_missing` into the configuration if training has some.

    Args:
        config ([`MMClfConfig`]):
            The configuration to change.
        prepared ([`PreparedData`]):
            The rows.
        train_rows (`Dataset`):
            The training rows or, for a stream, its first rows.

    Returns:
        `dict[str, dict[str, int]]`: The number of rows without an image and without a text, by split; empty for a
        model with one backbone.
    """
    missing = {}
    splits = {"train": train_rows, **prepared.splits} if config.has_image and config.has_text else {}
    for name, split in splits.items():
        has_image, has_text = presence(split)
        counts = missing[name] = {"image": int((~has_image).sum()), "text": int((~has_text).sum())}
        is_head = name not in prepared.splits
        if any(counts.values()):
            shown = f"train (the first {len(split):,} rows of the stream)" if is_head else name
            logger.info(f"  {shown}: {counts['image']:,} rows without an image, {counts['text']:,} without a text")
            if name == "train" and not config.learned_missing:
                config.learned_missing = True
                logger.info("  learned vectors replace them (learned_missing)")
        elif is_head and not config.learned_missing:
            logger.info("  zeros replace images and texts that later rows of the stream lack; see --learned_missing")
    return missing


def build_model(
    config: MMClfConfig, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None, prepared: PreparedData
) -> MMClfForImageTextClassification:
    """
    Build the model and load the weights of its backbones. If it standardises features, set its biases by the labels.

    Args:
        config ([`MMClfConfig`]):
            The architecture. Its vocabulary is changed to the tokenizer's if the text backbone starts from scratch.
        args ([`ModelArguments`]):
            The weights.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer, if the model has a text backbone.
        prepared ([`PreparedData`]):
            The rows. Those of a stream are not known, so its biases start at 0.

    Raises:
        `ValueError`: If the tokenizer has more tokens than the pretrained text backbone.
        `OSError`: If weights cannot be loaded.
    """
    weights = args.backbone_weights()
    if config.has_text:
        if weights["text"] is None:
            config.text_config.vocab_size = len(tokenizer)
            config.text_config.pad_token_id = tokenizer.pad_token_id
        elif len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, the pretrained text backbone "
                f"{config.text_config.vocab_size:,}; use the backbone's own tokenizer, or --from_scratch"
            )
        elif args.tokenizer and len(tokenizer) < 0.9 * config.text_config.vocab_size:
            raise ValueError(
                f"--tokenizer {args.tokenizer} has {len(tokenizer):,} tokens, the pretrained text backbone "
                f"{config.text_config.vocab_size:,}, so its numbers mean other words; leave --tokenizer out"
            )
    model = MMClfForImageTextClassification.from_backbones(config, weights["image"], weights["text"])
    if model.feature_norms is not None and "train" in prepared.splits:
        references = torch.from_numpy(references_of(prepared.splits["train"]))
        positives, known = (references == 1).sum(0), (references >= 0).sum(0)
        model.init_biases(torch.where(known > 0, positives / known.clamp(min=1), 0.5))
        logger.info("  the biases of the classifiers start at the frequencies of the labels")
    return model


def build_processor(
    model: MMClfForImageTextClassification, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None
) -> MMClfProcessor:
    """
    Build the processor of a model.

    Image size (unless given), mean and standard deviation are those that timm has for the backbone. Texts are
    truncated to the length that both the arguments and the model allow.

    Args:
        model ([`MMClfForImageTextClassification`]): The model.
        args ([`ModelArguments`]): The image size and the length of texts.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer, whose `model_max_length` is changed.
    """
    image_processor = None
    if model.config.has_image:
        known = model.image_model.pretrained_cfg
        image_processor = MMClfImageProcessor(
            size=args.image_size or known["input_size"][-1],
            image_mean=list(known["mean"]),
            image_std=list(known["std"]),
        )
    if tokenizer is not None:
        model.limit_text(tokenizer, args.max_tokens)  # the tokenizer is saved with this limit
    return MMClfProcessor(image_processor, tokenizer)
