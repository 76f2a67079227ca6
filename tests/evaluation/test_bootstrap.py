import numpy as np
import pytest
from support.metric_oracle import f1_averages

from hf_mmclf.evaluation import bootstrap
from hf_mmclf.evaluation.bootstrap import (
    AVERAGES,
    by_label_count,
    by_text_length,
    f1_intervals,
    paired_difference,
    resampled_f1,
    weighted_f1,
)
from hf_mmclf.evaluation.metrics import multi_label_metrics


def draw(rows=60, labels=4, seed=0, noise=0.2):
    """Labels, some rows without any, and decisions that are wrong for a share of `noise`."""
    rng = np.random.default_rng(seed)
    references = (rng.random((rows, labels)) < [0.5, 0.3, 0.2, 0.1][:labels]).astype(np.float32)
    return (references == 1) ^ (rng.random((rows, labels)) < noise), references


def test_resamples_are_those_of_a_plain_loop_over_drawn_rows(monkeypatch):
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 60)  # seven draws at a time, and a rest
    predicted, references = draw()
    found = resampled_f1(predicted, references, resamples=50, seed=3)
    rng = np.random.default_rng(3)
    for number in range(50):
        rows = rng.integers(60, size=60)
        expected = f1_averages(predicted[rows], references[rows])
        assert {name: found[name][number] for name in AVERAGES} == pytest.approx(expected)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(AVERAGES, 50)


def test_every_row_once_is_the_metric():
    predicted, references = draw()
    predicted[:, 2], references[:, 2] = False, 0  # a label that never occurs counts as 0 in both
    figures = multi_label_metrics(predicted.astype(float), references)
    found = weighted_f1(predicted, references, np.ones((1, 60)))
    assert {name: value.item() for name, value in found.items()} == pytest.approx({n: figures[n] for n in AVERAGES})


def test_weights_are_how_often_a_row_is_there():
    predicted, references = draw(rows=5)
    weights = np.array([[0, 2, 1, 0, 3], [1, 0, 0, 0, 0]])
    found = weighted_f1(predicted, references, weights)
    for number, row in enumerate(weights):
        rows = np.repeat(np.arange(5), row)
        expected = f1_averages(predicted[rows], references[rows])
        assert {name: values[number] for name, values in found.items()} == pytest.approx(expected)


def test_intervals_are_percentiles_and_hold_the_figure():
    predicted, references = draw(rows=200)
    intervals = f1_intervals(predicted, references, resamples=400, seed=1)
    figures = f1_averages(predicted, references)
    for name, values in resampled_f1(predicted, references, 400, 1).items():
        assert intervals[name] == pytest.approx(np.percentile(values, [2.5, 97.5]))
        assert intervals[name][0] < figures[name] < intervals[name][1]


def test_intervals_hold_the_true_value_about_as_often_as_they_say():
    truth = f1_averages(*draw(rows=100_000, seed=99))["f1"]
    held = 0
    for seed in range(100):
        low, high = f1_intervals(*draw(rows=150, seed=seed), resamples=300)["f1"]
        held += low <= truth <= high
    assert 88 <= held <= 99


def test_rare_labels_do_not_lower_the_macro_f1_of_a_perfect_model():
    """Each of these labels is missing from a third of the resamples."""
    references = np.eye(6)
    assert f1_intervals(references == 1, references) == dict.fromkeys(AVERAGES, [1.0, 1.0])


def test_intervals_of_a_single_row_and_of_nothing_at_all():
    assert f1_intervals(np.array([[True, True]]), np.array([[1, 0]]))["f1"] == pytest.approx([2 / 3, 2 / 3])
    nothing = f1_intervals(np.zeros((3, 2), bool), np.zeros((3, 2)))
    assert nothing == {"f1": [0, 0], "f1_macro": [0, 0], "f1_samples": [1, 1]}


def test_unknown_labels_and_rows_are_not_counted():
    predicted, references = draw()
    hidden = references.copy()
    hidden[:30, 0] = -1
    flipped = predicted.copy()
    flipped[:30, 0] = ~predicted[:30, 0]
    once = np.ones((1, 60))
    expected = weighted_f1(predicted, hidden, once)
    assert weighted_f1(flipped, hidden, once) == expected
    assert expected["f1"] != weighted_f1(predicted, references, once)["f1"]
    more = np.vstack([hidden, np.full((5, 4), -1)]), np.vstack([predicted, np.ones((5, 4), bool)])
    assert weighted_f1(more[1], more[0], np.ones((1, 65))) == expected


