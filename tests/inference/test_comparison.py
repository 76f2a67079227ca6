import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.metrics import f1_score
from support.tiny_folder import LABELS, write_folder, write_table

from hf_mmclf import DataArguments, Predictor, compare
from hf_mmclf.evaluation.bootstrap import paired_difference
from hf_mmclf.inference.comparison import comparison_text

IDS = ["1", "3", "10"]
REFERENCES = np.array([[label in labels.split() for label in IDS] for labels in LABELS])
AVERAGES = {"f1": "micro", "f1_macro": "macro", "f1_samples": "samples"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of two kinds, each with a threshold at which it has another row right."""
    thresholds = {"both": 0.2, "text": 0.85}
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind, threshold=t) for kind, t in thresholds.items()}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


def decisions_of(folder, table):
    predictor = Predictor.load(folder)
    prepared = predictor.prepare(DataArguments(str(table)))
    return predictor.scores(prepared.splits["train"], prepared.folder) >= predictor.model.config.threshold


def reordered(folder, order, to):
    """The same model with its labels in another order."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = np.ascontiguousarray(weights[name][order])
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    names = [config["id2label"][str(i)] for i in order]
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: i for i, name in enumerate(names)}
    config["label_ids"] = [config["label_ids"][i] for i in order]
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_figures_rows_and_differences_are_those_of_the_models(folders, table):
    models = [Predictor.load(folders[kind]) for kind in ("text", "both")]
    found = compare(*models, DataArguments(str(table)), resamples=200, seed=7)
    a, b = (decisions_of(folders[kind], table) for kind in ("text", "both"))
    assert (found["a"], found["b"]) == (str(folders["text"]), str(folders["both"]))
    assert (found["split"], found["rows"], found["left_out"], found["bad_images"]) == ("train", 5, 0, [])
    assert found["figures"] == paired_difference(a, b, REFERENCES, resamples=200, seed=7)
    for key, average in AVERAGES.items():
        expected = [f1_score(REFERENCES, table, average=average, zero_division=0) for table in (a, b)]
        assert [found["figures"][key][model] for model in "ab"] == pytest.approx(expected)
    right_a, right_b = ((table == REFERENCES).all(axis=1) for table in (a, b))
    assert found["right"] == {
        "both": (right_a & right_b).sum(),
        "a": (right_a & ~right_b).sum(),
        "b": (right_b & ~right_a).sum(),
        "neither": (~right_a & ~right_b).sum(),
    }
    expected = []
    for row in np.flatnonzero(right_a != right_b):
        labels = [[label for label, hit in zip(IDS, table[row], strict=True) if hit] for table in (REFERENCES, a, b)]
        right = "a" if right_a[row] else "b"
        expected.append(
            {"row": f"train.csv:{row + 2}", "right": right, "labels": labels[0], "a": labels[1], "b": labels[2]}
        )
    assert found["only_one_right"] == expected != []
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("swap", [False, True])
def test_labels_in_another_order_are_told_by_their_ids(swap, folders, table, tmp_path):
    other = reordered(folders["text"], [2, 0, 1], tmp_path / "other")
    pair = [Predictor.load(folder) for folder in (folders["text"], other)]
    found = compare(*(pair[::-1] if swap else pair), DataArguments(str(table)), resamples=50)
    reference = compare(pair[0], pair[0], DataArguments(str(table)), resamples=50)
    assert all(figures["difference"] == 0 for figures in found["figures"].values())
    assert found["right"] == reference["right"] and not found["only_one_right"]
    assert found["figures"]["f1"]["a"] == reference["figures"]["f1"]["a"] > 0
    other_kind = Predictor.load(folders["both"])
    mixed = compare(other_kind, pair[1], DataArguments(str(table)), resamples=50)
    assert mixed == {
        **compare(other_kind, pair[0], DataArguments(str(table)), resamples=50),
        "b": str(other),
    }


