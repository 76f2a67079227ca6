"""Stratified splits: each label has its share in each part."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from iterstrat.ml_stratifiers import IterativeStratification

ITERATIVE_ROWS = 100_000  # which iterative stratification splits in less than a second


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], seed: int, groups: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """
    Splits rows so that each label has its share in each part (Sechidis, Tsoumakas and Vlahavas, 2011).

    Args:
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot.
        fractions (`Sequence[float]`): Share of each part; they add up to 1.
        seed (`int`): Of the draws among equals.
        groups (`Sequence`, *optional*): Rows of one group (captions of one picture) stay together.

    Returns:
        `list[np.ndarray]`: Row numbers of each part, ascending.
    """
    if any(share < 0 for share in fractions) or not np.isclose(sum(fractions), 1) or fractions[0] <= 0:
        raise ValueError(f"fractions are {[round(share, 3) for share in fractions]}; expected shares that add up to 1")
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))} if groups is not None else range(len(labels))
    member = np.array([index[group] for group in groups]) if groups is not None else np.arange(len(labels))
    merged = np.zeros((len(index), labels.shape[1]), dtype=bool)
    np.logical_or.at(merged, member, labels)
    shares, state = np.array(fractions, dtype=float), np.random.RandomState(seed)
    part = np.full(len(merged), -1)
    if len(merged) > ITERATIVE_ROWS:
        _deal_blocks(part, merged, shares, state)
    rest = np.flatnonzero(part < 0)
    part[rest] = IterativeStratification(merged[rest], shares, state)
    return [np.flatnonzero(part[member] == i) for i in range(len(fractions))]


def _deal_blocks(part: np.ndarray, labels: np.ndarray, shares: np.ndarray, state: np.random.RandomState) -> None:
    """
    Gives a part to most rows of a long table, in blocks of rows of the same labels that hold each share exactly.

    Left at -1, for iterative stratification, are the rows that fill no block, and so many more of each combination
    that they can even those out: the parts become as even as those of a table of `ITERATIVE_ROWS`.
    """
    sizes = (size for size in range(1, 1001) if np.allclose(shares * size, np.rint(shares * size), rtol=0, atol=1e-9))
    block = next(sizes, len(labels) + 1)  # 10 for 0.8, 0.1 and 0.1; none for shares such as 1 / pi
    packed = np.packbits(labels, axis=1)
    _, combination, count = np.unique(packed, axis=0, return_inverse=True, return_counts=True)
    order = state.permutation(len(labels))
    order = order[np.argsort(combination[order], kind="stable")]  # those of a combination together, at random
    place = np.arange(len(labels)) - np.repeat(np.cumsum(count) - count, count)
    kept = min(1, (ITERATIVE_ROWS + (count % block).sum()) / len(labels))
    dealt = place < np.repeat(count * (1 - kept) // block * block, count)
    whole = np.repeat(np.arange(len(shares)), np.rint(shares * block).astype(int))
    part[order[dealt]] = whole[place[dealt] % block]
