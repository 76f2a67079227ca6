"""The main job: rows in, one folder with a trained model and its thresholds out."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from safetensors.torch import load_model
from transformers import EarlyStoppingCallback, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..data.augmentation import AugmentationArguments
from ..data.prepare import DataArguments, PreparedData, presence, references_of
from ..data.streaming import StreamCollator
from ..evaluation.ablation import REMOVED, ablation_figures
from ..evaluation.metrics import fit_temperature
from ..evaluation.report import ComputeMetrics, report_text, scores_of
from ..evaluation.thresholds import best_threshold, label_thresholds
from ..inference.predictor import Predictor, atomic_folder, save_model
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import MMClfTrainingArguments, ModelArguments
from .feature_cache import FeatureCache
from .inputs import (
    TrainingInputs,
    build_config,
    build_model,
    prepare_inputs,
    settle_labels,
)
from .losses import MultiLabelLoss
from .record import Results, run_record, write_records
from .trainer import MMClfTrainer

logger = logging.get_logger(__name__)
CHECKPOINTS = "checkpoints"


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
) -> Path:
    """
    Train a model, fit its thresholds on the validation rows, report on validation and test rows, and write the folder.

    Args:
        model_args ([`ModelArguments`]): The architecture and what it starts from.
        data_args ([`DataArguments`]): Where the rows come from.
        augmentation ([`AugmentationArguments`]): Random changes to training rows.
        args ([`MMClfTrainingArguments`]): Everything else.

    Returns:
        `Path`: The output folder: model, image processor, tokenizer, `metrics.json`, `training.json`, `splits.csv`,
        and the card (`README.md`) with its plots.

    Raises:
        `FileExistsError`: The output folder is in use already.
        `ValueError`, `OSError`: Arguments, rows or weights that do not fit; nothing has been written then.
    """
    _check_arguments(data_args, args)
    output, resume = _claim_output(model_args, args)
    set_seed(args.seed)
    inputs = prepare_inputs(model_args, data_args, args)
    args.distributed_state.wait_for_everyone()  # no process writes before all have looked at the output folder
    if args.process_index == 0:
        if resume is None:
            _remove_traces(Path(args.output_dir))  # of a start that failed before its first checkpoint
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    args.distributed_state.wait_for_everyone()
    trainer = _trainer(inputs, augmentation, args, resume)
    trainer.train(resume_from_checkpoint=resume)
    trainer.data_collator = inputs.preprocessing.collator  # reports read the rows as users will give them,
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # and in full precision
    predictor = Predictor(output, inputs.model, inputs.preprocessing.processor, trainer)
    results = _evaluate(predictor, inputs.prepared, args)
    if args.process_index == 0:
        record = run_record((model_args, data_args, augmentation, args), trainer, inputs, results)
        record["resumed"] = resume is not None
        with atomic_folder(output, Path(args.output_dir) / "finished") as stage:
            save_model(predictor.model, predictor.processor, stage)
            write_records(stage, inputs, results, record, args.save_predictions)
        if not args.keep_checkpoints:
            _remove_traces(Path(args.output_dir))
        print(f"\n{report_text(results.reports)}\n")
        print(f"Threshold: {inputs.model.config.threshold:.4f}, fitted on the validation rows")
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
    Build a trainer for `hyperparameter_search`: rows and settings are those of [`train`], each trial has a new model.

    It fits no thresholds and writes no output folder.

    Args:
        model_args, data_args, augmentation, args: As for [`train`].
        model_space (`Callable`, *optional*):
            Draws model arguments for a trial, such as `{"dropout": trial.suggest_float("dropout", 0, 0.5)}`. It
            cannot draw backbones, since images and texts are prepared for one. The `hp_space` of the search draws
            training arguments.

    Returns:
        [`MMClfTrainer`]: With a `model_init`.

    Raises:
        `ValueError`: `streaming` or `cache_features` is set, which serve one run only.
    """
    if data_args.streaming or args.cache_features:
        raise ValueError("a search trains more than once on the same rows: leave out streaming and cache_features")
    inputs = prepare_inputs(model_args, data_args, args)
    tokenizer = inputs.preprocessing.processor.tokenizer

    def model_init(trial: Any = None) -> MMClfForImageTextClassification:
        drawn = model_space(trial) if model_space and trial else {}
        config = build_config(dataclasses.replace(model_args, **drawn))
        settle_labels(config, inputs.prepared, inputs.prepared.splits)
        return build_model(config, model_args, tokenizer)

    return MMClfTrainer(model_init=model_init, **_trainer_options(inputs, augmentation, args))


def _trainer_options(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments
) -> dict[str, Any]:
    """Return the arguments of a trainer that reads its rows from the files."""
    preprocessing, rows = inputs.preprocessing, inputs.train_rows
    return {
        "args": args,
        "compute_metrics": ComputeMetrics(),
        "criterion": _criterion(args, rows),
        "train_dataset": rows.with_transform(preprocessing.training(augmentation)),
        "eval_dataset": preprocessing.dataset(inputs.prepared.splits["validation"]),
        "data_collator": preprocessing.collator,
    }


