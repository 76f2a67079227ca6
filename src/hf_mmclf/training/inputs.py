"""From arguments to what a training run works on: configuration, rows, tokenizer, model and preprocessing."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, BertConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import Preprocessing
from ..data.prepare import DataArguments, PreparedData, prepare_data, presence
from ..data.streaming import Stream, open_stream
from ..data.tokenizer import load_tokenizer
from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.processing_mmclf import MMClfProcessor
from ..presets import config_from_preset
from .arguments import MMClfTrainingArguments, ModelArguments

logger = logging.get_logger(__name__)


@dataclasses.dataclass
class TrainingInputs:
    """
    What a training run works on.

    Args:
        prepared ([`PreparedData`]): The rows of all splits; without `train` where these are streamed.
        train_rows (`Dataset`): The training rows or, of a stream, its first rows.
        stream ([`Stream`], *optional*): The training rows that are streamed.
        model ([`MMClfForImageTextClassification`]): With the labels in its configuration.
        preprocessing ([`Preprocessing`]): The transforms and the collator, with the processor.
        tokenizer_source (`str`, *optional*): Where the tokenizer comes from, in words.
        missing (`dict[str, dict[str, int]]`): The number of rows without an image and without a text, by split.
    """

    prepared: PreparedData
    train_rows: Dataset
    stream: Stream | None
    model: MMClfForImageTextClassification
    preprocessing: Preprocessing
    tokenizer_source: str | None
    missing: dict[str, dict[str, int]]


def prepare_inputs(
    model_args: ModelArguments, data_args: DataArguments, args: MMClfTrainingArguments
) -> TrainingInputs:
    """
    Read the rows, build the model, and check everything on the way. Nothing is written.

    Raises:
        `ValueError`, `OSError`: Arguments that do not fit each other, rows that cannot be read, or weights or a
            tokenizer that cannot be loaded.
    """
    config = build_config(model_args)
    stream = None
    if data_args.streaming:
        args.accelerator_config.dispatch_batches = False  # each process decodes its own images
        stream, prepared = open_stream(data_args, config.has_image, config.has_text, args.seed)
    else:
        prepared = prepare_data(data_args, config.has_image, config.has_text)
    train_rows = stream.head if stream else prepared.splits["train"]
    _report_rows(prepared, data_args.bad_images)
    tokenizer, source = build_tokenizer(model_args, config, train_rows)
    missing = settle_labels(config, prepared, {"train": train_rows, **prepared.splits})
    model = build_model(config, model_args, tokenizer)
    for part, weights in (("image", config.image_weights), ("text", config.text_weights)):
        if weights:
            logger.info(f"{part} backbone: {'random weights' if weights == 'scratch' else f'pretrained, {weights}'}")
    if source:
        logger.info(f"tokenizer: {source}")
    trained = model.num_parameters(only_trainable=True)
    logger.info(f"parameters: {model.num_parameters():,}, of which {trained:,} train")
    preprocessing = Preprocessing(build_processor(model, model_args, tokenizer), prepared.folder)
    return TrainingInputs(prepared, train_rows, stream, model, preprocessing, source, missing)


def _report_rows(prepared: PreparedData, bad_images: str) -> None:
    logger.info(f"Rows: {', '.join(f'{name} {len(split):,}' for name, split in prepared.splits.items())}")
    logger.info(f"  splits: {prepared.split_source}; labels: {', '.join(prepared.labels.names)}")
    if prepared.bad_images:
        logger.warning(f"  {len(prepared.bad_images):,} images cannot be read")
    for where, reason in prepared.bad_images:
        logger.warning(f"  image {'left out' if bad_images == 'skip' else 'taken as missing'}: {where}: {reason}")


def build_config(args: ModelArguments) -> MMClfConfig:
    """Return the preset's configuration with the changes of the arguments; labels and vocabulary are still open."""
    if args.preset is None:
        raise ValueError("ModelArguments.preset is None; name a preset, or let parse_arguments choose one")
    names = ("fusion", "fusion_layers", "fusion_heads", "fusion_norm", "projection_norm", "image_tokens", "width")
    names += ("dropout", "learned_missing", "modality_dropout")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("unfrozen_image_stages", "unfrozen_text_layers"):
        if getattr(args, name) is not None:
            changes[name] = None if getattr(args, name) == -1 else getattr(args, name)
    if args.image_backbone is not None:
        changes |= {"image_backbone": None if args.image_backbone == "none" else args.image_backbone}
        changes |= {"image_backbone_args": None}
    if args.text_backbone == "none":
        changes |= {"text_backbone": None, "text_config": None}
    elif args.text_backbone is not None:
        changes |= {"text_backbone": Path(args.text_backbone).name}
        changes |= {"text_config": _read_text_config(args.text_backbone)}
        if not Path(args.text_backbone).is_dir():
            changes["text_backbone"] = args.text_backbone
    return config_from_preset(args.preset, **changes)


