import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import AutoImageProcessor, BertTokenizer

from hf_mmclf.data.augmentation import AugmentationArguments
from hf_mmclf.data.collator import Collator, EvaluationImageTransform, Preprocessing, RowTransform
from hf_mmclf.model.image_processing_mmclf import MMClfImageProcessor
from hf_mmclf.model.processing_mmclf import MMClfProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "and", "cat"]
SIZE = 16


@pytest.fixture
def image_processor():
    return MMClfImageProcessor(size=SIZE)


@pytest.fixture
def processor(image_processor):
    return MMClfProcessor(image_processor, BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}))


def photo(width=20, height=10, seed=0):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def rows(tmp_path):
    """Rows with both modalities, without a text, without an image, and with a bad image."""
    photo().save(tmp_path / "a.png")
    photo(seed=1).save(tmp_path / "b.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    return Dataset.from_dict(
        {
            "image": ["a.png", "b.png", None, "bad.png"],
            "text": ["a dog", None, "a cat and a dog", "a cat"],
            "labels": [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]],
            "where": [f"rows.csv:{line}" for line in range(2, 6)],
        }
    )


# Rows


def test_rows_are_decoded_when_they_are_read(rows, tmp_path, image_processor):
    data = rows.with_transform(RowTransform(tmp_path, EvaluationImageTransform(image_processor)))
    assert set(data[0]) == {"text", "labels", "pixel_values"}
    assert data[0]["pixel_values"].shape == (3, SIZE, SIZE)
    assert data[1]["text"] is None and data[2]["pixel_values"] is None
    with pytest.raises(ValueError, match="^rows.csv:5: cannot read the image bad.png: "):
        data[3]
    assert data[0]["labels"] == [1.0, 0.0]  # the others can still be read


@pytest.mark.parametrize(("policy", "labels"), [("missing", [1.0, 1.0]), ("skip", [-1.0, -1.0])])
def test_an_image_that_became_unreadable_follows_the_policy(policy, labels, rows, tmp_path, image_processor, capsys):
    transform = RowTransform(tmp_path, EvaluationImageTransform(image_processor), bad_images=policy)
    data = rows.with_transform(transform)
    bad = data[3]
    assert bad["pixel_values"] is None and bad["text"] == "a cat" and list(bad["labels"]) == labels
    fate = "taken as missing" if policy == "missing" else "left out"
    assert f"Image became unreadable and is {fate}: rows.csv:5: " in capsys.readouterr().err
    assert [list(row["labels"]) for row in data.select(range(3))] == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    (tmp_path / "b.png").unlink()
    assert list(data[1]["labels"]) == [-1.0, -1.0]  # without a text, nothing is left of the row
    assert Preprocessing(MMClfProcessor(image_processor), tmp_path, policy).bad_images == "skip"


def test_without_an_image_transform_no_image_is_opened(rows, tmp_path):
    data = rows.with_transform(RowTransform(tmp_path / "nowhere"))
    assert [set(row) for row in data] == [{"text", "labels"}] * 4


def test_texts_are_transformed_unless_they_are_missing(rows, tmp_path):
    data = rows.with_transform(RowTransform(tmp_path, text=str.upper))
    assert [row["text"] for row in data] == ["A DOG", None, "A CAT AND A DOG", "A CAT"]


def test_images_in_the_table_give_what_files_give(rows, tmp_path, image_processor):
    transform = RowTransform(tmp_path, EvaluationImageTransform(image_processor))
    cells = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("a.png", "b.png")]
    stored = Dataset.from_dict({"image": cells, "text": ["x"] * 2, "where": ["x"] * 2})
    stored = stored.cast_column("image", Image(decode=False)).with_transform(transform)
    files = rows.with_transform(transform)
    for i in range(2):
        assert torch.equal(stored[i]["pixel_values"], files[i]["pixel_values"])


def test_training_transforms_can_be_pickled(rows, tmp_path, processor):
    transform = Preprocessing(processor, tmp_path).training(AugmentationArguments(swap_words=0.5))
    row = rows.with_transform(pickle.loads(pickle.dumps(transform)))[0]
    assert row["pixel_values"].shape == (3, SIZE, SIZE) and sorted(row["text"].split()) == ["a", "dog"]


# Preprocessing


