"""Reports of splits: the metrics of a model's scores, as dictionaries and as tables."""

import textwrap
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from tabulate import tabulate
from transformers import EvalPrediction

from ..model.configuration_mmclf import MMClfConfig, best_labels
from ..model.pipeline_mmclf import scores_of
from .ablation import ABLATIONS
from .bootstrap import by_label_count, by_text_length, f1_intervals
from .metrics import multi_label_metrics, per_label_report
from .thresholds import best_threshold

# The metrics of an evaluation that can choose the best checkpoint. Higher is better, except for the loss.
FIGURES = ("f1", "f1_at_0.5", "f1_macro", "f1_samples", "f1_weighted", "loss", "map", "precision", "precision_macro")
FIGURES += ("recall", "recall_macro")
# The averages of F1 in the table of a report, and their keys.
AVERAGES = {"micro": "f1", "macro": "f1_macro", "weighted": "f1_weighted", "samples": "f1_samples"}
# What is said of labels without examples, before their names. `multi_label_metrics` and `weighted_f1` do as it says.
ABSENT = "No row has these labels, which count as 0 in macro averages and are left out of the mean average precision:"
MANY_EMPTY = 0.1  # share of rows without a predicted label above which there is a warning
NAMED_LABELS = 20  # number of labels that one warning names
SHOWN_LABELS = 30  # number of labels in a table, on the screen and in the card
WIDTH = 100  # columns of a table on the screen
SHORTEST = 8  # to this width a text is shortened at most


