"""The main job: rows in, one folder with a trained model and its thresholds out."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_model
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..data.augmentation import ImageAugmentation, TextAugmentation
from ..data.collator import Collator, EvaluationImageTransform, RowTransform
from ..data.labels import LabelSet
from ..data.prepare import DataArguments, picture_paths, prepare_data
from ..data.streaming import StreamCollator, open_stream
from ..data.tokenizer import load_tokenizer
from ..evaluation.ablation import ABSENT, Transform, ablation_figures, ablations
from ..evaluation.calibration import fit_temperature
from ..evaluation.report import ComputeMetrics, report, report_text, scores_of
from ..evaluation.thresholds import best_threshold, label_thresholds
from ..inference.predictor import references_of, save_model, whole_folder
from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.processing_mmclf import MMClfProcessor
from .arguments import AugmentationArguments, MMClfTrainingArguments, ModelArguments
from .feature_cache import FeatureCache
from .inputs import build_config, build_image_processor, build_model
from .losses import MultiLabelLoss
from .record import machine_name, run_record, write_records
from .trainer import MMClfTrainer

CHECKPOINTS = "checkpoints"


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
) -> Path:
    """
    Trains, fits the thresholds on the validation rows, reports on validation and test rows, and writes the folder.

    Returns:
        `Path`: The output folder: model, image processor, tokenizer, `metrics.json`, `training.json`, `splits.csv`,
        and the card (`README.md`) with its plots.

    Raises:
        `FileExistsError`: the output folder is in use already.
    """
    config = build_config(model_args)
    output, resume = _claim_output(model_args, args)
    set_seed(args.seed)
    main = args.process_index == 0
    say = print if main else _be_silent
    stream = None
    if data_args.streaming:
        _check_streaming(args)
        args.accelerator_config.dispatch_batches = False  # each process decodes its own pictures
        stream, prepared = open_stream(data_args, config.has_image, config.has_text, args.seed)
    else:
        prepared = prepare_data(data_args, config.has_image, config.has_text)
    train_rows = stream.head if stream else prepared.splits["train"]
    say(f"Rows: {', '.join(f'{name} {len(split):,}' for name, split in prepared.splits.items())}")
    say(f"  splits: {prepared.split_source}; labels: {', '.join(prepared.labels.names)}")
    if prepared.bad_images:
        say(f"  {len(prepared.bad_images):,} pictures cannot be read")
    for where, reason in prepared.bad_images:
        say(f"  picture {'left out' if data_args.bad_images == 'skip' else 'taken as absent'}: {where}: {reason}")

    args.distributed_state.wait_for_everyone()  # until all have looked at the output folder, nobody writes
    if main:  # only now: a mistake above leaves nothing behind
        if resume is None:
            _remove_traces(Path(args.output_dir))  # of a start that failed before its first checkpoint
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    args.distributed_state.wait_for_everyone()
    tokenizer, tokenizer_source = None, None
    if config.has_text:
        with args.main_process_first(local=False, desc="tokenizer"):  # trained once for all processes and machines
            tokenizer, tokenizer_source = _tokenizer(model_args, config, train_rows, Path(args.output_dir), resume)
    _name_labels(config, prepared.labels)
    missing = _settle_missing(config, {"train": train_rows, **prepared.splits}, say)
    model = build_model(config, model_args, tokenizer)
    if tokenizer is not None:
        tokenizer.model_max_length = min(model_args.max_tokens, model.max_tokens)  # saved with it
    for part, weights in (("image", config.image_weights), ("text", config.text_weights)):
        if weights:
            say(f"{part} backbone: {'random weights' if weights == 'scratch' else f'pretrained, {weights}'}")
    if tokenizer is not None:
        say(f"tokenizer: {tokenizer_source}")
    trained = model.num_parameters(only_trainable=True)
    say(f"parameters: {model.num_parameters():,}, of which {trained:,} train")

    processor, size = None, None
    if config.has_image:
        processor = build_image_processor(model, model_args.image_size)
        size = processor.size["longest_edge"]
    collator = Collator(tokenizer, getattr(tokenizer, "model_max_length", 0), size)
    evaluation = RowTransform(prepared.folder, processor and EvaluationImageTransform(processor))
    training = RowTransform(prepared.folder, *_augmentations(augmentation, processor))
    datasets = {
        "train_dataset": stream.rows if stream else train_rows.with_transform(training),
        "eval_dataset": prepared.splits["validation"].with_transform(evaluation),
        "data_collator": collator,
    }
    if args.cache_features:
        if resume is not None:  # Trainer loads it too, but only when training begins
            load_model(model, Path(resume) / "model.safetensors", strict=False)
        recipe = dataclasses.asdict(augmentation) | {"image_processor": processor and processor.to_dict()}
        cache = FeatureCache(model, collator, args, recipe)
        views = args.cached_views if any(dataclasses.astuple(augmentation)) else 1
        wanted = {"train": (train_rows, training, views), "validation": (prepared.splits["validation"], evaluation, 1)}
        cached = cache.compute(wanted, say)
        datasets = {
            "train_dataset": cached["train"],
            "eval_dataset": cached["validation"],
            "data_collator": cache.cached_collator,
        }
    trainer = MMClfTrainer(model=model, args=args, compute_metrics=ComputeMetrics(), **datasets)
    trainer.criterion = _criterion(args, train_rows).to(args.device)
    if stream:
        seen = TrainerState.load_from_json(str(Path(resume) / "trainer_state.json")).global_step if resume else 0
        skipped = seen * args.gradient_accumulation_steps
        trainer.train_collator = StreamCollator(stream, training, collator, skipped)
    if args.early_stopping_patience and args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    elif args.early_stopping_patience:
        say("No early stopping: it needs load_best_model_at_end, which is off")
    trainer.train(resume_from_checkpoint=resume)

    trainer.data_collator = collator  # reports are of rows as users will give them, in full precision
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)

    def scored(rows: Dataset, change: Callable[[Transform], Transform]) -> np.ndarray:
        return scores_of(trainer.predict(rows.with_transform(change(evaluation))).predictions)

    reports, outcomes, speed, temperature = {}, {}, {}, None
    for name in ("validation", "test"):
        rows = prepared.splits.get(name)
        if rows is None or "labels" not in rows.column_names:
            say(f"No labelled {name} rows: nothing to report on them")
            continue
        result = trainer.predict(rows.with_transform(evaluation), metric_key_prefix=name)
        logits = result.predictions
        if name == "validation" and args.calibrate:
            temperature = fit_temperature(logits, result.label_ids)
            model.calibrate(temperature)
            logits = logits / temperature
        scores = scores_of(logits)
        outcomes[name] = scores, result.label_ids
        speed = {"split": name, "rows_per_second": result.metrics.get(f"{name}_samples_per_second")}
        if name == "validation":  # test labels never choose anything
            whole = np.arange(len(rows))
            if config.has_image and config.has_text and (config.learned_missing or config.modality_dropout):
                cells = zip(picture_paths(rows), rows["text"][:], strict=True)
                lack_nothing = np.flatnonzero([None not in row for row in cells])
                if len(lack_nothing):  # the others have thresholds of their own
                    whole = lack_nothing
                    _fit_missing_thresholds(config, scored, rows.select(whole), args)
            _fit_thresholds(config, scores[whole], result.label_ids[whole], args)
        reports[name] = report(scores, result.label_ids, config, rows)
    if args.ablations and reports and config.has_image and config.has_text:
        name, (_, references) = list(outcomes.items())[-1]
        rows = prepared.splits[name]
        reports[name]["ablations"] = ablation_figures(partial(scored, rows), rows, references, config)
    if main:
        record = run_record((model_args, data_args, augmentation, args), trainer, prepared)
        record |= {"tokenizer": tokenizer_source, "missing": missing, "resumed": resume is not None}
        record["temperature"] = temperature
        record["recipe"] |= {"image_size": size, "max_tokens": getattr(tokenizer, "model_max_length", None)}
        record["speed"] = {**speed, "batch_size": args.eval_batch_size, "machine": machine_name(args)}
        with whole_folder(output, Path(args.output_dir) / "finished") as stage:
            save_model(model, MMClfProcessor(processor, tokenizer), stage)
            write_records(stage, config, prepared, reports, outcomes, record, args.save_predictions)
        if not args.keep_checkpoints:
            _remove_traces(Path(args.output_dir))
        print(f"\n{report_text(reports)}\n\nThreshold: {config.threshold:.4f}, fitted on the validation rows")
        print(f"Output folder: {output}\nLoad it with:")
        print(f'  import hf_mmclf; from transformers import AutoModel; model = AutoModel.from_pretrained("{output}")')
    trainer.accelerator.wait_for_everyone()
    return output


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
    model_space: Callable[[Any], Mapping[str, Any]] | None = None,
) -> MMClfTrainer:
    """
    A trainer for `hyperparameter_search`: rows and settings are those of [`train`], each trial has a new model.

    It fits no thresholds and writes no finished folder; a tokenizer that is trained goes to `output_dir`.

    Args:
        model_args, data_args, augmentation, args: As for [`train`].
        model_space (`Callable`, *optional*):
            Draws model arguments for a trial, such as `{"dropout": trial.suggest_float("dropout", 0, 0.5)}`, but no
            backbones, since pictures and captions are made ready for one; training arguments are drawn by the
            `hp_space` of the search.

    Raises:
        `ValueError`: `streaming` or `cache_features`, which hold for one run only.
    """
    if data_args.streaming or args.cache_features:
        raise ValueError("a search trains more than once on the same rows: leave out streaming and cache_features")
    config = build_config(model_args)
    prepared = prepare_data(data_args, config.has_image, config.has_text)
    rows = prepared.splits["train"]
    tokenizer = None
    if config.has_text:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tokenizer, _ = _tokenizer(model_args, config, rows, Path(args.output_dir), None)

    def model_init(trial: Any = None) -> MMClfForImageTextClassification:
        drawn = model_space(trial) if model_space and trial else {}
        config = build_config(dataclasses.replace(model_args, **drawn))
        _name_labels(config, prepared.labels)
        _settle_missing(config, prepared.splits, _be_silent)
        return build_model(config, model_args, tokenizer)

    model = model_init()  # for what pictures and captions have to be like
    if tokenizer is not None:
        tokenizer.model_max_length = min(model_args.max_tokens, model.max_tokens)
    processor = build_image_processor(model, model_args.image_size) if config.has_image else None
    trainer = MMClfTrainer(
        model_init=model_init,
        args=args,
        compute_metrics=ComputeMetrics(),
        train_dataset=rows.with_transform(RowTransform(prepared.folder, *_augmentations(augmentation, processor))),
        eval_dataset=prepared.splits["validation"].with_transform(
            RowTransform(prepared.folder, processor and EvaluationImageTransform(processor))
        ),
        data_collator=Collator(
            tokenizer, getattr(tokenizer, "model_max_length", 0), processor and processor.size["longest_edge"]
        ),
    )
    trainer.criterion = _criterion(args, rows).to(args.device)
    return trainer


def _check_streaming(args: MMClfTrainingArguments) -> None:
    """Nobody knows how many rows a stream has."""
    if args.max_steps <= 0:
        raise ValueError("--streaming has no epochs; give --max_steps")
    if "epoch" in (args.eval_strategy, args.save_strategy):
        raise ValueError("--streaming has no epochs; give --eval_strategy steps and --save_strategy steps")
    if _counts_labels(args):
        raise ValueError("--streaming never sees all labels: no --positive_weight_power, no distribution_balanced")
    if args.cache_features:
        raise ValueError("--cache_features keeps something of each row on the disk, which --streaming avoids; choose")


def _be_silent(*_: Any) -> None:
    pass


def _claim_output(model_args: ModelArguments, args: MMClfTrainingArguments) -> tuple[Path, str | None]:
    """The output folder, and the checkpoint to go on from. Moves Trainer's own files to a sub-folder of it."""
    resuming = args.resume_from_checkpoint not in (None, "false", "False", False)
    output = Path(args.output_dir)
    if args.output_dir == "trainer_output":  # transformers' default: nobody chose a folder
        if resuming:
            raise ValueError("--resume_from_checkpoint needs the --output_dir of the run to go on with")
        chosen = [None]
        if args.process_index == 0:
            output, number = Path("outputs") / model_args.preset, 2
            while output.exists():
                output, number = Path("outputs") / f"{model_args.preset}-{number}", number + 1
            chosen = [str(output)]
        output = Path(broadcast_object_list(chosen)[0] if args.world_size > 1 else chosen[0])
    elif not resuming and _is_used(output):
        raise FileExistsError(
            f"{output} is not empty; give another --output_dir, or --resume_from_checkpoint true to go on there"
        )
    args.output_dir = str(output / CHECKPOINTS)
    if not resuming:
        return output, None
    checkpoint = args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"no checkpoint to go on from: {checkpoint or args.output_dir}")
    return output, checkpoint


