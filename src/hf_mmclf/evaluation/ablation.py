"""F1 of the same rows without their texts, without their images and with the texts of other rows."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..model.configuration_mmclf import MMClfConfig
from .metrics import multi_label_metrics

# Each ablation in the order of the reports, and its name there.
ABLATIONS = {"image_only": "images only", "text_only": "texts only", "shuffled_captions": "shuffled texts"}
# The column of the rows that is removed in an ablation.
REMOVED = {"image_only": "text", "text_only": "image"}


def ablation_figures(
    scores: Mapping[str, np.ndarray],
    references: np.ndarray,
    config: MMClfConfig,
    has_image: bool | np.ndarray = True,
    has_text: bool | np.ndarray = True,
) -> dict[str, dict[str, float]]:
    """
    Compute the F1 of ablated rows at the model's own thresholds for such rows.

    If F1 stays the same without a modality, the model does not use that modality.

    Args:
        scores (`Mapping[str, np.ndarray]`): Scores of shape `(rows, labels)` for some of `ABLATIONS`.
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels, -1 for unknown.
        config ([`MMClfConfig`]): The configuration with the thresholds.
        has_image, has_text (`bool` or `np.ndarray` of shape `(rows,)`, *optional*, defaults to `True`):
            Whether the rows have an image and a text before anything is removed.

    Returns:
        `dict[str, dict[str, float]]`: `f1`, `f1_samples` and `f1_macro` by ablation.

    Raises:
        `ValueError`: if an input has a wrong shape or range.
    """
    result = {}
    for name, ablated in scores.items():
        present = {"image": has_image, "text": has_text}
        if name in REMOVED:
            present = {modality: modality != REMOVED[name] for modality in present}
        cuts = config.cuts(ablated, present["image"], present["text"])
        figures = multi_label_metrics(ablated, references, cuts)
        result[name] = {average: figures[average] for average in ("f1", "f1_samples", "f1_macro")}
    return result


def shuffled_texts(texts: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """
    Give each row that has a text the text of another row.

    Args:
        texts (`Sequence[str | None]`): The text of each row, `None` for rows without one.
        seed (`int`, *optional*, defaults to 0): Seed of the shuffle.

    Returns:
        `list[str | None]`: The shuffled texts. `None` stays where it was; a single text stays too.
    """
    rows = [row for row, text in enumerate(texts) if text is not None]
    order = np.random.default_rng(seed).permutation(rows)
    shuffled = list(texts)
    # Each row takes the text of the row before it in a random circle, so no row keeps its own.
    for row, other in zip(order, np.roll(order, 1), strict=True):
        shuffled[row] = texts[other]
    return shuffled
