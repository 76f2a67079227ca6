"""Explain a label: how far its logit falls when a part of the image or a word of the text is hidden.

    explanation = explain(pipe, image="dog.jpg", text="a dog on a bench", label="dog")
    explanation.words, explanation.heat_map  # numbers
    explanation.save("why.png")  # a figure, which a notebook shows by itself

The method is occlusion (Zeiler and Fergus 2014, "Visualizing and understanding convolutional networks"; for words Li,
Monroe and Jurafsky 2016, "Understanding neural networks through representation erasure"). It uses only the outputs of
the backbones, so it works for every architecture.
"""

import dataclasses
import io
import os
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import is_one, scores_of

Features = tuple[torch.Tensor, torch.Tensor]  # tokens and their mask
LINE = 72  # characters in a line of the text in a figure


class Word(NamedTuple):
    """
    A word of the text: the characters between white space.

    Args:
        word (`str`): The word as written, with its punctuation.
        weight (`float`):
            How far the label's logit falls when the word is hidden. Positive speaks for the label, negative against
            it. 0 for the words of a truncated text that the model does not read.
        span (`tuple[int, int]`): Index in the text of its first character, and of the one after its last.
    """

    word: str
    weight: float
    span: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """
    What speaks for a label, and what against it.

    Args:
        label (`str`): The name of the label.
        score (`float`): Its score, between 0 and 1.
        threshold (`float`): The model's own threshold for it.
        image (`PIL.Image.Image`, *optional*): The image, upright.
        text (`str`, *optional*): The text.
        cells (`np.ndarray` of shape `(rows, columns)`, *optional*):
            How far the label's logit falls when a cell of the image and its neighbours are hidden. Positive speaks for
            the label, negative against it.
        words (`list[Word]`): The words of the text with their weights.
        score_without_image, score_without_text (`float`, *optional*):
            The score without the image or without the text; `None` unless both are given.
    """

    label: str
    score: float
    threshold: float
    image: Image.Image | None = dataclasses.field(repr=False)
    text: str | None
    cells: np.ndarray | None = dataclasses.field(repr=False)
    words: list[Word]
    score_without_image: float | None
    score_without_text: float | None

    @property
    def heat_map(self) -> np.ndarray | None:
        """`np.ndarray` of shape `(height, width)`: `cells`, interpolated to the pixels of `image`."""
        if self.image is None:
            return None
        size = (self.image.height, self.image.width)
        return F.interpolate(torch.from_numpy(self.cells)[None, None], size, mode="bilinear")[0, 0].numpy()

    def figure(self) -> Figure:
        """
        Draw the image beside its heat map, over the text in colors: red speaks for the label, blue against it.

        All parts share one scale, so a pale heat map over a red word means that the text decides.
        """
        weights = [word.weight for word in self.words] + ([] if self.cells is None else self.cells.ravel().tolist())
        limit = max(map(abs, weights), default=0) or 1.0
        scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
        heights = {} if self.image is None else {("image", "heat map"): 3.2}
        if self.words:
            lines = self._lines()
            heights["text", "text"] = 0.3 * len(lines)

        figure = Figure(figsize=(7.2, sum(heights.values()) + 1), layout="constrained")
        figure.suptitle(self._title(), fontsize=10, parse_math=False)
        panels = figure.subplot_mosaic([*heights], height_ratios=[*heights.values()])
        for panel in panels.values():
            panel.axis("off")
        if self.image is not None:
            panels["image"].imshow(self.image)
            # A pale gray image below, so that the colors on it are those of the scale.
            panels["heat map"].imshow(self.image.convert("L"), cmap="gray", vmin=-160, vmax=255)
            panels["heat map"].imshow(scale.to_rgba(self.heat_map), alpha=np.abs(self.heat_map) / limit)
        if self.words:
            boxes = [[_text_area(word, scale) for word in line] for line in lines]
            rows = [HPacker(children=line, pad=0, sep=6, align="baseline") for line in boxes]
            text = VPacker(children=rows, pad=0, sep=7, align="center")
            panels["text"].add_artist(AnchoredOffsetbox("upper center", child=text, frameon=False))
        figure.colorbar(scale, ax=list(panels.values()), label="fall of the logit when hidden")
        return figure

    def _lines(self) -> list[list[Word]]:
        """Break the words into lines of at most `LINE` characters."""
        text = " ".join(word.word for word in self.words)
        lines = textwrap.wrap(text, LINE, break_long_words=False, break_on_hyphens=False)
        words = iter(self.words)
        return [[next(words) for _ in line.split()] for line in lines]

    def _title(self) -> str:
        title = f"{self.label}: {self.score:.3f} (threshold {self.threshold:.3f})"
        without = (self.score_without_image, self.score_without_text)
        if None not in without:
            title += "\nwithout the image {:.3f}, without the text {:.3f}".format(*without)
        return title

    def save(self, path: str | os.PathLike) -> None:
        """Write the figure to a file, in the format of its ending (`.png`, `.pdf`, `.svg`)."""
        self.figure().savefig(path, dpi=150)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def _text_area(word: Word, scale: ScalarMappable) -> TextArea:
    color = scale.to_rgba(0.7 * word.weight)[:3]  # pale enough for black letters
    return TextArea(word.word, textprops={"backgroundcolor": color, "fontsize": 9, "parse_math": False})


