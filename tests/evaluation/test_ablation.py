import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import f1_score
from support.tiny_folder import CAPTIONS, LABELS, write_folder, write_table

from hf_mmclf import DataArguments, Predictor
from hf_mmclf.evaluation.ablation import ABLATIONS, ReplacedColumn, ablation_figures, ablations

TEXTS = ["a", None, "b", "c", None, "d"]
WHERE = [f"row {row}" for row in range(6)]


def batch_of(rows):
    return {
        "image": [f"{row}.jpg" for row in rows],
        "text": [TEXTS[row] for row in rows],
        "where": [WHERE[r] for r in rows],
    }


def same(batch):
    return batch


@pytest.fixture
def changes():
    return ablations(Dataset.from_dict({"text": TEXTS, "where": WHERE}))


def test_a_modality_is_taken_away_and_the_rest_stays(changes):
    assert list(changes) == list(ABLATIONS)
    given = batch_of([3, 0])
    assert changes["image_only"](same)(given) == {**given, "text": [None, None]}
    assert changes["text_only"](same)(given) == {**given, "image": [None, None]}
    assert given == batch_of([3, 0])


@pytest.mark.parametrize("seed", range(20))
def test_each_caption_goes_to_another_row_that_has_one(seed):
    rows = Dataset.from_dict({"text": TEXTS, "where": WHERE})
    change = ablations(rows, seed)["shuffled_captions"](same)
    shuffled = change(batch_of(range(6)))["text"]
    assert sorted(filter(None, shuffled)) == ["a", "b", "c", "d"]
    assert [text is None for text in shuffled] == [text is None for text in TEXTS]
    assert not [row for row, text in enumerate(shuffled) if text and text == TEXTS[row]]
    assert change(batch_of([5, 2]))["text"] == [shuffled[5], shuffled[2]]  # whatever the batch


def test_shuffling_is_that_of_the_seed():
    rows = Dataset.from_dict(
        {"text": [f"caption {row}" for row in range(30)], "where": [str(row) for row in range(30)]}
    )
    batch = {"text": rows["text"][:], "where": rows["where"][:]}
    first, again, other = (ablations(rows, seed)["shuffled_captions"](same)(batch) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("texts", [["a", None], [None, None], ["a"]])
def test_a_single_caption_cannot_be_shuffled(texts):
    rows = Dataset.from_dict({"text": texts, "where": WHERE[: len(texts)]})
    assert list(ablations(rows)) == ["image_only", "text_only"]


def test_worker_processes_can_have_it():
    change = ReplacedColumn(same, "text", {"row 0": "z"})
    assert pickle.loads(pickle.dumps(change))(batch_of([0, 2]))["text"] == ["z", None]


def test_figures_are_those_of_rows_written_like_that(tmp_path):
    """Against tables in which the cells are empty or exchanged; and text only opens no picture."""
    finished = Predictor.load(write_folder(tmp_path / "model", "both", threshold=0.4))
    table = write_table(tmp_path)
    prepared = finished.prepare(DataArguments(str(table)))
    rows = prepared.splits["train"]
    references = np.array([[label in labels.split() for label in ("1", "3", "10")] for labels in LABELS])
    found = finished.evaluate(rows, prepared.folder)["ablations"]
    images = [f"{row}.jpg" for row in range(5)]
    shuffled = ablations(rows)["shuffled_captions"](same)({"text": CAPTIONS, "where": rows["where"][:]})["text"]
    tables = {
        "image_only": (images, [None] * 5),
        "text_only": ([None] * 5, CAPTIONS),
        "shuffled_captions": (images, shuffled),
    }
    assert list(found) == list(tables)
    for name, (pictures, captions) in tables.items():
        source = Dataset.from_dict({"image": pictures, "text": captions, "where": WHERE[:5]})
        args = DataArguments(image_dir=str(tmp_path))
        changed = finished.prepare(args, with_labels=False, sources={"train": source}).splits["train"]
        predicted = finished.scores(changed, tmp_path) >= 0.4
        expected = {"f1": "micro", "f1_macro": "macro"}
        expected = {
            key: f1_score(references, predicted, average=avg, zero_division=0) for key, avg in expected.items()
        }
        assert found[name] == pytest.approx(expected)
    for picture in images:
        (tmp_path / picture).unlink()
    score = ablations(rows)["text_only"]
    assert finished.scores(rows, tmp_path, change=score).shape == (5, 3)


def test_figures_use_the_thresholds_of_the_configuration(tiny_config):
    config = tiny_config(threshold=0.3, label_thresholds={"LABEL_1": 0.7})
    references = np.array([[1, 0, 1], [0, 1, 1]])
    rows = Dataset.from_dict({"image": ["a.jpg", None], "text": ["a", "b"], "where": WHERE[:2]})
    scores = torch.tensor([[0.4, 0.6, 0.2], [0.1, 0.6, 0.9]]).numpy()
    found = ablation_figures(lambda change: scores, rows, references, config)
    assert found == dict.fromkeys(
        ABLATIONS, {"f1": pytest.approx(2 / 3), "f1_macro": pytest.approx((1 + 0 + 2 / 3) / 3)}
    )
    config.missing_thresholds = {"text": 0.05, "image": 0.95}  # which the ablated rows lack
    found = ablation_figures(lambda change: scores, rows, references, config)
    assert found["image_only"]["f1"] == pytest.approx(8 / 10)
    assert found["text_only"]["f1"] == 0
    assert found["shuffled_captions"]["f1"] == pytest.approx(2 / 5)  # the second row lacks a picture there too
