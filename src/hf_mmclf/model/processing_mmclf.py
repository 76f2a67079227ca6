"""Pictures and captions to a model's inputs, with masks for what a row lacks.

Pushed to the Hub as code, so it imports third-party packages only and stands alone.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import has_file

__all__ = ["MMClfProcessor"]


class MMClfProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer as one. A model with pictures or captions alone has one of the two.

    `processor(images=picture, text="a dog")` prepares one row, lists of the same length prepare a batch. A row may
    lack its picture or its caption: give `None` there (a blank caption counts as none).

    Args:
        image_processor ([`MMClfImageProcessor`], *optional*): `None` for a model without pictures.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): `None` for a model without captions.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None):
        if image_processor is None and tokenizer is None:
            raise ValueError("got neither image_processor nor tokenizer; expected at least one of them")
        self.image_processor, self.tokenizer = image_processor, tokenizer
        if tokenizer is not None:
            tokenizer.padding_side = "right"  # positions count from the first token, so a batch equals its rows
        self.chat_template = None

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str | None] | None = None,
        return_tensors: str = "pt",
        max_length: int | None = None,
    ) -> BatchFeature:
        r"""
        Args:
            images (*optional*):
                A picture (path, URL, PIL image, encoded bytes, array or tensor) or a list of them, `None` for those
                that are absent.
            text (`str` or `list[str]`, *optional*):
                A caption or a list of them, `None` for those that are absent.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` for tensors, `"np"` for arrays.
            max_length (`int`, *optional*):
                Longer captions are cut; by default to the tokenizer's `model_max_length`.

        Returns:
            `BatchFeature`: `pixel_values` (batch, 3, size, size) and `image_mask` (batch,) where images are given;
            `input_ids`, `attention_mask`, `token_type_ids` (batch, tokens), padded to the longest, and `text_mask`
            (batch,) where text is given.

        Raises:
            `ValueError`: no input, one that the model does not have, or lists of different lengths.
        """
        images, text = self._listed(images), self._listed(text)
        if not images and not text:
            raise ValueError("got neither images nor text; expected at least one of them")
        if images is not None and self.image_processor is None:
            raise ValueError("got images, but this model has no image backbone; give text alone")
        if text is not None and self.tokenizer is None:
            raise ValueError("got text, but this model has no text backbone; give images alone")
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(
                f"got {len(images)} images and {len(text)} texts; expected as many of one as of the other"
            )
        if images is not None:
            given = [image for image in images if image is not None]
            prepared = iter(self.image_processor(given, return_tensors="pt")["pixel_values"] if given else [])
            images = [None if image is None else next(prepared) for image in images]
        inputs = self.collate(images, text, max_length)
        if return_tensors == "np":
            inputs = {name: value.numpy() for name, value in inputs.items()}
        return BatchFeature(inputs)

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
                One tensor or `None` for each row; the image of a row without one is black.
            text (`Sequence[str]`, *optional*):
                One text or `None` for each row. A blank text counts as none.
            max_length (`int`, *optional*):
                Longer texts are truncated. Defaults to the tokenizer's `model_max_length`.

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
            texts = [given or "" for given in text]
            inputs |= self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            inputs["text_mask"] = torch.tensor([bool(given.strip()) for given in texts], dtype=torch.bool)
        return inputs

    @staticmethod
    def _listed(rows: Any) -> list | None:
        if rows is None or isinstance(rows, list):
            return rows
        is_batch = isinstance(rows, tuple) or (isinstance(rows, np.ndarray | torch.Tensor) and rows.ndim == 4)
        return list(rows) if is_batch else [rows]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "MMClfProcessor":
        """From a folder or a name on the Hub, whichever parts are there; `kwargs` as for `AutoTokenizer`."""
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
        """Writes the parts, and this file, to a folder."""
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
        """What `processor_config.json` holds: which class loads the parts, which have files of their own."""
        name = type(self).__name__
        return {"processor_class": name, "auto_map": {"AutoProcessor": f"processing_mmclf.{name}"}}
