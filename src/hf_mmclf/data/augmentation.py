"""Random changes to training images and captions.

Classes rather than closures, so that workers started by spawn or forkserver can unpickle them. All draws come from
torch's global generator, which a data loader seeds differently in every worker and reproducibly in every run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["AugmentationArguments", "ImageAugmentation", "TextAugmentation"]


def _field(default: float, text: str) -> float:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class AugmentationArguments:
    """Random changes to training rows; 0 switches each off."""

    _argument_group_name = "augmentation of training rows"
    crop_scale: float = _field(0.6, "Smallest share of a picture's area that a random resized crop keeps.")
    flip: float = _field(0.5, "Probability of mirroring left and right.")
    vertical_flip: float = _field(0.0, "Probability of turning upside down.")
    rotation: float = _field(20.0, "Largest rotation either way, in degrees.")
    color_jitter: float = _field(0.2, "Largest relative change of brightness, contrast and saturation.")
    swap_words: float = _field(0.1, "Probability for each word to change places with another.")
    drop_words: float = _field(0.0, "Probability for each word to be left out.")


class ImageAugmentation:
    """
    Random resized crop, flips, rotation and colour jitter, then the processor's normalisation.

    The crop takes the full-size picture straight to the output size, so the other steps work on few pixels. It thereby
    replaces the resizing of evaluation (long edge to `size`, centred on a black square), which takes its place when
    the crop is off. With every switch at 0 the result is exactly that of the image processor.

    Args:
        size (`int`):
            Side of the square output in pixels.
        mean, std (`Sequence[float]`):
            Mean and standard deviation of the three channels, in units of the 0 to 1 range.
        resample (`PIL.Image.Resampling` or `int`, *optional*, defaults to bicubic):
            Filter of the resizing; always antialiased.
        crop_scale (`float`, *optional*, defaults to 0.6):
            Smallest share of the picture's area that a crop keeps, at most 1; aspect ratios 3:4 to 4:3. 0: no crop.
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring left and right.
        vertical_flip (`float`, *optional*, defaults to 0.0):
            Probability of turning top and bottom. Off by default: photographs are not met upside down.
        rotation (`float`, *optional*, defaults to 20.0):
            Largest rotation either way in degrees; uncovered corners are black. 0: none.
        color_jitter (`float`, *optional*, defaults to 0.2):
            Largest relative change of brightness, contrast and saturation, each drawn on its own; 0: none. The hue
            stays: colours carry meaning, and shifting it costs more than all other steps together.

    Attributes:
        short_edge (`int`): Pixels of the short edge that are enough: large JPEGs may be decoded to a smaller scale.

    Raises:
        `ValueError`: for a probability or a share outside 0 to 1, or a negative amount.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        resample: int = Image.Resampling.BICUBIC,
        crop_scale: float = 0.6,
        flip: float = 0.5,
        vertical_flip: float = 0.0,
        rotation: float = 20.0,
        color_jitter: float = 0.2,
    ):
        if not 0 <= crop_scale <= 1:
            raise ValueError(f"`crop_scale` must lie between 0 and 1, got {crop_scale}")
        self.short_edge = 2 * size  # so that also crops are made smaller, not larger
        steps: list[Any] = [v2.PILToTensor()]
        if crop_scale:
            steps.append(v2.RandomResizedCrop(size, scale=(crop_scale, 1.0), interpolation=resample))
        else:
            steps += [_ResizeLongEdge(size, resample), v2.CenterCrop(size)]  # pads with black what is smaller
        if flip:
            steps.append(v2.RandomHorizontalFlip(flip))
        if vertical_flip:
            steps.append(v2.RandomVerticalFlip(vertical_flip))
        steps.append(v2.ToDtype(torch.float32))  # the steps below would convert back and forth
        if rotation:
            steps.append(v2.RandomRotation(rotation, v2.InterpolationMode.BILINEAR, fill=None))  # outside is black
        if color_jitter:
            steps.append(_ColorJitter(color_jitter, color_jitter, color_jitter))
        # Rescaling and normalising in one step, in the arithmetic of transformers: equal to the last bit.
        mean, std = ((255 * torch.tensor(values)).tolist() for values in (mean, std))
        self.transform = v2.Compose([*steps, v2.Normalize(mean, std, inplace=True)])

    @classmethod
    def from_processor(cls, processor: Any, **switches: float) -> "ImageAugmentation":
        """Take size, mean, std and resample from an image processor; `switches` are the other arguments."""
        size, resample = processor.size["longest_edge"], processor.resample
        return cls(size, processor.image_mean, processor.image_std, resample=resample, **switches)

    def __call__(self, image: torch.Tensor | Image.Image) -> torch.Tensor:
        """Turn an upright RGB picture of any size into a float32 tensor of shape (3, size, size), normalised.

        A tensor has pixels from 0 to 255, in uint8, and the shape (3, height, width).
        """
        return self.transform(image)


class _ResizeLongEdge:
    # v2.Resize(None, max_size) rounds down, to 0 pixels for very long pictures; the image processor does not.
    def __init__(self, size: int, resample: int):
        self.size, self.resample = size, resample

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        long_edge = max(image.shape[-2:])
        size = [max(1, round(edge * self.size / long_edge)) for edge in image.shape[-2:]]
        return F.resize(image, size, interpolation=self.resample)


class _ColorJitter(v2.ColorJitter):
    # The same steps and draws, in place on float pixels from 0 to 255: allocating each result takes most of the time.
    def transform(self, image: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        for step in params["fn_idx"].tolist():
            if step == 0:
                image.mul_(params["brightness_factor"]).clamp_(0, 255)
            elif step in (1, 2):
                gray = F.rgb_to_grayscale(image)
                factor = params["saturation_factor"] if step == 2 else params["contrast_factor"]
                image.mul_(factor).add_(gray if step == 2 else gray.mean(), alpha=1 - factor).clamp_(0, 255)
        return image


class TextAugmentation:
    """
    Random swaps and losses of words, after Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting
    Performance on Text Classification Tasks": each word, with probability `drop`, is left out, and each that stays,
    with probability `swap`, changes places with another word of the caption.

    Captions in which nothing is drawn, or of a single word, come back as they are; in the others any run of white
    space becomes one space. One word always stays.

    Args:
        swap (`float`, *optional*, defaults to 0.1):
            Probability of a swap for each word: on average one swap in a caption of ten words. 0: none.
        drop (`float`, *optional*, defaults to 0.0):
            Probability of each word to be left out. 0: none.

    Raises:
        `ValueError`: for a probability outside 0 to 1.
    """

    def __init__(self, swap: float = 0.1, drop: float = 0.0):
        for name, value in {"swap": swap, "drop": drop}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value}")
        self.swap, self.drop = swap, drop

    def __call__(self, text: str) -> str:
        """Return `text` with some of its words left out and some swapped."""
        words = text.split()
        if self.drop and len(words) > 1:
            kept = torch.rand(len(words)) >= self.drop
            kept[torch.randint(len(words), ())] |= not kept.any()
            if not kept.all():
                words = [word for word, stays in zip(words, kept.tolist(), strict=True) if stays]
                text = " ".join(words)
        swapped = torch.nonzero(torch.rand(len(words)) < self.swap).flatten().tolist()
        if len(words) < 2 or not swapped:
            return text
        for i in swapped:
            j = (i + int(torch.randint(1, len(words), ()))) % len(words)  # any word but the i-th
            words[i], words[j] = words[j], words[i]
        return " ".join(words)
