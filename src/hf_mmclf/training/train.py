"""Training: arguments in, one folder with a trained model, its thresholds and its reports out."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_model
from transformers import EarlyStoppingCallback, TrainerState, set_seed
from transformers.utils import logging

from ..data.arguments import DataArguments
from ..data.augmentation import AugmentationArguments
from ..data.prepare import PreparedData, presence, references_of
from ..data.streaming import StreamCollator
from ..evaluation.ablation import REMOVED
from ..evaluation.metrics import fit_temperature
from ..evaluation.report import ComputeMetrics, report_text, scores_of
from ..evaluation.thresholds import best_threshold, label_thresholds
from ..inference.folders import atomic_folder, save_model
from ..inference.predictor import Predictor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import Arguments, MMClfTrainingArguments, ModelArguments
from .checkpoints import Start, begin_run, claim_output, fingerprint, remove_traces
from .feature_cache import FeatureCache
from .inputs import (
    TrainingInputs,
    build_config,
    build_model,
    check_arguments,
    prepare_inputs,
    settle_labels,
    settle_missing,
)
from .losses import MultiLabelLoss
from .record import Outcomes, Results, run_record, write_records
from .trainer import MMClfTrainer

logger = logging.get_logger(__name__)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
) -> Path:
    """
    Train a model, fit its thresholds on the validation rows, report on validation and test rows, and write the folder.

    Args:
        model_args ([`ModelArguments`]):
            The architecture and its initial weights.
        data_args ([`DataArguments`]):
            The rows.
        augmentation ([`AugmentationArguments`]):
            Random changes to training rows.
        args ([`MMClfTrainingArguments`]):
            Everything else.

    Returns:
        `Path`: The output folder with the model, its image processor and tokenizer, `metrics.json`, `training.json`,
        `splits.csv`, and the model card (`README.md`) with its plots.

    Raises:
        `FileExistsError`: If the output folder is not empty, or if another run uses it.
        `ValueError`, `OSError`: If arguments, rows or weights do not fit, or if the run cannot be resumed. Nothing has
            been written then.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_mmclf import parse_arguments, train

    >>> output = f"{tempfile.mkdtemp()}/model"
    >>> flags = ["--preset", "demo-text", "--demo_rows", "60", "--max_steps", "2", "--output_dir", output]
    >>> folder = train(*parse_arguments(flags))  # doctest: +ELLIPSIS
    <BLANKLINE>
    rows of ...
    >>> (folder / "model.safetensors").is_file()
    True

    ```
    """
    _check_arguments(data_args, args)
    with claim_output(model_args.preset, args) as start:
        if not start.finished:
            _run((model_args, data_args, augmentation, args), start)
    return start.output


def _run(arguments: Arguments, start: Start) -> None:
    """Train, score and write in an output folder that this run has claimed."""
    model_args, data_args, augmentation, args = arguments
    set_seed(args.seed)
    inputs = prepare_inputs(*arguments)
    begin_run(args, start, fingerprint(arguments, inputs))
    trainer = _fit(inputs, augmentation, args, start.checkpoint)
    preprocessing = inputs.preprocessing
    predictor = Predictor(start.output, inputs.model, preprocessing.processor, trainer, preprocessing.bad_images)
    outcomes, speed, temperature = _score(predictor, inputs.prepared, args)
    _fit_thresholds(predictor, inputs.prepared, outcomes, args)
    results = Results(_report(predictor, inputs.prepared, outcomes, args.ablations), outcomes, speed, temperature)
    if args.process_index == 0:
        record = run_record(arguments, trainer, inputs, results)
        record["resumed"] = start.checkpoint is not None
        with atomic_folder(start.output, Path(args.output_dir) / "finished") as stage:
            save_model(predictor.model, predictor.processor, stage)
            write_records(stage, inputs, results, record, args.save_predictions)
        if not args.keep_checkpoints:
            remove_traces(Path(args.output_dir))
        _print_summary(start.output, results, inputs.model.config.threshold)
    trainer.accelerator.wait_for_everyone()


def build_trainer(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation: AugmentationArguments,
    args: MMClfTrainingArguments,
    model_space: Callable[[Any], Mapping[str, Any]] | None = None,
) -> MMClfTrainer:
    """
    Build a trainer for `hyperparameter_search`. Rows and settings are those of [`train`], each trial has a new model.

    The trainer fits no thresholds and writes no output folder.

    Args:
        model_args ([`ModelArguments`]):
            The architecture and its initial weights.
        data_args ([`DataArguments`]):
            The rows.
        augmentation ([`AugmentationArguments`]):
            Random changes to training rows.
        args ([`MMClfTrainingArguments`]):
            Everything else.
        model_space (`Callable`, *optional*):
            Draws model arguments for a trial, such as `{"dropout": trial.suggest_float("dropout", 0, 0.5)}`. It
            cannot draw backbones, because images and texts are prepared for one pair. The `hp_space` of the search
            draws training arguments.

    Returns:
        [`MMClfTrainer`]: A trainer with a `model_init`.

    Raises:
        `ValueError`: If `streaming` or `cache_features` is set, because they serve one run only.
    """
    if data_args.streaming or args.cache_features or model_args.init_from:
        raise ValueError("a search trains new models on the same rows; leave out streaming, cache_features, init_from")
    inputs = prepare_inputs(model_args, data_args, augmentation, args)
    tokenizer = inputs.preprocessing.processor.tokenizer

    def model_init(trial: Any = None) -> MMClfForImageTextClassification:
        drawn = model_space(trial) if model_space and trial else {}
        config = build_config(dataclasses.replace(model_args, **drawn))
        settle_labels(config, inputs.prepared, inputs.train_rows, model_args.min_labels)
        settle_missing(config, inputs.prepared, inputs.train_rows)
        return build_model(config, model_args, tokenizer, inputs.prepared)

    return MMClfTrainer(model_init=model_init, **_trainer_options(inputs, augmentation, args))


def _fit(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments, checkpoint: str | None
) -> MMClfTrainer:
    """Train the model of the inputs, and return the trainer."""
    options = _trainer_options(inputs, augmentation, args)
    if inputs.stream:
        options |= _streamed(inputs, augmentation, args, checkpoint)
    if args.cache_features:
        options |= _cached(inputs, augmentation, args, checkpoint)
    with _logs_in(Path(args.output_dir).parent / "logs"):
        trainer = MMClfTrainer(model=inputs.model, **options)
    if args.early_stopping_patience and args.load_best_model_at_end:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    elif args.early_stopping_patience:
        logger.warning("No early stopping: it needs load_best_model_at_end, which is off")
    trainer.train(resume_from_checkpoint=checkpoint)
    # Reports are computed in full precision, as users of the model will compute its scores.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    return trainer


def _trainer_options(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments
) -> dict[str, Any]:
    """Return the arguments of a trainer that reads its rows from the files."""
    preprocessing, rows = inputs.preprocessing, inputs.train_rows
    return {
        "args": args,
        "compute_metrics": ComputeMetrics(inputs.model.config.min_labels),
        "criterion": _criterion(args, rows),
        "train_dataset": rows.with_transform(preprocessing.training(augmentation)),
        "eval_dataset": preprocessing.dataset(inputs.prepared.splits["validation"]),
        "data_collator": preprocessing.collator,
    }


def _streamed(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments, checkpoint: str | None
) -> dict[str, Any]:
    """Return the arguments of a trainer that differ if the training rows are streamed."""
    batches = 0
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        batches = state.global_step * args.gradient_accumulation_steps
    preprocessing = inputs.preprocessing
    collator = StreamCollator(inputs.stream, preprocessing.training(augmentation), preprocessing.collator, batches)
    return {"train_dataset": inputs.stream.rows, "train_data_collator": collator}


def _cached(
    inputs: TrainingInputs, augmentation: AugmentationArguments, args: MMClfTrainingArguments, checkpoint: str | None
) -> dict[str, Any]:
    """Return the arguments of a trainer that differ if features are cached."""
    if checkpoint is not None:  # Trainer loads these weights too, but only when training begins
        load_model(inputs.model, Path(checkpoint) / "model.safetensors", strict=False)
    preprocessing = inputs.preprocessing
    cache = FeatureCache(inputs.model, preprocessing.collator, args, dataclasses.asdict(augmentation))
    views = args.cached_views if any(dataclasses.astuple(augmentation)) else 1
    wanted = {
        "train": (inputs.train_rows, preprocessing.training(augmentation), views),
        "validation": (inputs.prepared.splits["validation"], preprocessing.evaluation, 1),
    }
    rows = cache.compute(wanted)
    options = {"train_dataset": rows["train"], "eval_dataset": rows["validation"]}
    return {**options, "data_collator": cache.cached_collator}


@contextmanager
def _logs_in(folder: Path) -> Iterator[None]:
    """Let TensorBoard write to a folder that stays; transformers would write to that of the checkpoints."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    os.environ[name] = given or str(folder)
    try:
        yield
    finally:
        del os.environ[name]
        if given is not None:
            os.environ[name] = given


def _criterion(args: MMClfTrainingArguments, rows: Dataset) -> MultiLabelLoss:
    """Return the loss of the arguments, with the label frequencies of the training rows if it needs them."""
    positives = known = None
    if args.counts_labels:
        labels = torch.from_numpy(references_of(rows))
        positives, known = (labels == 1).sum(0), (labels >= 0).sum(0)
    weights = dict(power=args.positive_weight_power, cap=args.positive_weight_cap)
    return MultiLabelLoss(args.loss, positives, known, smoothing=args.label_smoothing_factor, **weights)


def _score(
    predictor: Predictor, prepared: PreparedData, args: MMClfTrainingArguments
) -> tuple[Outcomes, dict[str, Any], float | None]:
    """
    Score the validation and test rows that have labels, and calibrate the model on the former if asked.

    Returns:
        `tuple`: Scores and labels `(rows, labels)` by split, the speed on the last split, and the temperature.
    """
    outcomes, speed, temperature = {}, {}, None
    for name in ("validation", "test"):
        rows = prepared.splits.get(name)
        if rows is None or "labels" not in rows.column_names:
            logger.info(f"No labelled {name} rows: nothing to report on them")
            continue
        output, references = predictor.predict(rows, prepared.folder), references_of(rows)
        logits = output.predictions
        lost = (output.label_ids == -1).all(1) & (references != -1).any(1)
        if lost.any():  # images became unreadable, and --bad_images leaves their rows out
            logger.warning(f"{lost.sum()} of {len(rows)} {name} rows are left out of the report")
            prepared.splits[name] = rows.select(np.flatnonzero(~lost))
            logits, references = logits[~lost], references[~lost]
        if name == "validation" and args.calibrate:
            temperature = fit_temperature(logits, references)
            predictor.model.calibrate(temperature)
            logits = logits / temperature
        outcomes[name] = scores_of(logits), references
        rate = output.metrics["test_samples_per_second"]
        speed = {"split": name, "rows_per_second": rate, "batch_size": args.eval_batch_size}
    return outcomes, speed, temperature


def _fit_thresholds(
    predictor: Predictor, prepared: PreparedData, outcomes: Outcomes, args: MMClfTrainingArguments
) -> None:
    """
    Fit the thresholds of the configuration on the validation rows.

    A model that has learned to do without a modality gets thresholds for rows that lack one. They are fitted on the
    rows with both modalities, without one of them.
    """
    if "validation" not in outcomes:
        return
    config, rows = predictor.model.config, prepared.splits["validation"]
    scores, references = outcomes["validation"]
    objective = args.threshold_objective
    aim = dict(beta=args.threshold_beta, precision=args.threshold_precision, min_labels=config.min_labels)
    if (
        config.has_image
        and config.has_text
        and (config.learned_missing or config.modality_dropout or config.modality_classifiers)
    ):
        both = np.flatnonzero(np.logical_and(*presence(rows)))
        if len(both):  # the other rows have thresholds of their own
            rows, scores, references = rows.select(both), scores[both], references[both]
            config.missing_thresholds = {}
            for column in REMOVED.values():
                found = scores_of(predictor.predict(rows, prepared.folder, replaced=(column, None)).predictions)
                config.missing_thresholds[column] = best_threshold(found, references, objective or "micro", **aim)
    config.threshold = best_threshold(scores, references, objective or "micro", **aim)
    config.label_thresholds = None
    if args.label_thresholds:
        shrinkage = None if args.threshold_shrinkage == -1 else args.threshold_shrinkage
        fitted = label_thresholds(scores, references, shrinkage, objective or "macro", **aim)
        config.label_thresholds = dict(zip(config.label_names, fitted.tolist(), strict=True))


def _report(
    predictor: Predictor, prepared: PreparedData, outcomes: Outcomes, ablations: bool
) -> dict[str, dict[str, Any]]:
    """Return the figures of each scored split. Ablations take three more passes, so only the last split has them."""
    last = list(outcomes)[-1:] if ablations else []
    return {
        name: predictor.report(prepared.splits[name], scores, prepared.folder if name in last else None)
        for name, (scores, _) in outcomes.items()
    }


def _print_summary(output: Path, results: Results, threshold: float) -> None:
    print(f"\n{report_text(results.reports)}\n")
    print(f"Threshold: {threshold:.4f}, fitted on the validation rows")
    print(f"Output folder: {output}\nLoad it with:")
    print(f'  import hf_mmclf; from transformers import AutoModel; model = AutoModel.from_pretrained("{output}")')


def _check_arguments(data_args: DataArguments, args: MMClfTrainingArguments) -> None:
    """Check arguments of several classes together: a stream has no known number of rows."""
    check_arguments(args)
    if not data_args.streaming:
        return
    if args.max_steps <= 0:
        raise ValueError("--streaming has no epochs; give --max_steps")
    if "epoch" in (args.eval_strategy, args.save_strategy):
        raise ValueError("--streaming has no epochs; give --eval_strategy steps and --save_strategy steps")
    if args.counts_labels:
        raise ValueError(
            "--streaming cannot count the labels; leave out --positive_weight_power and the loss distribution_balanced"
        )
    if args.cache_features:
        raise ValueError("--cache_features keeps all rows on disk; leave it or --streaming out")
