import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from support.tiny_folder import CAPTIONS, NAMES, write_folder, write_table

import hf_mmclf
from hf_mmclf import (
    ImageTextClassificationPipeline,
    MMClfConfig,
    MMClfForImageTextClassification,
    MMClfProcessor,
    Predictor,
)
from hf_mmclf.model.pipeline_mmclf import TASK

KINDS = ["both", "image", "text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind, threshold=0.4) for kind in KINDS}


@pytest.fixture(scope="module")
def pipes(folders):
    return {kind: hf_mmclf.pipeline(folder, device="cpu") for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def pipe(pipes):
    return pipes["both"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    write_table(folder)
    return [str(folder / f"{row}.jpg") for row in range(len(CAPTIONS))]


@pytest.fixture(scope="module")
def records(images):
    return [{"image": image, "text": text} for image, text in zip(images, CAPTIONS, strict=True)]


def close(given, expected):
    """Whether two results have the same labels, in the same order, with the same scores."""
    if isinstance(expected[0], list) if expected else False:
        return len(given) == len(expected) and all(map(close, given, expected))
    same = [row["label"] for row in given] == [row["label"] for row in expected]
    return same and np.allclose([row["score"] for row in given], [row["score"] for row in expected], atol=1e-6)


@pytest.fixture(scope="module")
def expected(folders, records):
    """All scores of each record, by a forward pass without our data code."""
    model, processor = Predictor.load(folders["both"]).model, Predictor.load(folders["both"]).processor
    results = []
    for record in records:
        inputs = processor.image_processor(Image.open(record["image"]), return_tensors="pt")
        inputs |= processor.tokenizer(record["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            scores = model(**inputs).logits[0].sigmoid().tolist()
        ranked = sorted(zip(scores, NAMES.values(), strict=True), reverse=True)
        results.append([{"label": label, "score": score} for score, label in ranked])
    return results


def above(results, threshold):
    return [[row for row in result if row["score"] >= threshold] for result in results]


# What it takes


def test_one_record(pipe, records, expected):
    for record, result in zip(records, expected, strict=True):
        assert close(pipe(record, return_all_scores=True), result)
        assert close(pipe(**record, return_all_scores=True), result)
        assert close(pipe(record), above([result], 0.4)[0])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_records_do_not_depend_on_their_batch(batch_size, pipe, records, images, expected):
    options = dict(batch_size=batch_size, return_all_scores=True)
    table = Dataset.from_dict({"image": images, "text": CAPTIONS})
    decoded = table.cast_column("image", ImageColumn())
    assert close(pipe(records, **options), expected)
    assert close(pipe(tuple(records), **options), expected)
    assert close(pipe(image=images, text=CAPTIONS, **options), expected)
    assert close(pipe(image=table["image"], text=table["text"], **options), expected)
    assert close(pipe(image=decoded["image"], text=decoded["text"], **options), expected)
    assert close(pipe(table, **options), expected)
    lazy = pipe((record for record in records), **options)
    assert not isinstance(lazy, list)
    assert close(list(lazy), expected)
    assert close(list(pipe(iter(records), **options)), expected)


def test_a_generator_is_read_as_it_is_used(pipe, records):
    endless = itertools.cycle(records)
    taken = list(itertools.islice(iter(pipe(endless, batch_size=2)), 7))
    assert close(taken[5:], taken[:2])


def test_workers_change_nothing(pipe, records, expected):
    assert close(pipe(records, batch_size=2, num_workers=1, return_all_scores=True), expected)


def test_every_form_of_an_image(pipe, images, expected):
    path = images[2]
    opened = Image.open(path)
    data = Path(path).read_bytes()
    table = Dataset.from_dict({"image": [path]}, features=Features({"image": ImageColumn(decode=False)}))
    array = np.array(opened)
    forms = [opened, data, bytearray(data), array, torch.from_numpy(array), table[0]["image"], {"bytes": data}]
    for form in forms:
        assert close(pipe(image=form, text=CAPTIONS[2], return_all_scores=True), expected[2])
    columns = dict(image=[array, array], text=[CAPTIONS[2]] * 2)
    assert close(pipe(**columns, return_all_scores=True), [expected[2]] * 2)
    columns["image"] = np.stack([array, array])
    assert close(pipe(**columns, return_all_scores=True), [expected[2]] * 2)


def test_tables_of_pandas_are_read_by_place(pipe, records, expected):
    frame = pd.DataFrame(records).iloc[[2, 0, 1]]  # its index is 2, 0, 1
    wanted = [expected[row] for row in (2, 0, 1)]
    assert close(pipe(frame, return_all_scores=True), wanted)
    assert close(pipe(image=frame["image"], text=frame["text"], return_all_scores=True), wanted)


def test_a_pipeline_of_remote_code_saves_its_code(pipe, tmp_path, records):
    """A class that was loaded from a folder saves its code too."""
    pipe.save_pretrained(tmp_path / "first")
    remote = transformers.pipeline(TASK, model=str(tmp_path / "first"), trust_remote_code=True, device="cpu")
    assert type(remote) is not ImageTextClassificationPipeline
    remote.save_pretrained(tmp_path / "second")
    again = transformers.pipeline(TASK, model=str(tmp_path / "second"), trust_remote_code=True, device="cpu")
    assert close(again(records), pipe(records))


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_longest_text_of_a_text_backbone(model_type, tmp_path):
    """RoBERTa's first position has the number after the padding's; its tokenizer here knows no limit."""
    folder = write_folder(tmp_path, "text", text_pooling="mean")
    tokenizer = Predictor.load(folder).processor.tokenizer
    config = dict(model_type=model_type, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config |= dict(intermediate_size=32, max_position_embeddings=16, pad_token_id=1, vocab_size=len(tokenizer))
    model = MMClfForImageTextClassification(MMClfConfig(text_config=config, text_pooling="mean", id2label=NAMES))
    assert model.max_tokens == (16 if model_type == "bert" else 14)
    assert hf_mmclf.pipeline(model, processor=MMClfProcessor(tokenizer=tokenizer))(text="a man " * 50, top_k=1)


def test_a_missing_image_or_text(pipe, images, folders):
    model, processor = Predictor.load(folders["both"]).model, Predictor.load(folders["both"]).processor
    with torch.no_grad():
        image = model(**processor.image_processor(Image.open(images[0]), return_tensors="pt")).logits
        text = model(**processor.tokenizer("a dog", return_tensors="pt")).logits
    image, text = (sorted(logits[0].sigmoid().tolist(), reverse=True) for logits in (image, text))
    rows = [{"image": images[0]}, {"text": "a dog"}, {"image": images[0], "text": " "}]
    rows += [{"image": None, "text": "a dog"}, {"image": {"bytes": None, "path": None}, "text": "a dog"}]
    for batch_size in (1, 3, 5):
        results = pipe(rows, batch_size=batch_size, return_all_scores=True)
        scores = [[row["score"] for row in result] for result in results]
        np.testing.assert_allclose(scores, [image, text, image, text, text], atol=1e-6)
    assert close(pipe(image=images[:2]), [pipe(image=image) for image in images[:2]])
    assert close(pipe(text=CAPTIONS), [pipe(text=text) for text in CAPTIONS])


@pytest.mark.parametrize("kind", ["image", "text"])
def test_models_of_one_modality(kind, pipes, images):
    pipe = pipes[kind]
    column = images if kind == "image" else CAPTIONS
    assert close(pipe(**{kind: column}, batch_size=3), [pipe({kind: value}) for value in column])
    other = {"image": "text", "text": "image"}[kind]
    value = {"image": images[0], "text": "a dog"}
    assert close(pipe({kind: value[kind], other: None}), pipe({kind: value[kind]}))
    with pytest.raises(ValueError, match=f"record 1: got {other}s?, but this model has no {other} backbone"):
        pipe([{kind: value[kind]}, value])
    with pytest.raises(ValueError, match=f"record 0: got {other}s?, but this model has no {other} backbone"):
        pipe({other: value[other]})


def test_texts_longer_than_the_limit_are_truncated(pipe):
    assert close(pipe(text="a man " * 50), pipe(text="a man " * 7))


def test_nothing_gives_nothing(pipe):
    assert pipe([]) == [] and pipe(image=[], text=[]) == []
    assert list(pipe(iter([]))) == []


# What it returns


def test_thresholds(pipe, records, expected):
    assert close(pipe(records), above(expected, 0.4))
    for threshold in (0.0, 0.3, 0.9, 1.0):
        assert close(pipe(records, threshold=threshold), above(expected, threshold))
    by_label = pipe(records, threshold={"dog": 1.0, "person": 0})
    for result, everything in zip(by_label, expected, strict=True):
        light = next(row["score"] for row in everything if row["label"] == "traffic light")
        assert {row["label"] for row in result} == {"person"} | ({"traffic light"} if light >= 0.4 else set())
    assert close(pipe(records, threshold=[1, 1, 0]), [[r for r in e if r["label"] == "dog"] for e in expected])
    assert close(pipe(records), above(expected, 0.4))  # nothing is remembered


def test_a_score_equal_to_its_threshold_is_predicted(pipe, records, monkeypatch):
    score = pipe(records[0], top_k=1)[0]["score"]
    above_it = float(np.nextafter(score, 1))
    assert len(pipe(records[0], threshold=score)) == 1 and not pipe(records[0], threshold=above_it)
    monkeypatch.setattr(pipe.model.config, "threshold", score)
    assert len(pipe(records[0])) == 1
    monkeypatch.setattr(pipe.model.config, "threshold", above_it)
    assert not pipe(records[0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_thresholds_of_rows_with_a_missing_modality(batch_size, pipe, records, monkeypatch):
    monkeypatch.setattr(pipe.model.config, "missing_thresholds", {"image": 0.0, "text": 1.0})
    rows = [records[0], {"text": records[1]["text"]}, {"image": records[2]["image"], "text": " "}] * 2
    whole, read, seen = pipe(rows, batch_size=batch_size)[:3]
    assert close(whole, pipe(records[0])) and len(read) == 3 and not seen
    read, seen = pipe(rows, batch_size=batch_size, threshold={"dog": 0})[4:]
    assert len(read) == 3 and [row["label"] for row in seen] == ["dog"]
    assert len(pipe(rows[2], threshold=0.0)) == 3 and not pipe(rows[1], threshold=1.0)


def test_top_k(pipe, records, expected):
    assert close(pipe(records, top_k=2), [result[:2] for result in expected])
    assert close(pipe(records, top_k=9), expected)
    assert close(pipe(records, top_k=2, threshold=0.7), [result[:2] for result in above(expected, 0.7)])
    assert close(pipe(records, top_k=2, return_all_scores=True), [result[:2] for result in expected])


def test_options_may_be_given_when_it_is_made(folders, records, expected):
    pipe = hf_mmclf.pipeline(folders["both"], threshold=0.2, batch_size=2)
    assert close(pipe(records), above(expected, 0.2))
    assert close(pipe(records, threshold=0.9), above(expected, 0.9))


def test_a_model_in_training_mode_is_put_to_use(folders, records, expected):
    finished = Predictor.load(folders["both"])
    pipe = hf_mmclf.pipeline(finished.model.train(), processor=finished.processor)
    assert close(pipe(records, return_all_scores=True), expected)


def test_half_precision(folders, records, expected):
    pipe = hf_mmclf.pipeline(folders["both"], dtype=torch.bfloat16)
    result = pipe(records, return_all_scores=True)
    scores = [{row["label"]: row["score"] for row in rows} for rows in result]
    for row, wanted in zip(scores, expected, strict=True):
        np.testing.assert_allclose([row[w["label"]] for w in wanted], [w["score"] for w in wanted], atol=0.1)


# What it refuses


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_bad_record_is_named_by_its_index(batch_size, pipe, records, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    cases = [
        ({"image": str(tmp_path / "bad.jpg")}, r"cannot read the image .*bad.jpg: not an image"),
        ({"image": str(tmp_path / "none.jpg")}, r"cannot read the image .*none.jpg: "),
        ({"image": b""}, r"cannot read the image \(bytes\): the file is empty"),
        ({"image": 3}, r"cannot read the image \(int\): An image must be"),
        ({"text": 3}, "the text is int; expected a string"),
        ({"text": ""}, "has neither an image nor a text"),
        ({}, "has neither an image nor a text"),
        ({"image": None, "text": "  "}, "has neither an image nor a text"),
        ({"image": "a.jpg", "caption": "a dog"}, r"got the keys \['caption'\]; expected image and text"),
        ("a.jpg", 'got str; expected {"image": ...'),
    ]
    for bad, message in cases:
        for rows in ([*records[:3], bad, *records], iter([*records[:3], bad])):
            with pytest.raises(ValueError, match=rf"record 3:? ?{message}"):
                list(pipe(rows, batch_size=batch_size))


def test_bad_calls(pipe, records):
    for call in (lambda: pipe(), lambda: pipe(records, image="a.jpg")):
        with pytest.raises(ValueError, match="one of these forms, and not both"):
            call()
    with pytest.raises(ValueError, match="columns of different lengths: {'image': 1, 'text': 2}"):
        pipe(image=["a.jpg"], text=["a", "b"])
    with pytest.raises(ValueError, match="one column and one single value"):
        pipe(image="a.jpg", text=["a", "b"])
    for inputs in ("a.jpg", b"", 3):
        with pytest.raises(ValueError, match="record 0: got .*the keyword form"):
            pipe(inputs)
    for threshold in (1.5, -1, {"dog": 2}, [0.5, 0.5, 7]):
        with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\]"):
            pipe(records, threshold=threshold)
    with pytest.raises(ValueError, match=r"unknown labels \['cat'\]; expected some of \['person'"):
        pipe(records, threshold={"cat": 0.1})
    with pytest.raises(ValueError, match="expected a number, a dictionary by label name, or 3 numbers"):
        pipe(records, threshold=[0.1, 0.2])
    for top_k in (0, 1.5, True):
        with pytest.raises(ValueError, match="expected a whole number of at least 1"):
            pipe(records, top_k=top_k)
    with pytest.raises(TypeError, match="treshold"):
        pipe(records, treshold=0.5)


# How it is made


def test_transformers_own_factory(folders, pipe, records, tmp_path):
    """A folder that only the parts have written names no pipeline, so no flag is needed; one that does asks for it."""
    registered = transformers.pipeline("image-text-classification", model=str(folders["both"]))
    assert type(registered) is ImageTextClassificationPipeline
    assert close(registered(records), pipe(records))
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.pipeline("image-text-classification", model=str(tmp_path))
    assert close(hf_mmclf.pipeline(tmp_path)(records), pipe(records))


def test_rows_without_an_image_do_not_run_the_image_backbone(pipe, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the image backbone ran")

    monkeypatch.setattr(pipe.model, "encode_image", fail)
    assert pipe(text="a dog") and pipe([{"text": "a dog"}, {"text": "no"}], batch_size=2)
    with pytest.raises(AssertionError):
        pipe(image=Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_what_the_classifier_reads(kind, pipes, records):
    pipe = pipes[kind]
    own = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}[kind]
    rows = [{name: row[name] for name in own} for row in records]
    vectors = pipe.embed(rows, batch_size=2)
    assert vectors.dtype == np.float32 and vectors.shape == (len(rows), pipe.model.classifier.in_features)
    np.testing.assert_allclose(pipe.embed(rows[1]), vectors[1], atol=1e-5)
    np.testing.assert_allclose(pipe.embed(iter(rows)), vectors, atol=1e-5)
    columns = {name: [row[name] for row in rows] for name in own}
    np.testing.assert_allclose(pipe.embed(**columns), vectors, atol=1e-5)
    logits = torch.nn.functional.linear(
        torch.from_numpy(vectors), pipe.model.classifier.weight, pipe.model.classifier.bias
    )
    scores = [{row["label"]: row["score"] for row in found} for found in pipe(rows, return_all_scores=True)]
    for found, row in zip(scores, logits.sigmoid().tolist(), strict=True):
        assert list(map(found.get, pipe.model.config.id2label.values())) == pytest.approx(row, abs=1e-5)
    if kind == "both":  # one modality is enough
        assert not np.allclose(pipe.embed(text=CAPTIONS[0]), vectors[0])
    with pytest.raises(TypeError, match="threshold"):
        pipe.embed(rows, threshold=0.5)


def test_embeddings_of_label_queries_are_their_mean(tmp_path, records):
    pipe = hf_mmclf.pipeline(write_folder(tmp_path, "both", fusion="label_queries"), device="cpu")
    found = []
    pipe.model.classifier.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0].mean(0).numpy()))
    vectors = pipe.embed(records)
    np.testing.assert_allclose(vectors, found, atol=1e-6)
    assert vectors.shape == (len(records), 8)


def test_columns_are_read_row_by_row(pipe):
    """A table of any size need not fit into memory."""
    read = []

    class Column:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            read.append(index)
            return CAPTIONS[index]

    assert close(pipe(text=Column()), pipe(text=CAPTIONS))
    assert read == list(range(5))


def test_value_feature_columns(pipe):
    table = Dataset.from_dict({"text": ["a dog", None]}, features=Features({"text": Value("string")}))
    with pytest.raises(ValueError, match="record 1 has neither"):
        pipe(text=table["text"])


def test_two_positional_arguments_and_images(pipe, images):
    expected = pipe(image=images[0], text=CAPTIONS[0], return_all_scores=True)
    assert pipe(images[0], CAPTIONS[0], return_all_scores=True) == expected
    assert pipe(images=images[0], text=CAPTIONS[0], return_all_scores=True) == expected
    assert len(pipe(images[:2], CAPTIONS[:2])) == 2
    with pytest.raises(ValueError, match="one of these forms, and not both"):
        pipe(images[0], CAPTIONS[0], image=images[0])


def test_columns_with_empty_cells_of_pandas(pipe, images):
    texts = pd.Series([CAPTIONS[0], float("nan")])
    expected = pipe(image=images[:2], text=[CAPTIONS[0], None], return_all_scores=True)
    assert pipe(image=images[:2], text=texts, return_all_scores=True) == expected
