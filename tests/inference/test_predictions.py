import csv
import json

import numpy as np
import pytest
from datasets import Dataset

from hf_mmclf import MMClfConfig
from hf_mmclf.inference.predictions import atomic_file, check_output, prediction_lines, rows_of, write_predictions

NAMES = {0: "person", 1: "traffic light", 2: "dog"}
# three labels, one, none, and all three exactly at the threshold 0.5
SCORES = np.array([[0.9, 0.8, 0.95], [0.1, 0.6, 0.2], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], dtype=np.float32)


def config_of(**fields):
    return MMClfConfig(image_backbone="resnet18", id2label=NAMES, label_ids=["1", "3", "10"], **fields)


@pytest.fixture
def rows():
    images = ["7.jpg", None, {"bytes": b"", "path": "c.png"}, {"bytes": b"x", "path": None}]
    images = [image if isinstance(image, dict) else {"bytes": None, "path": image} for image in images]
    where = [f"test.csv:{line}" for line in (2, 3, 4, 5)]
    return Dataset.from_dict({"image": images, "text": ["a"] * 4, "where": where})


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "fields, labels",
    [
        (dict(threshold=0.5), ["1 3 10", "3", "", "1 3 10"]),
        (dict(threshold=0.5, label_thresholds={"dog": 0.3, "person": 0.51}), ["1 3 10", "3", "", "3 10"]),
        (dict(threshold=0.05), ["1 3 10"] * 4),
    ],
)
def test_csv_is_the_competitions_form(fields, labels, rows, tmp_path):
    """0.3 as float32 is above 0.3 as float64, and a score that equals its threshold is predicted."""
    path = tmp_path / "not" / "yet" / "there.csv"
    scores = SCORES.copy()
    scores[2, 2] = np.nextafter(np.float32(0.3), np.float32(0)) if "label_thresholds" in fields else 0.3
    write_predictions(path, rows, scores, config_of(**fields))
    names = ["7.jpg", "test.csv:3", "c.png", "test.csv:5"]
    expected = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
    assert path.read_bytes().decode() == "\n".join(["ImageID,Labels", *expected, ""])


def test_csv_labels_with_spaces_can_be_told_apart(rows, tmp_path):
    config = config_of()
    config.label_ids = None  # the labels are written by their names
    write_predictions(tmp_path / "p.csv", rows, SCORES, config)
    with (tmp_path / "p.csv").open() as file:
        assert [row["Labels"] for row in csv.DictReader(file)][:2] == ["person|traffic light|dog", "traffic light"]


def test_json_lines_have_names_and_all_scores_sorted(rows, tmp_path):
    write_predictions(tmp_path / "p.jsonl", rows, SCORES, config_of(label_thresholds={"dog": 0.97}))
    lines = json_lines(tmp_path / "p.jsonl")
    assert [line["image"] for line in lines] == ["7.jpg", "test.csv:3", "c.png", "test.csv:5"]
    assert [line["labels"] for line in lines] == [
        ["person", "traffic light"],
        ["traffic light"],
        [],
        ["person", "traffic light"],  # both exactly at the threshold
    ]
    assert list(lines[0]["scores"].items()) == [("dog", 0.95), ("person", 0.9), ("traffic light", 0.8)]
    for line, scores in zip(lines, SCORES, strict=True):
        assert list(line["scores"].values()) == sorted(line["scores"].values(), reverse=True)
        assert line["scores"] == pytest.approx(dict(zip(NAMES.values(), map(float, scores), strict=True)), abs=1e-6)


def test_lines_for_the_screen(rows):
    assert prediction_lines(rows, SCORES, config_of(threshold=0.5)) == [
        "7.jpg: dog 0.95, person 0.90, traffic light 0.80",
        "test.csv:3: traffic light 0.60",
        "c.png: no label",
        "test.csv:5: person 0.50, traffic light 0.50, dog 0.50",
    ]


def test_labels_are_named_in_the_order_of_the_logits(tmp_path):
    """Twelve labels through a file, where "10" sorts before "2", and a dictionary in another order."""
    names = {i: f"label {i}" for i in range(12)}
    MMClfConfig(image_backbone="resnet18", id2label=dict(reversed(names.items()))).save_pretrained(tmp_path)
    rows = Dataset.from_dict({"image": ["a.jpg"], "text": ["a"], "where": ["row 1"]})
    lines = prediction_lines(rows, np.eye(12)[2:3], MMClfConfig.from_pretrained(tmp_path))
    assert lines == ["a.jpg: label 2 1.00"]


def test_rows_without_an_image_or_a_text_have_their_own_thresholds(tmp_path):
    thresholds = dict(threshold=0.3, missing_thresholds={"image": 0.6, "text": 1.0})
    config = config_of(text_config=dict(model_type="bert"), **thresholds)
    where = ["row 1", "row 2", "row 3"]
    rows = Dataset.from_dict({"image": ["a.jpg", None, "b.jpg"], "text": ["a", "b", None], "where": where})
    scores = np.array([[0.3, 0.6, 1.0]] * 3)
    write_predictions(tmp_path / "p.jsonl", rows, scores, config)
    write_predictions(tmp_path / "p.csv", rows, scores, config)
    expected = [{"person", "traffic light", "dog"}, {"traffic light", "dog"}, {"dog"}]
    assert [set(line["labels"]) for line in json_lines(tmp_path / "p.jsonl")] == expected
    assert (tmp_path / "p.csv").read_text().splitlines()[1:] == ["a.jpg,1 3 10", "row 2,3 10", "b.jpg,10"]
    lines = prediction_lines(rows, scores, config)
    assert [line.count(",") + 1 for line in lines] == [len(labels) for labels in expected]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.csv.gz"])
def test_other_suffixes_are_refused_before_anything_is_written(name, rows, tmp_path):
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        write_predictions(tmp_path / "new" / name, rows, SCORES, config_of())
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_found_before_any_work(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="a.csv is a folder; give the name of a file"):
        check_output(tmp_path / "a.csv", (".csv",), overwrite=True)
    with pytest.raises(FileExistsError, match="b.csv cannot be written, because file is a file"):
        check_output(tmp_path / "file" / "more" / "b.csv", (".csv",))


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "p.csv"
    with atomic_file(path) as file:
        file.write("old")
    with pytest.raises(ValueError, match="stop"), atomic_file(path) as file:
        file.write("new")
        raise ValueError("stop")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "images, texts, error, message",
    [
        (["a.jpg", "b.jpg"], ["a"], ValueError, "2 images, but 1 texts; expected one text for each image"),
        (["a.jpg", "b.jpg", "c.jpg"], None, FileNotFoundError, "no such image: b.jpg, c.jpg"),
    ],
)
def test_images_and_texts_that_make_no_rows(images, texts, error, message, tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(error, match=message):
        rows_of(images, texts, tmp_path)


def test_images_and_texts_as_rows(tmp_path):
    (tmp_path / "a.jpg").touch()
    where = {"where": "row 1"}
    assert rows_of(["a.jpg"], ["a"], tmp_path)[:1] == {"image": ["a.jpg"], "text": ["a"], "where": ["row 1"]}
    assert rows_of(["a.jpg"], None, tmp_path)[0] == {"image": "a.jpg", "text": None, **where}
    assert rows_of(None, ["a", "b"])[0] == {"image": None, "text": "a", **where}
