"""Whether a model uses both pictures and captions: the same rows without one of them, or with captions of others."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from ..model.configuration_mmclf import MMClfConfig
from .metrics import MultiLabelMetric
from .thresholds import thresholds_of

# Each ablation, in the order of the reports, and what it is called there.
ABLATIONS = {"image_only": "pictures only", "text_only": "captions only", "shuffled_captions": "shuffled captions"}
# What is absent in some of them.
ABSENT = {"image_only": "text", "text_only": "image"}

Transform = Callable[[Mapping[str, list]], dict[str, list]]


class ReplacedColumn:
    """
    A transform of rows that sees other cells in one column; nothing is copied, and no picture is decoded for nothing.

    Args:
        transform (`Callable`): Of the rows, such as a [`RowTransform`].
        column (`str`): `image` or `text`.
        cells (`Mapping[str, Any]`, *optional*): From a row's `where` to its cell; rows that are not in it have none.
    """

    def __init__(self, transform: Transform, column: str, cells: Mapping[str, Any] | None = None):
        self.transform, self.column, self.cells = transform, column, cells or {}

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        return self.transform({**batch, self.column: [self.cells.get(where) for where in batch["where"]]})


def ablations(rows: Dataset, seed: int = 0) -> dict[str, Callable[[Transform], Transform]]:
    """
    What makes a transform of rows into one of the rows without a part.

    Args:
        rows (`Dataset`): Columns `text` and `where`.
        seed (`int`, *optional*, defaults to 0): Of the shuffling.

    Returns:
        `dict[str, Callable]`: `image_only` takes the captions away, `text_only` the pictures; `shuffled_captions`, not
        there where less than two rows have a caption, gives each row that has one the caption of another.
    """
    changes = {
        "image_only": partial(ReplacedColumn, column="text"),
        "text_only": partial(ReplacedColumn, column="image"),
    }
    if shuffled := _shuffled(rows["where"][:], rows["text"][:], seed):
        changes["shuffled_captions"] = partial(ReplacedColumn, column="text", cells=shuffled)
    return changes


def ablation_figures(
    score: Callable[[Callable[[Transform], Transform]], np.ndarray],
    rows: Dataset,
    references: np.ndarray,
    config: MMClfConfig,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """
    F1 of each of [`ablations`] at the model's own thresholds for such rows. A modality that makes no difference is not
    used; one without which little is left may be all that is.

    Args:
        score (`Callable`): From an ablation to the scores, `(rows, labels)`, of the rows that it changes.
        rows (`Dataset`): Columns `image`, `text` and `where`.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels.
        config ([`MMClfConfig`]): With the thresholds.
        seed (`int`, *optional*, defaults to 0): Of the shuffling.

    Returns:
        `dict[str, dict[str, float]]`: `f1` and `f1_macro` by ablation.
    """
    result = {}
    for name, change in ablations(rows, seed).items():
        kept = thresholds_of(config, rows) if name not in ABSENT else config.thresholds_for(**{ABSENT[name]: False})
        figures = MultiLabelMetric().compute(predictions=score(change), references=references, threshold=kept)
        result[name] = {average: figures[average] for average in ("f1", "f1_macro")}
    return result


def _shuffled(where: Sequence[str], texts: Sequence[str | None], seed: int) -> dict[str, str]:
    """Captions by row, none of them its own; rows without a caption stay without."""
    captioned = [row for row, text in enumerate(texts) if text is not None]
    if len(captioned) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(captioned)
    # each takes that of the one before it in a random circle, so that none keeps its own
    return {where[row]: texts[other] for row, other in zip(order, np.roll(order, 1), strict=True)}