def _trainer(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments, resume: str | None
) -> MMClfTrainer:
    """Build the trainer of a run: from files, from a stream or from cached features."""
    options = _trainer_options(inputs, augmentation, args)
    training = inputs.preprocessing.training(augmentation)
    if inputs.stream:
        state = resume and TrainerState.load_from_json(str(Path(resume) / "trainer_state.json"))
        skipped = state.global_step * args.gradient_accumulation_steps if state else 0
        options["train_dataset"] = inputs.stream.rows
        options["train_data_collator"] = StreamCollator(
            inputs.stream, training, inputs.preprocessing.collator, skipped
        )
    if args.cache_features:
        if resume is not None:  # Trainer loads the weights too, but only when training begins
            load_model(inputs.model, Path(resume) / "model.safetensors", strict=False)
        image_processor = inputs.preprocessing.processor.image_processor
        recipe = dataclasses.asdict(augmentation) | {"image_processor": image_processor and image_processor.to_dict()}
        cache = FeatureCache(inputs.model, inputs.preprocessing.collator, args, recipe)
        views = args.cached_views if any(dataclasses.astuple(augmentation)) else 1
        validation = inputs.prepared.splits["validation"], inputs.preprocessing.evaluation, 1
        cached = cache.compute({"train": (inputs.train_rows, training, views), "validation": validation}, logger.info)
        options |= {"train_dataset": cached["train"], "eval_dataset": cached["validation"]}
        options["data_collator"] = cache.cached_collator
    trainer = MMClfTrainer(model=inputs.model, **options)
    if args.early_stopping_patience and args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    elif args.early_stopping_patience:
        logger.warning("No early stopping: it needs load_best_model_at_end, which is off")
    return trainer


def _evaluate(predictor: Predictor, prepared: PreparedData, args: MMClfTrainingArguments) -> Results:
    """Fit calibration and thresholds on the validation rows, then report on each split that has labels."""
    config = predictor.model.config
    reports, outcomes, speed, temperature = {}, {}, {}, None
    for name in ("validation", "test"):
        rows = prepared.splits.get(name)
        if rows is None or "labels" not in rows.column_names:
            logger.info(f"No labelled {name} rows: nothing to report on them")
            continue
        output, references = predictor.predict(rows, prepared.folder), references_of(rows)
        logits = output.predictions
        if name == "validation" and args.calibrate:
            temperature = fit_temperature(logits, references)
            predictor.model.calibrate(temperature)
            logits = logits / temperature
        scores = scores_of(logits)
        if name == "validation":  # test labels never choose anything
            _fit_thresholds(predictor, rows, scores, prepared.folder, args)
        outcomes[name] = scores, references
        reports[name] = predictor.report(rows, scores)
        rate = next((value for key, value in output.metrics.items() if key.endswith("samples_per_second")), None)
        speed = {"split": name, "rows_per_second": rate, "batch_size": args.eval_batch_size}
    if args.ablations and reports and config.has_image and config.has_text:
        name, (_, references) = list(outcomes.items())[-1]
        rows = prepared.splits[name]
        ablated = predictor.ablated_scores(rows, prepared.folder)
        reports[name]["ablations"] = ablation_figures(ablated, references, config, *presence(rows))
    return Results(reports, outcomes, speed, temperature)


def _fit_thresholds(
    predictor: Predictor, rows: Dataset, scores: np.ndarray, folder: Path, args: MMClfTrainingArguments
) -> None:
    """
    Fit the thresholds of the configuration.

    A model that has learned to do without a modality gets thresholds for such rows: they are fitted on the rows that
    have both, without one of them.
    """
    config, references = predictor.model.config, references_of(rows)
    aim = dict(beta=args.threshold_beta, precision=args.threshold_precision)
    objective = args.threshold_objective
    if config.has_image and config.has_text and (config.learned_missing or config.modality_dropout):
        both = np.flatnonzero(np.logical_and(*presence(rows)))
        if len(both):  # the other rows have thresholds of their own
            rows, scores, references = rows.select(both), scores[both], references[both]
            config.missing_thresholds = {}
            for column in REMOVED.values():
                found = scores_of(predictor.predict(rows, folder, replaced=(column, None)).predictions)
                config.missing_thresholds[column] = best_threshold(found, references, objective or "micro", **aim)
    config.threshold = best_threshold(scores, references, objective or "micro", **aim)
    config.label_thresholds = None
    if args.label_thresholds:
        shrinkage = None if args.threshold_shrinkage == -1 else args.threshold_shrinkage
        fitted = label_thresholds(scores, references, shrinkage, objective or "macro", **aim)
        config.label_thresholds = dict(zip(config.label_names, fitted.tolist(), strict=True))


def _criterion(args: MMClfTrainingArguments, rows: Dataset) -> MultiLabelLoss:
    """Return the loss that the arguments name, with the label frequencies of the training rows where it needs them."""
    positives, count = None, None
    if args.counts_labels:
        labels = torch.from_numpy(references_of(rows))
        positives, count = (labels == 1).sum(0), len(rows)
    weights = dict(power=args.positive_weight_power, cap=args.positive_weight_cap)
    return MultiLabelLoss(args.loss, positives, count, smoothing=args.label_smoothing_factor, **weights)


def _check_arguments(data_args: DataArguments, args: MMClfTrainingArguments) -> None:
    """Check what the classes of arguments cannot check alone: a stream has no known number of rows."""
    if not data_args.streaming:
        return
    if args.max_steps <= 0:
        raise ValueError("--streaming has no epochs; give --max_steps")
    if "epoch" in (args.eval_strategy, args.save_strategy):
        raise ValueError("--streaming has no epochs; give --eval_strategy steps and --save_strategy steps")
    if args.counts_labels:
        raise ValueError("--streaming never sees all labels: no --positive_weight_power, no distribution_balanced")
    if args.cache_features:
        raise ValueError("--cache_features keeps something of each row on the disk, which --streaming avoids; choose")


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
    for pattern in ("checkpoint-*", "finished"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if checkpoints.is_dir() and not any(checkpoints.iterdir()):
        checkpoints.rmdir()
