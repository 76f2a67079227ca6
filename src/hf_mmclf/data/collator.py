"""From rows to batches: pictures decoded and transformed when they are asked for, captions padded to the batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..model.image_processing_mmclf import read_image
from ..model.processing_mmclf import MMClfProcessor
from .augmentation import AugmentationArguments, ImageAugmentation, TextAugmentation


def is_absent(image: Any) -> bool:
    """Whether a cell of the column `image` holds no picture."""
    return image is None or (isinstance(image, Mapping) and image.get("bytes") is None and not image.get("path"))


def open_image(
    image: str | Mapping[str, Any], folder: Path, where: str, short_edge: int | None = None
) -> torch.Tensor:
    """An upright RGB picture from a name relative to `folder` or from bytes; `ValueError` naming the row if bad.

    See [`read_image`], which does it.
    """
    name, data = (image, None) if isinstance(image, str) else (image.get("path"), image.get("bytes"))
    try:
        return read_image(folder / name if data is None else BytesIO(data), short_edge)
    except ValueError as error:
        raise ValueError(
            f"{where}: cannot read the picture {name or 'in the table'}: {error}. --bad_images skip leaves such rows "
            "out, --bad_images missing keeps them without a picture"
        ) from error


class RowTransform:
    """
    Decodes and transforms rows when they are asked for; given to `Dataset.with_transform`.

    Args:
        folder (`Path`): What picture names are relative to.
        image ([`ImageAugmentation`] or [`EvaluationImageTransform`], *optional*): `None`: no pictures.
        text (`Callable`, *optional*): From caption to caption; `None` leaves it.
    """

    def __init__(self, folder: Path, image: Callable | None = None, text: Callable | None = None):
        self.folder, self.image, self.text = folder, image, text

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = {"text": [self._text(text) for text in batch["text"]]}
        if "labels" in batch:
            rows["labels"] = batch["labels"]
        if self.image is not None:
            rows["pixel_values"] = [
                None if is_absent(image) else self.image(open_image(image, self.folder, where, self.image.short_edge))
                for image, where in zip(batch["image"], batch["where"], strict=True)
            ]
        return rows

    def _text(self, text: str | None) -> str | None:
        return self.text(text) if self.text is not None and text is not None else text


class EvaluationImageTransform:
    """The saved image processor, for one picture of shape (3, H, W) in uint8: float32 of shape (3, size, size)."""

    short_edge = None  # pictures at full size, as everyone who uses the model will give them

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class ReplacedColumn:
    """
    A row transform that reads other cells in one column. Nothing is copied, and no removed image is decoded.

    Args:
        transform (`Callable`): A transform of rows, such as a [`RowTransform`].
        column (`str`): `image` or `text`.
        cells (`Mapping[str, Any]`, *optional*): The new cell by the row's `where`; other rows get `None`.
    """

    def __init__(self, transform: Callable, column: str, cells: Mapping[str, Any] | None = None):
        self.transform, self.column, self.cells = transform, column, cells or {}

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        return self.transform({**batch, self.column: [self.cells.get(where) for where in batch["where"]]})


class Collator:
    """
    Make one batch of transformed rows by [`MMClfProcessor.collate`].

    Args:
        processor ([`MMClfProcessor`]): The model's processor. What it has no part for is left out.
    """

    def __init__(self, processor: MMClfProcessor):
        self.processor = processor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        parts = {"pixel_values": self.processor.image_processor, "text": self.processor.tokenizer}
        names = [name for name, part in parts.items() if part is not None and name in rows[0]]
        batch = self.processor.collate(**{name: [row[name] for row in rows] for name in names})
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor(np.array([row["labels"] for row in rows]), dtype=torch.float32)
        return batch


class Preprocessing:
    """
    Everything between prepared rows and a model: transforms, datasets and the collator.

    Args:
        processor ([`MMClfProcessor`]): The model's processor.
        folder (`Path`): The folder to which image names are relative.

    Attributes:
        collator ([`Collator`]): Makes batches of transformed rows.
        evaluation ([`RowTransform`]): The transform of rows that are evaluated or predicted.
    """

    def __init__(self, processor: MMClfProcessor, folder: Path):
        image_processor = processor.image_processor
        self.processor, self.folder, self.collator = processor, folder, Collator(processor)
        self.evaluation = RowTransform(folder, image_processor and EvaluationImageTransform(image_processor))

    def training(self, augmentation: AugmentationArguments) -> RowTransform:
        """Return the transform of training rows, with random changes of these strengths."""
        image_processor = self.processor.image_processor
        strengths = dataclasses.asdict(augmentation)
        swap, drop = strengths.pop("swap_words"), strengths.pop("drop_words")
        image = image_processor and ImageAugmentation.from_processor(image_processor, **strengths)
        return RowTransform(self.folder, image, TextAugmentation(swap, drop) if swap or drop else None)

    def dataset(self, rows: Dataset, column: str | None = None, cells: Mapping[str, Any] | None = None) -> Dataset:
        """Return rows to evaluate, transformed when they are read; `column` and `cells` are of [`ReplacedColumn`]."""
        transform = self.evaluation if column is None else ReplacedColumn(self.evaluation, column, cells)
        return rows.with_transform(transform)
