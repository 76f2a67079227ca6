"""The loop that people write by hand, in plain PyTorch: the baseline of the speed measurements.

It works like the poster's code: PIL augments the images at full size and resizes them afterwards, texts are padded to
one constant length (the characters of the longest), frozen parameters have no gradient but BatchNorm stays in training
mode, and there are two loader workers, fp32, the default memory format and plain AdamW. It does not use the package. A
row is a mapping with `image` (file name), `text` and `labels` (multi-hot).
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


def augmentation(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: float,
    flip: float,
    vertical_flip: float,
    rotation: float,
    color_jitter: float,
) -> transforms.Compose:
    """Return the poster's steps in its order. The arguments are named as in `hf_mmclf.AugmentationArguments`."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.RandomHorizontalFlip(flip),
            transforms.RandomVerticalFlip(vertical_flip),
            transforms.RandomRotation(rotation),
            transforms.ColorJitter(color_jitter, color_jitter, color_jitter),
            # long edge to `size`, centred on black
            partial(ImageOps.pad, size=(size, size), method=Image.Resampling.BICUBIC, color="black"),
            transforms.RandomResizedCrop(size, scale=(crop_scale, 1.0), interpolation=bicubic),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def swap_words(text: str, probability: float) -> str:
    """Swap each word with a random one, with this probability."""
    words = text.split()
    for i in range(len(words)):
        if random.random() < probability:
            j = random.randrange(len(words))
            words[i], words[j] = words[j], words[i]
    return " ".join(words)


class ImageTextRows(Dataset):
    """Rows as tensors, one at a time. Texts are padded to the number of characters of the longest."""

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        folder: Path,
        transform: Any,
        tokenizer: Any,
        positions: int,
        swap: float,
    ):
        self.rows, self.folder, self.transform, self.tokenizer, self.swap = rows, folder, transform, tokenizer, swap
        self.length = min(positions, max(len(row["text"]) for row in rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        tokens = self.tokenizer(
            swap_words(row["text"], self.swap),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return {
            "pixel_values": self.transform(Image.open(self.folder / row["image"]).convert("RGB")),
            "input_ids": tokens["input_ids"][0],
            "attention_mask": tokens["attention_mask"][0],
            "labels": torch.tensor(row["labels"], dtype=torch.float32),
        }


def loader(dataset: Dataset, batch_size: int, workers: int = 2) -> DataLoader:
    """Return a loader of shuffled batches."""
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=workers)


def frozen_by_hand(model: nn.Module) -> nn.Module:
    """Copy a model and freeze it as people do: every part stays in the graph and in training mode."""
    config = copy.deepcopy(model.config)
    config.unfrozen_image_stages = config.unfrozen_text_layers = None
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad = name in trained
    return plain


def train(model: nn.Module, batches: DataLoader, learning_rate: float = 1e-4) -> Iterator[float]:
    """Train one epoch and yield the loss after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    criterion = nn.BCEWithLogitsLoss()
    model.train()
    for batch in batches:
        labels = batch.pop("labels")
        optimizer.zero_grad()
        loss = criterion(model(**batch).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
