"""How much of a figure is owed to the rows that happen to be there: the bootstrap over rows.

Rows are drawn with replacement, as many as there are, again and again, and the figures of each draw computed (Efron &
Tibshirani 1993, "An Introduction to the Bootstrap"). Weights and thresholds of the model stay as they are, so what
another training run would change is not in it.
"""

from collections.abc import Iterator

import numpy as np

AVERAGES = ("f1", "f1_macro", "f1_samples")
BLOCK = 4_000_000  # weights held at a time


class WeightedF1:
    """
    F1 of rows that count more than once, once or not at all; what resamples and groups of rows have in common.

    A label that occurs in the rows, but neither in the references nor in the predictions of those with a weight, is
    left out of the macro mean: it would lower it only because it was not drawn. One that occurs nowhere counts as 0,
    as in [`MultiLabelMetric`].

    Args:
        predicted (`np.ndarray` of shape `(rows, labels)`): Decisions, bool.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels, bool or numbers; a label of -1 is
            unknown and counts nowhere, nor does a row without any known label.
    """

    def __init__(self, predicted: np.ndarray, references: np.ndarray):
        known, actual = references >= 0, references == 1
        hits = (predicted & actual).astype(np.float64)
        total = (predicted & known).astype(np.float64) + actual  # F1 is 2 hits / (guessed + actual)
        row_f1 = np.where(total.any(axis=1), _f1(hits.sum(axis=1), total.sum(axis=1)), 1.0)
        informed = known.any(axis=1)
        self.never = ~total.any(axis=0)
        self.terms = np.column_stack([hits, total, row_f1 * informed, informed])

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`f1`, `f1_macro` and `f1_samples` as [`MultiLabelMetric`] has them, `(draws,)` each, for `(draws, rows)`."""
        labels = len(self.never)
        sums = weights.astype(np.float64) @ self.terms
        hits, total = sums[:, :labels], sums[:, labels : 2 * labels]
        averaged = (total > 0) | self.never
        return {
            "f1": _f1(hits.sum(axis=1), total.sum(axis=1)),
            "f1_macro": _f1(hits, total).sum(axis=1) / np.maximum(averaged.sum(axis=1), 1),
            "f1_samples": sums[:, -2] / np.maximum(sums[:, -1], 1),
        }


def resampled_f1(
    predicted: np.ndarray, references: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """
    F1 of resampled rows. The same seed and number of rows give the same resamples, so that figures of two models on
    the same rows are pairs.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`WeightedF1`].
        resamples (`int`, *optional*, defaults to 1000): How often to draw.
        seed (`int`, *optional*, defaults to 0): Of the draws.

    Returns:
        `dict[str, np.ndarray]`: `f1`, `f1_macro` and `f1_samples`, each of shape `(resamples,)`.
    """
    f1_of = WeightedF1(predicted, references)
    draws = [f1_of(weights) for weights in _draws(len(references), resamples, seed)]
    return {name: np.concatenate([draw[name] for draw in draws]) for name in AVERAGES}


def f1_intervals(
    predicted: np.ndarray, references: np.ndarray, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """Lower and upper end of the percentile interval of each figure of [`resampled_f1`], whose arguments it takes."""
    figures = resampled_f1(predicted, references, resamples, seed)
    return {name: _interval(values, level) for name, values in figures.items()}


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    references: np.ndarray,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | list[float]]]:
    """
    What the second of two models has more than the first on the same rows, by the paired bootstrap (Koehn 2004,
    "Statistical Significance Tests for Machine Translation Evaluation").

    Args:
        first, second, references (`np.ndarray` of shape `(rows, labels)`): Decisions of each, and labels, as for
            [`WeightedF1`].
        level (`float`, *optional*, defaults to 0.95): Of the interval.
        resamples, seed (`int`, *optional*, default to 1000 and 0): As for [`resampled_f1`].

    Returns:
        `dict[str, dict]`: For `f1`, `f1_macro` and `f1_samples` the figures of the models, `a` and `b`; `difference`,
        b - a, and its percentile `interval`; `not_better`, the share of resamples in which b is not above a; `p`,
        twice the smaller of that share and of the share in which a is not above b, at most 1. For `p` either share
        has one resample more (Davison & Hinkley 1997, "Bootstrap Methods and their Application"), so that it is never
        0.
    """
    once = np.ones((1, len(references)))
    figures = [WeightedF1(predicted, references)(once) for predicted in (first, second)]
    draws = [resampled_f1(predicted, references, resamples, seed) for predicted in (first, second)]
    result = {}
    for name in AVERAGES:
        a, b = (float(figure[name][0]) for figure in figures)
        differences = draws[1][name] - draws[0][name]
        not_better, not_worse = (differences <= 0).sum(), (differences >= 0).sum()
        result[name] = {
            "a": a,
            "b": b,
            "difference": b - a,
            "interval": _interval(differences, level),
            "not_better": float(not_better / resamples),
            "p": float(min(1.0, 2 * (min(not_better, not_worse) + 1) / (resamples + 1))),
        }
    return result


def _draws(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn, `(draws, rows)`: multinomial counts, in blocks that fit in memory."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // rows)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        yield np.stack([np.bincount(rng.integers(rows, size=rows), minlength=rows) for _ in range(count)])


def _f1(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(total, 1)  # without anything to count there are no hits: 0


def _interval(values: np.ndarray, level: float) -> list[float]:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
