"""Thresholds that turn scores into labels, fitted on validation rows.

Only the distinct scores can be cuts, so every search here is exact. The objectives differ in what their F-measure is
counted over: all decisions (micro), those of a label (macro), those of a row (samples).
"""

import logging
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from .metrics import check_scores

__all__ = ["OBJECTIVES", "best_threshold", "label_thresholds"]

logger = logging.getLogger(__name__)

Objective = Literal["micro", "macro", "samples", "precision"]
OBJECTIVES = ("micro", "macro", "samples", "precision")
SHRINKAGES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, np.inf)  # among which cross-validation chooses


def best_threshold(
    scores: ArrayLike,
    references: ArrayLike,
    objective: Objective = "micro",
    beta: float = 1.0,
    precision: float = 0.9,
) -> float:
    """The one threshold for all labels that is best on the given rows (Lipton, Elkan & Naryanaswamy 2014, "Optimal
    Thresholding of Classifiers to Maximize F1 Measure").

    It lies halfway between the lowest score that it accepts and the next lower one (or 0), on no score, and also
    separates the two when it is rounded to float32. Of several equally good cuts the highest is taken.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1].
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1; -1 where nobody knows, which counts for nothing.
        objective (`str`, *optional*, defaults to `"micro"`):
            `"micro"`, `"macro"` or `"samples"`: the F-measure to maximise; `"precision"`: the largest recall, both
            over all decisions, with a precision of at least `precision`.
        beta (`float`, *optional*, defaults to 1.0):
            Recall counts so many times as much as precision.
        precision (`float`, *optional*, defaults to 0.9):
            Only for that objective.

    Returns:
        `float`: strictly between 0 and 1; 0.5, with a logged warning, where no positive has a score above 0 (so that
        a long training does not end in an error). Where no cut is as precise as asked, that of the highest precision,
        with a warning.
    """
    scores, references, known = check_scores(scores, references)
    threshold = _cut(scores, references, known, _Aim(objective, beta, precision))
    if threshold is None:
        logger.warning("No positive label has a score above 0: no threshold can be fitted, 0.5 is used instead.")
        return 0.5
    return threshold


def label_thresholds(
    scores: ArrayLike,
    references: ArrayLike,
    shrinkage: float | None = 2.0,
    objective: Objective = "macro",
    beta: float = 1.0,
    precision: float = 0.9,
) -> np.ndarray:
    """One threshold for each label, drawn towards [`best_threshold`] for rare ones.

    A threshold fitted to a handful of positives fits their noise. So `logit(t) = w * logit(t_label) + (1 - w) *
    logit(t_global)` with `w = support / (support + shrinkage)`. Logits, because the model is additive there and low
    scores are not crowded together: halfway from 0.01 to 0.5 is then 0.09, not 0.255.

    Args:
        scores (`ArrayLike` of shape `(N, L)`):
            Probabilities in [0, 1], of validation rows.
        references (`ArrayLike` of shape `(N, L)`):
            Multi-hot labels, 0 or 1; -1 where nobody knows.
        shrinkage (`float`, *optional*, defaults to 2.0):
            Number of positives at which label and global threshold weigh the same; 0 does not shrink. In simulations
            (18 labels, 300 to 3,000 validation rows, prevalences from 50% to 0.2%) the macro-F1 on other rows at 2 was
            within 0.005 of the best value's, -0.001 to +0.021 from no shrinking, -0.003 to +0.061 from the global one.
            `None`: the best of `SHRINKAGES` by five-fold cross-validation on these rows.
        objective (`str`, *optional*, defaults to `"macro"`):
            As in [`best_threshold`], which is asked for its threshold with `"micro"` where this is `"macro"`. What is
            best for `"micro"` and `"samples"` is found label by label, those of the others as they are, until no
            change helps. `"precision"` holds for each label, so nothing is shrunk.
        beta, precision (`float`, *optional*): As in [`best_threshold`].

    Returns:
        `np.ndarray` of shape `(L,)`: strictly between 0 and 1. A label without positives gets the global threshold.
    """
    if shrinkage is not None and not shrinkage >= 0:
        raise ValueError(f"shrinkage is {shrinkage}, expected a number of at least 0; 0 switches the shrinking off.")
    scores, references, known = check_scores(scores, references)
    aim = _Aim(objective, beta, precision)
    if shrinkage is None:
        shrinkage = _cross_validated(scores, references, known, aim)
    return _label_cuts(scores, references, known, aim)(shrinkage)