def _read_text_config(source: str) -> dict[str, Any]:
    """Read the configuration of a text encoder on the Hub or in a folder."""
    try:
        return AutoConfig.from_pretrained(source).to_dict()
    except ValueError:  # no model_type: TinyBERT, BERT-tiny and other BERTs are older than it
        values, _ = PreTrainedConfig.get_config_dict(source)
        if "model_type" in values or "type_vocab_size" not in values:
            raise
        return BertConfig(**values).to_dict()  # weights of another encoder do not fit it, which is an error


def build_tokenizer(
    args: ModelArguments, config: MMClfConfig, rows: Dataset
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Load or train the tokenizer, the same in every process; returns it and where it comes from, in words."""
    if not config.has_text:
        return None, None
    if args.tokenizer == "train" and not args.from_scratch:
        raise ValueError(
            "--tokenizer train gives every word piece a new number, which pretrained text weights do not know; add "
            "--from_scratch, or leave --tokenizer out for the backbone's own"
        )
    source = args.tokenizer or ("train" if args.from_scratch else args.text_backbone or config.text_backbone)
    # The configuration knows the kind of the backbone's own tokenizer, even where the repository does not say it.
    own = config.text_config if source in (args.text_backbone, config.text_backbone) else None
    return load_tokenizer(source, filter(None, rows["text"][:]), args.vocab_size, own)


def settle_labels(config: MMClfConfig, prepared: PreparedData, splits: Mapping[str, Dataset]) -> dict[str, Any]:
    """
    Write the labels into the configuration, and `learned_missing` where training rows lack an image or a text.

    Returns:
        `dict[str, dict[str, int]]`: The number of rows without an image and without a text, by split.
    """
    config.id2label = dict(enumerate(prepared.labels.names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.label_ids = list(prepared.labels.ids)
    missing = {}
    for name, split in splits.items() if config.has_image and config.has_text else ():
        has_image, has_text = presence(split)
        counts = missing[name] = {"picture": int((~has_image).sum()), "caption": int((~has_text).sum())}
        if any(counts.values()):
            logger.info(f"  {name}: {counts['picture']:,} rows without an image, {counts['caption']:,} without a text")
            if name == "train" and not config.learned_missing:
                config.learned_missing = True
                logger.info("  learned vectors stand in for them (learned_missing)")
    return missing


def build_model(
    config: MMClfConfig, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None
) -> MMClfForImageTextClassification:
    """Build the model and load its backbones as the arguments say."""
    image_weights, text_weights = (None, None) if args.from_scratch else (args.image_weights, args.text_weights)
    if text_weights == "hub" and args.text_backbone and Path(args.text_backbone).is_dir():
        text_weights = args.text_backbone
    if config.has_text:
        if text_weights is None:
            config.text_config.vocab_size = len(tokenizer)
            config.text_config.pad_token_id = tokenizer.pad_token_id
        elif len(tokenizer) > config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer):,} tokens, the pretrained text backbone "
                f"{config.text_config.vocab_size:,}; use the backbone's own tokenizer, or --from_scratch"
            )
    return MMClfForImageTextClassification.from_backbones(config, image_weights, text_weights)


def build_processor(
    model: MMClfForImageTextClassification, args: ModelArguments, tokenizer: PreTrainedTokenizerBase | None
) -> MMClfProcessor:
    """
    Build the processor of a model: image size (unless given), mean and deviation as timm knows them for the backbone,
    and the longest text that both the arguments and the model allow.
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
        tokenizer.model_max_length = min(args.max_tokens, model.max_tokens)  # saved with it
    return MMClfProcessor(image_processor, tokenizer)