def _is_used(output: Path) -> bool:
    """Whether a folder holds a model, a checkpoint or anything else but the traces of a start that failed."""
    if not output.exists():
        return False
    return any(entry.name != CHECKPOINTS for entry in output.iterdir()) or any(
        (output / CHECKPOINTS).glob("checkpoint-*")
    )


def _remove_traces(checkpoints: Path) -> None:
    """Removes what a run leaves in its folder of checkpoints, but not what others put there (logs, say)."""
    for pattern in ("checkpoint-*", "tokenizer*", "finished"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()


def _tokenizer(
    args: ModelArguments, config: MMClfConfig, rows: Dataset, folder: Path, resume: str | None
) -> tuple[PreTrainedTokenizerBase, str]:
    if args.tokenizer == "train" and not args.from_scratch:
        raise ValueError(
            "--tokenizer train gives every word piece a new number, which pretrained text weights do not know; add "
            "--from_scratch, or leave --tokenizer out for the backbone's own"
        )
    source = args.tokenizer or ("train" if args.from_scratch else args.text_backbone or config.text_backbone)
    saved, note = folder / "tokenizer", folder / "tokenizer.txt"
    if source == "train" and note.exists():  # by the main process, or by the run that is resumed
        return load_tokenizer(str(saved))[0], note.read_text(encoding="utf-8")
    # the backbone's own: what kind it is the configuration knows, even where the repository does not say
    own = config.text_config if source in (args.text_backbone, config.text_backbone) else None
    tokenizer, description = load_tokenizer(source, filter(None, rows["text"][:]), args.vocab_size, own)
    if source == "train":
        tokenizer.save_pretrained(saved)
        note.write_text(description, encoding="utf-8")
    return tokenizer, description


def _name_labels(config: MMClfConfig, labels: LabelSet) -> None:
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    config.label_ids = list(labels.ids)


def _settle_missing(config: MMClfConfig, splits: Mapping[str, Dataset], say: Any) -> dict[str, dict[str, int]]:
    """Says how many rows lack a picture or caption, and lets the model learn stand-ins if training rows do."""
    missing = {}
    for name, split in splits.items() if config.has_image and config.has_text else ():
        cells = {"picture": picture_paths(split), "caption": split["text"][:]}
        counts = missing[name] = {kind: sum(cell is None for cell in column) for kind, column in cells.items()}
        if any(counts.values()):
            say(f"  {name}: {counts['picture']:,} rows without a picture, {counts['caption']:,} without a caption")
            if name == "train" and not config.learned_missing:
                config.learned_missing = True
                say("  learned vectors stand in for them (learned_missing)")
    return missing


def _augmentations(args: AugmentationArguments, processor: MMClfImageProcessor | None) -> tuple[Any, Any]:
    image = processor and ImageAugmentation.from_processor(
        processor,
        crop_scale=args.crop_scale,
        flip=args.flip,
        vertical_flip=args.vertical_flip,
        rotation=args.rotation,
        color_jitter=args.color_jitter,
    )
    changes_words = args.swap_words or args.drop_words
    return image, TextAugmentation(args.swap_words, args.drop_words) if changes_words else None


def _counts_labels(args: MMClfTrainingArguments) -> bool:
    return args.positive_weight_power > 0 or args.loss == "distribution_balanced"


def _criterion(args: MMClfTrainingArguments, rows: Dataset) -> MultiLabelLoss:
    """The loss that the arguments name, with the label frequencies of the training rows."""
    positives, count = None, None
    if _counts_labels(args):
        labels = torch.from_numpy(rows.with_format("numpy")["labels"][:])
        positives, count = (labels == 1).sum(0), len(rows)
    weights = dict(power=args.positive_weight_power, cap=args.positive_weight_cap)
    return MultiLabelLoss(args.loss, positives, count, smoothing=args.label_smoothing_factor, **weights)


def _fit_thresholds(config: MMClfConfig, scores: Any, references: Any, args: MMClfTrainingArguments) -> None:
    aim = dict(beta=args.threshold_beta, precision=args.threshold_precision)
    config.threshold = best_threshold(scores, references, args.threshold_objective or "micro", **aim)
    config.label_thresholds = None
    if args.label_thresholds:
        shrinkage = None if args.threshold_shrinkage == -1 else args.threshold_shrinkage
        fitted = label_thresholds(scores, references, shrinkage, args.threshold_objective or "macro", **aim)
        config.label_thresholds = {name: float(t) for name, t in zip(config.id2label.values(), fitted, strict=True)}


def _fit_missing_thresholds(
    config: MMClfConfig,
    score: Callable[[Dataset, Callable[[Transform], Transform]], np.ndarray],
    rows: Dataset,
    args: MMClfTrainingArguments,
) -> None:
    """Of rows that lack a picture or a caption: fitted on validation rows that have both, less the one."""
    config.missing_thresholds = {}
    aim = dict(beta=args.threshold_beta, precision=args.threshold_precision)
    for name, absent in ABSENT.items():
        scores, references = score(rows, ablations(rows)[name]), references_of(rows)
        fitted = best_threshold(scores, references, args.threshold_objective or "micro", **aim)
        config.missing_thresholds[absent] = fitted