class ComputeMetrics:
    """
    Metrics for `Trainer`, at the threshold with the best micro-F1 for these scores.

    A fixed threshold would choose the checkpoint whose scores happen to lie around it. The result has `threshold` and
    `f1_at_0.5` too.

    Args:
        min_labels (`int`, *optional*, defaults to 0): The number of labels that each row gets at least.
    """

    def __init__(self, min_labels: int = 0):
        self.min_labels = min_labels

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        scores, references = scores_of(prediction.predictions), prediction.label_ids
        threshold = best_threshold(scores, references, min_labels=self.min_labels)
        best = best_labels(scores, self.min_labels)
        fitted, half = (multi_label_metrics(scores, references, np.where(best, 0.0, cut)) for cut in (threshold, 0.5))
        return fitted | {"threshold": threshold, "f1_at_0.5": half["f1"]}


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
        scores (`np.ndarray` of shape `(rows, labels)`): Probabilities.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels, -1 for unknown.
        config ([`MMClfConfig`]): The labels and their thresholds.
        has_image (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`): Whether the rows have
            an image.
        texts (`Sequence[str | None]`, *optional*): The text of each row, `None` for rows without one. By default all
            rows have a text, and nothing is reported by its length.

    Returns:
        `dict`: `rows`, `at_0.5` and `fitted` (see [`multi_label_metrics`]) and `per_label` (see [`per_label_report`],
        with `f1_at_0.5`). At the thresholds of the configuration: `intervals` (95%, see [`f1_intervals`]),
        `by_label_count`, `by_caption_length` (see [`by_text_length`]; with `texts`, for a model that reads them) and
        `warnings` (sentences).

    Raises:
        `ValueError`: if an input has a wrong shape or range.
    """
    names = config.label_names
    present = has_image, True if texts is None else np.array([text is not None for text in texts], dtype=bool)
    predicted, cuts = config.decide(scores, *present), config.cuts(scores, *present)
    cuts_at_half = config.cuts(scores, thresholds=0.5)
    fitted, half = (per_label_report(scores, references, given, names) for given in (cuts, cuts_at_half))
    figures = {
        "rows": len(scores),
        "at_0.5": multi_label_metrics(scores, references, cuts_at_half),
        "fitted": multi_label_metrics(scores, references, cuts),
        "intervals": f1_intervals(predicted, references),
        "per_label": [
            row | {"f1_at_0.5": at_half["f1"], "threshold": threshold}
            for row, at_half, threshold in zip(fitted, half, config.thresholds, strict=True)
        ],
        "by_label_count": by_label_count(predicted, references),
    }
    if texts is not None and config.has_text:
        figures["by_caption_length"] = by_text_length(predicted, references, texts)
    return figures | {"warnings": _warnings(predicted, references, names)}


def _warnings(predicted: np.ndarray, references: np.ndarray, names: Sequence[str]) -> list[str]:
    """Describe faults of the predictions that an average can hide."""
    warnings, actual = [], references == 1
    labelled = actual.any(axis=1)
    empty = int((labelled & ~predicted.any(axis=1)).sum())
    if empty > MANY_EMPTY * labelled.sum():
        share = f"{empty:,} of the {labelled.sum():,} rows that have a label ({empty / labelled.sum():.0%})"
        warnings.append(f"Nothing is predicted for {share}.")
    support = actual.sum(axis=0)
    never = [f"{names[i]} ({support[i]:,})" for i in np.flatnonzero((support > 0) & ~predicted.any(axis=0))]
    if never:
        warnings.append(f"Never predicted, though rows have them: {_enumerate(never)}.")
    return warnings + absent_labels(references, names)


def absent_labels(references: np.ndarray, names: Sequence[str]) -> list[str]:
    """Return a sentence about the labels that no row has, or nothing. It says what they count in the averages."""
    absent = [names[i] for i in np.flatnonzero(~(references == 1).any(axis=0))]
    return [f"{ABSENT} {_enumerate(absent)}."] if absent else []


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_LABELS:,} more" if len(names) > NAMED_LABELS else ""
    return f"{', '.join(map(printable, names[:NAMED_LABELS]))}{more}"


def printable(text: str) -> str:
    """Escape control characters, such as those that a label of a stranger's folder sends to the terminal."""
    return "".join(
        character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text
    )


def format_table(rows: Sequence[Mapping[str, Any]], markdown: bool = False) -> str:
    """
    Format rows as a table, numbers to the right.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): One mapping from column name to value for each row, all with the same
            keys.
        markdown (`bool`, *optional*, defaults to `False`): Whether to write Markdown, with 3 digits for floats,
            thousands separators and "–" for `None`. By default the table is plain text with 4 digits and "-", and the
            longest texts are shortened until it has at most `WIDTH` columns.

    Returns:
        `str`: The table; empty without rows.
    """
    digits, missing, separator = (3, "–", ",") if markdown else (4, "-", "")

    def cell(value: Any) -> str:
        if value is None:
            return missing
        if isinstance(value, Integral):
            return f"{value:{separator}}"
        return f"{value:.{digits}f}" if isinstance(value, Real) else printable(str(value))

    columns = list(rows[0]) if rows else []
    numeric = [all(isinstance(row[name], Real | None) for row in rows) for name in columns]
    cells = [[cell(row[name]) for name in columns] for row in rows]
    return tabulate(
        cells if markdown else _fitting(cells, columns, numeric),
        headers=columns,
        tablefmt="pipe" if markdown else "plain",
        colalign=["right" if number else "left" for number in numeric],
        disable_numparse=True,
    )


def _fitting(cells: list[list[str]], columns: Sequence[str], numeric: Sequence[bool]) -> list[list[str]]:
    """Shorten the texts of the widest columns, until all columns with the two spaces between them fit `WIDTH`."""
    least = [len(name) + 2 for name in columns]  # tabulate pads each name of a column by two
    widths = [max(sizes) for sizes in zip(least, *([len(text) for text in row] for row in cells), strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        texts = [i for i, number in enumerate(numeric) if not number and widths[i] > max(least[i], SHORTEST)]
        if not texts:
            break
        widths[max(texts, key=lambda i: (i > 0, widths[i]))] -= 1  # the name of a row is cut last
    return [
        [text if len(text) <= width else f"{text[: width - 1]}…" for text, width in zip(row, widths, strict=True)]
        for row in cells
    ]


def report_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the averages of F1 of some splits as plain text: at 0.5, at the fitted thresholds, and the interval."""
    return format_table(
        [
            {
                "rows of": name,
                "rows": split["rows"],
                "F1": title,
                "at 0.5": split["at_0.5"][key],
                "fitted": split["fitted"][key],
                "95%": "{:.3f}-{:.3f}".format(*split["intervals"][key]) if key in split["intervals"] else "",
            }
            for name, split in reports.items()
            for title, key in AVERAGES.items()
        ]
    )


def shown_labels(per_label: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the figures of the `SHOWN_LABELS` labels with the most rows, in the order of all labels."""
    frequent = sorted(per_label, key=lambda label: -label["support"])[:SHOWN_LABELS]
    return [label for label in per_label if label in frequent]


def _label_table(per_label: Sequence[Mapping[str, Any]], file: str) -> str:
    columns = {"threshold": "threshold", "rows": "support", "F1 at 0.5": "f1_at_0.5", "F1": "f1"}
    shown = shown_labels(per_label)
    table = format_table(
        [{"label": row["label"]} | {title: row[key] for title, key in columns.items()} for row in shown]
    )
    more = len(per_label) - len(shown)
    return f"{table}\n(the {len(shown)} labels with the most rows; {more:,} more are in {file})" if more else table


def group_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of the subgroups in a report as rows of a table."""
    titles = {"by_label_count": "labels: {}", "by_caption_length": "words of the text: {}"}
    return [
        {
            "rows with": title.format(group["group"]),
            "rows": group["rows"],
            "F1, micro": group["f1"],
            "F1, samples": group["f1_samples"],
        }
        for key, title in titles.items()
        for group in report.get(key, ())
    ]


def ablation_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the ablations of a report as rows of a table, below the figures of the rows as they are."""
    if not report.get("ablations"):
        return []
    figures = {"as they are": report["fitted"]}
    figures |= {ABLATIONS[name]: ablated for name, ablated in report["ablations"].items()}
    titles = {"F1, micro": "f1", "F1, samples": "f1_samples", "F1, macro": "f1_macro"}
    return [{"rows": name} | {title: row.get(key) for title, key in titles.items()} for name, row in figures.items()]


def warning_text(warning: str) -> str:
    """Format a warning of a report in lines of at most `WIDTH` columns."""
    return textwrap.fill(f"Warning: {warning}", WIDTH, break_on_hyphens=False)


def report_text(reports: Mapping[str, Mapping[str, Any]], file: str = "metrics.json") -> str:
    """
    Format reports as plain text of at most `WIDTH` columns.

    Args:
        reports (`Mapping[str, Mapping]`): Reports by split.
        file (`str`, *optional*, defaults to `"metrics.json"`): The file that has all figures.

    Returns:
        `str`: [`report_table`], then the labels, subgroups, ablations and warnings of the last split.
    """
    split, figures = list(reports.items())[-1]
    tables = [format_table(rows) for rows in (group_rows(figures), ablation_rows(figures)) if rows]
    labels, warnings = _label_table(figures["per_label"], file), map(warning_text, figures["warnings"])
    return "\n\n".join([report_table(reports), f"{split.capitalize()} rows:", labels, *tables, *warnings])
