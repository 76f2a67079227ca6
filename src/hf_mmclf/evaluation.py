"""What a model's scores are worth, and what they say: reports of splits, tables, files of predictions."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction

from .configuration_mmclf import MMClfConfig
from .metrics import MultiLabelMetric, best_threshold, metrics_table, per_label_report


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Scores in [0, 1], float32, of logits of any shape."""
    return torch.sigmoid(torch.as_tensor(logits).float()).numpy()


class ComputeMetrics:
    """For `Trainer`: micro-F1 and the rest at the threshold that suits these scores best, and `f1_at_0.5`.

    A fixed threshold would pick the checkpoint whose scores happen to lie around it.
    """

    def __init__(self):
        self.metric = MultiLabelMetric()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        scores, references = scores_of(prediction.predictions), prediction.label_ids
        threshold = best_threshold(scores, references)
        figures = self.metric.compute(predictions=scores, references=references, threshold=threshold)
        at_half = self.metric.compute(predictions=scores, references=references)
        return {**figures, "threshold": threshold, "f1_at_0.5": at_half["f1"]}


def report(scores: np.ndarray, references: np.ndarray, config: MMClfConfig) -> dict[str, Any]:
    """
    All figures of one split, at 0.5 and at the thresholds of the configuration.

    Args:
        scores, references (`np.ndarray` of shape `(rows, labels)`): Probabilities, and multi-hot labels.
        config ([`MMClfConfig`]): Labels and thresholds.

    Returns:
        `dict`: `rows`, `at_0.5` and `fitted` (figures of [`MultiLabelMetric`]), `per_label` (with `f1_at_0.5`).
    """
    metric, names = MultiLabelMetric(), list(config.id2label.values())
    labels = per_label_report(scores, references, config.thresholds, names)
    for row, at_half in zip(labels, per_label_report(scores, references, 0.5, names), strict=True):
        row["f1_at_0.5"] = at_half["f1"]
    return {
        "rows": len(scores),
        "at_0.5": metric.compute(predictions=scores, references=references),
        "fitted": metric.compute(predictions=scores, references=references, threshold=config.thresholds),
        "per_label": labels,
    }


def report_table(reports: dict[str, dict[str, Any]]) -> str:
    """Plain text of the reports of some splits side by side: one line a label, then the averages."""
    rows = []
    for i, label in enumerate(next(iter(reports.values()))["per_label"]):
        row = {"label": label["label"], "threshold": label["threshold"]}
        for name, split in reports.items():
            figures = split["per_label"][i]
            row |= {f"{name} rows": figures["support"]}
            row |= {f"{name} F1 at 0.5": figures["f1_at_0.5"], f"{name} F1": figures["f1"]}
        rows.append(row)
    averages = {"micro": "f1", "macro": "f1_macro", "weighted": "f1_weighted", "samples": "f1_samples"}
    for title, key in averages.items():
        row = {"label": f"= {title} F1", "threshold": None}
        for name, split in reports.items():
            row |= {f"{name} rows": split["rows"]}
            row |= {f"{name} F1 at 0.5": split["at_0.5"][key], f"{name} F1": split["fitted"][key]}
        rows.append(row)
    return metrics_table(rows)


def write_predictions(
    path: str | Path,
    data: Dataset,
    scores: np.ndarray,
    config: MMClfConfig,
    extra: dict[str, Sequence[Any]] | None = None,
) -> None:
    """
    Writes predicted labels, as labels are written in the data.

    Args:
        path (`str` or `Path`): `.csv` for the competition's form (`ImageID,Labels`, labels separated by spaces);
            `.jsonl` for one object a row, with labels and all scores by name.
        data (`Dataset`): The rows, with the columns `image` and `where`.
        scores (`np.ndarray` of shape `(rows, labels)`): Probabilities.
        config ([`MMClfConfig`]): Labels and thresholds.
        extra (`dict`, *optional*): Further columns, placed first.
    """
    path, names = Path(path), list(config.id2label.values())
    ids = config.label_ids or names
    hits = scores.astype(np.float64) >= np.array(config.thresholds)
    extra = extra or {}
    images = [_name_of(image) or where for image, where in zip(data["image"], data["where"], strict=True)]
    part = path.with_name(f".{path.name}.part")  # a killed run must not leave a short file that looks whole
    with part.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*extra, "ImageID", "Labels"])
            for row, image in enumerate(images):
                labels = " ".join(ids[i] for i in np.flatnonzero(hits[row]))
                writer.writerow([*(values[row] for values in extra.values()), image, labels])
        elif path.suffix == ".jsonl":
            for row, image in enumerate(images):
                best_first = np.argsort(-scores[row], kind="stable")
                line = {name: values[row] for name, values in extra.items()}
                line |= {"image": image, "labels": [names[i] for i in best_first if hits[row, i]]}
                line["scores"] = {names[i]: round(float(scores[row, i]), 6) for i in best_first}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            part.unlink()
            raise ValueError(f"{path}: expected a name that ends in .csv (ImageID,Labels) or .jsonl (with scores)")
    part.replace(path)


def _name_of(image: Any) -> str | None:
    return image if isinstance(image, str) or image is None else image.get("path")
