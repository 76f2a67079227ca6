"""Stratified splits: each label has its share in each part."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from iterstrat.ml_stratifiers import IterativeStratification


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
    part = IterativeStratification(merged, np.array(fractions, dtype=float), np.random.RandomState(seed))
    return [np.flatnonzero(part[member] == i) for i in range(len(fractions))]
