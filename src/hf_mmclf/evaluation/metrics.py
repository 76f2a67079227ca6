"""Multi-label metrics for N rows and L labels: counts, precision, recall, F-beta and calibration.

One rule holds everywhere: a label is predicted if its score is at least its threshold. Both are compared in float64; a
float32 score converts to it without loss. Scores are probabilities and references are multi-hot. An unknown label (-1)
is never counted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from sklearn.metrics import average_precision_score


class Counts(NamedTuple):
    """True positives, false positives and false negatives, as arrays of the same shape."""

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_negatives: np.ndarray

    @classmethod
    def of(cls, predicted: np.ndarray, references: np.ndarray) -> "Counts":
        """Count each decision by itself: `predicted` is bool, `references` is 1, 0 or -1 (unknown)."""
        positive, negative = references == 1, references == 0
        return cls(predicted & positive, predicted & negative, ~predicted & positive)

    def sum(self, axis: int | None = None, keepdims: bool = False) -> "Counts":
        """Add the counts of each label (`axis=0`), of each row (`axis=1`) or of all decisions (`None`)."""
        return Counts(*(part.sum(axis, keepdims=keepdims) for part in self))

    def precision(self) -> np.ndarray:
        """Return the precision, and 0 where no label is predicted."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    def recall(self) -> np.ndarray:
        """Return the recall, and 0 where no row has the label."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    def f_beta(self, beta: float = 1.0, empty: float = 0.0) -> np.ndarray:
        """
        Return the F-measure.

        Args:
            beta (`float`, *optional*, defaults to 1.0): How many times as much recall counts as precision.
            empty (`float`, *optional*, defaults to 0.0): The value where no label is predicted and none is there.
        """
        weight = beta**2
        predicted, actual = (self.true_positives + wrong for wrong in self[1:])
        return _ratio((1 + weight) * self.true_positives, predicted + weight * actual, empty)


def multi_label_metrics(
    scores: ArrayLike,
    references: ArrayLike,
    threshold: ArrayLike = 0.5,
    label_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """
    Compute all multi-label metrics of scores at a threshold.

    A ratio with nothing to count is 0, like `zero_division=0` in scikit-learn, so a label without positives lowers the
    macro means. The exception is `f1_samples`: a row that has no label and gets none is right and counts as 1
    (`zero_division=1`). Otherwise a perfect model would stay below 1.

    Args:
        scores (`ArrayLike` of shape `(N, L)`): Probabilities in [0, 1], not logits and not decisions.
        references (`ArrayLike` of shape `(N, L)`): Multi-hot labels, 0 or 1 (any dtype), or -1 for unknown.
        threshold (`float` or `ArrayLike` of shape `(L,)` or `(N, L)`, *optional*, defaults to 0.5):
            The lowest score that predicts a label, for all labels, for each label or for each decision.
        label_names (`Sequence[str]` of length L, *optional*):
            Names of the labels, to add the F1 of each label under `"f1/<name>"`.

    Returns:
        `dict[str, float]`: Values in [0, 1]. `f1`, `precision` and `recall` (micro: over all `N x L` decisions);
        `f1_macro`, `precision_macro` and `recall_macro` (mean over labels); `f1_weighted` (mean over labels, weighted
        by support); `f1_samples` (mean over rows); `map` (average precision of scikit-learn, mean over the labels with
        a positive, 0 if there is none); `ece` (see [`expected_calibration_error`]) and `no_label_rate` (share of rows
        without a predicted label).

    Raises:
        `ValueError`: if an input has a wrong shape or range.
    """
    scores, references = check_scores(scores, references)
    predicted = (scores >= _check_threshold(threshold, *scores.shape)) & (references >= 0)
    counts = Counts.of(predicted, references)
    total, by_label, by_row = counts.sum(), counts.sum(axis=0), counts.sum(axis=1)
    label_f1, support = by_label.f_beta(), (references == 1).sum(axis=0)
    row_f1 = by_row.f_beta(empty=1.0)[(references >= 0).any(axis=1)]
    average_precisions = [value for value in _average_precisions(scores, references) if value is not None]
    result = {
        "f1": total.f_beta(),
        "f1_macro": label_f1.mean(),
        "f1_samples": _mean(row_f1),
        "f1_weighted": _ratio(label_f1 @ support, support.sum()),
        "precision": total.precision(),
        "recall": total.recall(),
        "precision_macro": by_label.precision().mean(),
        "recall_macro": by_label.recall().mean(),
        "map": _mean(average_precisions),
        "ece": expected_calibration_error(scores, references),
        "no_label_rate": 1 - predicted.any(axis=1).mean(),
    }
    if label_names is not None:
        _check_names(label_names, scores.shape[1])
        result |= {f"f1/{name}": value for name, value in zip(label_names, label_f1, strict=True)}
    return {name: float(value) for name, value in result.items()}


def per_label_report(
    scores: ArrayLike, references: ArrayLike, threshold: ArrayLike, label_names: Sequence[str]
) -> list[dict]:
    """
    Compute the metrics of each label.

    Args:
        scores, references (`ArrayLike` of shape `(N, L)`): As for [`multi_label_metrics`].
        threshold (`float` or `ArrayLike` of shape `(L,)` or `(N, L)`): As for [`multi_label_metrics`].
        label_names (`Sequence[str]` of length L): The names of the labels.

    Returns:
        `list[dict]`: For each label `label`, `precision`, `recall`, `f1`, `average_precision` (`None` for a label
        without positives), `support` (number of rows with the label), `predicted` (number of rows for which it is
        predicted) and `threshold` (`None` if each row has its own).

    Raises:
        `ValueError`: if an input has a wrong shape or range.
    """
    scores, references = check_scores(scores, references)
    thresholds = _check_threshold(threshold, *scores.shape)
    _check_names(label_names, scores.shape[1])
    counts = Counts.of(scores >= thresholds, references).sum(axis=0)
    columns = {
        "label": label_names,
        "precision": counts.precision().tolist(),
        "recall": counts.recall().tolist(),
        "f1": counts.f_beta().tolist(),
        "average_precision": _average_precisions(scores, references),
        "support": (counts.true_positives + counts.false_negatives).tolist(),
        "predicted": (counts.true_positives + counts.false_positives).tolist(),
        "threshold": thresholds.tolist() if thresholds.ndim == 1 else [None] * len(label_names),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def expected_calibration_error(scores: np.ndarray, references: np.ndarray, bins: int = 15) -> float:
    """
    Compute the expected calibration error (ECE) over all `N x L` decisions.

    The decisions are sorted by score into bins of equal width. The error is the mean over bins, weighted by size, of
    the distance between the mean score and the share of positives.

    The definition is that of Naeini, Cooper & Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian
    Binning"; 15 bins are customary since Guo et al. 2017, "On Calibration of Modern Neural Networks". Where labels are
    rare, most decisions are easy and the error is small for any model: compare models on the same rows.

    Args:
        scores (`np.ndarray` of shape `(N, L)`): Probabilities in [0, 1].
        references (`np.ndarray` of shape `(N, L)`): Multi-hot labels, bool or numbers; -1 for unknown.
        bins (`int`, *optional*, defaults to 15): Number of bins; a score on an edge belongs to the upper bin.

    Returns:
        `float`: The error in [0, 1]; 0 if no label is known.
    """
    known = references >= 0
    scores, positive = scores[known], references[known] == 1
    index = np.minimum((scores * bins).astype(int), bins - 1)
    surplus = np.bincount(index, weights=scores - positive)  # distance of the means times number of decisions
    return float(np.abs(surplus).sum() / max(scores.size, 1))


def fit_temperature(logits: ArrayLike, references: ArrayLike) -> float:
    """
    Find the temperature T at which `sigmoid(logits / T)` has the smallest binary cross-entropy.

    The order of the scores stays (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Args:
        logits (`ArrayLike` of shape `(N, L)`): Logits of validation rows.
        references (`ArrayLike` of shape `(N, L)`): Multi-hot labels, 0 or 1, or -1 for unknown.

    Returns:
        `float`: A temperature between 0.05 and 20; above 1 if the model is overconfident.
    """
    logits, references = np.asarray(logits, dtype=np.float64), np.asarray(references)
    known = references >= 0
    logits, references = logits[known], references[known]

    def cross_entropy(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return np.mean(np.logaddexp(0, scaled) - references * scaled)

    return float(np.exp(minimize_scalar(cross_entropy, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def check_scores(scores: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """
    Check scores and references and convert them to arrays.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Scores as float64 and references as int8, both of shape `(N, L)`.

    Raises:
        `ValueError`: if an input has a wrong shape or range.
    """
    scores, references = np.asarray(scores, dtype=np.float64), np.asarray(references)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"Scores have the shape {scores.shape}; expected (rows, labels) with at least one of each.")
    if scores.shape != references.shape:
        raise ValueError(f"References have the shape {references.shape}; expected that of the scores, {scores.shape}.")
    if nans := np.isnan(scores).sum():
        raise ValueError(f"{nans} of {scores.size} scores are NaN; logits are NaN after a training that diverged.")
    low, high = scores.min(), scores.max()
    if low < 0 or high > 1:
        raise ValueError(f"Scores lie between {low:.4g} and {high:.4g}; expected [0, 1]: apply a sigmoid to logits.")
    if (wrong := references[~np.isin(references, (-1, 0, 1))]).size:
        raise ValueError(f"References contain {wrong[0]}; expected multi-hot labels, 0 and 1, or -1 for unknown.")
    return scores, references.astype(np.int8)


def _check_threshold(threshold: ArrayLike, num_rows: int, num_labels: int) -> np.ndarray:
    threshold = np.asarray(threshold, dtype=np.float64)
    if threshold.shape not in ((), (num_labels,), (num_rows, num_labels)):
        expected = f"one number, or {num_labels} of them (one per label), or these for each row"
        raise ValueError(f"The threshold has the shape {threshold.shape}; expected {expected}.")
    if not ((threshold >= 0) & (threshold <= 1)).all():
        raise ValueError(f"The threshold is {threshold.tolist()}; expected probabilities, in [0, 1].")
    return threshold if threshold.ndim == 2 else np.broadcast_to(threshold, num_labels)


def _check_names(label_names: Sequence[str], num_labels: int) -> None:
    if len(label_names) != num_labels:
        raise ValueError(f"{len(label_names)} label names given; expected {num_labels}, one per label.")


def _ratio(numerator: ArrayLike, denominator: ArrayLike, empty: float = 0.0) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(denominator), empty), where=denominator > 0)


def _mean(values: ArrayLike) -> float:
    return np.mean(values) if len(values) else 0.0


def _average_precisions(scores: np.ndarray, references: np.ndarray) -> list[float | None]:
    """Return the average precision of each label, `None` for a label without positives."""
    columns = [(truth[truth >= 0], score[truth >= 0]) for truth, score in zip(references.T, scores.T, strict=True)]
    return [float(average_precision_score(truth, score)) if truth.any() else None for truth, score in columns]
