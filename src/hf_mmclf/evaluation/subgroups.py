"""Figures of some kinds of rows: a mean over all hides where a model fails."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bootstrap import WeightedF1

LABEL_COUNTS = ("0", "1", "2", "3", "4+")
# up to so many words; fixed, so that data sets can be compared
CAPTION_WORDS = {"none": 0, "1-8": 8, "9-11": 11, "12-15": 15, "16+": None}


def by_label_count(predicted: np.ndarray, references: np.ndarray) -> list[dict[str, Any]]:
    """
    Figures by how many labels a row has.

    Args:
        predicted (`np.ndarray` of shape `(rows, labels)`): Decisions, bool.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels; -1 is unknown and counts nowhere.

    Returns:
        `list[dict]`: For each group of `LABEL_COUNTS` that has rows: `group`, `rows`, `f1` (micro; `None` where no row
        has a label), `f1_samples` (of rows without a label the share that is given none).
    """
    counts = (references == 1).sum(axis=1)
    return _figures(LABEL_COUNTS, np.minimum(counts, len(LABEL_COUNTS) - 1), predicted, references)


def by_caption_length(
    predicted: np.ndarray, references: np.ndarray, texts: Sequence[str | None]
) -> list[dict[str, Any]]:
    """
    Figures by how many words (between white space) a row's caption has, as those of [`by_label_count`], for the groups
    of `CAPTION_WORDS`.

    Args:
        predicted, references (`np.ndarray` of shape `(rows, labels)`): As for [`by_label_count`].
        texts (`Sequence[str | None]`): The rows' captions, `None` where there is none.
    """
    words = [len((text or "").split()) for text in texts]
    limits = [limit for limit in CAPTION_WORDS.values() if limit is not None]
    return _figures(tuple(CAPTION_WORDS), np.searchsorted(limits, words), predicted, references)


def _figures(
    names: Sequence[str], group: np.ndarray, predicted: np.ndarray, references: np.ndarray
) -> list[dict[str, Any]]:
    """`group` is the index in `names` of each row."""
    member = group == np.arange(len(names))[:, None]
    figures = WeightedF1(predicted, references)(member)
    return [
        {
            "group": name,
            "rows": int(rows.sum()),
            "f1": float(f1) if (references[rows] == 1).any() else None,
            "f1_samples": float(f1_samples),
        }
        for name, rows, f1, f1_samples in zip(names, member, figures["f1"], figures["f1_samples"], strict=True)
        if rows.any()
    ]
