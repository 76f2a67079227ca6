"""The card's tables: figures of `metrics.json` as rows."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..model.configuration_mmclf import MMClfConfig

# Names of what metrics.json holds, in the order of the card.
FIGURE_NAMES = {
    "f1": "F1, micro",
    "f1_macro": "F1, macro",
    "f1_weighted": "F1, weighted",
    "f1_samples": "F1, samples",
    "precision": "precision, micro",
    "precision_macro": "precision, macro",
    "recall": "recall, micro",
    "recall_macro": "recall, macro",
    "map": "mean average precision",
    "ece": "expected calibration error",
    "no_label_rate": "share of rows given no label",
}
AT = {"at_0.5": "at 0.5", "fitted": "at the fitted threshold"}  # keys of metrics.json
WITHOUT_THRESHOLD = ("map", "ece")  # figures that do not depend on it


def escape(text: str) -> str:
    """Text of somebody's own, such as a label's name, as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#!])", r"\\\1", " ".join(str(text).split()))


def average_rows(reports: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The averages of all splits side by side, with intervals where they were recorded."""
    return [
        {
            "": title,
            **{
                f"{split}, {at_name}": _with_interval(report, at, figure)
                for split, report in reports.items()
                for at, at_name in AT.items()
            },
        }
        for figure, title in FIGURE_NAMES.items()
        if all(figure in report[at] for report in reports.values() for at in AT)  # not all that older runs recorded
    ]


def _with_interval(report: Mapping[str, Any], at: str, figure: str) -> float | str:
    interval = report.get("intervals", {}).get(figure) if at == "fitted" else None
    value = report[at][figure]
    return value if interval is None else "{:.3f} ({:.3f}–{:.3f})".format(value, *interval)


def label_rows(per_label: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures of each label."""
    return [
        {
            "label": escape(row["label"]),
            "precision": row["precision"],
            "recall": row["recall"],
            "F1": row["f1"],
            "F1 at 0.5": row["f1_at_0.5"],
            "average precision": row["average_precision"],
            "support": row["support"],
            "threshold": row["threshold"],
        }
        for row in per_label
    ]


def threshold_rows(config: MMClfConfig) -> list[dict[str, Any]]:
    """The labels of a model without figures."""
    names = [config.id2label[i] for i in range(config.num_labels)]
    pairs = zip(names, config.thresholds, strict=True)
    return [{"label": escape(name), "threshold": threshold} for name, threshold in pairs]
