import json
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from hf_mmclf.evaluation.calibration import expected_calibration_error
from hf_mmclf.evaluation.metrics import MultiLabelMetric, per_label_report


def draw(rows=200, labels=5, seed=0, digits=None, prevalence=0.3):
    """Scores that know something about the references; `digits` makes ties."""
    rng = np.random.default_rng(seed)
    references = rng.random((rows, labels)) < prevalence
    scores = 1 / (1 + np.exp(-rng.normal(2.0 * references - 1.5, 1.5)))
    return (scores if digits is None else scores.round(digits)), references.astype(int)


def compute(scores, references, **options):
    return MultiLabelMetric().compute(predictions=scores, references=references, **options)


@pytest.mark.parametrize("threshold", [0.5, [0.1, 0.3, 0.5, 0.7, 0.9]])
def test_metrics_are_those_of_scikit_learn(threshold):
    scores, references = draw(digits=2)
    references[:, 3] = 0  # a label without positives
    predicted = scores >= np.asarray(threshold)
    expected = {
        "f1": f1_score(references, predicted, average="micro", zero_division=0),
        "f1_macro": f1_score(references, predicted, average="macro", zero_division=0),
        "f1_samples": f1_score(references, predicted, average="samples", zero_division=1),
        "f1_weighted": f1_score(references, predicted, average="weighted", zero_division=0),
        "precision": precision_score(references, predicted, average="micro", zero_division=0),
        "recall": recall_score(references, predicted, average="micro", zero_division=0),
        "precision_macro": precision_score(references, predicted, average="macro", zero_division=0),
        "recall_macro": recall_score(references, predicted, average="macro", zero_division=0),
        "map": average_precision_score(references[:, [0, 1, 2, 4]], scores[:, [0, 1, 2, 4]], average="macro"),
        "ece": expected_calibration_error(scores, references),
        "no_label_rate": (predicted.sum(axis=1) == 0).mean(),
    }
    result = compute(scores, references, threshold=threshold)
    assert result == pytest.approx(expected, abs=1e-12)
    assert {type(value) for value in result.values()} == {float}


def test_rows_without_any_label_count_as_right():
    assert compute([[0.9, 0.1], [0.2, 0.1]], [[1, 0], [0, 0]])["f1_samples"] == 1.0
    assert compute([[0.9, 0.1], [0.2, 0.7]], [[1, 0], [0, 0]])["f1_samples"] == 0.5


def test_what_is_unknown_counts_for_nothing():
    scores, references = draw(rows=400)
    unknown = np.random.default_rng(1).random(references.shape) < 0.3
    hidden = np.where(unknown, -1, references)
    hits = (scores >= 0.5) & ~unknown
    result = compute(scores, hidden)
    assert result["f1"] == pytest.approx(f1_score(references[~unknown], hits[~unknown]))
    by_label = [f1_score(references[known, i], hits[known, i]) for i, known in enumerate(~unknown.T)]
    assert result["f1_macro"] == pytest.approx(np.mean(by_label))
    assert [row["f1"] for row in per_label_report(scores, hidden, 0.5, list("abcde"))] == pytest.approx(by_label)
    precisions = [average_precision_score(references[k, i], scores[k, i]) for i, k in enumerate(~unknown.T)]
    assert result["map"] == pytest.approx(np.mean(precisions))
    changed = np.where(unknown, 1 - scores, scores)
    assert compute(changed, hidden) == pytest.approx(result)


def test_one_label_is_not_taken_for_a_binary_task():
    scores, references = draw(labels=1)
    result = compute(scores, references)
    assert result["f1"] == result["f1_macro"] == pytest.approx(f1_score(references[:, 0], scores[:, 0] >= 0.5))


def test_nothing_true_and_nothing_predicted_gives_zeros_and_no_warning(recwarn):
    result = compute(np.full((4, 3), 0.2), np.zeros((4, 3)))
    assert result.pop("no_label_rate") == 1.0
    assert result.pop("f1_samples") == 1.0
    assert result.pop("ece") == pytest.approx(0.2)
    assert set(result.values()) == {0.0}
    assert not recwarn.list