def explain(
    pipe: Any,
    image: Any = None,
    text: str | None = None,
    label: str | None = None,
    grid: int = 8,
    batch_size: int = 32,
) -> Explanation:
    r"""
    Measure what in an image and its text speaks for a label. The model is left as it was.

    The image is divided into cells. Windows of 3 x 3 cells, at every place and also over the edges, are filled with
    the mean color of the image. The figure of a cell is the mean fall of the label's logit over the nine windows that
    hide it. A word is hidden by masking its tokens, so the other words keep their positions.

    Each figure is the effect of hiding this part alone. If two parts carry a label, hiding one of them may change
    little.

    Args:
        pipe ([`ImageTextClassificationPipeline`] or [`Predictor`]):
            An object with a `model` and its `processor`.
        image (*optional*):
            An image in any form that the pipeline takes.
        text (`str`, *optional*):
            The text. A blank one counts as none.
        label (`str`, *optional*):
            The name of a label. Defaults to the most likely one.
        grid (`int`, *optional*, defaults to 8):
            Cells along the longer edge of the image. A square image takes `(grid + 2) ** 2` passes of the image
            backbone.
        batch_size (`int`, *optional*, defaults to 32):
            Variants of the image or the text in one pass.

    Returns:
        [`Explanation`]: The figures of the label, and how to draw them.

    Raises:
        `ValueError`: if neither image nor text is given, the model does not read one of them, or it does not have the
            label.
        `TypeError`: if `pipe` is something else, such as the name of a folder.
    """
    _check_inputs(pipe, image, text, label, grid)
    model, processor, names = pipe.model, pipe.processor, pipe.model.config.label_names
    text = text if text and text.strip() else None

    with _evaluating(model):
        seen = None if image is None else ImageOcclusion(model, processor.image_processor, image, grid)
        read = None if text is None else TextOcclusion(model, processor.tokenizer, text)
        image_features, text_features = (part and part.features for part in (seen, read))
        logits = _logits(model, image_features, text_features)[0]
        index = int(logits.argmax()) if label is None else names.index(label)
        cells = without_image = without_text = None
        words = []
        if seen:
            falls = _mean_falls(seen, lambda tokens: _logits(model, tokens, text_features)[:, index], batch_size)
            cells = falls.numpy()
        if read:
            falls = _mean_falls(read, lambda tokens: _logits(model, image_features, tokens)[:, index], batch_size)
            words = [
                Word(text[slice(*span)], fall, span) for span, fall in zip(read.spans, falls.tolist(), strict=True)
            ]
        if seen and read:
            without_image = float(scores_of(_logits(model, None, text_features)[0, index]))
            without_text = float(scores_of(_logits(model, image_features, None)[0, index]))
    return Explanation(
        label=names[index],
        score=float(scores_of(logits[index])),
        threshold=model.config.thresholds_for(image is not None, text is not None)[index],
        image=seen and seen.image,
        text=text,
        cells=cells,
        words=words,
        score_without_image=without_image,
        score_without_text=without_text,
    )


