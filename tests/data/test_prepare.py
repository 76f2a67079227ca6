import io
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, Image, List, Value
from PIL import Image as PILImage

from hf_mmclf.data.arguments import DataArguments
from hf_mmclf.data.images import open_image
from hf_mmclf.data.labels import LabelSet
from hf_mmclf.data.prepare import IMAGE_COLUMNS, LABEL_COLUMNS, TEXT_COLUMNS, prepare_data

DATA = Path(os.environ.get("HF_MMCLF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA}; HF_MMCLF_DATA names another place")

TAGS = [["1", "3"], ["10"], ["3"], ["1"], ["1", "10"], []] * 5  # 30 rows
TEXTS = [f'text {i}, "so"' for i in range(30)]
NAMES = [f"{i}.png" for i in range(30)]


def encoded(mode="RGB", size=(4, 3), kind="png", **options):
    file = io.BytesIO()
    PILImage.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def save_images(folder, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(encoded())


def competition(path, names=NAMES, tags=TAGS, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{name},{' '.join(labels)},{text}\n" for name, labels, text in zip(names, tags, texts, strict=True)]
    path.write_text("ImageID,Labels,Caption\n" + "".join(rows), encoding="utf-8")
    return str(path)


def records(labels="labels", convert=list, image="image", text="text"):
    return [
        {image: name, text: content, labels: convert(tags)}
        for name, content, tags in zip(NAMES, TEXTS, TAGS, strict=True)
    ]


def text_rows(path, text="text", label="labels", rows=(("a dog", "dog"), ("a cat", "cat")) * 10):
    path.write_text(f"{text},{label}\n" + "".join(f"{a},{b}\n" for a, b in rows), encoding="utf-8")
    return str(path)


def prepare_text(data, **options):
    return prepare_data(DataArguments(data=str(data), **options), uses_image=False)


def everything(prepared):
    """Return labels and image of all rows by text."""
    return {
        row["text"]: ([prepared.labels.ids[i] for i in np.flatnonzero(row["labels"])], row["image"])
        for split in prepared.splits.values()
        for row in split.remove_columns("where").to_list()
    }


# Forms


def from_competition(folder):
    save_images(folder / "data")
    return {"data": competition(folder / "train.csv"), "image_dir": str(folder / "data")}


def from_named_columns(folder):
    save_images(folder)
    rows = records("tags", "|".join, "file", "words")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    named = {"image_column": "file", "text_column": "words", "label_column": "tags"}
    return {"data": str(folder / "rows.jsonl"), **named}


def from_parquet(folder):
    save_images(folder)
    Dataset.from_list(records()).to_parquet(folder / "rows.parquet")
    return {"data": str(folder / "rows.parquet")}


def from_indicators(folder):
    save_images(folder)
    columns = {tag: [int(tag in tags) for tags in TAGS] for tag in ("10", "1", "3")}
    Dataset.from_dict({"image": NAMES, "text": TEXTS, **columns}).to_csv(folder / "rows.csv")
    return {"data": str(folder / "rows.csv"), "label_columns": ["10", "1", "3"]}


def from_image_folder(folder):
    save_images(folder)
    Dataset.from_list(records("labels", ",".join, "file_name")).to_csv(folder / "metadata.csv")
    return {"data": str(folder)}


def from_saved(folder):
    rows = records()
    for i, row in enumerate(rows):
        row["image"] = {"bytes": encoded(size=(4, 3 + i)), "path": None}
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(folder / "saved")
    return {"data": str(folder / "saved")}


@pytest.mark.parametrize(
    "form", [from_competition, from_named_columns, from_parquet, from_indicators, from_image_folder, from_saved]
)
def test_rows_of_every_form_come_out_the_same(tmp_path, form):
    prepared = prepare_data(DataArguments(**form(tmp_path)))
    assert prepared.labels.ids == ("1", "3", "10") and prepared.bad_images == []
    rows = everything(prepared)
    assert {text: tags for text, (tags, _) in rows.items()} == dict(zip(TEXTS, TAGS, strict=True))
    if form is not from_saved:
        assert [rows[text][1] for text in TEXTS] == NAMES
    for split in prepared.splits.values():
        assert set(split.column_names) == {"image", "text", "labels", "where"}
        for row in split:
            assert open_image(row["image"], prepared.folder, row["where"]).shape[-1] == 4


@pytest.mark.parametrize("columns", [IMAGE_COLUMNS, TEXT_COLUMNS, LABEL_COLUMNS])
def test_the_help_names_the_default_columns(columns):
    assert f"first that exists of {', '.join(columns)}." in " ".join(DataArguments.__doc__.split())


def test_the_embedded_data_set_is_the_default():
    prepared = prepare_data(DataArguments())
    assert prepared.splits.num_rows == {"train": 2400, "validation": 300, "test": 300}
    assert prepared.split_source == "given" and prepared.labels.ids == tuple(sorted(prepared.labels.ids))
    assert prepared.splits["test"][0]["where"] == "demo/test:1"
    with pytest.raises(ValueError, match="--test_data is given, but the embedded data set has a split 'test' already"):
        prepare_data(DataArguments(demo_rows=20, test_data="rows.csv"))


@needs_data
@pytest.mark.parametrize("folder, table, count", [("competition", "train.csv", 3257), ("coco301", "all.csv", 301)])
def test_real_tables_load_with_their_images(folder, table, count):
    args = DataArguments(data=str(DATA / folder / table), image_dir=str(DATA / folder / "data"), bad_images="skip")
    names = str(DATA / "labels.json")
    prepared = prepare_data(args if count == 301 else DataArguments(**{**vars(args), "label_names_file": names}))
    assert sum(prepared.splits.num_rows.values()) == count and prepared.bad_images == []
    if count == 3257:
        assert prepared.labels.names[9] == "traffic light"


def test_an_unlabelled_test_table_beside_labelled_ones(tmp_path):
    competition(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("ImageID,Caption\n40.png,a dog\n", encoding="utf-8")
    prepared = prepare_text(tmp_path)
    assert "labels" not in prepared.splits["test"].column_names
    assert prepared.splits["test"]["text"][:] == ["a dog"]
    assert "test" not in prepared.split_source and len(prepared.splits["validation"]) == 3
    # and when the label column is named
    assert "labels" not in prepare_text(tmp_path, label_column="Labels").splits["test"].column_names


def test_validation_and_test_rows_from_places_of_their_own(tmp_path):
    save_images(tmp_path / "a", NAMES)
    save_images(tmp_path / "b", ["x.png"])
    data = competition(tmp_path / "a" / "rows.csv")
    other = competition(tmp_path / "b" / "rows.csv", ["x.png"], [["1"]], ["own folder"])
    prepared = prepare_data(DataArguments(data=data, validation_data=other, test_data=data))
    assert prepared.splits.num_rows == {"train": 30, "validation": 1, "test": 30}
    assert prepared.split_source == "given"
    row = prepared.splits["validation"][0]
    assert open_image(row["image"], prepared.folder, row["where"]).shape == (3, 3, 4)

    competition(tmp_path / "train.csv")
    competition(tmp_path / "test.csv", ["z.png"], [["3"]], ["test row"])
    assert prepare_text(data, test_data=str(tmp_path)).splits["test"]["text"][:] == ["test row"]
    with pytest.raises(ValueError, match="--test_data is given, but .* has a split 'test' already"):
        prepare_text(tmp_path, test_data=other)
    with pytest.raises(ValueError, match="--validation_data: .* has the splits train, test; give one"):
        prepare_text(data, validation_data=str(tmp_path))


def test_the_delimiter_of_training_rows_holds_for_all_splits(tmp_path):
    text_rows(tmp_path / "train.csv", rows=[("a", "traffic light|dog"), ("b", "traffic light")])
    text_rows(tmp_path / "validation.csv", rows=[("c", "traffic light")])
    prepared = prepare_text(tmp_path)
    assert prepared.labels.ids == ("dog", "traffic light")
    assert everything(prepared)["c"] == (["traffic light"], None)


def test_rows_for_a_trained_model_keep_its_labels_and_are_not_split(tmp_path):
    labels = LabelSet(("10", "3", "1"), ("ten", "three", "one"))
    data = competition(tmp_path / "rows.csv")
    prepared = prepare_data(DataArguments(data=data), uses_image=False, labels=labels)
    assert prepared.labels is labels and list(prepared.splits) == ["train"]
    assert prepared.splits["train"][0]["labels"] == [0, 1, 1]

    path = tmp_path / "unlabelled.csv"
    path.write_text("ImageID,Caption\n,a dog\n", encoding="utf-8")
    prepared = prepare_data(DataArguments(data=str(path)), labels=labels)
    assert prepared.splits["train"].column_names == ["image", "text", "where"]

    unknown = DataArguments(data=text_rows(path, rows=[("a", "4")]), image_column="none")
    with pytest.raises(ValueError, match="unlabelled.csv:2: unknown label '4'"):
        prepare_data(unknown, labels=labels)
    assert len(prepare_data(unknown, labels=labels, with_labels=False).splits["train"]) == 1


# What is wrong is said


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"label_column": "tags", "text_column": "captoin"},
            "--text_column: no column 'captoin'; did you mean 'caption'?",
        ),
        ({"label_column": "tags", "image_column": "imag"}, "--image_column: no column 'imag'; did you mean 'image'?"),
        ({"label_column": "tagz"}, "--label_column: no column 'tagz'; did you mean 'tags'?"),
        ({"label_columns": ["tags", "xyz"]}, "--label_columns: no column 'xyz'; there are 'image', 'caption', 'tags'"),
        ({}, "no label column in the train rows among 'image', 'caption', 'tags'; expected labels or Labels"),
        ({"label_columns": ["tags"]}, "t.csv:2: column 'tags' is 'dog'; expected 0 or 1"),
        ({"label_column": "tags", "validation_fraction": 0}, "--validation_fraction is 0; validation rows choose"),
        ({"label_column": "tags", "validation_fraction": 0.7, "test_fraction": 0.4}, "fractions are .* add up to 1"),
        ({"label_column": "tags"}, "the validation split is empty: 2 rows, 2 if rows of one image"),
    ],
)
def test_wrong_flags_are_answered_with_right_ones(tmp_path, flags, message):
    path = tmp_path / "t.csv"
    path.write_text("image,caption,tags\n,a dog,dog\n,a cat,cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        prepare_text(path, **flags)


ROWS = {"image": ["a.png"], "text": ["a dog"], "labels": [["dog"]]}


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({}, {"label_delimiter": "|"}, "--label_delimiter has no effect, because the labels are not delimited text"),
        ({}, {"label_columns": ["labels", "labels"]}, "--label_columns names 'labels' twice"),
        ({"labels": LabelSet(("dog",), ("dog",))}, {"split_seed": 1}, "only training splits rows"),
        ({"labels": LabelSet(("dog",), ("dog",))}, {"validation_fraction": 0.2}, "only training splits rows"),
        ({"labels": LabelSet(("dog",), ("dog",))}, {"streaming": True}, "only training reads a stream"),
        ({"with_labels": False}, {"label_column": "nonsense"}, "--label_column has no effect, because a prediction"),
        ({"sources": ROWS}, {"validation_data": "x.csv"}, "the rows are given without a table"),
        ({"sources": ROWS}, {"demo_rows": 5}, "the rows are given without a table"),
    ],
)
def test_arguments_without_an_effect_are_refused(changes, flags, message):
    rows = Dataset.from_dict({**ROWS, "where": ["t:1"]})
    data = None if "sources" in changes else rows
    changes = {**changes, "sources": {"train": rows}} if "sources" in changes else changes
    with pytest.raises(ValueError, match=message):
        prepare_data(DataArguments(data=data, **flags), uses_image=False, **changes)