def check_objective(objective: str, beta: float, precision: float) -> None:
    """`ValueError` for arguments that no search takes."""
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    if not 0 < beta < np.inf:
        raise ValueError(f"beta is {beta}; expected a number above 0, 1 for F1")
    if not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}; expected a share above 0 and up to 1")


class _Aim:
    """What a search maximises, in counts of hits, guesses and positives."""

    def __init__(self, objective: str, beta: float, precision: float):
        check_objective(objective, beta, precision)
        self.objective, self.beta, self.precision = objective, beta, precision
        self.empty = float(objective == "samples")  # of a row without labels that is given none: it is right

    def groups(self, shape: tuple[int, int]) -> np.ndarray:
        """Which F-measure each decision counts for."""
        rows, labels = np.indices(shape)
        return {"macro": labels, "samples": rows}.get(self.objective, np.zeros(shape, dtype=int))

    def measure(self, hits: ArrayLike, guesses: ArrayLike, positives: ArrayLike) -> np.ndarray:
        if self.objective == "precision":
            # above the asked precision the number of hits decides; +1 puts any of them before those below
            share = np.divide(hits, guesses, out=np.zeros(np.shape(guesses)), where=np.greater(guesses, 0))
            reached = np.greater_equal(share, self.precision) & np.greater(hits, 0)
            return np.where(reached, 1.0 + np.divide(hits, np.maximum(positives, 1)), share)
        weight = self.beta**2
        both = np.asarray(guesses + weight * positives, dtype=float)
        return np.divide((1 + weight) * hits, both, out=np.full(both.shape, self.empty), where=both > 0)

    def value(self, predicted: np.ndarray, references: np.ndarray, known: np.ndarray) -> float:
        """Of decisions (N, L): what the cuts are compared by in cross-validation."""
        axis = {"macro": 0, "samples": 1}.get(self.objective)
        counts = [(x & known).sum(axis) for x in (predicted & references, predicted, references)]
        return float(np.mean(self.measure(*counts)))


def _cut(
    scores: np.ndarray,
    references: np.ndarray,
    known: np.ndarray,
    aim: _Aim,
    groups: np.ndarray | None = None,
    others: np.ndarray | None = None,
) -> float | None:
    """The best cut for decisions of any shape, or `None` where none gives a hit.

    `others` (3, groups) are hits, guesses and positives that count too, whatever the cut.
    """
    groups = aim.groups(scores.shape) if groups is None else groups
    scores, references, groups = scores[known], references[known], groups[known]
    if not references.any():
        return None
    order = np.argsort(-scores, kind="stable")
    scores, hit, group = scores[order], references[order].astype(int), groups[order]
    count = int(groups.max()) + 1 if others is None else others.shape[1]
    base = np.zeros((3, count), dtype=int) if others is None else others
    positives = base[2] + np.bincount(group, hit, count).astype(int)
    # of each decision's group, once it is accepted: its hits and guesses so far
    by_group = np.argsort(group, kind="stable")
    first = np.searchsorted(group[by_group], np.arange(count))
    hits, guesses = np.empty_like(hit), np.empty_like(hit)
    running = np.cumsum(hit[by_group])
    before = np.concatenate([[0], running])[first]
    hits[by_group] = running - before[group[by_group]]
    guesses[by_group] = np.arange(1, len(hit) + 1) - first[group[by_group]]
    hits, guesses = hits + base[0][group], guesses + base[1][group]
    after = aim.measure(hits, guesses, positives[group])
    earlier = aim.measure(hits - hit, guesses - 1, positives[group])
    gained = np.cumsum(after - earlier)  # each decision changes the measure of its own group alone
    # equal scores stand or fall together, and scores of 0 cannot be accepted
    last = np.flatnonzero(np.diff(np.append(scores, 0.0)))
    if not len(last) or not np.cumsum(hit)[last].any():
        return None
    cut = last[np.argmax(np.round(gained[last], 12))]  # rounded: sums of the same changes in another order are equal
    if aim.objective == "precision" and hits[cut] < aim.precision * guesses[cut]:
        logger.warning(
            "No threshold has a precision of %.3f: the most precise one has %.3f.",
            aim.precision,
            hits[cut] / guesses[cut],
        )
    upper, lower = scores[cut], scores[cut + 1] if cut + 1 < len(scores) else 0.0
    middle = (upper + lower) / 2
    threshold = middle if lower < np.float32(middle) <= upper else upper
    return float(min(threshold, np.nextafter(1.0, 0.0)))