def test_other_labels_are_an_error_that_names_them(folders, table, tmp_path):
    other = shutil.copytree(folders["text"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["label_ids"] = ["1", "4", "10"]
    (other / "config.json").write_text(json.dumps(config))
    models = [Predictor.load(folder) for folder in (folders["both"], other)]
    message = "the models have different labels: only .*both.* has 3; only .*other has 4. Expected the same set"
    with pytest.raises(ValueError, match=message):
        compare(*models, DataArguments(str(table)))


class TestRows:
    """Which rows are compared where training has split the table; a row is named by its line."""

    def pair(self, folders, tmp_path, first, second):
        models = []
        for name, splits in (("a", first), ("b", second)):
            folder = shutil.copytree(folders["text"], tmp_path / name)
            if splits:
                lines = [f"{split},train.csv:{line}" for line, split in enumerate(splits.split(), start=2)]
                (folder / "splits.csv").write_text("\n".join(["split,row", *lines]) + "\n")
            models.append(Predictor.load(folder))
        return models

    @pytest.mark.parametrize(
        "first, second, split, name, rows, left_out",
        [
            ("train test train test test", "train test train test test", None, "test", [1, 3, 4], 0),
            ("train test train test test", "test test train train test", None, "test", [1, 4], 2),
            ("train test train test test", "", None, "test and train", [1, 3, 4], 2),
            ("train test train test test", "test test train train test", "train", "train", [2], 2),
        ],
    )
    def test_that_both_held_out(self, first, second, split, name, rows, left_out, folders, table, tmp_path):
        models = self.pair(folders, tmp_path, first, second)
        found = compare(*models, DataArguments(str(table)), split, resamples=20)
        assert (found["split"], found["rows"], found["left_out"]) == (name, len(rows), left_out)
        predicted = decisions_of(folders["text"], table)[rows]
        expected = f1_score(REFERENCES[rows], predicted, average="micro", zero_division=0)
        assert found["figures"]["f1"]["a"] == found["figures"]["f1"]["b"] == pytest.approx(expected)

    def test_that_neither_shares(self, folders, table, tmp_path):
        models = self.pair(folders, tmp_path, "train test train train train", "train train train test train")
        with pytest.raises(ValueError, match="no row is in both the test rows of .*a and the test rows of .*b; give"):
            compare(*models, DataArguments(str(table)))

    def test_without_labels(self, folders, tmp_path):
        model = Predictor.load(folders["text"])
        table = write_table(tmp_path, "test.csv", labelled=False)
        with pytest.raises(ValueError, match="these rows have no labels"):
            compare(model, model, DataArguments(str(table)))


def test_text_has_each_figure_in_its_place():
    figures = {"a": 0.5, "b": 0.625, "difference": 0.125, "interval": [-0.01, 0.25], "not_better": 0.031, "p": 0.064}
    rows = [{"row": f"t.csv:{n}", "right": "b", "labels": ["1", "3"], "a": [], "b": ["1", "3"]} for n in range(7)]
    rows.append({"row": "t.csv:9", "right": "a", "labels": ["10"], "a": ["10"], "b": ["1"]})
    comparison = {
        "a": "old",
        "b": "new",
        "split": "test",
        "rows": 1234,
        "left_out": 2,
        "figures": dict.fromkeys(AVERAGES, figures),
        "right": {"both": 1000, "a": 1, "b": 7, "neither": 226},
        "only_one_right": rows,
    }
    head, table, counts, shown = comparison_text(comparison).split("\n\n")
    assert head == "A: old\nB: new\n1,234 rows of test; 2 that only one model takes are left out"
    assert table.splitlines()[0].split() == ["A", "B", "B", "-", "A", "95%", "not", "better", "p"]
    for line, average in zip(table.splitlines()[1:], AVERAGES.values(), strict=True):
        assert line.split() == f"{average} F1 0.5000 0.6250 0.1250 -0.0100 to +0.2500 0.0310 0.0640".split()
    assert counts == "Rows with exactly their labels: both 1,000, only A 1, only B 7, neither 226"
    lines = [line.split() for line in shown.splitlines()]
    assert lines[:2] == [["row", "only", "right", "labels", "A", "B"], ["t.csv:9", "A", "10", "10", "1"]]
    assert lines[2:] == [[f"t.csv:{n}", "B", "1", "3", "-", "1", "3"] for n in range(5)]
    comparison |= {"left_out": 0, "only_one_right": [], "warnings": ["No row has these labels: tie."]}
    text = comparison_text(comparison)
    assert "\n\nWarning: No row has these labels: tie.\n\nRows with exactly" in text
    assert text.endswith("neither 226") and "left out" not in text