def _check_inputs(pipe: Any, image: Any, text: Any, label: str | None, grid: int) -> None:
    if not (hasattr(pipe, "model") and hasattr(pipe, "processor")):
        raise TypeError(f"got {pipe!r}; expected a pipeline: explain(hf_mmclf.pipeline(folder), ...)")
    parts = {"image": (image, pipe.processor.image_processor), "text": (text, pipe.processor.tokenizer)}
    for name, (given, part) in parts.items():
        if given is not None and part is None:
            raise ValueError(f"got {name}, but this model has no {name} backbone; leave it out")
    if not is_one(image) or not isinstance(text, str | None):
        kinds = f"{type(image).__name__} and {type(text).__name__}"
        raise ValueError(f"got {kinds} as image and text; expected one image, one text, or one of both")
    if image is None and not (text or "").strip():
        raise ValueError("got neither an image nor a text; expected at least one of them")
    names = pipe.model.config.label_names
    if label not in (None, *names):
        raise ValueError(f"unknown label {label!r}; expected one of {', '.join(names)}")
    if grid < 1:
        raise ValueError(f"grid is {grid}; expected at least 1")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode without gradients, then restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class ImageOcclusion:
    """
    An image with variants of it, in each of which a window is filled with the mean color of the image.

    Args:
        model ([`MMClfForImageTextClassification`]): The model.
        image_processor ([`MMClfImageProcessor`]): Its image processor.
        image: An image in any form that the pipeline takes.
        grid (`int`): Cells along the longer edge.

    Attributes:
        image (`PIL.Image.Image`): The image, upright.
        features (`tuple[torch.Tensor, torch.Tensor]`): Tokens and mask of the whole image.
        hidden (`torch.Tensor` of shape `(variants, rows, columns)`): 1 for the cells that a variant hides, else 0.
    """

    def __init__(self, model: MMClfForImageTextClassification, image_processor: Any, image: Any, grid: int):
        upright = image_processor.process_image(image_processor.fetch_images(image), do_convert_rgb=True)
        self.model, self.image = model, Image.fromarray(upright.permute(1, 2, 0).byte().numpy())
        pixels = image_processor(upright, return_tensors="pt")["pixel_values"]
        self.pixels = pixels.to(model.device, model.dtype)
        self.features = model.encode_image(self.pixels)
        # A white image of this size shows which pixels are padding.
        white = image_processor(torch.full_like(upright, 255), do_normalize=False, return_tensors="pt")["pixel_values"]
        edges = [torch.nonzero((white[0, 0] > 0.5).any(axis)).flatten()[[0, -1]].tolist() for axis in (1, 0)]
        self.box = tuple(slice(first, last + 1) for first, last in edges)
        # Windows over the edges too: then each cell is hidden by nine windows, at the edge as in the middle.
        lengths = [last + 1 - first for first, last in edges]
        near = []
        for length in lengths:
            count = max(1, round(min(grid, max(lengths)) * length / max(lengths)))
            near.append((torch.arange(-1, count + 1)[:, None] - torch.arange(count)).abs() <= 1)
        self.hidden = (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(0, 1).float()

    def without(self, hidden: torch.Tensor) -> Features:
        """Return tokens and masks of variants that hide these cells `(batch, rows, columns)`."""
        inside = self.pixels[(0, ..., *self.box)]
        filled = F.interpolate(hidden[:, None], inside.shape[1:]).to(inside.device).bool()
        variants = self.pixels.repeat(len(hidden), 1, 1, 1)
        variants[(..., *self.box)] = torch.where(filled, inside.mean((1, 2), keepdim=True), inside)
        return self.model.encode_image(variants)


class TextOcclusion:
    """
    A text with variants of it, in each of which the tokens of a word are masked.

    Args:
        model ([`MMClfForImageTextClassification`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, which must be a fast one.
        text (`str`): The text.

    Attributes:
        spans (`list[tuple[int, int]]`): Index of the first character of each word, and of the one after its last.
        features (`tuple[torch.Tensor, torch.Tensor]`): Tokens and mask of the whole text.
        hidden (`torch.Tensor` of shape `(variants, words)`): 1 for the word that a variant hides, else 0.
    """

    def __init__(self, model: MMClfForImageTextClassification, tokenizer: Any, text: str):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} does not tell which characters its tokens stand for")
        self.model, self.spans = model, [match.span() for match in re.finditer(r"\S+", text)]
        inputs = tokenizer(text, truncation=True, return_offsets_mapping=True, return_tensors="pt")
        starts, ends = inputs.pop("offset_mapping")[0].T
        first, last = torch.tensor(self.spans).T[..., None]
        self.pieces = (starts < last) & (ends > first) & (starts < ends)  # special tokens stand for no characters
        self.hidden = torch.diag(self.pieces.any(1).float())  # a word that was cut off is never hidden
        self.inputs = {name: values.to(model.device) for name, values in inputs.items()}
        self.features = model.encode_text(**self.inputs)

    def without(self, hidden: torch.Tensor) -> Features:
        """Return tokens and masks of variants that hide these words `(batch, words)`."""
        masked = (hidden @ self.pieces.float()).bool().to(self.model.device)
        variants = {name: values.expand(len(hidden), -1) for name, values in self.inputs.items()}
        variants["attention_mask"] = variants["attention_mask"].masked_fill(masked, 0)
        return self.model.encode_text(**variants)


def _mean_falls(
    occlusion: ImageOcclusion | TextOcclusion, logit: Callable[[Features], torch.Tensor], batch_size: int
) -> torch.Tensor:
    """Return for each part the mean fall of a logit over the variants that hide the part; 0 if none does."""
    before = logit(occlusion.features)
    falls = torch.cat([before - logit(occlusion.without(batch)) for batch in occlusion.hidden.split(batch_size)])
    hidden = occlusion.hidden.flatten(1)
    return (falls @ hidden / hidden.sum(0).clamp(min=1)).reshape(occlusion.hidden.shape[1:])


def _logits(model: nn.Module, image: Features | None, text: Features | None) -> torch.Tensor:
    """Return logits `(variants, labels)` of variants of one modality, with the other one the same for all of them."""
    count = max(len(features[0]) for features in (image, text) if features)
    image, text = (features and [x.expand(count, *x.shape[1:]) for x in features] for features in (image, text))
    return model.classify(image, text).float().cpu()
