"""Random changes of training images and texts.

These are classes and not closures, so workers that are started by spawn or forkserver can unpickle them. All random
numbers come from the global generator of torch. A data loader seeds it differently in every worker, and in the same
way in every run.
"""

import dataclasses
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["AugmentationArguments", "ImageAugmentation", "TextAugmentation"]


@dataclasses.dataclass
class AugmentationArguments:
    """
    The strengths of random changes of training rows. 0 switches a change off.

    Args:
        crop_scale (`float`, *optional*, defaults to 0.6):
            Smallest share of the area of an image that a random resized crop keeps.
        flip (`float`, *optional*, defaults to 0.5):
            Probability of mirroring an image left to right.
        vertical_flip (`float`, *optional*, defaults to 0.0):
            Probability of turning an image upside down.
        rotation (`float`, *optional*, defaults to 20.0):
            Largest rotation in either direction, in degrees.
        color_jitter (`float`, *optional*, defaults to 0.2):
            Largest relative change of brightness, contrast and saturation.
        swap_words (`float`, *optional*, defaults to 0.1):
            Probability for each word to change places with another word of the text.
        drop_words (`float`, *optional*, defaults to 0.0):
            Probability for each word to be left out.
    """

    _argument_group_name = "augmentation of training rows"

    crop_scale: float = 0.6
    flip: float = 0.5
    vertical_flip: float = 0.0
    rotation: float = 20.0
    color_jitter: float = 0.2
    swap_words: float = 0.1
    drop_words: float = 0.0


class ImageAugmentation:
    """
    Random resized crop, flips, rotation and colour jitter, then the normalisation of the image processor.

    The crop resizes the full-size image directly to the output size, so the other steps work on few pixels. When the
    crop is off, the image is resized as for evaluation (long edge to `size`, centred on a black square). With all
    changes at 0 the result is exactly that of the image processor.

    Args:
        processor ([`MMClfImageProcessor`]):
            Gives the size of the square output, the mean and standard deviation of the channels, and the filter of the
            resizing, which is always antialiased.
        strengths ([`AugmentationArguments`], *optional*):
            The strengths of the changes. Crops have aspect ratios between 3:4 and 4:3. The corners that a rotation
            uncovers are black. The hue stays: colours carry meaning, and changing it costs more time than all other
            steps together.

    Attributes:
        short_edge (`int`): A number of pixels of the short edge that is enough. JPEGs may be decoded to such a size.

    Raises:
        `ValueError`: If a probability or a share is not between 0 and 1, or if an amount is negative.
    """

    def __init__(self, processor: Any, strengths: AugmentationArguments | None = None):
        strengths = strengths or AugmentationArguments()
        if not 0 <= strengths.crop_scale <= 1:
            raise ValueError(f"`crop_scale` must be between 0 and 1, got {strengths.crop_scale}")
        size, resample = processor.size["longest_edge"], processor.resample
        self.short_edge = 2 * size  # crops are then rarely enlarged
        steps: list[Any] = [v2.PILToTensor()]
        if strengths.crop_scale:
            steps.append(v2.RandomResizedCrop(size, scale=(strengths.crop_scale, 1.0), interpolation=resample))
        else:
            steps += [_ResizeLongEdge(size, resample), v2.CenterCrop(size)]  # adds black to the short edge
        if strengths.flip:
            steps.append(v2.RandomHorizontalFlip(strengths.flip))
        if strengths.vertical_flip:
            steps.append(v2.RandomVerticalFlip(strengths.vertical_flip))
        steps.append(v2.ToDtype(torch.float32))  # one conversion, not one in each step below
        if strengths.rotation:  # uncovered corners are black
            steps.append(v2.RandomRotation(strengths.rotation, v2.InterpolationMode.BILINEAR, fill=None))
        if strengths.color_jitter:
            steps.append(_ColorJitter(*[strengths.color_jitter] * 3))
        # One step rescales and normalises, with the arithmetic of transformers: equal to the last bit.
        mean, std = ((255 * torch.tensor(values)).tolist() for values in (processor.image_mean, processor.image_std))
        self.transform = v2.Compose([*steps, v2.Normalize(mean, std, inplace=True)])

    def __call__(self, image: torch.Tensor | Image.Image) -> torch.Tensor:
        """
        Augment and normalise one image.

        Args:
            image (`torch.Tensor` or `PIL.Image.Image`): An upright RGB image of any size. A tensor is uint8 of shape
                `(3, height, width)`.

        Returns:
            `torch.Tensor`: float32 of shape `(3, size, size)`.
        """
        return self.transform(image)


class _ResizeLongEdge:
    # v2.Resize(None, max_size) rounds down, to 0 pixels for very long images; the image processor does not.
    def __init__(self, size: int, resample: int):
        self.size, self.resample = size, resample

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        long_edge = max(image.shape[-2:])
        size = [max(1, round(edge * self.size / long_edge)) for edge in image.shape[-2:]]
        return F.resize(image, size, interpolation=self.resample)


class _ColorJitter(v2.ColorJitter):
    # The same steps and random numbers, in place on float pixels from 0 to 255: allocations take most of the time.
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
    Randomly leave out and swap words (Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting
    Performance on Text Classification Tasks").

    Each word is left out with probability `drop`. Each remaining word changes places with another word of the text
    with probability `swap`. One word always remains. A text that does not change keeps its white space; in the others
    each run of white space becomes one space.

    Args:
        swap (`float`, *optional*, defaults to 0.1):
            Probability of a swap for each word: on average one swap in a text of ten words.
        drop (`float`, *optional*, defaults to 0.0):
            Probability for each word to be left out.

    Raises:
        `ValueError`: If a probability is not between 0 and 1.
    """

    def __init__(self, swap: float = 0.1, drop: float = 0.0):
        for name, value in {"swap": swap, "drop": drop}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {value}")
        self.swap, self.drop = swap, drop

    def __call__(self, text: str) -> str:
        """Return the text with some words left out and some swapped."""
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