def test_label_names_add_the_f1_of_every_label():
    scores, references = draw(labels=2)
    result = compute(scores, references, label_names=["cat", "macro"])
    each = f1_score(references, scores >= 0.5, average=None)
    assert (result["f1/cat"], result["f1/macro"]) == pytest.approx(tuple(each))
    assert result["f1_macro"] == pytest.approx(each.mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_exactly_at_the_threshold_is_predicted(dtype):
    scores = draw(rows=15, labels=2)[0].astype(dtype)
    references = np.ones_like(scores)
    for at in scores.ravel():
        below, above = np.nextafter(float(at), 0), np.nextafter(float(at), 1)
        expected = [(scores.astype(float) >= threshold).mean() for threshold in (below, float(at), above)]
        assert expected[1] > expected[2]
        found = [per_label_report(scores, references, t, "ab") for t in (below, float(at), above)]
        assert [sum(row["predicted"] for row in rows) / 30 for rows in found] == pytest.approx(expected)
    for at in scores.ravel()[:5]:  # and no precision is lost on the way through Arrow
        for threshold in (float(at), np.nextafter(float(at), 1)):
            expected = (scores.astype(float) >= threshold).mean()
            assert compute(scores, references, threshold=threshold)["recall"] == pytest.approx(expected, abs=1e-12)


def test_rows_may_come_in_batches_and_one_by_one():
    scores, references = draw(rows=30)
    metric = MultiLabelMetric()
    metric.add_batch(predictions=scores[:10], references=references[:10])
    metric.add_batch(predictions=scores[10:29], references=references[10:29])
    metric.add(prediction=scores[29], reference=references[29])
    assert metric.compute() == compute(scores, references)


def test_a_metric_still_works_after_an_error():
    scores, references = draw(rows=30)
    metric = MultiLabelMetric()
    for bad, threshold in ((scores * 9, 0.5), (scores[:5], 0.5), (scores, [0.5, 0.5])):
        with pytest.raises(ValueError):
            metric.compute(predictions=bad, references=references, threshold=threshold)
    assert metric.compute(predictions=scores, references=references) == compute(scores, references)


OFFLINE_SCRIPT = """
import socket
def refuse(*args): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
from hf_mmclf.evaluation.metrics import MultiLabelMetric
scores = np.linspace(0, 1, 400).reshape(100, 4)
print("ready", flush=True)
input()
for _ in range(20):
    print(MultiLabelMetric().compute(predictions=scores, references=scores > 0.4)["precision"], flush=True)
"""


@pytest.mark.slow
def test_two_processes_compute_at_the_same_time_offline_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))  # the other process' folder
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen([sys.executable, "-c", OFFLINE_SCRIPT], **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        scores = np.linspace(0, 1, 400).reshape(100, 4)
        found = [compute(scores, scores > 0.8)["precision"] for _ in range(20)]
        theirs = [float(line) for line in other.communicate(timeout=60)[0].splitlines()]
    assert other.returncode == 0
    assert found == [pytest.approx(80 / 200)] * 20
    assert theirs == [1.0] * 20
    assert (tmp_path / "metrics").is_dir()
    assert not [path for path in (tmp_path / "metrics").rglob("*") if path.is_file()]


def test_per_label_report():
    scores, references = draw(digits=2, labels=3)
    references[:, 1] = 0
    thresholds = [0.4, 0.5, 0.99]
    rows = per_label_report(scores, references, thresholds, ["cat", "dog", "bus"])
    assert [row["label"] for row in rows] == ["cat", "dog", "bus"]
    assert [row["threshold"] for row in rows] == thresholds
    for i, row in enumerate(rows):
        truth, predicted = references[:, i], scores[:, i] >= thresholds[i]
        for key, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            assert row[key] == pytest.approx(function(truth, predicted, zero_division=0))
        assert (row["support"], row["predicted"]) == (truth.sum(), predicted.sum())
    assert rows[0]["average_precision"] == pytest.approx(average_precision_score(references[:, 0], scores[:, 0]))
    assert rows[1]["average_precision"] is None
    assert json.loads(json.dumps(rows)) == rows


GOOD = [[0.1, 0.9], [0.8, 0.2]]
HOT = [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("scores", "references", "parts"),
    [
        ([0.1, 0.9], [0, 1], ["(2,)", "(rows, labels)", "one row per sample"]),
        (np.zeros((0, 2)), np.zeros((0, 2)), ["(0, 2)", "at least one of each"]),
        (np.zeros((3, 0)), np.zeros((3, 0)), ["(3, 0)", "at least one of each"]),
        (GOOD, [[0, 1]], ["(1, 2)", "(2, 2)", "same rows and labels"]),
        (GOOD, [0, 1], ["(2,)", "(2, 2)", "multi-hot"]),
        ([[0.1, np.nan], [np.nan, 0.2]], HOT, ["2 of 4", "NaN", "logits"]),
        ([[-3.5, 0.9], [0.8, 7.25]], HOT, ["-3.5", "7.25", "[0, 1]", "sigmoid"]),
        ([[0.5, np.inf], [0.8, 0.2]], HOT, ["inf", "sigmoid"]),
        (GOOD, [[0, 2], [1, 0]], ["contain 2", "0 and 1", "multi-hot"]),
        (GOOD, [[0, 0.5], [1, 0]], ["contain 0.5", "0 and 1"]),
        (GOOD, [[0, np.nan], [1, 0]], ["contain nan", "0 and 1"]),
    ],
)
def test_bad_scores_and_references_are_explained(scores, references, parts):
    for call in (compute, lambda s, r: per_label_report(s, r, 0.5, ["a", "b"])):
        with pytest.raises(ValueError) as error:
            call(scores, references)
        assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("threshold", "parts"),
    [
        ([0.5, 0.5, 0.5], ["(3,)", "2 of them", "one per label"]),
        ([[0.5, 0.5]], ["(1, 2)", "one number"]),
        (50, ["50", "[0, 1]", "per cent"]),
        ([0.5, -0.1], ["-0.1", "[0, 1]", "logits"]),
        (np.nan, ["nan", "[0, 1]"]),
    ],
)
def test_bad_thresholds_are_explained(threshold, parts):
    for call in (compute, lambda s, r, threshold: per_label_report(s, r, threshold, ["a", "b"])):
        with pytest.raises(ValueError) as error:
            call(GOOD, HOT, threshold=threshold)
        assert [part for part in parts if part not in str(error.value)] == []


def test_bad_names_are_explained():
    with pytest.raises(ValueError, match="3 label names given, expected 2: name every column"):
        compute(GOOD, HOT, label_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 label names given, expected 2: name every column"):
        per_label_report(GOOD, HOT, 0.5, ["a"])