class TestPairedDifference:
    def test_is_the_difference_of_the_same_resamples(self):
        (first, references), second = draw(), draw(noise=0.3)[0]
        found = paired_difference(first, second, references, resamples=200, seed=5)
        draws = [resampled_f1(predicted, references, 200, 5) for predicted in (first, second)]
        figures = [f1_averages(predicted, references) for predicted in (first, second)]
        for name in AVERAGES:
            differences = draws[1][name] - draws[0][name]
            assert (found[name]["a"], found[name]["b"]) == pytest.approx((figures[0][name], figures[1][name]))
            assert found[name]["difference"] == pytest.approx(figures[1][name] - figures[0][name])
            assert found[name]["interval"] == pytest.approx(np.percentile(differences, [2.5, 97.5]))
            below, above = (differences <= 0).sum(), (differences >= 0).sum()
            assert found[name]["not_better"] == below / 200
            assert found[name]["p"] == pytest.approx(min(1, 2 * (min(below, above) + 1) / 201))

    def test_is_zero_between_a_model_and_itself(self):
        predicted, references = draw()
        for figures in paired_difference(predicted, predicted, references, resamples=100).values():
            assert (figures["difference"], figures["interval"]) == (0, [0, 0])
            assert (figures["not_better"], figures["p"]) == (1, 1)

    def test_changes_its_sign_with_the_order(self):
        (worse, references), better = draw(noise=0.4), draw(noise=0.02)[0]
        there = paired_difference(worse, better, references, resamples=300)
        back = paired_difference(better, worse, references, resamples=300)
        for name in AVERAGES:
            assert there[name]["difference"] == pytest.approx(-back[name]["difference"])
            assert there[name]["interval"] == pytest.approx([-end for end in reversed(back[name]["interval"])])
            assert (there[name]["not_better"], back[name]["not_better"]) == (0, 1)
            assert there[name]["p"] == back[name]["p"] == pytest.approx(2 / 301)

    def test_a_pair_can_show_a_difference_that_two_intervals_do_not(self):
        """The second model is the first with a few decisions corrected: it is better, though the intervals overlap."""
        predicted, references = draw(rows=150, noise=0.25)
        better = predicted.copy()
        better[:12] = references[:12] == 1
        found = paired_difference(predicted, better, references)["f1"]
        alone = [f1_intervals(decisions, references)["f1"] for decisions in (predicted, better)]
        assert alone[0][1] > alone[1][0] and found["interval"][0] > 0 and found["p"] < 0.05


@pytest.fixture
def outcome():
    rng = np.random.default_rng(0)
    references = (rng.random((80, 6)) < 0.3).astype(np.float32)
    references[0] = 0
    references[1] = 1
    return (references == 1) ^ (rng.random((80, 6)) < 0.2), references


def figures_of(predicted, references, rows):
    expected = f1_averages(predicted[rows], references[rows])
    return rows.sum(), pytest.approx(expected["f1"]), pytest.approx(expected["f1_samples"])


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


def test_by_text_length(outcome):
    predicted, references = outcome
    lengths = np.resize([0, 1, 8, 9, 11, 12, 15, 16, 40], 80)
    texts = [" ".join(["word"] * length) or None for length in lengths]
    found = by_text_length(predicted, references, texts)
    bins = {"none": (0, 0), "1-8": (1, 8), "9-11": (9, 11), "12-15": (12, 15), "16+": (16, 99)}
    assert [group["group"] for group in found] == list(bins)
    for group, (low, high) in zip(found, bins.values(), strict=True):
        rows = (lengths >= low) & (lengths <= high)
        assert (group["rows"], group["f1"], group["f1_samples"]) == figures_of(predicted, references, rows)


def test_groups_without_rows_are_left_out(outcome):
    predicted, references = outcome
    assert [group["group"] for group in by_text_length(predicted, references, ["a  dog\n"] * 80)] == ["1-8"]
    assert [group["group"] for group in by_label_count(predicted[1:2], references[1:2])] == ["4+"]


def test_unknown_labels_are_none():
    found = by_label_count(np.array([[True, True], [False, True]]), np.array([[1, -1], [-1, -1]]))
    assert [(group["group"], group["rows"], group["f1"]) for group in found] == [("0", 1, None), ("1", 1, 1.0)]