def test_rows_to_evaluate_go_through_the_saved_image_processor(rows, tmp_path, processor):
    processor.image_processor.save_pretrained(tmp_path / "model")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "model")
    row = Preprocessing(processor, tmp_path).dataset(rows)[0]
    assert torch.equal(row["pixel_values"], loaded(photo(), return_tensors="pt").pixel_values[0])


def test_training_takes_the_strengths_of_the_arguments(rows, tmp_path, processor):
    preprocessing = Preprocessing(processor, tmp_path)
    off = dict.fromkeys(("crop_scale", "flip", "rotation", "color_jitter", "swap_words"), 0)
    plain = preprocessing.dataset(rows)[0]
    row = rows.with_transform(preprocessing.training(AugmentationArguments(**off)))[0]
    assert row["text"] == "a dog" and torch.equal(row["pixel_values"], plain["pixel_values"])
    flipped = preprocessing.training(AugmentationArguments(**{**off, "flip": 1}))
    assert torch.equal(rows.with_transform(flipped)[0]["pixel_values"], plain["pixel_values"].flip(-1))
    dropped = preprocessing.training(AugmentationArguments(**{**off, "drop_words": 1}))
    assert rows.with_transform(dropped)[0]["text"] in ("a", "dog")


def test_a_column_is_replaced_by_row(rows, tmp_path, processor):
    preprocessing = Preprocessing(processor, tmp_path)
    other = preprocessing.dataset(rows, "text", {"rows.csv:3": "a dog", "rows.csv:2": "a cat"})
    assert [other[i]["text"] for i in range(3)] == ["a cat", "a dog", None]
    assert torch.equal(other[0]["pixel_values"], preprocessing.dataset(rows)[0]["pixel_values"])
    without = preprocessing.dataset(rows, "image")
    assert [row["pixel_values"] for row in without] == [None] * 4  # the bad image is not opened either
    assert without[0]["text"] == "a dog"


def test_a_model_of_one_modality_has_no_transform_of_the_other(rows, tmp_path, processor):
    text_only = Preprocessing(MMClfProcessor(None, processor.tokenizer), tmp_path)
    assert set(text_only.dataset(rows)[3]) == {"text", "labels"}
    assert set(rows.with_transform(text_only.training(AugmentationArguments()))[3]) == {"text", "labels"}


# Batches


@pytest.mark.parametrize("start", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_give_the_batches_of_the_main_process(rows, tmp_path, processor, start):
    preprocessing = Preprocessing(processor, tmp_path)
    data = preprocessing.dataset(rows.select([0, 1, 2, 0]))
    options = {"batch_size": 2, "collate_fn": preprocessing.collator}
    alone = list(torch.utils.data.DataLoader(data, **options))
    shared = list(torch.utils.data.DataLoader(data, num_workers=2, multiprocessing_context=start, **options))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_a_bad_image_in_a_worker_is_named(rows, tmp_path, processor):
    preprocessing = Preprocessing(processor, tmp_path)
    loader = torch.utils.data.DataLoader(preprocessing.dataset(rows), num_workers=1, collate_fn=preprocessing.collator)
    with pytest.raises(ValueError, match="rows.csv:5: cannot read the image bad.png"):
        list(loader)


def test_a_missing_modality_is_blank_and_masked(processor):
    image = torch.randn(3, SIZE, SIZE)
    batch = Collator(processor)([{"text": "a dog", "pixel_values": None}, {"text": None, "pixel_values": image}])
    assert batch["image_mask"].tolist() == [False, True] and batch["text_mask"].tolist() == [True, False]
    assert not batch["pixel_values"][0].any() and torch.equal(batch["pixel_values"][1], image)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3], [2, 3, 0, 0]]  # padded to the longest of the batch
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert "labels" not in batch


def test_a_model_of_one_modality_gets_no_inputs_of_the_other(processor):
    rows = [{"text": "a dog", "pixel_values": torch.zeros(3, SIZE, SIZE), "labels": [1, 0]}]
    image, text = MMClfProcessor(processor.image_processor), MMClfProcessor(None, processor.tokenizer)
    assert set(Collator(image)(rows)) == {"pixel_values", "image_mask", "labels"}
    assert set(Collator(text)(rows)) == {"input_ids", "token_type_ids", "attention_mask", "text_mask", "labels"}


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_labels_are_one_float_matrix(processor, convert):
    rows = [{"text": "a", "labels": convert([1, 0, 1])}, {"text": "a", "labels": convert([0, 0, 0])}]
    labels = Collator(processor)(rows)["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == [[1, 0, 1], [0, 0, 0]]