def test_arguments_of_images_are_named_where_there_are_none(notices):
    rows = Dataset.from_dict(ROWS)
    prepare_data(DataArguments(rows, bad_images="skip"), uses_image=False, labels=LabelSet(("dog",), ("dog",)))
    assert "--bad_images has no effect, because the model has no image backbone" in notices()


def test_a_names_file_of_other_labels_does_not_fit_a_trained_model(tmp_path):
    path, labels = tmp_path / "names.json", LabelSet(("1", "2"), ("dog", "cat"))
    rows = Dataset.from_dict({"text": ["a"], "labels": ["1"]})
    for names, message in (
        ({"1": "cat"}, "has the name 'dog' for it"),
        ({"7": "bird"}, "but the model has 1, 2"),
        ({"1": "dog"}, "1 labels, but the model has 2: 1, 2"),
    ):
        path.write_text(json.dumps(names), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            prepare_data(DataArguments(data=rows, label_names_file=str(path)), uses_image=False, labels=labels)
    path.write_text('{"2": "cat", "1": "dog"}', encoding="utf-8")
    prepare_data(DataArguments(data=rows, label_names_file=str(path)), uses_image=False, labels=labels)


def test_empty_lists_of_any_form_are_unknown_alike():
    for cells in ([["a"], []], ["['a']", "[]"], ["a", " "], ["a|b", "|"]):
        rows = Dataset.from_dict({"text": ["x", "y"], "labels": cells})
        labels = LabelSet(("a", "b"), ("a", "b"))
        options = dict(uses_image=False, labels=labels)
        assert prepare_data(DataArguments(rows, empty_is_unknown=True), **options).splits["train"]["labels"][1] == [
            -1,
            -1,
        ]
        assert prepare_data(DataArguments(rows), **options).splits["train"]["labels"][1] == [0, 0]


def test_tables_without_a_needed_column_or_split(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,labels\n1,a\n", encoding="utf-8")
    with pytest.raises(
        ValueError,
        match="train: no text column among 'id', 'labels'; name it by --text_column, or",
    ):
        prepare_text(path)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": 3, "labels": ["a"]}\n{"text": 4, "labels": ["a"]}', encoding="utf-8")
    with pytest.raises(ValueError, match="rows.jsonl:1: column 'text' is 3; expected text"):
        prepare_text(path)
    text_rows(tmp_path / "test.csv")
    with pytest.raises(ValueError, match="no training rows; the source has only test"):
        prepare_text(tmp_path)
    text_rows(tmp_path / "train.csv")
    (tmp_path / "validation.csv").write_text("text\na dog\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no label column in the validation rows"):
        prepare_text(tmp_path)
    text_rows(tmp_path / "validation.csv", rows=[("a dog", "dog"), ("a bird", "dgo")])
    with pytest.raises(ValueError, match="validation.csv:3: unknown label 'dgo'; did you mean 'dog'"):
        prepare_text(tmp_path)


def test_missing_image_files_are_all_found_at_the_start(tmp_path):
    save_images(tmp_path, NAMES[:20])
    data = competition(tmp_path / "train.csv")
    for policy in ("error", "skip", "missing"):
        with pytest.raises(FileNotFoundError) as error:
            prepare_data(DataArguments(data=data, bad_images=policy))
        message = str(error.value)
        assert message.startswith(f"10 of 30 images are not in '{tmp_path}' (train.csv:22: '20.png'; train.csv:23: ")
        assert message.count(".png") == 5 and "--image_dir" in message
    prepare_data(DataArguments(data=data), uses_image=False)  # a model without an image backbone needs no files


def test_missing_files_of_an_image_feature_are_found_too():
    images = [{"bytes": encoded(), "path": "gone.png"}, {"bytes": None, "path": "none.png"}, None]
    rows = Dataset.from_dict({"image": images, "text": ["x"] * 3, "labels": ["x"] * 3, "where": ["a:1", "a:2", "a:3"]})
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are not in '.' \(a:2: 'none.png'\)"):
        prepare_data(DataArguments(), sources={"train": rows.cast_column("image", Image())})


# Good and bad images


GOOD = {
    "grey.png": encoded("L"),
    "palette.gif": encoded("P", kind="gif"),
    "alpha.png": encoded("RGBA"),
    "cmyk.jpg": encoded("CMYK", kind="jpeg"),
    "deep.png": encoded("I;16"),
    "dot.png": encoded(size=(1, 1)),
    "long.png": encoded("L", size=(20_000, 10)),
}
BAD = {
    "cut.jpg": encoded(size=(640, 480), kind="jpeg")[:900],
    "empty.png": b"",
    "text.png": b"no image at all",
}
REASONS = {"cut.jpg": "truncated", "empty.png": "the file is empty", "text.png": "of a known format"}


@pytest.fixture(params=["files", "bytes"])
def mixed(request, tmp_path):
    """A source of good and bad images, each with its name as the text, and one row without an image."""
    files = {**GOOD, **BAD}
    labels = ["x"] * (len(files) + 1)
    if request.param == "files":
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        Dataset.from_dict({"image": [*files, ""], "text": [*files, "none"], "labels": labels}).to_csv(
            tmp_path / "train.csv"
        )
    else:
        cells = [*({"bytes": content, "path": None} for content in files.values()), None]
        rows = Dataset.from_dict({"image": cells, "text": [*files, "none"], "labels": labels})
        DatasetDict(train=rows.cast_column("image", Image(decode=False))).save_to_disk(tmp_path)
    return DataArguments(data=str(tmp_path), validation_fraction=0.2, test_fraction=0)


def rows_of(prepared):
    rows = {row["text"]: row for split in prepared.splits.values() for row in split.to_list()}
    opened = {}
    for name, row in rows.items():
        empty = row["image"] is None
        opened[name] = None if empty else open_image(row["image"], prepared.folder, row["where"])
    return rows, opened


def test_bad_images_error_names_file_and_row_when_the_image_is_opened(mixed):
    prepared = prepare_data(mixed)
    rows = {row["text"]: row for split in prepared.splits.values() for row in split.to_list()}
    for name in GOOD:
        assert open_image(rows[name]["image"], prepared.folder, "here").shape[0] == 3
    for name, reason in REASONS.items():
        row = rows[name]
        with pytest.raises(ValueError) as error:
            open_image(row["image"], prepared.folder, row["where"])
        shown = name if isinstance(row["image"], str) else "in the table"
        assert str(error.value).startswith(f"{row['where']}: cannot read the image {shown}: ")
        assert reason in str(error.value) and "--bad_images skip" in str(error.value) and "0x" not in str(error.value)


@pytest.mark.parametrize("policy", ["skip", "missing"])
def test_bad_images_are_counted_and_listed_and_good_ones_kept(mixed, policy):
    mixed.bad_images = policy
    prepared = prepare_data(mixed)
    assert [where.split(":")[-1] for where, _ in prepared.bad_images] == (
        ["9", "10", "11"] if "train.csv" in prepared.bad_images[0][0] else ["8", "9", "10"]
    )
    for (_, reason), expected in zip(prepared.bad_images, REASONS.values(), strict=True):
        assert expected in reason
    rows, opened = rows_of(prepared)
    assert set(rows) == {*GOOD, "none"} | (set(BAD) if policy == "missing" else set())
    assert {name for name, image in opened.items() if image is None} == set(rows) - set(GOOD)
    assert opened["long.png"].shape == (3, 10, 20_000)


def test_rows_that_lose_their_only_modality_are_an_error(mixed):
    mixed.bad_images = "missing"
    with pytest.raises(ValueError, match="4 of 11 rows have no image, which this model needs: "):
        prepare_data(mixed, uses_text=False)


def test_a_source_with_no_good_image_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    data = competition(tmp_path / "t.csv", ["a.png"] * 3, [["1"]] * 3, "abc")
    with pytest.raises(ValueError, match="no row is left: none of 3 images can be read .t.csv:2: the file is empty"):
        prepare_data(DataArguments(data=data, bad_images="skip"))


def test_rows_with_a_missing_modality(tmp_path):
    save_images(tmp_path, ["a.png"])
    data = str(tmp_path / "train.csv")
    lines = ["ImageID,Labels,Caption", "a.png,1,both", "a.png,1,", ",1,text only", 'a.png,1," "', "", ""]
    Path(data).write_text("\n".join(lines), encoding="utf-8")
    args = DataArguments(data=data, validation_data=data, test_data=data)
    rows = prepare_data(args).splits["train"]
    assert rows["image"][:] == ["a.png", "a.png", None, "a.png"]
    assert rows["text"][:] == ["both", None, "text only", None]
    with pytest.raises(ValueError, match="1 of 4 rows have no image, which this model needs: train.csv:4"):
        prepare_data(args, uses_text=False)
    with pytest.raises(ValueError, match="2 of 4 rows have no text, .*: train.csv:3, train.csv:5"):
        prepare_data(args, uses_image=False)
    Path(data).write_text("\n".join([*lines, ",1,"]).replace(",1,text only", ",,"), encoding="utf-8")
    with pytest.raises(ValueError, match="rows have no image or text, which this model needs: train.csv:4"):
        prepare_data(args)


def test_cells_that_are_blank_or_no_text(tmp_path):
    """White space of any kind is no text; numbers can name images; columns may be empty."""
    blanks = ["", " ", "\t\n", "\u3000", "\x1c\u2028\x85", None]
    rows = Dataset.from_dict({"text": [*blanks, " a dog "], "image": list(range(7)), "labels": ["x"] * 7})
    for name in ("0", *map(str, range(1, 7))):
        (tmp_path / name).write_bytes(encoded())
    labels = LabelSet(("x",), ("x",))
    rows.to_parquet(tmp_path / "rows.parquet")
    found = prepare_data(DataArguments(data=str(tmp_path / "rows.parquet")), labels=labels).splits["train"]
    assert found["text"][:] == [None] * 6 + [" a dog "] and found["image"][:] == [str(i) for i in range(7)]
    assert found["labels"][:] == [[1]] * 7 and found.features["labels"] == List(Value("float32"))
    rows.remove_columns("text").add_column("text", [None] * 7).to_parquet(tmp_path / "rows.parquet")
    found = prepare_data(DataArguments(data=str(tmp_path / "rows.parquet")), labels=labels).splits["train"]
    assert found["text"][:] == [None] * 7 and found.features["text"] == Value("string")


# Splits


def wheres(prepared):
    return {name: split["where"][:] for name, split in prepared.splits.items()}


def test_splits_are_drawn_by_seed_and_lose_no_row(tmp_path):
    rng = random.Random(0)
    tags = [rng.sample("abcdef", rng.randrange(4)) for _ in range(400)]
    data = competition(tmp_path / "t.csv", [f"{i}.png" for i in range(400)], tags, ["x"] * 400)
    one, same = prepare_text(data), prepare_text(data)
    other = prepare_text(data, split_seed=1, validation_fraction=0.2, test_fraction=0)
    assert wheres(one) == wheres(same)
    for name, size in {"train": 320, "validation": 40, "test": 40}.items():
        assert abs(len(one.splits[name]) - size) <= 4
    assert sorted(sum(wheres(one).values(), [])) == sorted(f"t.csv:{line}" for line in range(2, 402))
    assert list(other.splits) == ["train", "validation"] and abs(len(other.splits["validation"]) - 80) <= 4
    assert set(wheres(prepare_text(data, split_seed=1))["test"]) != set(wheres(one)["test"])
    assert "seed 1" in other.split_source and "iterative stratification" in other.split_source


@pytest.mark.parametrize("form", ["files", "bytes"])
def test_rows_of_one_image_stay_together(tmp_path, form):
    content = {f"{i}.png": encoded(size=(i + 1, 1)) for i in range(40)}
    names = [name for name in content for _ in range(5)]
    tags = [["a", "b", "c"][i % 3] for i in range(200)]
    texts = [f"text {i}" for i in range(200)]
    images = names if form == "files" else [{"bytes": content[name], "path": None} for name in names]
    rows = Dataset.from_dict({"image": images, "text": texts, "labels": tags}).shuffle(seed=0)
    if form == "bytes":
        rows = rows.cast_column("image", Image())
    rows.save_to_disk(tmp_path)
    prepared = prepare_data(DataArguments(data=str(tmp_path)), uses_image=False)
    number = dict(zip(texts, names, strict=True))
    parts = [{number[text] for text in split["text"]} for split in prepared.splits.values()]
    assert sum(map(len, parts)) == 40 and all(parts)


def test_rows_without_an_image_are_no_group(tmp_path):
    prepared = prepare_text(text_rows(tmp_path / "t.csv"))
    assert prepared.splits.num_rows == {"train": 16, "validation": 2, "test": 2}


# What was found


def test_what_was_found_is_said_once(tmp_path, notices):
    rows = [f"dog {n};dog|pet\nDog {n};Dog\n" for n in range(10)]
    (tmp_path / "t.csv").write_text("caption;tags\n" + "".join(rows))
    prepare_text(tmp_path / "t.csv", label_column="tags")
    separator, columns, spellings = notices()
    assert separator == "t.csv: the columns are separated by semicolons"
    assert columns == "Columns: text 'caption', labels 'tags' (separated by '|')"
    assert "these labels look like spellings of one label: 'dog' (t.csv:2, 10 in all), 'Dog'" in spellings


@pytest.mark.parametrize("part, other", [("image", "text"), ("text", "image")])
def test_a_needed_column_must_be_there_or_be_none(tmp_path, part, other):
    save_images(tmp_path)
    rows = records(convert=" ".join)
    Dataset.from_list(rows).remove_columns(part).to_csv(tmp_path / "t.csv")
    args = DataArguments(data=str(tmp_path / "t.csv"))
    message = f"no {part} column among '{other}', 'labels'; name it by --{part}_column, or give --{part}_column none"
    with pytest.raises(ValueError, match=message):
        prepare_data(args)
    args = DataArguments(data=str(tmp_path / "t.csv"), **{f"{part}_column": "none"})
    assert set(prepare_data(args).splits["train"][part]) == {None}


def test_images_of_one_file_under_several_names_are_one_image(tmp_path, notices):
    save_images(tmp_path, ["0.png"])
    names = ["0.png", "./0.png", str(tmp_path / "0.png"), f"../{tmp_path.name}/0.png"] * 3
    table = pd.DataFrame({"image": names, "text": "a", "labels": ["x", "y"] * 6})
    with pytest.raises(ValueError, match="12 rows, 1 if rows of one image count once"):
        prepare_data(DataArguments(data=table, image_dir=str(tmp_path)))
    table.to_csv(tmp_path / "train.csv", index=False)
    table.to_csv(tmp_path / "validation.csv", index=False)
    prepare_data(DataArguments(data=str(tmp_path)))
    assert any("train rows: 1 images or texts occur with different labels" in line for line in notices())


def encode(name):
    return {"bytes": encoded(), "path": name}


@pytest.mark.parametrize("cell", [lambda name: encoded(), encode, lambda name: PILImage.new("RGB", (4, 3))])
def test_images_in_tables_of_pandas_and_parquet(tmp_path, cell, notices):
    frame = pd.DataFrame({"image": [cell(name) for name in NAMES], "text": TEXTS, "labels": TAGS})
    sources = [frame]
    if not isinstance(frame["image"][0], PILImage.Image):
        frame.to_parquet(tmp_path / "rows.parquet")
        sources.append(str(tmp_path / "rows.parquet"))
    for source in sources:
        with pytest.raises(ValueError, match="1 if rows of one image count once"):
            prepare_data(DataArguments(data=source))
        options = {"validation_data": source, "test_data": source}
        prepared = prepare_data(DataArguments(data=source, **options))
        row = prepared.splits["train"][0]
        assert open_image(row["image"], prepared.folder, row["where"]).shape == (3, 3, 4)
        assert any("train rows: 1 images or texts occur with different labels" in line for line in notices())


def test_tables_in_memory_are_prepared_like_files(tmp_path, monkeypatch):
    save_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    expected = everything(prepare_data(DataArguments(data=competition(tmp_path / "t.csv"))))
    rows = {"ImageID": NAMES, "Labels": TAGS, "Caption": TEXTS}
    for data in (pd.DataFrame(rows), Dataset.from_dict(rows)):
        assert everything(prepare_data(DataArguments(data=data))) == expected


def test_names_of_images_that_are_nearly_right(tmp_path):
    save_images(tmp_path)
    for name in (" 3.png", "data\\3.png"):
        data = competition(tmp_path / "t.csv", [f'"{name}"', *NAMES[1:]])
        with pytest.raises(FileNotFoundError, match=f"t.csv:2: {re.escape(repr(name))}, but '3.png' is"):
            prepare_data(DataArguments(data=data))


def test_images_by_url_are_refused_with_that_word(tmp_path):
    save_images(tmp_path)
    data = competition(tmp_path / "t.csv", ["https://x.org/1.png", *NAMES[1:]])
    with pytest.raises(ValueError, match="t.csv:2: the image 'https://x.org/1.png' is a URL, and a table names files"):
        prepare_data(DataArguments(data=data))


def test_too_few_rows_name_the_flags(tmp_path):
    data = text_rows(tmp_path / "t.csv", rows=[(f"row {row}", f"label{row}") for row in range(8)])
    with pytest.raises(ValueError, match="the validation split is empty: 8 rows, .* too few for .*0.1") as error:
        prepare_text(data)
    assert "--validation_data and --test_data" in str(error.value) and "--validation_fraction" in str(error.value)
    assert len(prepare_text(data, validation_data=data, test_data=data).splits["train"]) == 8


def test_rows_that_are_in_two_splits_are_counted(tmp_path, notices):
    rows = [(f"a dog {n % 15}", "dog") for n in range(60)]
    prepare_text(text_rows(tmp_path / "t.csv", rows=rows))
    assert any(re.match(r"\d of \d test rows are training rows too", line) for line in notices())


def test_the_column_of_the_training_rows_is_that_of_all_splits(tmp_path):
    train = text_rows(tmp_path / "t.csv", text="sentence")
    (tmp_path / "v.csv").write_text("text,sentence,labels\n12345,a dog,dog\n")
    prepared = prepare_text(train, validation_data=str(tmp_path / "v.csv"))
    assert prepared.splits["validation"]["text"][:] == ["a dog"]
