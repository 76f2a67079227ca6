"""Thresholds that turn scores into labels, fitted on validation rows.

Every search is exact, because only the distinct scores need to be tried as cuts, and a cut above all of them, which
accepts nothing. The objectives differ in what one F-measure covers: all decisions (micro), those of a label (macro) or
those of a row (samples).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit
from transformers.utils.logging import get_logger

from ..model.configuration_mmclf import best_labels
from .metrics import Counts, check_scores

logger = get_logger(__name__)

Objective = Literal["micro", "macro", "samples", "precision"]
OBJECTIVES = get_args(Objective)
SHRINKAGES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, np.inf)  # the candidates of cross-validation
ROUNDS = 10  # limit for the search over labels that depend on each other; it usually ends earlier
NONE = Counts(0, 0, 0)
TOP = np.nextafter(1.0, 0.0)  # the highest threshold; it accepts scores of 1, as every threshold does


def best_threshold(
    scores: ArrayLike,
    references: ArrayLike,
    objective: Objective = "micro",
    beta: float = 1.0,
    precision: float = 0.9,
    min_labels: int = 0,
) -> float:
    """
    Find the one threshold for all labels that is best on the given rows.

    The threshold lies halfway between the lowest accepted score and the next lower score (or 0), or between 1 and the
    highest score where it is best to accept nothing. It equals no score, and it still separates the two scores when it
    is rounded to float32. Among equally good cuts the highest is taken (Lipton, Elkan & Naryanaswamy 2014, "Optimal
    Thresholding of Classifiers to Maximize F1 Measure"). On the given rows no other threshold is better.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1].
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1, or -1 for unknown.
        objective (`str`, *optional*, defaults to `"micro"`):
            `"micro"`, `"macro"` or `"samples"` maximise this average of the F-measure. `"precision"` maximises the
            recall among the thresholds with a precision of at least `precision`, both over all decisions.
        beta (`float`, *optional*, defaults to 1.0):
            How many times as much recall counts as precision.
        precision (`float`, *optional*, defaults to 0.9):
            The precision to reach, for the objective `"precision"` only. If no threshold reaches it, the most precise
            one is taken and a warning is logged.
        min_labels (`int`, *optional*, defaults to 0):
            The number of labels that each row gets at least, whatever the threshold: those with its highest scores.

    Returns:
        `float`: A threshold strictly between 0 and 1. It is 0.5, with a warning, if every threshold is as good as
        accepting nothing (no positive has a score above 0), because a long training should not end in an error.

    Raises:
        `ValueError`: if an argument has a wrong shape or range.
    """
    scores, references = check_scores(scores, references)
    scores = _with_best(scores, min_labels)
    target = _Target(objective, beta, precision)
    threshold = _best_cut(scores, references, target)
    if threshold is None:
        logger.warning(
            "Every threshold is as good as accepting nothing (no positive label has a score above 0?): no threshold "
            "can be fitted, 0.5 is used instead."
        )
        return 0.5
    if objective == "precision" and (best := target.value(scores >= threshold, references)) < 1:
        logger.warning(f"No threshold has a precision of {precision:.3f}: the most precise one has {best:.3f}.")
    return threshold


def _with_best(scores: np.ndarray, min_labels: int) -> np.ndarray:
    """Return the scores with 1.0, which every threshold accepts, for the best labels of each row."""
    if not 0 <= min_labels <= scores.shape[1]:
        raise ValueError(f"min_labels is {min_labels}; expected 0 to {scores.shape[1]}, the number of labels")
    return np.where(best_labels(scores, min_labels), 1.0, scores)


def label_thresholds(
    scores: ArrayLike,
    references: ArrayLike,
    shrinkage: float | None = 2.0,
    objective: Objective = "macro",
    beta: float = 1.0,
    precision: float = 0.9,
    min_labels: int = 0,
) -> np.ndarray:
    """
    Find one threshold for each label, shrunk towards the global threshold for rare labels.

    A threshold that is fitted on a handful of positives overfits. Therefore `logit(t) = w * logit(t_label) + (1 - w) *
    logit(t_global)` with `w = support / (support + shrinkage)`. The mean is taken over logits because low scores are
    less crowded there: halfway from 0.01 to 0.5 is then 0.09, not 0.255.

    On the given rows the result is never worse than the global threshold of the same objective. If the shrunk
    thresholds are worse, the global one is used instead: with the objective `"macro"` for the labels that it suits
    better, otherwise for all labels.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1] of validation rows.
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1, or -1 for unknown.
        shrinkage (`float`, *optional*, defaults to 2.0):
            Number of positives at which the label's own threshold and the global one have equal weight; 0 switches the
            shrinking off. In simulations (18 labels, 300 to 3,000 validation rows, prevalences from 50% to 0.2%) the
            macro-F1 on other rows with 2 was within 0.005 of the best value, -0.001 to +0.021 better than without
            shrinking and -0.003 to +0.061 better than with the global threshold. `None` chooses the best of
            `SHRINKAGES` by five-fold cross-validation on these rows.
        objective (`str`, *optional*, defaults to `"macro"`):
            As for [`best_threshold`]. The global threshold is fitted for `"micro"` if this is `"macro"`. For `"micro"`
            and `"samples"` one label after the other is fitted, with the others fixed, until nothing changes. For
            `"precision"` each label reaches the precision by itself or is never accepted, and nothing is shrunk.
        beta, precision, min_labels (*optional*, default to 1.0, 0.9 and 0):
            As for [`best_threshold`].

    Returns:
        `np.ndarray` of shape `(L,)`: Thresholds strictly between 0 and 1; the global one for labels without positives.

    Raises:
        `ValueError`: if an argument has a wrong shape or range.
    """
    if shrinkage is not None and not shrinkage >= 0:
        raise ValueError(f"shrinkage is {shrinkage}; expected a number of at least 0; 0 switches the shrinking off")
    scores, references = check_scores(scores, references)
    scores = _with_best(scores, min_labels)
    target = _Target(objective, beta, precision)
    if shrinkage is None:
        shrinkage = _cross_validated_shrinkage(scores, references, target)
    return _fit_labels(scores, references, target)(shrinkage)


def check_objective(objective: str, beta: float, precision: float) -> None:
    """
    Check the arguments of a search.

    Args:
        objective (`str`): One of `OBJECTIVES`.
        beta (`float`): A number above 0.
        precision (`float`): A share above 0 and up to 1.

    Raises:
        `ValueError`: if an argument is none of these.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if not 0 < beta < np.inf:
        raise ValueError(f"beta is {beta}; expected a number above 0, 1 for F1")
    if not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}; expected a share above 0 and up to 1")


