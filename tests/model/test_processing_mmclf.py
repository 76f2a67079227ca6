import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.tiny_folder import CAPTIONS, write_folder
from transformers import AutoProcessor

from hf_mmclf import MMClfForImageTextClassification, MMClfImageProcessor, MMClfProcessor
from hf_mmclf.data.tokenizer import load_tokenizer

IMAGES = [Image.new("RGB", (30, 20 + row), color) for row, color in enumerate(("red", "lime", "blue"))]
TEXTS = ["a dog", "a man on a dog and dogs", "no"]


@pytest.fixture(scope="module")
def processor():
    return MMClfProcessor(MMClfImageProcessor(size=32), load_tokenizer("train", CAPTIONS, 60)[0])


def test_a_batch_is_what_its_parts_make(processor):
    inputs = processor(images=IMAGES, text=TEXTS)
    expected = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected["pixel_values"] = processor.image_processor(IMAGES, return_tensors="pt")["pixel_values"]
    expected["image_mask"] = expected["text_mask"] = torch.ones(3, dtype=torch.bool)
    assert set(inputs) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(inputs[name], values, rtol=0, atol=0)


def test_one_row_is_a_batch_of_one(processor):
    expected = processor(images=IMAGES[:1], text=TEXTS[:1])
    array = np.array(IMAGES[0])
    for image in (IMAGES[0], array, torch.from_numpy(array), array[None], (IMAGES[0],)):
        inputs = processor(images=image, text=TEXTS[0])
        assert all(torch.equal(inputs[name], values) for name, values in expected.items())


def test_a_missing_modality_is_masked(processor, notices):
    inputs = processor(images=[None, IMAGES[1], None], text=[TEXTS[0], None, " \n"])
    assert inputs["image_mask"].tolist() == [False, True, False]
    assert inputs["text_mask"].tolist() == [True, False, False]
    assert not inputs["pixel_values"][[0, 2]].any()
    assert torch.equal(inputs["pixel_values"][1:2], processor(images=IMAGES[1])["pixel_values"])
    assert set(processor(images=IMAGES)) == {"pixel_values", "image_mask"}
    assert set(processor(text=TEXTS)) == {"input_ids", "attention_mask", "token_type_ids", "text_mask"}
    notices()
    assert not processor(images=[None], text="a")["image_mask"].any()
    assert notices() == []


def test_long_texts_are_truncated(processor):
    assert processor(text="a man " * 20, max_length=8)["input_ids"].shape == (1, 8)
    limited = MMClfProcessor(tokenizer=load_tokenizer("train", CAPTIONS, 60)[0])
    limited.tokenizer.model_max_length = 5
    assert limited(text=["a man " * 20, "a"])["input_ids"].shape == (2, 5)


def test_arrays_instead_of_tensors(processor):
    tensors, arrays = (processor(images=IMAGES, text=TEXTS, return_tensors=kind) for kind in ("pt", "np"))
    for name, values in arrays.items():
        assert isinstance(values, np.ndarray)
        np.testing.assert_array_equal(values, tensors[name].numpy())


def test_keywords_of_transformers_processors(processor):
    text = processor(text=["a dog", "a man on a dog"], padding="max_length", max_length=9, truncation=True)
    assert text["input_ids"].shape == (2, 9)
    nested = dict(images_kwargs={"do_normalize": False, "size": 16}, text_kwargs={"return_token_type_ids": False})
    inputs = processor(images=[IMAGES[0], None], text=TEXTS[:2], **nested)
    assert inputs["pixel_values"].shape == (2, 3, 16, 16) and inputs["pixel_values"].max() == 1
    assert "token_type_ids" not in inputs
    assert processor(images=[None], text="a", size=16)["pixel_values"].shape == (1, 3, 16, 16)
    assert processor(images=IMAGES[0], device="meta")["pixel_values"].device.type == "meta"
    lists = processor(images=IMAGES, text=TEXTS, padding=False, return_tensors=None)
    assert [len(ids) for ids in lists["input_ids"]] == [4, 9, 3] and isinstance(lists["pixel_values"], list)
    assert set(inputs) | {"token_type_ids"} == set(processor.model_input_names)


@pytest.mark.parametrize(
    "given, name",
    [
        ({"paddding": True}, "paddding"),
        ({"text_kwargs": {"max_len": 3}}, "max_len"),
        ({"images_kwargs": {"colour": 1}}, "colour"),
        ({"videos": []}, "videos"),
        ({"is_split_into_words": True}, "is_split_into_words"),
    ],
)
def test_unknown_keywords_are_errors(given, name, processor):
    with pytest.raises(TypeError, match=rf"got the unknown arguments \['{name}'\]; expected some of"):
        processor(images=IMAGES, text=TEXTS, **given)
    with pytest.raises(TypeError, match="got the unknown arguments"):
        MMClfProcessor(tokenizer=processor.tokenizer)(text=TEXTS, do_resize=False)


