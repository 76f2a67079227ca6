"""Output folders without training: tiny models with random weights, and rows to show them."""

from pathlib import Path

import torch
from PIL import Image

from hf_mmclf import MMClfConfig, MMClfForImageTextClassification, MMClfImageProcessor
from hf_mmclf.data.tokenizer import load_tokenizer

CAPTIONS = ["a dog", "a man on a dog", 'a man says "no, dog" to a man', "dogs and a man and dogs on a man", "no man"]
LABELS = ["1 3", "10", "1 3 10", "3", "1"]
COLORS = ["red", "lime", "blue", "white", "orange"]
NAMES = {0: "person", 1: "traffic light", 2: "dog"}
TEXT = dict(
    model_type="bert",
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.5,  # so that texts tell rows apart
)


def write_folder(folder: Path, kind: str = "both", **fields) -> Path:
    """A folder as training leaves it, for a model of `kind` "both", "image" or "text" whose scores differ by row."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("train", CAPTIONS, 60)[0]
    if kind != "image":
        fields["text_config"] = dict(TEXT, vocab_size=len(tokenizer))
        tokenizer.model_max_length = TEXT["max_position_embeddings"]
        tokenizer.save_pretrained(folder)
    if kind != "text":
        fields["image_backbone"] = "test_resnet"
        MMClfImageProcessor(size=32).save_pretrained(folder)
    config = MMClfConfig(width=8, id2label=NAMES, label_ids=["1", "3", "10"], **fields)
    model = MMClfForImageTextClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(6)  # scores all over the range, not all near 0.5
    model.save_pretrained(folder)
    return folder


def write_table(folder: Path, name: str = "train.csv", labelled: bool = True) -> Path:
    """A table in the competition's form, and its images next to it."""
    lines = ["ImageID,Labels,Caption" if labelled else "ImageID,Caption"]
    for row, (caption, labels, color) in enumerate(zip(CAPTIONS, LABELS, COLORS, strict=True)):
        Image.new("RGB", (20 + 5 * row, 30), color).save(folder / f"{row}.jpg")
        lines.append(f"{row}.jpg,{labels},{caption}" if labelled else f"{row}.jpg,{caption}")
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name
