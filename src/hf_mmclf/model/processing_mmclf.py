"""The processor: images and texts to model inputs, with masks for missing ones.

This file is pushed to the Hub as code: it imports only third-party packages and its neighbours.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import TextKwargs
from transformers.utils import cached_file

__all__ = ["MMClfProcessor", "is_missing_image", "is_missing_text", "is_one", "scores_of"]

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Arguments of tokenizers that would make another number of rows, or that are for texts with marks of images.
REFUSED = {"is_split_into_words", "return_overflowing_tokens", "sanitize_control_tokens"}
REFUSED |= {"return_mm_token_type_ids", "return_text_replacement_offsets"}


def _is_empty_cell(cell: Any) -> bool:
    """Return whether a cell is `None`, NaN or `pandas.NA`, with which tables represent missing values."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell)) or type(cell).__name__ == "NAType"


def is_missing_image(image: Any) -> bool:
    """Return whether a cell holds no image: it is empty or an undecoded cell of `datasets` without bytes and path."""
    if isinstance(image, Mapping):
        return image.get("bytes") is None and not image.get("path")
    return _is_empty_cell(image)


def is_missing_text(text: Any) -> bool:
    """Return whether a cell holds no text: it is empty or blank."""
    return not text.strip() if isinstance(text, str) else _is_empty_cell(text)