@dataclass(frozen=True)
class _Target:
    """What a search maximises: the mean of a measure over groups of decisions."""

    objective: Objective
    beta: float
    precision: float

    def __post_init__(self):
        check_objective(self.objective, self.beta, self.precision)

    def grouped(self, table: np.ndarray) -> np.ndarray:
        """Reshape a table `(N, L)` to one row for each group of decisions."""
        return {"macro": table.T, "samples": table}.get(self.objective, table.reshape(1, -1))

    def counts(self, predicted: np.ndarray, references: np.ndarray) -> Counts:
        """Count the decisions of each group."""
        return Counts.of(self.grouped(predicted), self.grouped(references)).sum(axis=1, keepdims=True)

    def value(self, predicted: np.ndarray, references: np.ndarray) -> float:
        """Return the mean of the measure over all groups, for decisions `(N, L)`."""
        return float(self.measure(self.counts(predicted, references)).mean())

    def measure(self, counts: Counts) -> np.ndarray:
        """Return the value of each group of decisions."""
        if self.objective != "precision":
            return counts.f_beta(self.beta, empty=float(self.objective == "samples"))
        precision = counts.precision()
        reached = (precision >= self.precision) & (counts.true_positives > 0)
        # where the precision is reached, recall decides; the 1 ranks any such value above all others
        return np.where(reached, 1.0 + counts.recall(), precision)


