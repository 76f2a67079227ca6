"""Bootstrap confidence intervals over rows, and F1 of subgroups of rows.

A resample has as many rows as the data, drawn with replacement, and its own F1. The spread of F1 over many resamples
gives the interval (Efron & Tibshirani 1993, "An Introduction to the Bootstrap"). The model and its thresholds stay the
same, so the intervals do not include the differences between training runs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .metrics import Counts

AVERAGES = ("f1", "f1_macro", "f1_samples")
BLOCK = 4_000_000  # number of weights in memory at a time
LABEL_COUNTS = ("0", "1", "2", "3", "4+")
# the largest number of words of each group; fixed, so that data sets can be compared
TEXT_WORDS = {"none": 0, "1-8": 8, "9-11": 11, "12-15": 15, "16+": None}


def weighted_f1(predicted: np.ndarray, references: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """
    Compute F1 of weighted rows: of resamples (how often a row is drawn) or subgroups (whether a row belongs to it).

    A label is left out of the macro mean if the weighted rows neither have it nor are predicted to have it, but other
    rows do: it would lower the mean only because it was not drawn. A label that occurs in no row counts as 0, as in
    [`multi_label_metrics`].

    Args:
        predicted (`np.ndarray` of shape `(rows, labels)`): Decisions, bool.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels, bool or numbers; -1 for unknown. A row
            without any known label is not counted.
        weights (`np.ndarray` of shape `(draws, rows)`): The weight of each row.

    Returns:
        `dict[str, np.ndarray]`: `f1`, `f1_macro` and `f1_samples`, each of shape `(draws,)`.
    """
    weights = weights.astype(np.float64)
    counts, informed = Counts.of(predicted, references), (references >= 0).any(axis=1)
    by_label = Counts(*(weights @ part for part in counts))
    row_f1 = counts.sum(axis=1).f_beta(empty=1.0) * informed
    averaged = np.any(by_label, axis=0) | ~np.any(counts, axis=(0, 1))
    return {
        "f1": by_label.sum(axis=1).f_beta(),
        "f1_macro": by_label.f_beta().sum(axis=1) / np.maximum(averaged.sum(axis=1), 1),
        "f1_samples": weights @ row_f1 / np.maximum(weights @ informed, 1),
    }


def resampled_f1(
    predicted: np.ndarray, references: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """
    Compute the F1 of resampled rows.

    The same seed and number of rows give the same resamples, so the figures of two models on the same rows are paired.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`weighted_f1`].
        resamples (`int`, *optional*, defaults to 1000): Number of resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Returns:
        `dict[str, np.ndarray]`: `f1`, `f1_macro` and `f1_samples`, each of shape `(resamples,)`.
    """
    blocks = [weighted_f1(predicted, references, weights) for weights in _draws(len(references), resamples, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in AVERAGES}


def f1_intervals(
    predicted: np.ndarray, references: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """
    Compute the 95% percentile intervals of F1.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`weighted_f1`].
        resamples, seed (`int`, *optional*, default to 1000 and 0): As for [`resampled_f1`].

    Returns:
        `dict[str, list[float]]`: Lower and upper end for `f1`, `f1_macro` and `f1_samples`.
    """
    return {name: _interval(values) for name, values in resampled_f1(predicted, references, resamples, seed).items()}


def paired_difference(
    first: np.ndarray, second: np.ndarray, references: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float | list[float]]]:
    """
    Compare the F1 of two models on the same rows by the paired bootstrap.

    The method is that of Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation". For `p` one
    resample is added to each share, so it is never 0 (Davison & Hinkley 1997, "Bootstrap Methods and their
    Application").

    Args:
        first, second (`np.ndarray` of shape `(rows, labels)`): Decisions of the two models, bool.
        references (`np.ndarray` of shape `(rows, labels)`): As for [`weighted_f1`].
        resamples, seed (`int`, *optional*, default to 1000 and 0): As for [`resampled_f1`].

    Returns:
        `dict[str, dict]`: For `f1`, `f1_macro` and `f1_samples`: the figures of the models, `a` and `b`; `difference`
        (b - a) and its 95% percentile `interval`; `not_better`, the share of resamples in which b is not above a; `p`,
        twice the smaller of this share and the share in which a is not above b, at most 1.
    """
    once = np.ones((1, len(references)))
    figures = [weighted_f1(predicted, references, once) for predicted in (first, second)]
    draws = [resampled_f1(predicted, references, resamples, seed) for predicted in (first, second)]
    result = {}
    for name in AVERAGES:
        a, b = (figure[name].item() for figure in figures)
        differences = np.round(draws[1][name] - draws[0][name], 12)  # equal sums can differ in their last digit
        not_better, not_worse = (differences <= 0).sum(), (differences >= 0).sum()
        p = min(1.0, 2 * (min(not_better, not_worse) + 1) / (resamples + 1))
        result[name] = {"a": a, "b": b, "difference": b - a, "interval": _interval(differences)}
        result[name] |= {"not_better": float(not_better / resamples), "p": float(p)}
    return result


def by_label_count(predicted: np.ndarray, references: np.ndarray) -> list[dict[str, Any]]:
    """
    Compute the F1 of rows with the same number of labels.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`weighted_f1`].

    Returns:
        `list[dict]`: For each group of `LABEL_COUNTS` that has rows: `group`, `rows`, `f1` (micro; `None` if no row
        has a label) and `f1_samples` (for rows without labels, the share for which none is predicted).
    """
    counts = (references == 1).sum(axis=1)
    return _subgroups(LABEL_COUNTS, np.minimum(counts, len(LABEL_COUNTS) - 1), predicted, references)


def by_text_length(predicted: np.ndarray, references: np.ndarray, texts: Sequence[str | None]) -> list[dict[str, Any]]:
    """
    Compute the F1 of rows with texts of similar length, counted in words between white space.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`weighted_f1`].
        texts (`Sequence[str | None]`): The text of each row, `None` for rows without one.

    Returns:
        `list[dict]`: As for [`by_label_count`], for the groups of `TEXT_WORDS`.
    """
    words = [len((text or "").split()) for text in texts]
    limits = [limit for limit in TEXT_WORDS.values() if limit is not None]
    return _subgroups(tuple(TEXT_WORDS), np.searchsorted(limits, words), predicted, references)


def _subgroups(
    names: Sequence[str], group: np.ndarray, predicted: np.ndarray, references: np.ndarray
) -> list[dict[str, Any]]:
    """Compute the figures of groups of rows; `group` is the index in `names` for each row."""
    member = group == np.arange(len(names))[:, None]
    figures = weighted_f1(predicted, references, member)
    result = []
    for index in np.flatnonzero(member.any(axis=1)):
        f1 = figures["f1"][index] if (references[member[index]] == 1).any() else None
        row = {"group": names[index], "rows": int(member[index].sum()), "f1": f1}
        result.append(row | {"f1_samples": float(figures["f1_samples"][index])})
    return result


def _draws(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn, of shape `(draws, rows)`, in blocks that fit in memory."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // rows)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        yield np.stack([np.bincount(rng.integers(rows, size=rows), minlength=rows) for _ in range(count)])


def _interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, [0.025, 0.975]).tolist()
