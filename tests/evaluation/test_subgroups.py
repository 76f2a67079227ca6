import numpy as np
import pytest
from sklearn.metrics import f1_score

from hf_mmclf.evaluation.subgroups import by_caption_length, by_label_count


@pytest.fixture
def outcome():
    rng = np.random.default_rng(0)
    references = (rng.random((80, 6)) < 0.3).astype(np.float32)
    references[0] = 0
    references[1] = 1
    return (references == 1) ^ (rng.random((80, 6)) < 0.2), references


def figures_of(predicted, references, rows):
    micro = f1_score(references[rows], predicted[rows], average="micro", zero_division=0)
    samples = f1_score(references[rows], predicted[rows], average="samples", zero_division=1)
    return rows.sum(), pytest.approx(micro), pytest.approx(samples)


def test_by_label_count(outcome):
    predicted, references = outcome
    found = by_label_count(predicted, references)
    assert [group["group"] for group in found] == ["0", "1", "2", "3", "4+"]
    counts = references.sum(axis=1)
    empty = counts == 0
    assert found[0] == {
        "group": "0",
        "rows": empty.sum(),
        "f1": None,  # no label to find
        "f1_samples": pytest.approx((~predicted[empty].any(axis=1)).mean()),
    }
    for group, rows in zip(found[1:], (counts == 1, counts == 2, counts == 3, counts >= 4), strict=True):
        assert (group["rows"], group["f1"], group["f1_samples"]) == figures_of(predicted, references, rows)


def test_by_caption_length(outcome):
    predicted, references = outcome
    lengths = np.resize([0, 1, 8, 9, 11, 12, 15, 16, 40], 80)
    texts = [" ".join(["word"] * length) or None for length in lengths]
    found = by_caption_length(predicted, references, texts)
    bins = {"none": (0, 0), "1-8": (1, 8), "9-11": (9, 11), "12-15": (12, 15), "16+": (16, 99)}
    assert [group["group"] for group in found] == list(bins)
    for group, (low, high) in zip(found, bins.values(), strict=True):
        rows = (lengths >= low) & (lengths <= high)
        assert (group["rows"], group["f1"], group["f1_samples"]) == figures_of(predicted, references, rows)


def test_groups_without_rows_are_left_out(outcome):
    predicted, references = outcome
    assert [group["group"] for group in by_caption_length(predicted, references, ["a  dog\n"] * 80)] == ["1-8"]
    assert [group["group"] for group in by_label_count(predicted[1:2], references[1:2])] == ["4+"]


def test_unknown_labels_are_none():
    found = by_label_count(np.array([[True, True], [False, True]]), np.array([[1, -1], [-1, -1]]))
    assert [(group["group"], group["rows"], group["f1"]) for group in found] == [("0", 1, None), ("1", 1, 1.0)]
