"""From rows to batches: pictures decoded and transformed when they are asked for, captions padded to the batch."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..model.image_processing_mmclf import read_image


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


class Collator:
    """
    Rows to one batch: captions padded to the longest of the batch, masks where a picture or caption is absent.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): `None` for a model without captions.
        max_tokens (`int`, *optional*, defaults to 128): Longer captions are cut.
        image_size (`int`, *optional*): Side of the pictures in pixels; `None` for a model without pictures.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int = 128,
        image_size: int | None = None,
    ):
        self.tokenizer, self.max_tokens, self.image_size = tokenizer, max_tokens, image_size

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {}
        if self.image_size is not None:
            pictures = [row["pixel_values"] for row in rows]
            blank = torch.zeros(3, self.image_size, self.image_size)
            batch["pixel_values"] = torch.stack([blank if picture is None else picture for picture in pictures])
            batch["image_mask"] = torch.tensor([picture is not None for picture in pictures])
        if self.tokenizer is not None:
            texts = [row["text"] for row in rows]
            batch |= self.tokenizer(
                [text or "" for text in texts],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            batch["text_mask"] = torch.tensor([text is not None for text in texts])
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor(np.array([row["labels"] for row in rows]), dtype=torch.float32)
        return batch
