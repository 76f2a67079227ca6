import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from support.tiny_folder import CAPTIONS, LABELS, NAMES, write_folder, write_table
from transformers import BertConfig

from hf_mmclf import DataArguments, MMClfProcessor, Predictor, save_for_hub
from hf_mmclf.evaluation.report import report

KINDS = ["both", "image", "text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished folder of each kind."""
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind, threshold=0.4) for kind in KINDS}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


def forward(finished, image, caption):
    """Scores of one row without any of our data code: no padding, no masks, an absent input not given."""
    inputs = {}
    if image is not None and finished.processor.image_processor:
        inputs |= finished.processor.image_processor(Image.open(image).convert("RGB"), return_tensors="pt")
    if caption is not None and finished.processor.tokenizer:
        inputs |= finished.processor.tokenizer(caption, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        return finished.model.eval()(**inputs).logits[0].sigmoid().numpy()


def test_load_says_what_is_wrong_with_a_folder(tmp_path, folders):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no finished model here \(no config.json\)$"):
        Predictor.load(tmp_path / "nowhere")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="its training has not finished"):
        Predictor.load(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a bert model; expected a folder that"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_for_the_hub_it_loads_again(kind, folders, table, tmp_path):
    finished = Predictor.load(folders[kind])
    save_for_hub(finished.model, finished.processor, tmp_path / "new")
    rows = finished.prepare(DataArguments(str(table))).splits["train"]
    again = Predictor.load(tmp_path / "new")
    np.testing.assert_array_equal(again.scores(rows, table.parent), finished.scores(rows, table.parent))
    assert ModelCard.load(tmp_path / "new" / "README.md").data.library_name == "transformers"


def test_saving_keeps_what_is_in_the_folder(folders, tmp_path):
    finished = Predictor.load(folders["both"])
    (tmp_path / "README.md").write_text("my own card")
    (tmp_path / "metrics.json").write_text("{}")
    save_for_hub(finished.model, finished.processor, tmp_path)
    finished.model.config.threshold = 0.7
    save_for_hub(finished.model, finished.processor, tmp_path)
    finished.model.config.threshold = 0.4
    assert Predictor.load(tmp_path).model.config.threshold == 0.7
    assert (tmp_path / "README.md").read_text() == "my own card"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_card_has_the_figures_that_are_there(folders, table, tmp_path):
    finished = Predictor.load(folders["both"])
    prepared = finished.prepare(DataArguments(str(table)))
    figures = finished.evaluate(prepared.splits["train"], prepared.folder)
    (tmp_path / "metrics.json").write_text(json.dumps({"test": figures}))
    save_for_hub(finished.model, finished.processor, tmp_path)
    f1 = {result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert round(figures["fitted"]["f1"], 4) in f1


def test_parts_of_another_model_are_refused(folders, tmp_path):
    text, image = (Predictor.load(folders[kind]) for kind in ("text", "image"))
    save_for_hub(text.model, text.processor, tmp_path)
    with pytest.raises(FileExistsError, match="has tokenizer.json, tokenizer_config.json of another model"):
        save_for_hub(image.model, image.processor, tmp_path)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(FileExistsError, match="has onnx of another model"):
        save_for_hub(text.model, text.processor, tmp_path)


def test_a_folder_that_could_not_be_written_does_not_load(folders, tmp_path, monkeypatch):
    finished = Predictor.load(folders["both"])

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(MMClfProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_for_hub(finished.model, finished.processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_processor_that_does_not_fit_is_refused(folders, tmp_path):
    both, text = (Predictor.load(folders[kind]) for kind in ("both", "text"))
    with pytest.raises(ValueError, match="the processor has no image_processor"):
        save_for_hub(both.model, text.processor, tmp_path / "model")
    with pytest.raises(ValueError, match="the processor has a image_processor, and the model has no use"):
        save_for_hub(text.model, both.processor, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size, workers", [(1, 0), (2, 0), (64, None), (3, 1)])
def test_scores_are_those_of_a_forward_pass_of_each_row(kind, batch_size, workers, folders, table):
    finished = Predictor.load(str(folders[kind]))
    parts = finished.processor
    assert (parts.image_processor is None, parts.tokenizer is None) == (kind == "text", kind == "image")
    prepared = finished.prepare(DataArguments(str(table)))
    rows = prepared.splits["train"]
    scores = finished.scores(rows, prepared.folder, batch_size, workers)
    expected = [forward(finished, table.parent / f"{row}.jpg", caption) for row, caption in enumerate(CAPTIONS)]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(np.diff(expected, axis=0)).max(axis=1).min() > 1e-3  # else an order could not be told
    np.testing.assert_allclose(finished.scores(rows.select([3, 0]), prepared.folder), scores[[3, 0]], atol=1e-5)


def test_missing_captions_and_pictures(folders, table):
    finished = Predictor.load(folders["both"])
    cells = [("0.jpg", None), (None, CAPTIONS[1]), ("2.jpg", CAPTIONS[2]), ("3.jpg", "  ")]
    where = [f"row {row}" for row in range(4)]
    source = Dataset.from_dict({"image": [i for i, _ in cells], "text": [t for _, t in cells], "where": where})
    args = DataArguments(image_dir=str(table.parent))
    prepared = finished.prepare(args, with_labels=False, sources={"train": source})
    scores = finished.scores(prepared.splits["train"], prepared.folder)
    expected = [
        forward(finished, image and table.parent / image, None if text == "  " else text) for image, text in cells
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    neither = source.remove_columns(["image", "text"])
    neither = neither.add_column("image", ["0.jpg", None] * 2).add_column("text", ["a", None] * 2)
    with pytest.raises(ValueError, match="2 of 4 rows have no picture or caption"):
        finished.prepare(args, with_labels=False, sources={"train": neither})


def test_captions_longer_than_the_model_reads_are_cut(folders, table):
    """The tokenizer of this folder knows no limit; the model has 16 positions."""
    finished = Predictor.load(folders["text"])
    source = Dataset.from_dict({"text": ["a man " * 50, "a man " * 7], "where": ["row 1", "row 2"]})
    rows = finished.prepare(DataArguments(), with_labels=False, sources={"train": source}).splits["train"]
    scores = finished.scores(rows, table.parent)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    finished.processor.tokenizer.model_max_length = 4  # training's --max_tokens is kept
    cut = finished.scores(rows, table.parent)
    np.testing.assert_allclose(cut[0], forward(finished, None, "a man"), atol=1e-5)
    assert np.abs(cut - scores).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_reports_on_the_models_own_labels(kind, folders, table):
    finished = Predictor.load(folders[kind])
    prepared = finished.prepare(DataArguments(str(table)))
    rows = prepared.splits["train"]
    figures = finished.evaluate(rows, prepared.folder)
    references = np.array([[label in labels.split() for label in ("1", "3", "10")] for labels in LABELS])
    expected = report(finished.scores(rows, prepared.folder), references, finished.model.config, rows)
    assert ("by_caption_length" in expected) == (kind != "image")
    assert finished.evaluate(rows, prepared.folder, ablations=False) == expected
    assert ("ablations" in figures) == (kind == "both")
    figures.pop("ablations", None)
    assert figures == expected
    assert [label["label"] for label in figures["per_label"]] == list(NAMES.values())
    assert {label["threshold"] for label in figures["per_label"]} == {0.4}


def test_evaluate_needs_labels(folders, tmp_path):
    finished = Predictor.load(folders["both"])
    prepared = finished.prepare(DataArguments(str(write_table(tmp_path, "test.csv", labelled=False))))
    with pytest.raises(ValueError, match="no labels; name their column by --label_column"):
        finished.evaluate(prepared.splits["train"], prepared.folder)


class TestChooseSplit:
    """Rows are told by their number, which is the line in their table less two."""

    @pytest.fixture
    def choose(self, folders, tmp_path):
        """Chooses from a table (or folder of tables), given the lines of the training's `splits.csv`."""
        folder = shutil.copytree(folders["text"], tmp_path / "model")

        def run(source, recorded="", **options):
            if recorded:
                (folder / "splits.csv").write_text(f"split,row\n{recorded}", encoding="utf-8")
            finished = Predictor.load(folder)
            name, rows = finished.choose_split(finished.prepare(DataArguments(str(source))), **options)
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