@pytest.mark.parametrize("column", [tuple, np.array, pd.Series, lambda texts: np.array(texts, dtype=object)])
def test_columns_of_any_kind(column, processor):
    expected = processor(images=IMAGES, text=TEXTS)
    inputs = processor(images=pd.Series(IMAGES), text=column(TEXTS))
    assert all(torch.equal(inputs[name], values) for name, values in expected.items())


@pytest.mark.parametrize("missing", [None, float("nan"), np.float64("nan"), pd.NA])
def test_missing_cells_of_tables(missing, processor):
    texts = pd.Series(["a dog", missing], dtype=object)
    assert processor(text=texts)["text_mask"].tolist() == [True, False]
    images = pd.Series([IMAGES[0], missing], dtype=object)
    assert processor(images=images, text=TEXTS[:2])["image_mask"].tolist() == [True, False]


def test_a_list_of_images_for_each_text(processor):
    inputs = processor(images=[[IMAGES[0]], []], text=TEXTS[:2])
    assert inputs["image_mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match="row 1 has 2 images; expected one"):
        processor(images=[[IMAGES[0]], IMAGES[:2]], text=TEXTS[:2])


def test_a_text_that_is_none_is_named(processor):
    with pytest.raises(ValueError, match="row 1: the text is int; expected a string"):
        processor(text=["a", 3])


def test_bad_input_is_named(processor):
    with pytest.raises(ValueError, match="neither image_processor nor tokenizer"):
        MMClfProcessor()
    for nothing in ({}, dict(images=[], text=[])):
        with pytest.raises(ValueError, match="neither images nor text"):
            processor(**nothing)
    with pytest.raises(ValueError, match="got 3 images and 1 texts; expected the same number"):
        processor(images=IMAGES, text="a dog")
    with pytest.raises(ValueError, match="got images, but this model has no image backbone"):
        MMClfProcessor(tokenizer=processor.tokenizer)(images=IMAGES, text=TEXTS)
    with pytest.raises(ValueError, match="got text, but this model has no text backbone"):
        MMClfProcessor(processor.image_processor)(images=IMAGES, text=TEXTS)


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    """Also from a folder that only the parts have written."""
    folder = write_folder(tmp_path / "model", kind)
    first = AutoProcessor.from_pretrained(folder)
    assert isinstance(first, MMClfProcessor)
    assert (first.image_processor is None, first.tokenizer is None) == (kind == "text", kind == "image")
    first.save_pretrained(tmp_path / "saved")
    second = MMClfProcessor.from_pretrained(tmp_path / "saved")
    rows = {**({} if kind == "text" else {"images": IMAGES}), **({} if kind == "image" else {"text": TEXTS})}
    inputs, again = first(**rows), second(**rows)
    assert set(inputs) == set(again)
    assert all(torch.equal(inputs[name], values) for name, values in again.items())
    model = MMClfForImageTextClassification.from_pretrained(folder)
    assert model(**inputs).logits.shape == (3, 3)
    assert type(first).__name__ in repr(first)


def test_a_folder_without_parts_is_named(tmp_path):
    with pytest.raises(OSError, match=r"neither an image processor .* nor a tokenizer .* is there"):
        MMClfProcessor.from_pretrained(tmp_path)


def test_a_sub_folder(tmp_path):
    write_folder(tmp_path / "inner")
    processor = AutoProcessor.from_pretrained(tmp_path / "inner")
    processor.save_pretrained(tmp_path / "saved" / "inner")
    for folder in (tmp_path, tmp_path / "saved"):
        again = MMClfProcessor.from_pretrained(folder, subfolder="inner", do_normalize=False)
        assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert again.image_processor.size == processor.image_processor.size and not again.image_processor.do_normalize


def test_push_to_hub(hub, tmp_path):
    code = """
import sys
from hf_mmclf import MMClfProcessor
processor = MMClfProcessor.from_pretrained(sys.argv[1])
processor.push_to_hub("user/new", token=sys.argv[2])
again = MMClfProcessor.from_pretrained("user/new", token=sys.argv[2])
assert again.to_dict() == processor.to_dict() and again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
"""
    command = [sys.executable, "-c", code, str(write_folder(tmp_path / "model")), hub.token]
    child = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
