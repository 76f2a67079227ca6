"""Why a label: how far it falls when a place of the picture or a word of the caption is hidden.

    explanation = explain(pipe, image="dog.jpg", text="a dog on a bench", label="dog")
    explanation.words, explanation.heat_map  # numbers
    explanation.save("why.png")  # a picture; in a notebook, the explanation itself is shown as one

One method serves both modalities: occlusion (Zeiler and Fergus, 2014, "Visualizing and understanding convolutional
networks"; for words Li, Monroe and Jurafsky, 2016, "Understanding neural networks through representation erasure").
It needs nothing of the backbones but their output, so it holds for all of them, and what it says is a fact about the
model: hide this, and the logit falls by so much.
"""

import dataclasses
import io
import os
import re
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
from ..model.pipeline_mmclf import is_one

Features = tuple[torch.Tensor, torch.Tensor]  # tokens and their mask
LINE = 72  # characters in a line of a figure's caption


class Word(NamedTuple):
    """What stands between white space in a caption.

    Args:
        word (`str`): As written, with its punctuation.
        weight (`float`):
            How far the label's logit falls when the model does not see the word. Positive speaks for the label,
            negative against it. 0 for words that the model has not read, since the caption is too long for it.
        span (`tuple[int, int]`): Its first character in the caption, and the one after its last.
    """

    word: str
    weight: float
    span: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """
    What speaks for a label, and what against it.

    Args:
        label (`str`): Its name.
        score (`float`): Its score, between 0 and 1.
        threshold (`float`): The model's own threshold for it.
        image (`PIL.Image.Image`, *optional*): The picture, upright; `None` where there is none.
        text (`str`, *optional*): The caption; `None` where there is none.
        cells (`np.ndarray` of shape `(rows, columns)`, *optional*):
            How far the label's logit falls when a cell of the picture and its neighbours are hidden. Positive speaks
            for the label, negative against it.
        words (`list[Word]`): The same for the words of the caption, in their order.
        score_without_image, score_without_text (`float`, *optional*):
            The score if the picture or the caption were absent; `None` unless there are both.
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
        """The picture beside its heat map, over the caption in colours: red speaks for the label, blue against it.

        All share one scale, so that a pale picture over a red word says that the caption decides.
        """
        peaks = [abs(word.weight) for word in self.words]
        if self.image is not None:
            peaks.append(float(np.abs(self.cells).max()))
        limit = max(peaks, default=0) or 1.0
        scale = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
        lines = self._lines()
        layout = {("picture", "heat map"): 3.2} if self.image is not None else {}
        if lines:
            layout["caption", "caption"] = 0.3 * len(lines)

        figure = Figure(figsize=(7.2, sum(layout.values()) + 1), layout="constrained")
        figure.suptitle(self._title(), fontsize=10, parse_math=False)
        panels = figure.subplot_mosaic([*layout], height_ratios=[*layout.values()])
        for panel in panels.values():
            panel.axis("off")
        if self.image is not None:
            panels["picture"].imshow(self.image)
            # grey and pale, so that the colours on it are those of the scale
            panels["heat map"].imshow(self.image.convert("L"), cmap="gray", vmin=-160, vmax=255)
            heat = self.heat_map
            panels["heat map"].imshow(scale.to_rgba(heat), alpha=np.abs(heat) / limit)
        if lines:
            rows = []
            for line in lines:
                boxes = []
                for word in line:
                    color = scale.to_rgba(0.7 * word.weight)[:3]  # pale enough to read black letters on
                    style = {"backgroundcolor": color, "fontsize": 9, "parse_math": False}
                    boxes.append(TextArea(word.word, textprops=style))
                rows.append(HPacker(children=boxes, pad=0, sep=6, align="baseline"))
            caption = VPacker(children=rows, pad=0, sep=7, align="center")
            panels["caption"].add_artist(AnchoredOffsetbox("upper center", child=caption, frameon=False))
        figure.colorbar(scale, ax=list(panels.values()), label="fall of the logit when hidden")
        return figure

    def _lines(self) -> list[list[Word]]:
        lines, room = [], 0
        for word in self.words:
            room -= len(word.word) + 1
            if room < 0:
                lines.append([])
                room = LINE - len(word.word)
            lines[-1].append(word)
        return lines

    def _title(self) -> str:
        title = f"{self.label}: {self.score:.3f} (threshold {self.threshold:.3f})"
        if self.score_without_image is not None:
            title += f"\nwithout the picture {self.score_without_image:.3f}, "
            title += f"without the caption {self.score_without_text:.3f}"
        return title

    def save(self, path: str | os.PathLike) -> None:
        """Writes the figure to a file; its ending says in which form (`.png`, `.pdf`, `.svg`)."""
        self.figure().savefig(path, dpi=150)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


def explain(
    pipe: Any,
    image: Any = None,
    text: str | None = None,
    label: str | None = None,
    grid: int = 8,
    batch_size: int = 32,
) -> Explanation:
    r"""
    What in a picture and its caption speaks for a label. The model is left as it was.

    The picture is divided into cells; windows of 3 x 3 cells, at every place and over its edges too, are painted in
    the picture's mean colour, and a cell's figure is the mean fall of the label's logit over the nine windows that
    hide it. A word is hidden by masking its word pieces, so that the others keep their places.

    Each figure is the effect of hiding this alone. Where two toys or two words carry a label, hiding one of them may
    change little.

    Args:
        pipe ([`ImageTextClassificationPipeline`] or [`Predictor`]):
            Anything with a `model` and its `processor`.
        image (*optional*):
            A picture in any form that the pipeline takes.
        text (`str`, *optional*):
            Its caption; a blank one counts as none.
        label (`str`, *optional*):
            The name of a label; by default the most likely one.
        grid (`int`, *optional*, defaults to 8):
            Cells along the longer edge of the picture. A square one costs `(grid + 2) ** 2` passes of the image
            backbone.
        batch_size (`int`, *optional*, defaults to 32):
            Variants in one pass.

    Raises:
        `ValueError`: neither picture nor caption, one that the model does not take, or a label that it does not have.
        `TypeError`: `pipe` is something else, such as the name of a folder.
    """
    if not (hasattr(pipe, "model") and hasattr(pipe, "processor")):
        raise TypeError(f"got {pipe!r}; expected a pipeline: explain(hf_mmclf.pipeline(folder), ...)")
    model, processor = pipe.model, pipe.processor
    names = model.config.label_names
    parts = {"image": (image, processor.image_processor), "text": (text, processor.tokenizer)}
    for name, (given, part) in parts.items():
        if given is not None and part is None:
            raise ValueError(f"got {name}, but this model has no {name} backbone; leave it out")
    if not is_one(image) or not isinstance(text, str | None):
        kinds = f"{type(image).__name__} and {type(text).__name__}"
        raise ValueError(f"got {kinds} as picture and caption; expected one picture, one caption, or one of both")
    text = text if text and text.strip() else None
    if image is None and text is None:
        raise ValueError("got neither a picture nor a caption; expected at least one of them")
    if label is not None and label not in names:
        raise ValueError(f"unknown label {label!r}; expected one of {', '.join(names)}")
    if grid < 1:
        raise ValueError(f"grid is {grid}; expected at least 1")

    picture = seen = read = cells = without_image = without_text = None
    words = []
    with _evaluating(model):
        if image is not None:
            picture, pixels, box = _prepare_picture(processor.image_processor, image)
            pixels = pixels.to(model.device, model.dtype)
            seen = model.encode_image(pixels)
        if text is not None:
            spans = [match.span() for match in re.finditer(r"\S+", text)]
            tokens, pieces = _prepare_caption(processor.tokenizer, text, spans, model)
            read = model.encode_text(**tokens)
        logits = model.classify(seen, read)[0]
        index = int(logits.argmax()) if label is None else names.index(label)

        def logit(image: Features | None, text: Features | None) -> torch.Tensor:
            """The label's, for variants of one modality; the other is the same for all of them."""
            count = max(len(features[0]) for features in (image, text) if features)
            image, text = ([x.expand(count, *x.shape[1:]) for x in f] if f else None for f in (image, text))
            return model.classify(image, text)[:, index].float().cpu()

        if image is not None:
            cells = _occlude_picture(
                pixels, box, grid, batch_size, lambda pixels: logit(model.encode_image(pixels), read)
            )
        if text is not None:
            weights = _occlude_words(
                tokens, pieces, batch_size, lambda tokens: logit(seen, model.encode_text(**tokens))
            )
            words = [Word(text[slice(*span)], weight, span) for span, weight in zip(spans, weights, strict=True)]
        if image is not None and text is not None:
            without_image, without_text = (float(logit(*pair).sigmoid()) for pair in ((None, read), (seen, None)))
    return Explanation(
        label=names[index],
        score=float(logits[index].float().sigmoid()),
        threshold=model.config.thresholds_for(image is not None, text is not None)[index],
        image=picture,
        text=text,
        cells=cells,
        words=words,
        score_without_image=without_image,
        score_without_text=without_text,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and afterwards the modes of before, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _prepare_picture(image_processor: Any, image: Any) -> tuple[Image.Image, torch.Tensor, tuple[slice, slice]]:
    """The upright picture, its pixel values (1, 3, H, W), and the rows and columns of these that are no padding."""
    picture = image_processor.process_image(image_processor.fetch_images(image), do_convert_rgb=True)
    pixels = image_processor(picture, return_tensors="pt")["pixel_values"]
    white = image_processor(torch.full_like(picture, 255), do_normalize=False, return_tensors="pt")["pixel_values"]
    shown = white[0, 0] > 0.5
    rows, columns = (torch.nonzero(shown.any(axis)).flatten() for axis in (1, 0))
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return Image.fromarray(picture.permute(1, 2, 0).byte().numpy()), pixels, box


def _prepare_caption(
    tokenizer: Any, text: str, spans: list[tuple[int, int]], model: MMClfForImageTextClassification
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's inputs for the caption, and for each word in `spans` which tokens are pieces of it: (W, T)."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell which characters its tokens stand for")
    inputs = tokenizer(
        text,
        truncation=True,
        max_length=min(tokenizer.model_max_length, model.max_tokens),
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    starts, ends = inputs.pop("offset_mapping")[0].T
    first, last = torch.tensor(spans).T[..., None]
    pieces = (starts < last) & (ends > first) & (starts < ends)  # special tokens stand for no characters
    return {name: values.to(model.device) for name, values in inputs.items()}, pieces.to(model.device)


def _occlude_picture(
    pixels: torch.Tensor, box: tuple[slice, slice], grid: int, batch_size: int, logit: Callable
) -> np.ndarray:
    """How far `logit` of the pixels (1, 3, H, W) falls for each cell of their part `box`, float32 (rows, columns)."""
    inside = pixels[(0, ..., *box)]
    height, width = inside.shape[1:]
    paint = inside.mean((1, 2), keepdim=True)
    # windows of 3 x 3 cells, also over the edges, so that as many of them hide a cell at the edge as one inside
    near = []
    for edge in (height, width):
        count = max(1, round(min(grid, max(height, width)) * edge / max(height, width)))
        near.append((torch.arange(-1, count + 1)[:, None] - torch.arange(count)).abs() <= 1)
    windows = (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(0, 1).float()  # (N, rows, columns)

    before, falls = logit(pixels), []
    for batch in windows.split(batch_size):
        hidden = F.interpolate(batch[:, None], (height, width)).to(pixels.device).bool()
        variants = pixels.repeat(len(batch), 1, 1, 1)
        variants[(..., *box)] = torch.where(hidden, paint, inside)
        falls.append(before - logit(variants))
    return (torch.einsum("n,nrc->rc", torch.cat(falls), windows) / windows.sum(0)).numpy()


def _occlude_words(
    tokens: dict[str, torch.Tensor], pieces: torch.Tensor, batch_size: int, logit: Callable
) -> list[float]:
    """How far `logit` of the tokens (1, T) falls for each word; `pieces` (W, T) says which tokens it is made of."""
    before, weights = logit(tokens), []
    for batch in pieces.split(batch_size):
        variants = {name: values.expand(len(batch), -1) for name, values in tokens.items()}
        variants["attention_mask"] = torch.where(batch, 0, tokens["attention_mask"])
        falls = before - logit(variants)
        weights += torch.where(batch.any(1).cpu(), falls, 0).tolist()
    return weights
