"""The processor: images and texts to model inputs, with masks for missing ones.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import has_file

__all__ = ["MMClfProcessor", "is_missing_image", "is_missing_text"]


def is_missing_image(image: Any) -> bool:
    """Return whether a cell holds no image: it is `None` or an undecoded cell of `datasets` without bytes and path."""
    return image is None or (isinstance(image, Mapping) and image.get("bytes") is None and not image.get("path"))


def is_missing_text(text: str | None) -> bool:
    """Return whether a cell holds no text: it is `None` or blank."""
    return text is None or not text.strip()


class MMClfProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer in one object. A model with one backbone has only one of the two.

    Args:
        image_processor ([`MMClfImageProcessor`], *optional*): `None` for a model without images.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): `None` for a model without texts.

    Raises:
        `ValueError`: if neither is given.

    Example:

        >>> from PIL import Image
        >>> from transformers import BertTokenizer
        >>> from hf_mmclf import MMClfImageProcessor, MMClfProcessor

        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
        >>> tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
        >>> processor = MMClfProcessor(MMClfImageProcessor(size=32), tokenizer)
        >>> inputs = processor(images=[Image.new("RGB", (40, 30)), None], text=["a dog", "a"])
        >>> inputs["pixel_values"].shape
        torch.Size([2, 3, 32, 32])
        >>> inputs["image_mask"].tolist()
        [True, False]
        >>> inputs["input_ids"].tolist()
        [[2, 5, 6, 3], [2, 5, 3, 0]]
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None):
        if image_processor is None and tokenizer is None:
            raise ValueError("got neither image_processor nor tokenizer; expected at least one of them")
        self.image_processor, self.tokenizer = image_processor, tokenizer
        if tokenizer is not None:
            # Positions start at the first token, so the outputs of a row do not depend on its batch.
            tokenizer.padding_side = "right"
        self.chat_template = None

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str | None] | None = None,
        return_tensors: str = "pt",
        max_length: int | None = None,
    ) -> BatchFeature:
        r"""
        Prepare one row or a batch of rows. Rows may lack an image or a text.

        Args:
            images (*optional*):
                An image (path, URL, PIL image, encoded bytes, array or tensor) or a list of them, with `None` for
                missing ones.
            text (`str` or `list[str]`, *optional*):
                A text or a list of them, with `None` for missing ones. A blank text counts as missing.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for tensors, `"np"` for arrays.
            max_length (`int`, *optional*):
                The number of tokens to which texts are truncated. Defaults to the tokenizer's `model_max_length`.

        Returns:
            `BatchFeature`: `pixel_values` of shape `(batch, 3, size, size)` and `image_mask` of shape `(batch,)` if
            images are given; `input_ids`, `attention_mask` and `token_type_ids` of shape `(batch, length)`, padded to
            the longest text, and `text_mask` of shape `(batch,)` if texts are given.

        Raises:
            `ValueError`: if there is no input, one that the model does not take, or lists have different lengths.
        """
        images, text = self._listed(images), self._listed(text)
        self._check_inputs(images, text)
        if images is not None:
            given = [image for image in images if image is not None]
            prepared = iter(self.image_processor(given, return_tensors="pt")["pixel_values"] if given else [])
            images = [None if image is None else next(prepared) for image in images]
        inputs = self.collate(images, text, max_length)
        if return_tensors == "np":
            inputs = {name: value.numpy() for name, value in inputs.items()}
        return BatchFeature(inputs)

    def _check_inputs(self, images: list | None, text: list | None) -> None:
        if not images and not text:
            raise ValueError("got neither images nor text; expected at least one of them")
        if images is not None and self.image_processor is None:
            raise ValueError("got images, but this model has no image backbone; give text alone")
        if text is not None and self.tokenizer is None:
            raise ValueError("got text, but this model has no text backbone; give images alone")
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(f"got {len(images)} images and {len(text)} texts; expected the same number")

    def collate(
        self,
        pixel_values: Sequence[torch.Tensor | None] | None = None,
        text: Sequence[str | None] | None = None,
        max_length: int | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        Make one batch of preprocessed images and of texts. Calling the processor and every data collator end here.

        Args:
            pixel_values (`Sequence[torch.Tensor]` of shape `(3, size, size)`, *optional*):
                One tensor or `None` for each row. A missing image becomes a tensor of zeros.
            text (`Sequence[str]`, *optional*):
                One text or `None` for each row. A blank text counts as missing.
            max_length (`int`, *optional*):
                The number of tokens to which texts are truncated. Defaults to the tokenizer's `model_max_length`.

        Returns:
            `dict[str, torch.Tensor]`: As when calling the processor.
        """
        inputs: dict[str, Any] = {}
        if pixel_values is not None:
            size = self.image_processor.size["longest_edge"]
            blank = torch.zeros(3, size, size)
            inputs["pixel_values"] = torch.stack([blank if image is None else image for image in pixel_values])
            inputs["image_mask"] = torch.tensor([image is not None for image in pixel_values], dtype=torch.bool)
        if text is not None:
            texts = ["" if is_missing_text(given) else given for given in text]
            inputs |= self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            inputs["text_mask"] = torch.tensor([given != "" for given in texts], dtype=torch.bool)
        return inputs

    @staticmethod
    def _listed(rows: Any) -> list | None:
        if rows is None or isinstance(rows, list):
            return rows
        is_batch = isinstance(rows, tuple) or (isinstance(rows, np.ndarray | torch.Tensor) and rows.ndim == 4)
        return list(rows) if is_batch else [rows]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "MMClfProcessor":
        """
        Load the processor from a folder or the Hub, with the parts that are there.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or a name on the Hub.
            kwargs: The arguments of `AutoTokenizer.from_pretrained`.

        Raises:
            `OSError`: if there is neither an image processor nor a tokenizer.
        """
        source = str(pretrained_model_name_or_path)
        kwargs.pop("_from_auto", None)
        where = {
            name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs
        }
        parts = {}
        if has_file(source, "preprocessor_config.json", **where):
            parts["image_processor"] = AutoImageProcessor.from_pretrained(source, **kwargs)
        if has_file(source, "tokenizer_config.json", **where):
            parts["tokenizer"] = AutoTokenizer.from_pretrained(source, **kwargs)
        if not parts:
            raise OSError(f"{source}: neither preprocessor_config.json nor tokenizer_config.json is there")
        return cls(**parts)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Save the parts and this file to a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        self.to_json_file(folder / "processor_config.json")
        code = Path(__file__)
        if code.resolve() != (folder / code.name).resolve():
            shutil.copyfile(code, folder / code.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `processor_config.json`: the class that loads the parts from their own files."""
        name = type(self).__name__
        return {"processor_class": name, "auto_map": {"AutoProcessor": f"processing_mmclf.{name}"}}
