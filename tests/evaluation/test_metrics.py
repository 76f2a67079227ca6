import json

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    fbeta_score,
    log_loss,
    precision_score,
    recall_score,
)
from support.metric_oracle import averages, draw, precision_recall_f

from hf_mmclf.evaluation.metrics import (
    expected_calibration_error,
    fit_temperature,
    multi_label_metrics,
    per_label_report,
)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_oracle_agrees_with_scikit_learn(beta):
    scores, references = draw(rows=60, labels=4)
    references[:, 3] = 0  # a label without positives
    predicted = scores >= 0.5
    found = averages(predicted, references, beta)
    names = {"micro": "", "macro": "_macro", "samples": "_samples", "weighted": "_weighted"}
    for average, suffix in names.items():
        options = {"average": average, "zero_division": int(average == "samples")}
        assert found[f"f1{suffix}"] == pytest.approx(fbeta_score(references, predicted, beta=beta, **options))
    for average in ("micro", "macro"):
        options = {"average": average, "zero_division": 0}
        expected = (function(references, predicted, **options) for function in (precision_score, recall_score))
        assert (found[f"precision{names[average]}"], found[f"recall{names[average]}"]) == pytest.approx((*expected,))


@pytest.mark.parametrize("threshold", [0.5, [0.1, 0.3, 0.5, 0.7, 0.9]])
@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_metrics_are_those_of_the_oracle(threshold, unknown):
    scores, references = draw(digits=2)
    references[:, 3] = 0  # a label without positives
    references = np.where(np.random.default_rng(1).random(references.shape) < unknown, -1, references)
    references[:2] = [[1, -1, -1, -1, -1], [-1] * 5 if unknown else [0] * 5]
    predicted = (scores >= np.asarray(threshold)) & (references >= 0)
    columns = [(references[references[:, i] >= 0, i], scores[references[:, i] >= 0, i]) for i in (0, 1, 2, 4)]
    expected = averages(predicted, references) | {
        "map": np.mean([average_precision_score(*column) for column in columns]),
        "ece": expected_calibration_error(scores, references),
        "no_label_rate": (predicted.sum(axis=1) == 0).mean(),
    }
    result = multi_label_metrics(scores, references, threshold)
    assert result == pytest.approx(expected, abs=1e-12)
    assert {type(value) for value in result.values()} == {float}


def test_rows_without_any_label_count_as_right():
    assert multi_label_metrics([[0.9, 0.1], [0.2, 0.1]], [[1, 0], [0, 0]])["f1_samples"] == 1.0
    assert multi_label_metrics([[0.9, 0.1], [0.2, 0.7]], [[1, 0], [0, 0]])["f1_samples"] == 0.5


def test_scores_of_unknown_labels_change_nothing():
    scores, references = draw(rows=400)
    unknown = np.random.default_rng(1).random(references.shape) < 0.3
    hidden, changed = np.where(unknown, -1, references), np.where(unknown, 1 - scores, scores)
    assert multi_label_metrics(changed, hidden) == pytest.approx(multi_label_metrics(scores, hidden))
    found = [per_label_report(table, hidden, 0.5, list("abcde")) for table in (scores, changed)]
    assert found[0] == found[1]
    by_label = [precision_recall_f(scores[:, i] >= 0.5, hidden[:, i])[2] for i in range(5)]
    assert [row["f1"] for row in found[0]] == pytest.approx(by_label)


def test_one_label_is_not_taken_for_a_binary_task():
    scores, references = draw(labels=1)
    result = multi_label_metrics(scores, references)
    assert result["f1"] == result["f1_macro"] == pytest.approx(f1_score(references[:, 0], scores[:, 0] >= 0.5))


def test_nothing_true_and_nothing_predicted_gives_zeros_and_no_warning(recwarn):
    result = multi_label_metrics(np.full((4, 3), 0.2), np.zeros((4, 3)))
    assert result.pop("no_label_rate") == 1.0
    assert result.pop("f1_samples") == 1.0
    assert result.pop("ece") == pytest.approx(0.2)
    assert set(result.values()) == {0.0}
    assert not recwarn.list


