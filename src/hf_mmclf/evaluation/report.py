"""What a model's scores are worth, and what they say: reports of splits, tables, files of predictions."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from transformers import EvalPrediction

from ..model.configuration_mmclf import MMClfConfig
from .ablation import ABLATIONS
from .bootstrap import f1_intervals
from .metrics import MultiLabelMetric, per_label_report
from .subgroups import by_caption_length, by_label_count
from .thresholds import best_threshold


def scores_of(logits: np.ndarray) -> np.ndarray:
    """Scores in [0, 1], float32, of logits of any shape."""
    return torch.sigmoid(torch.as_tensor(logits).float()).numpy()


# Figures of an evaluation that may choose the best checkpoint: more is better, but for the loss.
FIGURES = ("f1", "f1_at_0.5", "f1_macro", "f1_samples", "f1_weighted", "loss", "map", "precision", "precision_macro")
FIGURES += ("recall", "recall_macro")


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


def report(
    scores: np.ndarray,
    references: np.ndarray,
    config: MMClfConfig,
    has_image: bool | np.ndarray = True,
    texts: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """
    Compute all figures of one split, at 0.5 and at the thresholds of the configuration.

    Args:
        scores, references (`np.ndarray` of shape `(rows, labels)`): Probabilities, and multi-hot labels.
        config ([`MMClfConfig`]): Labels and thresholds.
        has_image (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`): Whether the rows have
            an image.
        texts (`Sequence[str | None]`, *optional*): The text of each row, `None` for rows without one. By default all
            rows have a text, and nothing is reported by its length.

    Returns:
        `dict`: `rows`, `at_0.5` and `fitted` (figures of [`MultiLabelMetric`]), `per_label` (with `f1_at_0.5`); and,
        all at the configuration's thresholds, `intervals` (95 %, of [`f1_intervals`]), `by_label_count`,
        `by_caption_length` (with `texts`, for a model that reads them) and `warnings` (sentences).
    """
    metric, names = MultiLabelMetric(), config.label_names
    present = has_image, True if texts is None else np.array([text is not None for text in texts], dtype=bool)
    thresholds, predicted = config.thresholds_for(*present), config.decide(scores, *present)
    texts = texts if config.has_text else None
    labels = per_label_report(scores, references, thresholds, names)
    for row, at_half in zip(labels, per_label_report(scores, references, 0.5, names), strict=True):
        row["f1_at_0.5"] = at_half["f1"]
    for row, threshold in zip(labels, config.thresholds, strict=True):
        row["threshold"] = threshold
    return {
        "rows": len(scores),
        "at_0.5": metric.compute(predictions=scores, references=references),
        "fitted": metric.compute(predictions=scores, references=references, threshold=thresholds),
        "intervals": f1_intervals(predicted, references),
        "per_label": labels,
        "by_label_count": by_label_count(predicted, references),
        **({} if texts is None else {"by_caption_length": by_caption_length(predicted, references, texts)}),
        "warnings": _warnings(predicted, references, names),
    }


MANY_EMPTY, NAMED_LABELS = 0.1, 20  # share of rows that is worth a warning; most names in one


def _warnings(predicted: np.ndarray, references: np.ndarray, names: Sequence[str]) -> list[str]:
    """What is wrong with predictions that an average may hide."""
    warnings, actual = [], references == 1
    labelled = actual.any(axis=1)
    empty = int((labelled & ~predicted.any(axis=1)).sum())
    if empty > MANY_EMPTY * labelled.sum():
        share = f"{empty:,} of the {labelled.sum():,} rows that have a label ({empty / labelled.sum():.0%})"
        warnings.append(f"Nothing is predicted for {share}.")
    support = actual.sum(axis=0)
    never = [f"{names[i]} ({support[i]:,})" for i in np.flatnonzero((support > 0) & ~predicted.any(axis=0))]
    if never:
        more = f" and {len(never) - NAMED_LABELS} more" if len(never) > NAMED_LABELS else ""
        warnings.append(f"Never predicted, though rows have them: {', '.join(never[:NAMED_LABELS])}{more}.")
    return warnings


def format_table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """
    Format rows as a table, numbers to the right.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): One mapping from column name to value for each row, all with the same
            keys.
        markdown (`bool`, *optional*, defaults to `False`): Whether to write Markdown, with 3 digits for floats,
            thousands separators and "–" for `None`. By default the table is plain text with 4 digits and "-".

    Returns:
        `str`: The table; empty without rows.
    """
    digits, missing, separator = (3, "–", ",") if markdown else (4, "-", "")

    def cell(value: Any) -> str:
        if value is None:
            return missing
        if isinstance(value, Integral):
            return f"{value:{separator}}"
        return f"{value:.{digits}f}" if isinstance(value, Real) else str(value)

    columns = list(rows[0]) if rows else []
    numeric = [all(isinstance(row[name], Real | None) for row in rows) for name in columns]
    return tabulate(
        [[cell(row[name]) for name in columns] for row in rows],
        headers=columns,
        tablefmt="pipe" if markdown else "plain",
        colalign=["right" if number else "left" for number in numeric],
        disable_numparse=True,
    )


def report_table(reports: dict[str, dict[str, Any]]) -> str:
    """Plain text of the reports of some splits side by side: one line a label, then the averages."""
    rows = []
    for i, label in enumerate(next(iter(reports.values()))["per_label"]):
        row = {"label": label["label"], "threshold": label["threshold"]}
        for name, split in reports.items():
            figures = split["per_label"][i]
            row |= {f"{name} rows": figures["support"]}
            row |= {f"{name} F1 at 0.5": figures["f1_at_0.5"], f"{name} F1": figures["f1"], f"{name} 95%": ""}
        rows.append(row)
    averages = {"micro": "f1", "macro": "f1_macro", "weighted": "f1_weighted", "samples": "f1_samples"}
    for title, key in averages.items():
        row = {"label": f"= {title} F1", "threshold": None}
        for name, split in reports.items():
            row |= {f"{name} rows": split["rows"]}
            row |= {f"{name} F1 at 0.5": split["at_0.5"][key], f"{name} F1": split["fitted"][key]}
            interval = split["intervals"].get(key)
            row |= {f"{name} 95%": "" if interval is None else "{:.3f}-{:.3f}".format(*interval)}
        rows.append(row)
    return format_table(rows)


def group_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of kinds of rows in a report as rows of a table; none where it has none."""
    titles = {"by_label_count": "labels: {}", "by_caption_length": "words of the caption: {}"}
    return [
        {"rows with": title.format(group["group"]), "rows": group["rows"]}
        | {"F1, micro": group["f1"], "F1, samples": group["f1_samples"]}
        for key, title in titles.items()
        for group in report.get(key, ())
    ]


def ablation_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The ablations of a report, after the rows as they are, as rows of a table; none where it has none."""
    found = {ABLATIONS[name]: figures for name, figures in report.get("ablations", {}).items()}
    seen = {"as they are": report["fitted"], **found} if found else {}
    return [
        {"rows": name, "F1, micro": values["f1"], "F1, macro": values["f1_macro"]} for name, values in seen.items()
    ]


def report_text(reports: dict[str, dict[str, Any]]) -> str:
    """[`report_table`], and of the last of the splits kinds of rows, ablations and warnings."""
    split, figures = list(reports.items())[-1]
    tables = [format_table(rows) for rows in (group_rows(figures), ablation_rows(figures)) if rows]
    warnings = [f"Warning: {warning}" for warning in figures["warnings"]]
    return "\n\n".join([report_table(reports), f"Of the {split} rows:", *tables, *warnings])
