"""From prepared rows to batches: images are decoded when a row is read, texts are padded to the longest of a batch."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers.utils import logging

from ..model.processing_mmclf import MMClfProcessor, is_missing_image
from .augmentation import AugmentationArguments, ImageAugmentation, TextAugmentation
from .images import open_image

logger = logging.get_logger(__name__)


class RowTransform:
    """
    Decode and transform rows when they are read; a transform for `Dataset.with_transform`.

    Args:
        folder (`Path`): The folder to which image names are relative.
        image ([`ImageAugmentation`] or [`EvaluationImageTransform`], *optional*): The transform of an image. Without
            one, no image is opened.
        text (`Callable`, *optional*): The transform of a text. Without one, texts stay.
        bad_images (`str`, *optional*, defaults to `"error"`): What happens to an image that has become unreadable
            since the rows were checked; see [`DataArguments`]. The labels of a row that is left out become unknown.
    """

    def __init__(
        self,
        folder: Path,
        image: Callable | None = None,
        text: Callable | None = None,
        bad_images: str = "error",
    ):
        self.folder, self.image, self.text, self.bad_images = folder, image, text, bad_images

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        rows = {name: list(batch[name]) for name in ("text", "labels") if name in batch}
        if self.text is not None:
            rows["text"] = [text if text is None else self.text(text) for text in rows["text"]]
        if self.image is not None:
            rows["pixel_values"] = list(map(self._open, batch["image"], batch["where"]))
            if self.bad_images != "error" and "labels" in rows:
                self._leave_out(rows, batch["image"])
        return rows

    def _open(self, cell: Any, where: str) -> torch.Tensor | None:
        if is_missing_image(cell):
            return None
        try:
            return self.image(open_image(cell, self.folder, where, self.image.short_edge))
        except ValueError as error:
            if self.bad_images == "error":
                raise
            fate = "left out" if self.bad_images == "skip" else "taken as missing"
            logger.warning_once(f"Image became unreadable and is {fate}: {where}: {error.__cause__}")
            return None

    def _leave_out(self, rows: dict[str, list], cells: Sequence[Any]) -> None:
        """Make the labels of rows unknown whose image became unreadable, unless their text is enough."""
        texts = [None] * len(cells) if self.bad_images == "skip" else rows.get("text", [None] * len(cells))
        for row, (pixels, cell, text) in enumerate(zip(rows["pixel_values"], cells, texts, strict=True)):
            if pixels is None and text is None and not is_missing_image(cell):
                rows["labels"][row] = [-1.0] * len(rows["labels"][row])


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
        bad_images (`str`, *optional*, defaults to `"error"`): As for [`RowTransform`]. A model without texts leaves
            out what would be missing.

    Attributes:
        collator ([`Collator`]): Makes batches of transformed rows.
        evaluation ([`RowTransform`]): The transform of rows that are evaluated or predicted.
    """

    def __init__(self, processor: MMClfProcessor, folder: Path, bad_images: str = "error"):
        if bad_images == "missing" and processor.tokenizer is None:
            bad_images = "skip"
        image = processor.image_processor and EvaluationImageTransform(processor.image_processor)
        self.processor, self.folder, self.bad_images, self.collator = (
            processor,
            folder,
            bad_images,
            Collator(processor),
        )
        self.evaluation = RowTransform(folder, image, bad_images=bad_images)

    def training(self, augmentation: AugmentationArguments) -> RowTransform:
        """Return the transform of training rows, with random changes of these strengths."""
        image_processor, swap, drop = self.processor.image_processor, augmentation.swap_words, augmentation.drop_words
        image = image_processor and ImageAugmentation(image_processor, augmentation)
        text = TextAugmentation(swap, drop) if swap or drop else None
        return RowTransform(self.folder, image, text, self.bad_images)

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
