import os
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from support.tiny_folder import CAPTIONS, LABELS, NAMES, write_folder, write_table
from transformers import BertConfig

from hf_mmclf import DataArguments, Predictor
from hf_mmclf.data.splits import row_digests
from hf_mmclf.evaluation.report import report
from hf_mmclf.inference.folders import atomic_folder, save_model

KINDS = ["both", "image", "text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind, threshold=0.4) for kind in KINDS}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


def forward(predictor, image, text):
    """Scores of one row without any of our data code: no padding, no masks, an absent input not given."""
    inputs = {}
    if image is not None and predictor.processor.image_processor:
        inputs |= predictor.processor.image_processor(Image.open(image).convert("RGB"), return_tensors="pt")
    if text is not None and predictor.processor.tokenizer:
        inputs |= predictor.processor.tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        return predictor.model.eval()(**inputs).logits[0].sigmoid().numpy()


def test_load_says_what_is_wrong_with_a_folder(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no model here \(no config.json\)$"):
        Predictor.load(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="its training has not finished"):
        Predictor.load(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a bert model; expected one that"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_damaged_or_missing_file_is_named(name, folders, tmp_path):
    folder = shutil.copytree(folders["both"], tmp_path / "m")
    os.truncate(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(ValueError, match=f"m: {name} cannot be read: .*train again"):
        Predictor.load(folder)
    (folder / name).unlink()
    with pytest.raises((ValueError, OSError), match=name):
        Predictor.load(folder)


def test_a_folder_that_could_not_be_written_does_not_load(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("stays")
    with pytest.raises(OSError, match="no space left"), atomic_folder(tmp_path) as stage:
        (stage / "config.json").write_text("new")
        raise OSError("no space left")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.json": "old", "notes.txt": "stays"}
    with pytest.raises(IsADirectoryError), atomic_folder(tmp_path, tmp_path / "stage") as stage:
        (stage / "config.json").write_text("new")
        (stage / "model").write_text("new")
        (tmp_path / "model").mkdir()  # no file can replace it
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "model"}


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_folder_have_the_permissions_that_the_umask_says(mask, mode, folders, tmp_path):
    predictor, before = Predictor.load(folders["text"]), os.umask(mask)
    try:
        with atomic_folder(tmp_path) as stage:
            save_model(predictor.model, predictor.processor, stage)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("limit, saved", [(10**30, 16), (4, 4)])
def test_a_saved_tokenizer_knows_how_many_tokens_the_model_reads(limit, saved, folders, tmp_path):
    predictor = Predictor.load(folders["text"])
    predictor.processor.tokenizer.model_max_length = limit
    save_model(predictor.model, predictor.processor, tmp_path)
    assert Predictor.load(tmp_path).processor.tokenizer.model_max_length == saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size, workers", [(1, 0), (2, 0), (64, None), (3, 1)])
def test_scores_are_those_of_a_forward_pass_of_each_row(kind, batch_size, workers, folders, table):
    predictor = Predictor.load(str(folders[kind]))
    parts = predictor.processor
    assert (parts.image_processor is None, parts.tokenizer is None) == (kind == "text", kind == "image")
    prepared = predictor.prepare(DataArguments(str(table)))
    rows = prepared.splits["train"]
    scores = predictor.scores(rows, prepared.folder, batch_size, workers)
    expected = [forward(predictor, table.parent / f"{row}.jpg", text) for row, text in enumerate(CAPTIONS)]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-3  # else an order could not be told
    np.testing.assert_allclose(predictor.scores(rows.select([3, 0]), prepared.folder), scores[[3, 0]], atol=1e-5)


def test_missing_texts_and_images(folders, table):
    predictor = Predictor.load(folders["both"])
    cells = [("0.jpg", None), (None, CAPTIONS[1]), ("2.jpg", CAPTIONS[2]), ("3.jpg", "  ")]
    where = [f"row {row}" for row in range(4)]
    source = Dataset.from_dict({"image": [i for i, _ in cells], "text": [t for _, t in cells], "where": where})
    args = DataArguments(image_dir=str(table.parent))
    prepared = predictor.prepare(args, with_labels=False, sources={"train": source})
    scores = predictor.scores(prepared.splits["train"], prepared.folder)
    expected = [
        forward(predictor, image and table.parent / image, None if text == "  " else text) for image, text in cells
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    neither = source.remove_columns(["image", "text"])
    neither = neither.add_column("image", ["0.jpg", None] * 2).add_column("text", ["a", None] * 2)
    with pytest.raises(ValueError, match="2 of 4 rows have no"):
        predictor.prepare(args, with_labels=False, sources={"train": neither})


def test_texts_longer_than_the_model_reads_are_cut(folders, table):
    """The model has 16 positions."""
    predictor = Predictor.load(folders["text"])
    source = Dataset.from_dict({"text": ["a man " * 50, "a man " * 7], "where": ["row 1", "row 2"]})
    rows = predictor.prepare(DataArguments(), with_labels=False, sources={"train": source}).splits["train"]
    scores = predictor.scores(rows, table.parent)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    predictor.processor.tokenizer.model_max_length = 4  # training's --max_tokens is kept
    cut = predictor.scores(rows, table.parent)
    np.testing.assert_allclose(cut[0], forward(predictor, None, "a man"), atol=1e-5)
    assert np.abs(cut - scores).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_reports_on_the_models_own_labels(kind, folders, table):
    predictor = Predictor.load(folders[kind])
    prepared = predictor.prepare(DataArguments(str(table)))
    rows = prepared.splits["train"]
    figures = predictor.evaluate(rows, prepared.folder)
    references = np.array([[label in labels.split() for label in ("1", "3", "10")] for labels in LABELS])
    expected = report(predictor.scores(rows, prepared.folder), references, predictor.model.config, texts=CAPTIONS)
    assert ("by_caption_length" in expected) == (kind != "image")
    assert predictor.evaluate(rows, prepared.folder, ablations=False) == expected
    assert ("ablations" in figures) == (kind == "both")
    figures.pop("ablations", None)
    assert figures == expected
    assert [label["label"] for label in figures["per_label"]] == list(NAMES.values())
    assert {label["threshold"] for label in figures["per_label"]} == {0.4}


def test_evaluate_needs_labels(folders, tmp_path):
    predictor = Predictor.load(folders["both"])
    prepared = predictor.prepare(DataArguments(str(write_table(tmp_path, "test.csv", labelled=False))))
    with pytest.raises(ValueError, match="no labels; name their column by --label_column"):
        predictor.evaluate(prepared.splits["train"], prepared.folder)


class TestChooseSplit:
    """Rows are told by their number, which is the line in their table less two."""

    @pytest.fixture
    def choose(self, folders, tmp_path):
        """Chooses from a table (or folder of tables), given the lines of the training's `splits.csv`."""
        folder = shutil.copytree(folders["text"], tmp_path / "model")

        def run(source, recorded="", **options):
            if recorded:
                (folder / "splits.csv").write_text(f"split,row\n{recorded}", encoding="utf-8")
            predictor = Predictor.load(folder)
            name, rows = predictor.choose_split(predictor.prepare(DataArguments(str(source))), **options)
            return name, [int(where.split(":")[-1]) - 2 for where in rows["where"]]

        return run

    SPLIT = "train,train.csv:2\ntrain,train.csv:5\nvalidation,train.csv:3\ntest,train.csv:6\ntest,train.csv:4\n"

    @pytest.mark.parametrize(
        "recorded, options, expected",
        [
            ("", {}, ("train", [0, 1, 2, 3, 4])),
            ("", dict(held_out=True), ("train", [0, 1, 2, 3, 4])),
            (SPLIT, {}, ("train", [0, 1, 2, 3, 4])),
            (SPLIT, dict(held_out=True), ("test", [2, 4])),
            (SPLIT, dict(name="test"), ("test", [2, 4])),
            (SPLIT, dict(name="validation"), ("validation", [1])),
            (SPLIT, dict(name="train"), ("train", [0, 3])),
            (SPLIT.replace("test", "validation"), dict(held_out=True), ("validation", [1, 2, 4])),
            # another table of this name: some of its rows are unknown
            (SPLIT.replace("train.csv:6", "train.csv:7"), dict(held_out=True), ("train", [0, 1, 2, 3, 4])),
        ],
    )
    def test_of_a_table(self, recorded, options, expected, choose, table):
        assert choose(table, recorded, **options) == expected

    @pytest.mark.parametrize("recorded", ["", SPLIT.replace("test", "validation"), SPLIT.replace("train.", "other.")])
    def test_of_a_table_without_it(self, recorded, choose, table):
        with pytest.raises(ValueError, match="no split 'test'; the source has train"):
            choose(table, recorded, name="test")

    @pytest.mark.parametrize("names, expected", [(("train", "test"), "test"), (("train", "val"), "validation")])
    def test_of_a_source_with_splits(self, names, expected, choose, tmp_path):
        """`splits.csv` has no say where the source has splits."""
        for name in names:
            write_table(tmp_path, f"{name}.csv")
        everything = list(range(5))
        for options in ({}, dict(held_out=True), dict(name=expected)):
            assert choose(tmp_path, self.SPLIT, **options) == (expected, everything)
        assert choose(tmp_path, self.SPLIT, name="train") == ("train", everything)


@pytest.fixture
def recorded(folders, tmp_path):
    """A model whose training knew ten texts: six train, two validation and two test rows."""
    folder = shutil.copytree(folders["text"], tmp_path / "m")
    (tmp_path / "t.csv").write_text("text,labels\n" + "".join(f"{n} dogs,3\n" for n in range(10)))
    rows = Predictor.load(folder).prepare(DataArguments(data=str(tmp_path / "t.csv"))).splits["train"]
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    lines = zip(splits, rows["where"][:], row_digests(rows, tmp_path, uses_image=False), strict=True)
    (folder / "splits.csv").write_text("split,row,digest\n" + "".join(f"{','.join(line)}\n" for line in lines))
    return Predictor.load(folder)


def choose(predictor, folder, numbers, name=None, held_out=True):
    (folder / "n.csv").write_text("text,labels\n" + "".join(f"{n} dogs,3\n" for n in numbers))
    prepared = predictor.prepare(DataArguments(data=str(folder / "n.csv")))
    return predictor.choose_split(prepared, name, held_out)


def test_rows_of_training_are_recognised_in_any_order(recorded, tmp_path, notices):
    name, rows = choose(recorded, tmp_path, [9, 3, 8, 0, 1, 2, 4, 5, 6, 7])
    assert name == "test" and rows["text"][:] == ["9 dogs", "8 dogs"]
    assert "2 of 10 rows: the test rows of training" in notices()
    assert choose(recorded, tmp_path, [9, 7, 8, 6], "validation")[1]["text"][:] == ["7 dogs", "6 dogs"]


def test_a_table_of_which_some_rows_are_known_is_taken_whole(recorded, tmp_path, notices):
    name, rows = choose(recorded, tmp_path, [0, 1, 8, 77])
    assert name == "train" and len(rows) == 4
    assert "All 4 rows, of which training knows some: 2 train, 1 test rows of training" in notices()
    with pytest.raises(ValueError, match="--split test: 2 train, 1 test rows of training are among these 4 rows"):
        choose(recorded, tmp_path, [0, 1, 8, 77], "test")


def test_other_rows_under_the_same_names_are_not_recognised(recorded, tmp_path, notices):
    name, rows = choose(recorded, tmp_path, range(50, 60))
    assert name == "train" and len(rows) == 10
    assert [line for line in notices() if "of training" in line] == [
        "All 10 rows; none is recognised as a row of training"
    ]


def test_rows_that_a_table_repeats_have_the_split_of_training(recorded, tmp_path, notices):
    repeated = choose(recorded, tmp_path, [*range(10), *range(10)])
    once = choose(recorded, tmp_path, range(10))
    assert repeated[0] == once[0] == "test" and len(repeated[1]) == 2 * len(once[1])


def test_a_folder_without_digests_says_how_it_recognises_rows(recorded, tmp_path, notices):
    (recorded.folder / "splits.csv").write_text("split,row\ntest,n.csv:2\ntrain,n.csv:3\n")
    assert choose(recorded, tmp_path, [5, 6])[1]["text"][:] == ["5 dogs"]
    assert any("recognised by file name and line" in line for line in notices())