def _best_cut(scores: np.ndarray, references: np.ndarray, target: _Target, fixed: Counts = NONE) -> float | None:
    """Find the best threshold for decisions `(N, L)`; `None` if every cut is as good as accepting nothing.

    `fixed` counts the decisions of each group that do not depend on this threshold.
    """
    scores = np.minimum(scores, TOP)  # a threshold is below 1, so it treats both alike
    scores, references = target.grouped(scores), target.grouped(references)
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, references = (np.take_along_axis(table, order, axis=1) for table in (scores, references))
    # the counts of each group when a decision and those of higher scores are accepted, and without that decision
    positive, negative = references == 1, references == 0
    hits, false_alarms = positive.cumsum(axis=1), negative.cumsum(axis=1)
    own = Counts(hits, false_alarms, hits[:, -1:] - hits)
    after = Counts(*(part + other for part, other in zip(own, fixed, strict=True)))
    before = Counts(after[0] - positive, after[1] - negative, after[2] + positive)
    known = references >= 0
    scores, gains = scores[known], (target.measure(after) - target.measure(before))[known]
    order = np.argsort(-scores, kind="stable")
    scores, gained = scores[order], gains[order].cumsum()
    # equal scores are accepted together, and a score of 0 cannot be accepted
    ends = np.flatnonzero(np.diff(scores, append=0.0))
    gained = np.round(gained[ends], 12)  # because the same gains added in another order are equally good
    if not gained.any():
        return None
    if scores[0] < TOP and gained.max() <= 0:
        return _between(1.0, scores[0])
    cut = ends[np.argmax(gained)]  # the first is the highest cut
    return _between(scores[cut], scores[cut + 1] if cut + 1 < len(scores) else 0.0)


def _between(upper: float, lower: float) -> float:
    """Return a threshold that accepts the upper score and not the lower one, also after rounding to float32."""
    middle = (upper + lower) / 2
    threshold = middle if lower < np.float32(middle) <= upper else upper
    return float(min(threshold, TOP))


def _fit_labels(scores: np.ndarray, references: np.ndarray, target: _Target) -> Callable[[float], np.ndarray]:
    """Fit the cut of each label. Returns a function from shrinkage to thresholds, as all shrinkages share the cuts."""
    best = _best_cut(scores, references, target)
    common = _best_cut(scores, references, replace(target, objective="micro")) if target.objective == "macro" else best
    best, common = (0.5 if cut is None else cut for cut in (best, common))
    cuts, support = _label_cuts(scores, references, target, common)

    def shrunk(shrinkage: float) -> np.ndarray:
        shrinkage = 0.0 if target.objective == "precision" else shrinkage
        weight = support / np.maximum(support + shrinkage, 1)
        mixed = np.minimum(expit(weight * logit(cuts) + (1 - weight) * logit(common)), TOP)
        return np.select([weight == 1, weight == 0], [cuts, common], mixed)  # the ends without rounding

    def never_worse(shrinkage: float) -> np.ndarray:
        thresholds = shrunk(shrinkage)
        own, whole = (target.measure(target.counts(scores >= cut, references)) for cut in (thresholds, best))
        if own.sum() >= whole.sum():
            return thresholds
        worse = (own < whole)[:, 0] if target.objective == "macro" else True
        return np.where(worse, best, thresholds)

    return never_worse


def _label_cuts(
    scores: np.ndarray, references: np.ndarray, target: _Target, common: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best cut of each label and its number of positives: the common cut and 0 where nothing is fitted."""
    num_labels = scores.shape[1]
    cuts, support = np.full(num_labels, common), np.zeros(num_labels, dtype=int)
    joint = target.objective in ("micro", "samples")  # the best cut of a label depends on those of the others
    for _ in range(ROUNDS if joint else 1):
        previous = cuts.copy()
        for label in np.flatnonzero((references == 1).any(axis=0)):
            others = (np.delete(table, label, axis=1) for table in (scores >= cuts, references))
            fixed = target.counts(*others) if joint else NONE
            column = scores[:, [label]], references[:, [label]]
            cut = _best_cut(*column, target, fixed)
            if cut is not None:
                cuts[label], support[label] = cut, (references[:, label] == 1).sum()
            if target.objective == "precision" and target.value(column[0] >= cuts[label], column[1]) < 1:
                cuts[label] = _between(1.0, column[0].max())  # accept nothing
        if np.array_equal(cuts, previous):
            break
    return cuts, support


def _cross_validated_shrinkage(scores: np.ndarray, references: np.ndarray, target: _Target) -> float:
    """Choose the shrinkage by cross-validation; among equally good ones the strongest.

    Thresholds are fitted on four fifths of the rows and applied to the rest. The measure covers all rows together.
    """
    folds = np.random.default_rng(0).permutation(len(scores)) % 5
    predicted = {shrinkage: np.zeros(scores.shape, dtype=bool) for shrinkage in SHRINKAGES}
    for fold in range(5):
        held = folds == fold
        thresholds = _fit_labels(scores[~held], references[~held], target)
        for shrinkage in SHRINKAGES:
            predicted[shrinkage][held] = scores[held] >= thresholds(shrinkage)

    return max(reversed(SHRINKAGES), key=lambda shrinkage: target.value(predicted[shrinkage], references))
