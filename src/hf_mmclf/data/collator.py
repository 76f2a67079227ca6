"""From prepared rows to batches: images are decoded when a row is read, texts are padded to the longest of a batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..model.processing_mmclf import MMClfProcessor, is_missing_image
from .augmentation import AugmentationArguments, ImageAugmentation, TextAugmentation
from .images import open_image


class RowTransform:
    """
    Decode and transform rows when they are read; a transform for `Dataset.with_transform`.

    Args:
        folder (`Path`): The folder to which image names are relative.
        image ([`ImageAugmentation`] or [`EvaluationImageTransform`], *optional*): The transform of an image. Without
            one, no image is opened.
        text (`Callable`, *optional*): The transform of a text. Without one, texts stay.
    """

    def __init__(self, folder: Path, image: Callable | None = None, text: Callable | None = None):
        self.folder, self.image, self.text = folder, image, text

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = {name: batch[name] for name in ("text", "labels") if name in batch}
        if self.text is not None:
            rows["text"] = [text if text is None else self.text(text) for text in rows["text"]]
        if self.image is not None:
            rows["pixel_values"] = [
                None
                if is_missing_image(cell)
                else self.image(open_image(cell, self.folder, where, self.image.short_edge))
                for cell, where in zip(batch["image"], batch["where"], strict=True)
            ]
        return rows


class EvaluationImageTransform:
    """
    Apply the saved image processor to one image.

    Args:
        processor ([`MMClfImageProcessor`]): The image processor of the model.
    """

    short_edge = None  # images in full size, as users of the model give them

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Turn a uint8 image of shape `(3, height, width)` into float32 pixel values of shape `(3, size, size)`."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


class ReplacedColumn:
    """
    A transform of rows with other cells in one column. Nothing is copied, and a replaced image is not decoded.

    Args:
        transform ([`RowTransform`]): The transform of the changed rows.
        column (`str`): `image` or `text`.
        cells (`Mapping[str, Any]`, *optional*): The new cell by the row's `where`. Other rows get `None`.
    """

    def __init__(self, transform: Callable, column: str, cells: Mapping[str, Any] | None = None):
        self.transform, self.column, self.cells = transform, column, cells or {}

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        return self.transform({**batch, self.column: [self.cells.get(where) for where in batch["where"]]})


class Collator:
    """
    Make one batch of transformed rows by [`MMClfProcessor.collate`].

    Args:
        processor ([`MMClfProcessor`]): The processor of the model. Inputs that it has no part for are left out.
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
        processor ([`MMClfProcessor`]): The processor of the model.
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
        image_processor, swap, drop = self.processor.image_processor, augmentation.swap_words, augmentation.drop_words
        image = image_processor and ImageAugmentation(image_processor, augmentation)
        return RowTransform(self.folder, image, TextAugmentation(swap, drop) if swap or drop else None)

    def dataset(self, rows: Dataset, column: str | None = None, cells: Mapping[str, Any] | None = None) -> Dataset:
        """
        Return rows to evaluate, transformed when they are read.

        Args:
            rows (`Dataset`): Rows in the form of [`PreparedData`].
            column (`str`, *optional*): A column with other cells; see [`ReplacedColumn`].
            cells (`Mapping[str, Any]`, *optional*): The cells of that column by the row's `where`.
        """
        transform = self.evaluation if column is None else ReplacedColumn(self.evaluation, column, cells)
        return rows.with_transform(transform)