def is_one(value: Any) -> bool:
    """Return whether a value is one image or text, and not a column of them."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim in (2, 3)
    return isinstance(value, str | bytes | bytearray | memoryview | Mapping) or not hasattr(value, "__len__")


def scores_of(logits: np.ndarray | torch.Tensor) -> np.ndarray:
    """
    Convert logits of any shape to scores in [0, 1], float32.

    The sigmoid is computed in float64 and then rounded, as in `predict.py` of an export. In float32, torch gives two
    results for 4% of all numbers, by the place of the number in the tensor.
    """
    return torch.as_tensor(logits).cpu().double().sigmoid().float().numpy()


class MMClfProcessor(ProcessorMixin):
    r"""
    An image processor and a tokenizer in one object. A model with one backbone has only one of the two.

    Args:
        image_processor ([`MMClfImageProcessor`], *optional*): `None` for a model without images.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): `None` for a model without texts.

    Raises:
        `ValueError`: if neither is given.
        `TypeError`: if a part is of another class.

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

    # Defaults of the call. They give way to those of the tokenizer and to the arguments of the call.
    images_kwargs = {"return_tensors": "pt"}
    text_kwargs = {"return_tensors": "pt", "padding": True, "truncation": True}

    def __init__(self, image_processor: Any = None, tokenizer: Any = None):
        given = {"image_processor": image_processor, "tokenizer": tokenizer}
        names = [name for name, part in given.items() if part is not None]
        if not names:
            raise ValueError("got neither image_processor nor tokenizer; expected at least one of them")
        self.get_attributes = partial(list, names)  # ProcessorMixin takes all parts of the signature for given
        super().__init__(**{name: given[name] for name in names})
        self.image_processor, self.tokenizer = image_processor, tokenizer
        if tokenizer is not None:
            # Positions start at the first token, so the outputs of a row do not depend on its batch.
            tokenizer.padding_side = "right"

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        r"""
        Prepare one row or a batch of rows. Rows may lack an image or a text.

        Args:
            images (*optional*):
                An image (path, URL, PIL image, encoded bytes, array or tensor) or a column of them (list, tuple,
                array or `pandas.Series`), with `None` for missing ones.
            text (*optional*):
                A text or a column of them, with `None` for missing ones. NaN and a blank text count as missing.
            kwargs:
                The arguments of transformers' processors, for one part (`text_kwargs={"max_length": 20}`,
                `images_kwargs={"device": "cuda"}`) or for all that know them (`max_length=20`). By default texts are
                padded to the longest (`padding=True`) and truncated (`truncation=True`) to `max_length` tokens, by
                default the tokenizer's `model_max_length`, and the outputs are tensors (`return_tensors="pt"`;
                `"np"` for arrays, `None` for lists).

        Returns:
            `BatchFeature`: `pixel_values` of shape `(batch, 3, size, size)` and `image_mask` of shape `(batch,)` if
            images are given; `input_ids`, `attention_mask` and `token_type_ids` of shape `(batch, length)`, and
            `text_mask` of shape `(batch,)` if texts are given.

        Raises:
            `ValueError`: if there is no input, one that the model does not take, or lists have different lengths.
            `TypeError`: if an argument is unknown.
        """
        images, text = _column(images), _column(text)
        self._check_inputs(images, text)
        if images is not None:
            images = [_one_image(row, cell) for row, cell in enumerate(images)]
            given = [image for image in images if image is not None]
            options = self._options(**kwargs)["images_kwargs"] | {"return_tensors": "pt"}
            prepared = iter(self.image_processor(given, **options)["pixel_values"] if given else [])
            images = [None if image is None else next(prepared) for image in images]
        return BatchFeature(self.collate(images, text, **kwargs))

    def collate(
        self,
        pixel_values: Sequence[torch.Tensor | None] | None = None,
        text: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        r"""
        Make one batch of preprocessed images and of texts. Calling the processor and every data collator end here.

        Args:
            pixel_values (`Sequence[torch.Tensor]` of shape `(3, size, size)`, *optional*):
                One tensor or `None` for each row. A missing image becomes a tensor of zeros.
            text (`Sequence[str]`, *optional*):
                One text or `None` for each row. A blank text counts as missing.
            kwargs:
                The arguments of the call.

        Returns:
            `dict[str, torch.Tensor]`: As when calling the processor.

        Raises:
            `ValueError`: if a text is not a string.
            `TypeError`: if an argument is unknown.
        """
        options = self._options(**kwargs)
        inputs: dict[str, Any] = {}
        if pixel_values is not None:
            kind = options["images_kwargs"].pop("return_tensors")
            given = [image for image in pixel_values if image is not None]
            if not given:  # a black image tells the shape
                black = np.zeros((8, 8, 3), np.uint8)  # of 1 x 1 x 3, transformers warns of ambiguous channels
                given = self.image_processor(black, return_tensors="pt", **options["images_kwargs"])["pixel_values"]
            blank = torch.zeros_like(given[0])
            pixels = [blank if image is None else image for image in pixel_values]
            masked = {"pixel_values": pixels, "image_mask": [image is not None for image in pixel_values]}
            if kind is not None:
                masked["pixel_values"] = torch.stack(pixels)
            inputs |= BatchFeature(masked, kind)
        if text is not None:
            texts = [_one_text(row, cell) for row, cell in enumerate(text)]
            masked = {**self.tokenizer(texts, **options["text_kwargs"]), "text_mask": [cell != "" for cell in texts]}
            inputs |= BatchFeature(masked, options["text_kwargs"]["return_tensors"])
        return inputs

    def _check_inputs(self, images: list | None, text: list | None) -> None:
        if not images and not text:
            raise ValueError("got neither images nor text; expected at least one of them")
        if images is not None and self.image_processor is None:
            raise ValueError("got images, but this model has no image backbone; give text alone")
        if text is not None and self.tokenizer is None:
            raise ValueError("got text, but this model has no text backbone; give images alone")
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(f"got {len(images)} images and {len(text)} texts; expected the same number")

    def _options(self, **kwargs: Any) -> dict[str, dict[str, Any]]:
        """Return the arguments for each part; raise `TypeError` for unknown ones, which transformers leaves out."""
        known, tokenizer = {}, {}
        if self.image_processor is not None:
            known["images_kwargs"] = set(self.image_processor.valid_kwargs.__annotations__)
        if self.tokenizer is not None:
            known["text_kwargs"] = set(TextKwargs.__annotations__) - REFUSED
            tokenizer = self.tokenizer.init_kwargs
        known["common_kwargs"] = set().union(*known.values())
        unknown = set(kwargs) - set(known) - known["common_kwargs"]
        unknown |= {name for part, names in known.items() for name in kwargs.get(part, {}) if name not in names}
        if unknown:
            names = sorted({*known, *known["common_kwargs"]})
            raise TypeError(f"got the unknown arguments {sorted(unknown)}; expected some of {names}")
        return self._merge_kwargs(tokenizer_init_kwargs=tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """`list[str]`: The names of the outputs."""
        masks = {"image_processor": "image_mask", "tokenizer": "text_mask"}
        return [*super().model_input_names, *(masks[name] for name in self.get_attributes())]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `processor_config.json`."""
        content = {name: value for name, value in super().to_dict().items() if value is not None}
        return content | {"auto_map": {"AutoProcessor": f"processing_mmclf.{type(self).__name__}"}}

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Load the parts that are there; `from_pretrained` calls this."""
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        is_there = {
            file: cached_file(source, file, _raise_exceptions_for_missing_entries=False, **hub) is not None
            for file in ("preprocessor_config.json", "tokenizer_config.json")
        }
        image_processor = tokenizer = None
        if "image_processor" in (processor_dict or {}) or is_there["preprocessor_config.json"]:
            image_processor = AutoImageProcessor.from_pretrained(source, **kwargs)
        if is_there["tokenizer_config.json"]:
            tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        if image_processor is None and tokenizer is None:
            raise OSError(
                f"{source}: neither an image processor (preprocessor_config.json) nor a tokenizer "
                "(tokenizer_config.json, tokenizer.json) is there"
            )
        return [image_processor, tokenizer]


def _column(rows: Any) -> list | None:
    return rows if rows is None else [rows] if is_one(rows) else list(rows)


def _one_image(row: int, cell: Any) -> Any:
    if isinstance(cell, list | tuple):  # transformers' processors take a list of images for each text
        if len(cell) > 1:
            raise ValueError(f"row {row} has {len(cell)} images; expected one")
        cell = cell[0] if cell else None
    return None if is_missing_image(cell) else cell


def _one_text(row: int, cell: Any) -> str:
    if is_missing_text(cell):
        return ""
    if not isinstance(cell, str):
        raise ValueError(f"row {row}: the text is {type(cell).__name__}; expected a string")
    return cell