def test_label_names_add_the_f1_of_every_label():
    scores, references = draw(labels=2)
    result = multi_label_metrics(scores, references, label_names=["cat", "macro"])
    each = f1_score(references, scores >= 0.5, average=None)
    assert (result["f1/cat"], result["f1/macro"]) == pytest.approx(tuple(each))
    assert result["f1_macro"] == pytest.approx(each.mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_score_equal_to_the_threshold_is_predicted(dtype):
    """Also for float32 scores that are not exact decimals, such as 0.3."""
    scores = draw(rows=15, labels=2)[0].astype(dtype)
    references = np.ones_like(scores)
    for at in scores.ravel():
        below, at, above = np.nextafter(float(at), 0), float(at), np.nextafter(float(at), 1)
        expected = [(scores.astype(float) >= threshold).mean() for threshold in (below, at, above)]
        assert expected[1] > expected[2]
        found = [per_label_report(scores, references, t, "ab") for t in (below, at, above)]
        assert [sum(row["predicted"] for row in rows) / 30 for rows in found] == pytest.approx(expected)
        found = [multi_label_metrics(scores, references, threshold)["recall"] for threshold in (below, at, above)]
        assert found == pytest.approx(expected, abs=1e-12)


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
        ([0.1, 0.9], [0, 1], ["(2,)", "(rows, labels)", "at least one of each"]),
        (np.zeros((0, 2)), np.zeros((0, 2)), ["(0, 2)", "at least one of each"]),
        (np.zeros((3, 0)), np.zeros((3, 0)), ["(3, 0)", "at least one of each"]),
        (GOOD, [[0, 1]], ["(1, 2)", "(2, 2)", "that of the scores"]),
        (GOOD, [0, 1], ["(2,)", "(2, 2)", "that of the scores"]),
        ([[0.1, np.nan], [np.nan, 0.2]], HOT, ["2 of 4", "NaN", "logits"]),
        ([[-3.5, 0.9], [0.8, 7.25]], HOT, ["-3.5", "7.25", "[0, 1]", "sigmoid"]),
        ([[0.5, np.inf], [0.8, 0.2]], HOT, ["inf", "sigmoid"]),
        (GOOD, [[0, 2], [1, 0]], ["contain 2", "0 and 1", "multi-hot"]),
        (GOOD, [[0, 0.5], [1, 0]], ["contain 0.5", "0 and 1"]),
        (GOOD, [[0, np.nan], [1, 0]], ["contain nan", "0 and 1"]),
    ],
)
def test_bad_scores_and_references_are_explained(scores, references, parts):
    for call in (multi_label_metrics, lambda s, r: per_label_report(s, r, 0.5, ["a", "b"])):
        with pytest.raises(ValueError) as error:
            call(scores, references)
        assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("threshold", "parts"),
    [
        ([0.5, 0.5, 0.5], ["(3,)", "2 of them", "one per label"]),
        ([[0.5, 0.5]], ["(1, 2)", "one number", "each row"]),
        (50, ["50", "[0, 1]", "probabilities"]),
        ([0.5, -0.1], ["-0.1", "[0, 1]", "probabilities"]),
        (np.nan, ["nan", "[0, 1]"]),
    ],
)
def test_bad_thresholds_are_explained(threshold, parts):
    for call in (multi_label_metrics, lambda s, r, threshold: per_label_report(s, r, threshold, ["a", "b"])):
        with pytest.raises(ValueError) as error:
            call(GOOD, HOT, threshold=threshold)
        assert [part for part in parts if part not in str(error.value)] == []


def test_bad_names_are_explained():
    with pytest.raises(ValueError, match="3 label names given; expected 2, one per label"):
        multi_label_metrics(GOOD, HOT, label_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="1 label names given; expected 2, one per label"):
        per_label_report(GOOD, HOT, 0.5, ["a"])


def slow_error(scores, references, bins):
    pairs = list(zip(np.ravel(scores), np.ravel(references), strict=True))
    error = 0.0
    for number in range(bins):
        inside = [
            (s, r) for s, r in pairs if number / bins <= s < (number + 1) / bins or s == 1 and number == bins - 1
        ]
        if inside:
            confidence, positive = np.mean(inside, axis=0)
            error += len(inside) / len(pairs) * abs(confidence - positive)
    return error


@pytest.mark.parametrize("bins", [1, 4, 15])
@pytest.mark.parametrize("dtype", [bool, int, np.float32])
def test_calibration_error_is_that_of_a_loop_over_the_bins(bins, dtype):
    rng = np.random.default_rng(0)
    scores = rng.random((50, 3))
    scores[0] = [0.0, 1.0, 0.5]
    references = (rng.random((50, 3)) < scores**2).astype(dtype)
    found = expected_calibration_error(scores, references, bins)
    assert found == pytest.approx(slow_error(scores, references, bins)) and found > 0.05
    assert expected_calibration_error(scores, references) == pytest.approx(slow_error(scores, references, 15))


def test_calibration_error_is_small_for_probabilities_and_one_for_wrong_certainty():
    rng = np.random.default_rng(0)
    scores = rng.random((20_000, 4))
    references = rng.random((20_000, 4)) < scores
    assert expected_calibration_error(scores, references) < 0.01
    assert expected_calibration_error(scores**3, references) > 0.2
    assert expected_calibration_error(np.array([[0.0, 1.0]]), np.array([[1, 0]])) == 1


def test_calibration_error_ignores_unknown_labels():
    scores, references = np.array([[0.9, 0.2], [0.6, 0.7]]), np.array([[1, -1], [0, -1]])
    assert expected_calibration_error(scores, references) == pytest.approx((0.1 + 0.6) / 2)
    assert expected_calibration_error(scores, np.full((2, 2), -1)) == 0


def test_temperature_is_the_factor_of_the_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (3000, 4))
    references = (rng.random(logits.shape) < expit(logits)).astype(int)
    for factor in (0.3, 1.0, 4.0):
        assert fit_temperature(factor * logits, references) == pytest.approx(factor, rel=0.05)
    best = fit_temperature(2 * logits, references)
    losses = [log_loss(references.ravel(), expit(2 * logits / t).ravel()) for t in (best, 0.9 * best, 1.1 * best)]
    assert losses[0] == min(losses)


def test_temperature_ignores_unknown_labels():
    rng = np.random.default_rng(0)
    logits, references = rng.normal(size=(50, 3)), rng.integers(-1, 2, (50, 3))
    changed = np.where(references < 0, 100, logits)
    assert fit_temperature(changed, references) == fit_temperature(logits, references)
