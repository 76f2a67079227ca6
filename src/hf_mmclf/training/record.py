"""Files that a training run writes beside the model: its figures, its recipe, its splits and its card."""

import csv
import dataclasses
import json
import platform
import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer, TrainerState

from ..data.splits import row_digests
from ..data.tables import source_name
from ..hub.card import EMBEDDED, write_card
from ..hub.plots import write_plots
from ..inference.predictions import write_predictions
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import Arguments, MMClfTrainingArguments, ModelArguments
from .inputs import TrainingInputs

RECORDED_PACKAGES = ("hf_mmclf", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets")
Outcomes = Mapping[str, tuple[np.ndarray, np.ndarray]]  # scores and labels (rows, labels) by split


class Results(NamedTuple):
    """
    Results of a run.

    Args:
        reports (`dict[str, dict]`):
            The figures of [`report`] by split.
        outcomes (`Mapping[str, tuple[np.ndarray, np.ndarray]]`):
            Scores and labels, both `(rows, labels)`, by split.
        speed (`dict[str, Any]`):
            Rows per second on the last split.
        temperature (`float`, *optional*):
            The temperature by which the logits were divided.
    """

    reports: dict[str, dict[str, Any]]
    outcomes: Outcomes
    speed: dict[str, Any]
    temperature: float | None


def run_record(arguments: Arguments, trainer: Trainer, inputs: TrainingInputs, results: Results) -> dict[str, Any]:
    """
    Return the record of a run for `training.json`, from which the card is written. It holds no paths.

    Args:
        arguments (`tuple`):
            The arguments of the run, as `parse_arguments` returns them.
        trainer (`Trainer`):
            The trainer after training.
        inputs ([`TrainingInputs`]):
            The rows, the model and the preprocessing.
        results ([`Results`]):
            The results of the run.

    Returns:
        `dict[str, Any]`: JSON values.
    """
    args, state, prepared = arguments[3], trainer.state, inputs.prepared
    return {
        **_sources(arguments, inputs),
        "splits": prepared.split_source,
        "rows": {name: len(split) for name, split in prepared.splits.items()},
        # a reason may end in a colon and a path
        "bad_images": [(where, re.sub(r""": ['"].*""", "", reason)) for where, reason in prepared.bad_images],
        "parameters": _parameters(inputs.model),
        "tokenizer": inputs.tokenizer_source,
        "missing": inputs.missing,
        "temperature": results.temperature,
        "speed": {**results.speed, "machine": machine_name(args)},
        "recipe": _recipe(arguments, inputs),
        "processes": args.world_size,
        "epochs": state.epoch,
        "best_checkpoint": _best_checkpoint(args, state),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "history": state.log_history,
    }


def _sources(arguments: Arguments, inputs: TrainingInputs) -> dict[str, Any]:
    """Return what the model was made from: preset, data and weights, and the license that follows."""
    model_args, data_args, _, args = arguments
    given = (data_args.data, data_args.validation_data, data_args.test_data)
    places = [place for place in given if place is not None]
    on_hub = [place for place in places if isinstance(place, str) and not Path(place).exists()]
    names = [
        Path(place).resolve().name if Path(source_name(place)).exists() else source_name(place) for place in places
    ]
    started_from = base_models(model_args, inputs.model)
    return {
        "preset": model_args.preset,
        "data": list(dict.fromkeys(names)) or [EMBEDDED],
        "datasets": list(dict.fromkeys(on_hub)),
        "license": args.license or ("unknown" if places or started_from or model_args.init_from else "mit"),
        "started_from": model_args.init_from and Path(model_args.init_from).name,
        "image_backbone": inputs.model.config.image_weights,
        "text_backbone": inputs.model.config.text_weights,
        "base_models": started_from,
    }


def _parameters(model: MMClfForImageTextClassification) -> dict[str, int]:
    counts = {"total": model.num_parameters(), "trained": model.num_parameters(only_trainable=True)}
    for part in ("image_model", "text_model"):
        if hasattr(model, part):
            counts[part] = sum(parameter.numel() for parameter in getattr(model, part).parameters())
    return counts


def _recipe(arguments: Arguments, inputs: TrainingInputs) -> dict[str, Any]:
    _, _, augmentation, args = arguments
    processor = inputs.preprocessing.processor
    return {
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "early_stopping_patience": args.early_stopping_patience,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optimizer": args.optim,
        "learning_rate": args.learning_rate,
        "backbone_learning_rate": args.backbone_learning_rate,
        "weight_decay": args.weight_decay,
        "schedule": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps,
        "max_gradient_norm": args.max_grad_norm,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
        "augmentation": dataclasses.asdict(augmentation),
        "loss": args.loss,
        "positive_weights": [args.positive_weight_power, args.positive_weight_cap],
        "label_smoothing": args.label_smoothing_factor,
        "threshold_objective": args.threshold_objective or "micro",
        "threshold_beta": args.threshold_beta,
        "threshold_precision": args.threshold_precision,
        "image_size": processor.image_processor and processor.image_processor.size["longest_edge"],
        "max_tokens": processor.tokenizer and processor.tokenizer.model_max_length,
    }


def _best_checkpoint(args: MMClfTrainingArguments, state: TrainerState) -> dict[str, Any] | None:
    if not args.load_best_model_at_end or state.best_metric is None:
        return None
    epochs = [entry["epoch"] for entry in state.log_history if entry.get("step") == state.best_global_step]
    return {"by": args.metric_for_best_model, "score": state.best_metric, "epoch": epochs[0] if epochs else None}


def base_models(args: ModelArguments, model: MMClfForImageTextClassification) -> list[str]:
    """Return the names on the Hub of the finished model or the pretrained backbones that were loaded from there."""
    if args.init_from is not None:
        return [] if Path(args.init_from).is_dir() else [args.init_from]
    found, weights = [], args.backbone_weights()
    if model.config.has_image and weights["image"] == "hub":
        found.append(model.image_model.pretrained_cfg.get("hf_hub_id"))
    if model.config.has_text and weights["text"] == "hub":
        found.append(model.config.text_backbone)
    return [name for name in found if name]


def machine_name(args: MMClfTrainingArguments) -> str:
    """Describe the machine without its name: the number and kind of its processors."""
    count = args.world_size * max(1, args.n_gpu)
    if args.device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{threads} CPU thread{'s' if threads > 1 else ''}, {platform.machine()}"
    else:
        named = getattr(torch.get_device_module(args.device), "get_device_name", lambda _: args.device.type)
        name = named(args.device)
    return name if count == 1 else f"{count} x {name}"


def write_records(
    folder: Path, inputs: TrainingInputs, results: Results, record: dict[str, Any], save_predictions: bool = False
) -> None:
    """
    Write `metrics.json`, `training.json`, `splits.csv`, the plots and the card to the folder of a saved model.

    Args:
        folder (`Path`):
            The folder of the model.
        inputs ([`TrainingInputs`]):
            The rows, and the model with the fitted thresholds.
        results ([`Results`]):
            The results of the run.
        record (`dict`):
            What [`run_record`] returned.
        save_predictions (`bool`, *optional*, defaults to `False`):
            Whether to write `predictions-<split>.csv` too.
    """
    config, prepared, outcomes = inputs.model.config, inputs.prepared, results.outcomes
    kinds = ("threshold", "label_thresholds", "missing_thresholds")
    thresholds = {name: getattr(config, name) for name in kinds}
    megabytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    dump = partial(json.dumps, indent=2, ensure_ascii=False)
    (folder / "metrics.json").write_text(dump({**thresholds, **results.reports}), encoding="utf-8")
    (folder / "training.json").write_text(dump({**record, "megabytes": megabytes}), encoding="utf-8")
    with (folder / "splits.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "row", "digest"])
        for name, split in prepared.splits.items():
            digests = row_digests(split, prepared.folder, config.has_image)
            writer.writerows((name, *row) for row in zip(split["where"][:], digests, strict=True))
    if save_predictions:
        for name, (scores, _) in outcomes.items():
            write_predictions(folder / f"predictions-{name}.csv", prepared.splits[name], scores, config)
    labels = list(results.reports.values())[-1]["per_label"]
    kept_epoch = (record["best_checkpoint"] or {}).get("epoch")
    write_plots(folder, outcomes, labels, config.threshold, record["history"], kept_epoch)
    write_card(folder)
