"""Splits of rows: drawn by iterative stratification, recorded, and recognised later by the content of the rows."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import csr_array
from transformers.utils import logging

from .images import image_groups, image_paths

logger = logging.get_logger(__name__)


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], seed: int, groups: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """
    Split rows at random so that each label has its share in each part.

    The method is iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the Stratification of
    Multi-label Data"): the rarest label goes first, and each of its rows to the part that lacks most rows of it. The
    rows are taken in a random order.

    Args:
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels.
        fractions (`Sequence[float]`): The share of each part. The shares add up to 1.
        seed (`int`): Seed of the order.
        groups (`Sequence`, *optional*): The group of each row. Rows of one group (texts of one image) stay together.

    Returns:
        `list[np.ndarray]`: The row numbers of each part, ascending.

    Raises:
        `ValueError`: If the shares do not add up to 1.
    """
    if any(share < 0 for share in fractions) or not np.isclose(sum(fractions), 1) or fractions[0] <= 0:
        raise ValueError(f"fractions are {[round(share, 3) for share in fractions]}; expected shares that add up to 1")
    groups = range(len(labels)) if groups is None else groups
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    member = np.array([numbers[group] for group in groups])
    merged = np.zeros((len(numbers), labels.shape[1]), dtype=bool)
    np.logical_or.at(merged, member, labels)
    part = _iterative_stratification(merged, np.array(fractions, dtype=float), np.random.default_rng(seed))
    return [np.flatnonzero(part[member] == i) for i in range(len(fractions))]


def _iterative_stratification(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the part of each row. The library `iterative-stratification` is too slow for thousands of labels."""
    order = rng.permutation(len(labels))
    by_row = csr_array(labels[order])
    by_label = by_row.tocsc()
    remaining = by_row.sum(axis=0).astype(float)  # rows of each label that have no part yet
    wanted = shares[:, None] * remaining  # rows of each label that a part lacks
    room = shares * len(labels)  # rows that a part lacks
    parts = np.full(len(labels), -1)

    def place(row: int, need: np.ndarray) -> None:
        best = np.flatnonzero(need == need.max())
        best = best[room[best] == room[best].max()]
        parts[row] = part = rng.choice(best) if len(best) > 1 else best[0]
        own = by_row.indices[by_row.indptr[row] : by_row.indptr[row + 1]]
        wanted[part, own] -= 1
        remaining[own] -= 1
        room[part] -= 1

    while (remaining > 0).any():
        label = np.where(remaining > 0, remaining, np.inf).argmin()
        for row in by_label.indices[by_label.indptr[label] : by_label.indptr[label + 1]]:
            if parts[row] < 0:
                place(row, wanted[:, label])
    for row in np.flatnonzero(parts < 0):  # rows without labels
        place(row, room)
    result = np.empty_like(parts)
    result[order] = parts
    return result


def split_rows(
    splits: Mapping[str, Dataset], labels: np.ndarray, validation: float, test: float, seed: int, folder: Path
) -> tuple[dict[str, Dataset], str]:
    """
    Take validation rows, and test rows if no split is given, from the training rows. Given splits stay.

    Args:
        splits (`Mapping[str, Dataset]`): The rows of `train` and of the given splits.
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels of the training rows.
        validation, test (`float`): The shares of the validation rows and the test rows.
        seed (`int`): Seed of the split.
        folder (`Path`): The folder to which image names are relative.

    Returns:
        `tuple[dict[str, Dataset], str]`: The splits, and how they were made, in words.

    Raises:
        `ValueError`: If a share is wrong or a split is empty.
    """
    if "validation" in splits:
        return dict(splits), "given"
    if validation <= 0:
        raise ValueError(f"--validation_fraction is {validation}; validation rows choose the threshold")
    shares = {"validation": validation} | ({} if "test" in splits else {"test": test})
    train = splits["train"]
    groups = image_groups(train, folder)
    parts = stratified_split(labels > 0, [1 - sum(shares.values()), *shares.values()], seed, groups)
    found = dict(zip(["train", *shares], parts, strict=True))
    if empty := [name for name, rows in found.items() if len(rows) == 0 and shares.get(name, 1) > 0]:
        flags = [" and ".join(f"--{name}_{kind}" for name in shares) for kind in ("data", "fraction")]
        raise ValueError(
            f"the {empty[0]} split is empty: {len(train)} rows, {len(set(groups))} if rows of one image count once, "
            f"are too few for {shares}; give its rows by {flags[0]}, or larger shares by {flags[1]}"
        )
    drawn = {name: train.select(rows) for name, rows in found.items() if len(rows)}
    return {**splits, **drawn}, f"{', '.join(shares)} by iterative stratification of the training rows, seed {seed}"


def warn_of_shared_rows(splits: Mapping[str, Dataset], folder: Path, uses_image: bool) -> None:
    """Warn of rows of another split that are training rows too. The arguments are those of [`row_digests`]."""
    digests = {name: row_digests(rows, folder, uses_image) for name, rows in splits.items()}
    trained = set(digests.pop("train", ()))
    for name, others in digests.items():
        if shared := sum(digest in trained for digest in others):
            logger.warning(f"  {shared:,} of {len(others):,} {name} rows are training rows too")


def row_digests(rows: Dataset, folder: Path, uses_image: bool = True) -> list[str]:
    """
    Compute what a row is recognised by: the content of its image and its text, and not its place in a file.

    The content of an image is its bytes if they are in the table, else the name and the size of its file. The names of
    folders do not count, so that a data set can move.

    Args:
        rows (`Dataset`): Rows with the columns `image` and `text`.
        folder (`Path`): The folder to which image names are relative.
        uses_image (`bool`, *optional*, defaults to `True`): Whether images count. They do not for a model without an
            image backbone, which needs no files.

    Returns:
        `list[str]`: The digest of each row.
    """
    digests = []
    places = image_paths(rows) if uses_image else [None] * len(rows)
    for row, (place, text) in enumerate(zip(places, rows["text"][:], strict=True)):
        content = [text and " ".join(text.split())]
        if place is True:
            content.append(hashlib.blake2b(rows[row]["image"]["bytes"]).hexdigest())
        elif place is not None:
            file = folder / place
            content += [file.name, file.stat().st_size if file.is_file() else None]
        digests.append(hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest())
    return digests
