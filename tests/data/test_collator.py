import io
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import AutoImageProcessor, BertTokenizer

from hf_mmclf.data.augmentation import ImageAugmentation, TextAugmentation
from hf_mmclf.data.collator import Collator, EvaluationImageTransform, RowTransform, is_absent, open_image
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "and", "cat"]
SIZE = 16


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})


@pytest.fixture
def processor():
    return MMClfImageProcessor(size=SIZE)


def photo(width=20, height=10, seed=0):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def rows(tmp_path):
    """Rows with a picture and caption, no caption, no picture, and with a picture that is none."""
    photo().save(tmp_path / "a.png")
    photo(seed=1).save(tmp_path / "b.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return Dataset.from_dict(
        {
            "image": ["a.png", "b.png", None, "bad.png"],
            "text": ["a dog", None, "a cat and a dog", "a cat"],
            "labels": [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]],
            "where": [f"rows.csv:{line}" for line in range(2, 6)],
        }
    )


# One picture


@pytest.mark.parametrize(
    "image, absent",
    [
        (None, True),
        ({"bytes": None, "path": None}, True),
        ({"bytes": None, "path": ""}, True),
        ("a.png", False),
        ({"bytes": None, "path": "a.png"}, False),
        ({"bytes": b"", "path": None}, False),  # a picture that cannot be read, not none
    ],
)
def test_what_counts_as_no_picture(image, absent):
    assert is_absent(image) == absent


def test_pictures_are_opened_upright(tmp_path):
    image = PILImage.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))  # the corner that goes to the upper right
    exif = PILImage.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    for cell in ("turned.png", {"bytes": (tmp_path / "turned.png").read_bytes(), "path": None}):
        upright = open_image(cell, tmp_path, "here")
        assert upright.shape == (3, 8, 4) and upright[:, 0, 3].tolist() == [255] * 3
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image("turned.jpg", tmp_path, "here").shape == (3, 8, 4)


def test_a_file_that_has_gone_is_an_error_like_others(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv:2: cannot read the picture gone.png: .*No such file"):
        open_image("gone.png", tmp_path, "t.csv:2")


# Rows


def test_rows_are_decoded_when_they_are_asked_for(rows, tmp_path, processor):
    data = rows.with_transform(RowTransform(tmp_path, EvaluationImageTransform(processor)))
    assert set(data[0]) == {"text", "labels", "pixel_values"}
    assert data[0]["pixel_values"].shape == (3, SIZE, SIZE)
    assert data[1]["text"] is None and data[2]["pixel_values"] is None
    with pytest.raises(ValueError, match="^rows.csv:5: cannot read the picture bad.png: not a picture"):
        data[3]
    assert data[0]["labels"] == [1.0, 0.0]  # the others still come


def test_without_an_image_transform_no_picture_is_opened(rows, tmp_path):
    data = rows.with_transform(RowTransform(tmp_path / "nowhere"))
    assert [set(row) for row in data] == [{"text", "labels"}] * 4


def test_captions_are_transformed_where_there_are_any(rows, tmp_path):
    data = rows.with_transform(RowTransform(tmp_path, text=str.upper))
    assert [row["text"] for row in data] == ["A DOG", None, "A CAT AND A DOG", "A CAT"]


def test_pictures_in_the_table_give_what_files_give(rows, tmp_path, processor):
    transform = RowTransform(tmp_path, EvaluationImageTransform(processor))
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    stored = Dataset.from_dict({"image": cells, "text": ["x"] * 2, "where": ["x"] * 2})
    stored = stored.cast_column("image", Image(decode=False)).with_transform(transform)
    files = rows.with_transform(transform)
    for i in range(2):
        assert torch.equal(stored[i]["pixel_values"], files[i]["pixel_values"])


def test_evaluation_is_the_saved_image_processor_and_nothing_else(rows, tmp_path, processor):
    processor.save_pretrained(tmp_path / "model")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "model")
    row = rows.with_transform(RowTransform(tmp_path, EvaluationImageTransform(processor)))[0]
    assert torch.equal(row["pixel_values"], loaded(photo(), return_tensors="pt").pixel_values[0])


