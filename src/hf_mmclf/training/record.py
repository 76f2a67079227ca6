"""What a training run leaves behind beside the model: its figures, its recipe, its splits, its card."""

import csv
import dataclasses
import json
import platform
import re
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer

from ..hub.card import EMBEDDED, write_card
from ..hub.plots import write_plots
from ..inference.predictions import write_predictions
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import Arguments, MMClfTrainingArguments, ModelArguments
from .inputs import TrainingInputs

RECORDED_PACKAGES = ("hf_mmclf", "torch", "torchvision", "timm", "transformers", "accelerate", "datasets")


class Results(NamedTuple):
    """
    What a run reaches.

    Args:
        reports (`dict[str, dict]`): The figures of [`report`] by split.
        outcomes (`dict[str, tuple[np.ndarray, np.ndarray]]`): Scores and labels `(rows, labels)` by split.
        speed (`dict[str, Any]`): Rows a second of the last split.
        temperature (`float`, *optional*): What the logits were divided by.
    """

    reports: dict[str, dict[str, Any]]
    outcomes: dict[str, tuple[np.ndarray, np.ndarray]]
    speed: dict[str, Any]
    temperature: float | None


def run_record(arguments: Arguments, trainer: Trainer, inputs: TrainingInputs, results: Results) -> dict[str, Any]:
    """A run for `training.json`, from which the card is written: names without paths, and no trace of who ran it."""
    model_args, data_args, augmentation, args = arguments
    model, config, state = inputs.model, inputs.model.config, trainer.state
    prepared, processor = inputs.prepared, inputs.preprocessing.processor
    places = [place for place in (data_args.data, data_args.validation_data, data_args.test_data) if place]
    on_hub = [place for place in places if not Path(place).exists()]
    names = [place if place in on_hub else Path(place).resolve().name for place in places]
    started_from = base_models(model_args, model)
    parameters = {"total": model.num_parameters(), "trained": model.num_parameters(only_trainable=True)}
    for part in ("image_model", "text_model"):
        if hasattr(model, part):
            parameters[part] = sum(parameter.numel() for parameter in getattr(model, part).parameters())
    best = None
    if args.load_best_model_at_end and state.best_metric is not None:
        epochs = [entry["epoch"] for entry in state.log_history if entry.get("step") == state.best_global_step]
        best = {"by": args.metric_for_best_model, "score": state.best_metric, "epoch": epochs[0] if epochs else None}
    return {
        "preset": model_args.preset,
        "data": list(dict.fromkeys(names)) or [EMBEDDED],
        "datasets": list(dict.fromkeys(on_hub)),
        "license": args.license or ("unknown" if places or started_from else "mit"),
        "image_backbone": config.image_weights,
        "text_backbone": config.text_weights,
        "base_models": started_from,
        "splits": prepared.split_source,
        "rows": {name: len(split) for name, split in prepared.splits.items()},
        # what comes after the colon is a path
        "bad_images": [(where, re.sub(r""": ['"].*""", "", reason)) for where, reason in prepared.bad_images],
        "parameters": parameters,
        "tokenizer": inputs.tokenizer_source,
        "missing": inputs.missing,
        "temperature": results.temperature,
        "speed": {**results.speed, "machine": machine_name(args)},
        "recipe": {
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
        },
        "processes": args.world_size,
        "epochs": state.epoch,
        "best_checkpoint": best,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in RECORDED_PACKAGES}},
        "history": state.log_history,
    }


def base_models(args: ModelArguments, model: MMClfForImageTextClassification) -> list[str]:
    """Names on the Hub of the pretrained backbones that came from there."""
    found = []
    if model.config.has_image and args.image_weights == "hub":
        found.append(model.image_model.pretrained_cfg.get("hf_hub_id"))
    if model.config.has_text and args.text_weights == "hub" and not Path(str(args.text_backbone)).is_dir():
        found.append(model.config.text_backbone)
    return [] if args.from_scratch else [name for name in found if name]


def machine_name(args: MMClfTrainingArguments) -> str:
    """The machine in words that fit any like it."""
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
    Writes `metrics.json`, `training.json`, `splits.csv`, the plots and the card to a folder that has the model.

    Args:
        folder (`Path`): Where the model has been saved.
        inputs ([`TrainingInputs`]): The rows, and the model with the fitted thresholds.
        results ([`Results`]): What the run reaches.
        record (`dict`): Of [`run_record`].
        save_predictions (`bool`, *optional*, defaults to `False`): Write `predictions-<split>.csv`.
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
        writer.writerow(["split", "row"])
        for name, split in prepared.splits.items():
            writer.writerows([name, where] for where in split["where"][:])
    if save_predictions:
        for name, (scores, _) in outcomes.items():
            write_predictions(folder / f"predictions-{name}.csv", prepared.splits[name], scores, config)
    labels = list(results.reports.values())[-1]["per_label"]
    kept_epoch = (record["best_checkpoint"] or {}).get("epoch")
    write_plots(folder, outcomes, labels, config.threshold, record["history"], kept_epoch)
    write_card(folder)
