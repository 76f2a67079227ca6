"""Metrics for N rows and L labels.

One rule holds everywhere: a label is predicted where its score is at least its threshold, both compared in float64 (a
float32 score converts to it without loss). Scores are probabilities, references are multi-hot; what is unknown (-1)
counts for nothing.
"""

from collections.abc import Sequence

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score

from .calibration import expected_calibration_error

__all__ = ["MultiLabelMetric", "check_scores", "per_label_report"]


class MultiLabelMetric(evaluate.Metric):
    """Multi-label metrics as an `evaluate` metric that needs no network and writes no file, so any number of processes
    may compute at the same time.

    `compute(predictions, references, threshold, label_names)` takes:

        predictions (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1], not logits and not decisions.
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1 (any dtype), or -1 where nobody knows.
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
        scores, positive, known = check_scores(predictions, references)
        super().add_batch(predictions=scores, references=np.where(known, positive, -1).astype(np.int8))

    def _compute(self, predictions, references, threshold=0.5, label_names=None) -> dict[str, float]:
        scores, references, known = check_scores(predictions, references)
        predicted = (scores >= _checked_threshold(threshold, *scores.shape)) & known
        precision, recall, f1 = _precision_recall_f1(predicted, references, axis=None)
        label_precision, label_recall, label_f1 = _precision_recall_f1(predicted, references, axis=0)
        average_precisions = [ap for ap in _average_precisions(scores, references, known) if ap is not None]
        result = {
            "f1": f1,
            "f1_macro": label_f1.mean(),
            "f1_samples": _mean(_precision_recall_f1(predicted, references, axis=1, empty=1.0)[2][known.any(axis=1)]),
            "f1_weighted": _ratio(label_f1 @ references.sum(axis=0), references.sum()),
            "precision": precision,
            "recall": recall,
            "precision_macro": label_precision.mean(),
            "recall_macro": label_recall.mean(),
            "map": np.mean(average_precisions or [0.0]),
            "ece": expected_calibration_error(scores, np.where(known, references, -1)),
            "no_label_rate": 1 - predicted.any(axis=1).mean(),
        }
        if label_names is not None:
            names = _checked_names(label_names, scores.shape[1])
            result |= {f"f1/{name}": value for name, value in zip(names, label_f1, strict=True)}
        return {name: float(value) for name, value in result.items()}


def per_label_report(
    scores: ArrayLike, references: ArrayLike, threshold: ArrayLike, label_names: Sequence[str]
) -> list[dict]:
    """One row of figures for every label; arguments and errors as for [`MultiLabelMetric`].

    Returns:
        `list[dict]`: `label`, `precision`, `recall`, `f1`, `average_precision` (`None` for a label without positives),
        `support` (rows that have the label), `predicted` (rows given the label), `threshold` (`None` where rows have
        their own).
    """
    scores, references, known = check_scores(scores, references)
    thresholds = _checked_threshold(threshold, *scores.shape)
    predicted = (scores >= thresholds) & known
    precision, recall, f1 = _precision_recall_f1(predicted, references, axis=0)
    average_precisions = _average_precisions(scores, references, known)
    return [
        {
            "label": name,
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "average_precision": average_precisions[i],
            "support": int(references[:, i].sum()),
            "predicted": int(predicted[:, i].sum()),
            "threshold": float(thresholds[i]) if thresholds.ndim == 1 else None,
        }
        for i, name in enumerate(_checked_names(label_names, scores.shape[1]))
    ]


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float = 0.0) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), empty), where=denominator > 0)


def _mean(values: np.ndarray) -> float:
    return values.mean() if len(values) else 0.0


def _precision_recall_f1(predicted: np.ndarray, references: np.ndarray, axis: int | None, empty: float = 0.0) -> tuple:
    # counted here: scikit-learn takes one column for a binary task, whose "micro" F1 is the accuracy
    hits = (predicted & references).sum(axis)
    guessed, actual = predicted.sum(axis), references.sum(axis)
    return _ratio(hits, guessed, empty), _ratio(hits, actual, empty), _ratio(2 * hits, guessed + actual, empty)


def _average_precisions(scores: np.ndarray, references: np.ndarray, known: np.ndarray) -> list[float | None]:
    columns = [(truth[mask], score[mask]) for truth, score, mask in zip(references.T, scores.T, known.T, strict=True)]
    return [float(average_precision_score(truth, score)) if truth.any() else None for truth, score in columns]


def check_scores(scores: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores as float64, which labels are there and which of them are known as bool, all `(N, L)`.

    Raises `ValueError` for inputs of the wrong shape or range.
    """
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
    if (wrong := references[(references != 0) & (references != 1) & (references != -1)]).size:
        expected = "0 and 1, or -1 for unknown: encode the labels as multi-hot rows, one column per label"
        raise ValueError(f"References contain {wrong[0]}, expected {expected}.")
    return scores, references == 1, references != -1


def _checked_threshold(threshold: ArrayLike, num_rows: int, num_labels: int) -> np.ndarray:
    threshold = np.asarray(threshold, dtype=np.float64)
    if threshold.shape not in ((), (num_labels,), (num_rows, num_labels)):
        expected = f"one number, or {num_labels} of them, one per label in the order of the columns, or that per row"
        raise ValueError(f"The threshold has the shape {threshold.shape}, expected {expected}.")
    if not ((threshold >= 0) & (threshold <= 1)).all():
        expected = "values in [0, 1]: thresholds apply to probabilities, not to logits or per cent"
        raise ValueError(f"The threshold is {threshold.tolist()}, expected {expected}.")
    return threshold if threshold.ndim == 2 else np.broadcast_to(threshold, num_labels)


def _checked_names(label_names: Sequence[str], num_labels: int) -> Sequence[str]:
    if len(label_names) != num_labels:
        raise ValueError(f"{len(label_names)} label names given, expected {num_labels}: name every column, in order.")
    return label_names