@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_give_the_batches_of_the_main_process(rows, tmp_path, processor, tokenizer, start):
    data = rows.select([0, 1, 2, 0]).with_transform(RowTransform(tmp_path, EvaluationImageTransform(processor)))
    options = {"batch_size": 2, "collate_fn": Collator(tokenizer, image_size=SIZE)}
    alone = list(torch.utils.data.DataLoader(data, **options))
    shared = list(torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context=start, **options))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_bad_picture_in_a_worker_is_named(rows, tmp_path, processor):
    data = rows.with_transform(RowTransform(tmp_path, EvaluationImageTransform(processor)))
    loader = torch.utils.data.DataLoader(data, num_workers=1, collate_fn=Collator(image_size=SIZE))
    with pytest.raises(ValueError, match="rows.csv:5: cannot read the picture bad.png"):
        list(loader)


def test_training_transforms_can_be_pickled(rows, tmp_path, processor):
    transform = RowTransform(tmp_path, ImageAugmentation.from_processor(processor), TextAugmentation(0.5))
    row = rows.with_transform(pickle.loads(pickle.dumps(transform)))[0]
    assert row["pixel_values"].shape == (3, SIZE, SIZE) and sorted(row["text"].split()) == ["a", "dog"]


# Batches


def test_captions_are_padded_to_the_longest_of_the_batch(tokenizer):
    collate = Collator(tokenizer)
    batch = collate([{"text": "a dog"}, {"text": "a cat and a dog"}])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 0, 0, 0], [2, 5, 8, 7, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0], [1] * 7]
    assert collate([{"text": "a dog"}])["input_ids"].shape == (1, 4)


def test_captions_are_cut_to_max_tokens(tokenizer):
    batch = Collator(tokenizer, max_tokens=5)([{"text": "a dog " * 100}, {"text": "a"}])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 5, 3], [2, 5, 3, 0, 0]]


def test_what_is_absent_is_blank_and_masked(tokenizer):
    picture = torch.randn(3, SIZE, SIZE)
    rows = [
        {"text": "a dog", "pixel_values": None},
        {"text": None, "pixel_values": picture},
        {"text": "a cat", "pixel_values": picture},
    ]
    batch = Collator(tokenizer, image_size=SIZE)(rows)
    assert batch["image_mask"].tolist() == [False, True, True] and batch["text_mask"].tolist() == [True, False, True]
    assert batch["image_mask"].dtype == batch["text_mask"].dtype == torch.bool
    assert not batch["pixel_values"][0].any() and torch.equal(batch["pixel_values"][1], picture)
    assert batch["input_ids"][1].tolist() == [2, 3, 0, 0]
    assert "labels" not in batch


def test_a_batch_in_which_all_is_absent(tokenizer):
    batch = Collator(tokenizer, image_size=SIZE)([{"text": None, "pixel_values": None}] * 2)
    assert batch["pixel_values"].shape == (2, 3, SIZE, SIZE) and not batch["image_mask"].any()
    assert batch["input_ids"].tolist() == [[2, 3]] * 2 and not batch["text_mask"].any()


def test_models_of_one_modality_get_that_only(tokenizer):
    rows = [{"text": "a dog", "pixel_values": torch.zeros(3, SIZE, SIZE), "labels": [1, 0]}]
    assert set(Collator(image_size=SIZE)(rows)) == {"pixel_values", "image_mask", "labels"}
    assert set(Collator(tokenizer)(rows)) == {"input_ids", "token_type_ids", "attention_mask", "text_mask", "labels"}


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_labels_are_one_float_matrix(tokenizer, convert):
    rows = [{"text": "a", "labels": convert([1, 0, 1])}, {"text": "a", "labels": convert([0, 0, 0])}]
    labels = Collator(tokenizer)(rows)["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_a_truncated_jpeg_in_the_table_is_named(tmp_path):
    file = io.BytesIO()
    photo(640, 480).save(file, "jpeg")
    with pytest.raises(ValueError, match="t.csv:2: cannot read the picture in the table: .*truncated"):
        open_image({"bytes": file.getvalue()[:2000], "path": None}, tmp_path, "t.csv:2")