def _label_cuts(
    scores: np.ndarray, references: np.ndarray, known: np.ndarray, aim: _Aim
) -> Callable[[float], np.ndarray]:
    """Thresholds of labels by shrinkage: the search is the same for all."""
    common = _cut(scores, references, known, _Aim("micro", aim.beta, 1.0) if aim.objective == "macro" else aim)
    common = 0.5 if common is None else common
    own, labels = np.full(scores.shape[1], common), range(scores.shape[1])
    found = np.zeros(scores.shape[1], dtype=bool)
    groups = aim.groups(scores.shape)
    for _ in range(10):  # rounds; one is enough where labels do not depend on each other
        before = own.copy()
        predicted = (scores >= own) & known
        for label in labels:
            others = None
            if aim.objective in ("micro", "samples"):
                rest = np.delete(np.arange(scores.shape[1]), label)
                kept = (predicted & references)[:, rest], predicted[:, rest], (references & known)[:, rest]
                flat = groups[:, rest].ravel()
                others = np.array([np.bincount(flat, x.ravel(), groups.max() + 1) for x in kept]).astype(int)
            column = scores[:, label], references[:, label], known[:, label]
            group = groups[:, label] if others is not None else np.zeros(len(scores), dtype=int)
            cut = _cut(*column, aim, group, others)
            if cut is not None:
                own[label], found[label] = cut, True
                predicted[:, label] = (scores[:, label] >= cut) & known[:, label]
        if aim.objective not in ("micro", "samples") or np.array_equal(own, before):
            break
    support = (references & known).sum(0)

    def shrunk(shrinkage: float) -> np.ndarray:
        shrinkage = 0.0 if aim.objective == "precision" else shrinkage
        weight = np.where(found, support / np.maximum(support + shrinkage, 1), 0.0)
        mixed = expit(weight * logit(own) + (1 - weight) * logit(common))
        return np.select([weight == 1, weight == 0], [own, np.full_like(own, common)], mixed)

    return shrunk


def _cross_validated(scores: np.ndarray, references: np.ndarray, known: np.ndarray, aim: _Aim) -> float:
    """The shrinkage whose thresholds, fitted on four fifths of the rows, are best on the rest; all fifths together.

    Of equally good ones the strongest.
    """
    folds = np.random.default_rng(0).permutation(len(scores)) % 5
    predicted = {shrinkage: np.zeros_like(references) for shrinkage in SHRINKAGES}
    for fold in range(5):
        fit, held = folds != fold, folds == fold
        if not (fit.any() and held.any()):
            continue
        thresholds = _label_cuts(scores[fit], references[fit], known[fit], aim)
        for shrinkage in SHRINKAGES:
            predicted[shrinkage][held] = scores[held] >= thresholds(shrinkage)
    return max(reversed(SHRINKAGES), key=lambda shrinkage: aim.value(predicted[shrinkage], references, known))
