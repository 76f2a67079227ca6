import os
import subprocess
import sys

import numpy as np
import pytest
from support.metric_oracle import draw

from hf_mmclf.evaluation.evaluate_metric import MultiLabelMetric
from hf_mmclf.evaluation.metrics import multi_label_metrics


def compute(scores, references, **options):
    return MultiLabelMetric().compute(predictions=scores, references=references, **options)


def test_figures_are_those_of_the_function():
    scores, references = draw(labels=2)
    references[:9, 0] = -1
    for options in ({}, {"threshold": [0.2, 0.7]}, {"threshold": 0.3, "label_names": ["cat", "macro"]}):
        assert compute(scores, references, **options) == multi_label_metrics(scores, references, **options)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_equal_to_the_threshold_is_predicted(dtype):
    """No precision is lost on the way through Arrow."""
    scores = draw(rows=15, labels=2)[0].astype(dtype)
    references = np.ones_like(scores)
    for at in scores.ravel()[:5]:
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
from hf_mmclf.evaluation.evaluate_metric import MultiLabelMetric
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
