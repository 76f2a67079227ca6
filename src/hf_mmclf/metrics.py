"""Metrics and decision thresholds for N rows and L labels.

One rule holds everywhere: a label is predicted where its score is at least its threshold, both compared in float64 (a
float32 score converts to it without loss). Scores are probabilities, references are multi-hot.
"""

import logging
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from .calibration import expected_calibration_error

__all__ = ["MultiLabelMetric", "best_threshold", "label_thresholds", "metrics_table", "per_label_report"]

logger = logging.getLogger(__name__)


class MultiLabelMetric(evaluate.Metric):
    """Multi-label metrics as an `evaluate` metric that needs no network and writes no file, so any number of processes
    may compute at the same time.

    `compute(predictions, references, threshold, label_names)` takes:

        predictions (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1], not logits and not decisions.
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1 (any dtype).
        threshold (`float` or `Sequence[float]` of length L, *optional*, defaults to 0.5):
            A score of at least the threshold predicts the label.
        label_names (`Sequence[str]` of length L, *optional*):
            When given, the F1 of every label is added under `"f1/<name>"`.

    and returns a flat `dict` of `float`, all in [0, 1]: `f1`, `precision`, `recall` (micro: over all N x L decisions),
    `f1_macro`, `precision_macro`, `recall_macro` (mean over labels), `f1_weighted` (over labels, by support),
    `f1_samples` (mean over rows), `map` (scikit-learn's average precision, mean over the labels that have a positive;
    0 when none has), `ece` (of [`expected_calibration_error`]) and `no_label_rate` (share of rows for which nothing is
    predicted).

    A ratio with nothing to count is 0, as with scikit-learn's `zero_division=0`; so a label without positives lowers
    the macro means. The exception is `f1_samples`: a row that has no label and is given none is right and counts as 1
    (`zero_division=1`), else a perfect model would stay below 1. Where every row has a label the two are the same.

    Raises `ValueError` for inputs of the wrong shape or range.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        # float64 and not the customary float32, so that no score moves across a threshold on its way through Arrow
        features = Features({"predictions": List(Value("float64")), "references": List(Value("int8"))})
        return evaluate.MetricInfo(
            description="Metrics for multi-label classification.",
            citation="",
            features=features,
            inputs_description=type(self).__doc__,
        )

    def add_batch(self, *, predictions: ArrayLike, references: ArrayLike) -> None:
        """Adds rows; checked here because `evaluate` would keep rows that it cannot compute."""
        scores, references = _checked(predictions, references)
        super().add_batch(predictions=scores, references=references.astype(np.int8))

    def _compute(self, predictions, references, threshold=0.5, label_names=None) -> dict[str, float]:
        scores, references = _checked(predictions, references)
        predicted = scores >= _checked_threshold(threshold, scores.shape[1])
        precision, recall, f1 = _precision_recall_f1(predicted, references, axis=None)
        label_precision, label_recall, label_f1 = _precision_recall_f1(predicted, references, axis=0)
        average_precisions = [ap for ap in _average_precisions(scores, references) if ap is not None]
        result = {
            "f1": f1,
            "f1_macro": label_f1.mean(),
            "f1_samples": _precision_recall_f1(predicted, references, axis=1, empty=1.0)[2].mean(),
            "f1_weighted": _ratio(label_f1 @ references.sum(axis=0), references.sum()),
            "precision": precision,
            "recall": recall,
            "precision_macro": label_precision.mean(),
            "recall_macro": label_recall.mean(),
            "map": np.mean(average_precisions or [0.0]),
            "ece": expected_calibration_error(scores, references),
            "no_label_rate": 1 - predicted.any(axis=1).mean(),
        }
        if label_names is not None:
            names = _checked_names(label_names, scores.shape[1])
            result |= {f"f1/{name}": value for name, value in zip(names, label_f1, strict=True)}
        return {name: float(value) for name, value in result.items()}


def per_label_report(
    scores: ArrayLike, references: ArrayLike, threshold: float | Sequence[float], label_names: Sequence[str]
) -> list[dict]:
    """One row of figures for every label; arguments and errors as for [`MultiLabelMetric`].

    Returns:
        `list[dict]`: `label`, `precision`, `recall`, `f1`, `average_precision` (`None` for a label without positives),
        `support` (rows that have the label), `predicted` (rows given the label), `threshold`.
    """
    scores, references = _checked(scores, references)
    thresholds = _checked_threshold(threshold, scores.shape[1])
    predicted = scores >= thresholds
    precision, recall, f1 = _precision_recall_f1(predicted, references, axis=0)
    average_precisions = _average_precisions(scores, references)
    return [
        {
            "label": name,
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "average_precision": average_precisions[i],
            "support": int(references[:, i].sum()),
            "predicted": int(predicted[:, i].sum()),
            "threshold": float(thresholds[i]),
        }
        for i, name in enumerate(_checked_names(label_names, scores.shape[1]))
    ]


def best_threshold(scores: ArrayLike, references: ArrayLike) -> float:
    """The threshold that maximises micro-F1 on the given rows: an exact search, since only the distinct scores can be
    cuts (Lipton, Elkan & Naryanaswamy 2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure").

    The threshold lies halfway between the lowest score it accepts and the next lower one (or 0), on no score, and also
    separates the two when it is rounded to float32. Of several equally good cuts the highest is taken.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1].
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1.

    Returns:
        `float`: strictly between 0 and 1; 0.5, with a logged warning, where no positive has a score above 0 (so that
        a long training does not end in an error).
    """
    scores, references = _checked(scores, references)
    threshold = _best_cut(scores.ravel(), references.ravel())
    if threshold is None:
        logger.warning("No positive label has a score above 0: no threshold can be fitted, 0.5 is used instead.")
        return 0.5
    return threshold


def label_thresholds(scores: ArrayLike, references: ArrayLike, shrinkage: float = 2.0) -> np.ndarray:
    """One threshold per label that maximises the label's own F1, drawn towards [`best_threshold`] for rare labels.

    A threshold fitted to a handful of positives fits their noise. So `logit(t) = w * logit(t_label) + (1 - w) *
    logit(t_global)` with `w = support / (support + shrinkage)`. Logits, because the model is additive there and low
    scores are not crowded together: halfway from 0.01 to 0.5 is then 0.09, not 0.255.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1], of validation rows.
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1.
        shrinkage (`float`, *optional*, defaults to 2.0):
            Number of positives at which label and global threshold weigh the same; 0 does not shrink. In simulations
            (18 labels, 300 to 3,000 validation rows, prevalences from 50% to 0.2%) the macro-F1 on other rows at 2 was
            within 0.005 of the best value's, -0.001 to +0.021 from no shrinking, -0.003 to +0.061 from the global one.

    Returns:
        `np.ndarray` of shape `(L,)`: strictly between 0 and 1. A label without positives gets the global threshold.
    """
    if not 0 <= shrinkage < np.inf:
        raise ValueError(f"shrinkage is {shrinkage}, expected a number of at least 0; 0 switches the shrinking off.")
    scores, references = _checked(scores, references)
    common = best_threshold(scores, references)

    def shrunk(label: int) -> float:
        own, support = _best_cut(scores[:, label], references[:, label]), references[:, label].sum()
        if own is None:
            return common
        weight = support / (support + shrinkage)
        odds = (own / (1 - own)) ** weight * (common / (1 - common)) ** (1 - weight)  # a mean of logits
        return odds / (1 + odds)

    return np.array([shrunk(label) for label in range(scores.shape[1])])


def metrics_table(rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> str:
    """Rows as a plain text table: numbers to the right, floats to 4 digits, "-" for what is `None` or missing.

    Args:
        rows (`Sequence[Mapping]`):
            One mapping from column name to value for each line.
        columns (`Sequence[str]`, *optional*, defaults to the keys of the first row):
            The columns to show, in this order.
    """
    columns = list(columns if columns is not None else rows[0] if rows else [])

    def text(value) -> str:
        if value is None:
            return "-"
        return f"{value:.4f}" if isinstance(value, Real) and not isinstance(value, Integral) else str(value)

    def column(name: str) -> list[str]:
        values = [row.get(name) for row in rows]
        cells = [name, *map(text, values)]
        align = str.rjust if all(value is None or isinstance(value, Real) for value in values) else str.ljust
        return [align(cell, max(map(len, cells))) for cell in cells]

    return "\n".join("  ".join(line).rstrip() for line in zip(*map(column, columns), strict=True))


def _best_cut(scores: np.ndarray, references: np.ndarray) -> float | None:
    """The threshold with the highest F1 for flat scores, or `None` where F1 is 0 at every threshold above 0."""
    order = np.argsort(-scores)
    hits = np.cumsum(references[order])
    scores = np.append(scores[order], 0.0)  # below the last score lies 0, and scores of 0 cannot be accepted
    last = np.flatnonzero(np.diff(scores))  # equal scores stand or fall together: cut only behind the last of them
    f1 = 2 * hits[last] / (last + 1 + hits[-1])
    if not f1.any():
        return None
    cut = last[f1.argmax()]
    upper, lower = scores[cut], scores[cut + 1]
    middle = (upper + lower) / 2
    threshold = middle if lower < np.float32(middle) <= upper else upper
    return float(min(threshold, np.nextafter(1.0, 0.0)))


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float = 0.0) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), empty), where=denominator > 0)


def _precision_recall_f1(predicted: np.ndarray, references: np.ndarray, axis: int | None, empty: float = 0.0) -> tuple:
    # counted here: scikit-learn takes one column for a binary task, whose "micro" F1 is the accuracy
    hits = (predicted & references).sum(axis)
    guessed, actual = predicted.sum(axis), references.sum(axis)
    return _ratio(hits, guessed, empty), _ratio(hits, actual, empty), _ratio(2 * hits, guessed + actual, empty)


def _average_precisions(scores: np.ndarray, references: np.ndarray) -> list[float | None]:
    columns = zip(scores.T, references.T, strict=True)
    return [float(average_precision_score(truth, score)) if truth.any() else None for score, truth in columns]


def _checked(scores: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and references as bool, both `(N, L)`."""
    scores, references = np.asarray(scores, dtype=np.float64), np.asarray(references)
    if scores.ndim != 2 or scores.size == 0:
        expected = "(rows, labels) with at least one of each: pass one row per sample, one column per label"
        raise ValueError(f"Scores have the shape {scores.shape}, expected {expected}.")
    if scores.shape != references.shape:
        expected = f"that of the scores, {scores.shape}: pass multi-hot labels for the same rows and labels"
        raise ValueError(f"References have the shape {references.shape}, expected {expected}.")
    if nans := np.isnan(scores).sum():
        hint = "look at the logits, a training that diverged gives NaN"
        raise ValueError(f"{nans} of {scores.size} scores are NaN, expected probabilities: {hint}.")
    if scores.min() < 0 or scores.max() > 1:
        expected = "probabilities in [0, 1]: apply a sigmoid if these are logits"
        raise ValueError(f"Scores lie between {scores.min():.4g} and {scores.max():.4g}, expected {expected}.")
    if (wrong := references[(references != 0) & (references != 1)]).size:
        expected = "0 and 1 only: encode the labels as multi-hot rows, one column per label"
        raise ValueError(f"References contain {wrong[0]}, expected {expected}.")
    return scores, references.astype(bool)


def _checked_threshold(threshold: float | Sequence[float], num_labels: int) -> np.ndarray:
    threshold = np.asarray(threshold, dtype=np.float64)
    if threshold.shape not in ((), (num_labels,)):
        expected = f"one number, or {num_labels} of them, one per label in the order of the columns"
        raise ValueError(f"The threshold has the shape {threshold.shape}, expected {expected}.")
    if not ((threshold >= 0) & (threshold <= 1)).all():
        expected = "values in [0, 1]: thresholds apply to probabilities, not to logits or per cent"
        raise ValueError(f"The threshold is {threshold.tolist()}, expected {expected}.")
    return np.broadcast_to(threshold, num_labels)


def _checked_names(label_names: Sequence[str], num_labels: int) -> Sequence[str]:
    if len(label_names) != num_labels:
        raise ValueError(f"{len(label_names)} label names given, expected {num_labels}: name every column, in order.")
    return label_names
