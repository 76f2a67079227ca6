import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from hf_mmclf.evaluation.calibration import expected_calibration_error, fit_temperature


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
def test_is_that_of_a_loop_over_the_bins(bins, dtype):
    rng = np.random.default_rng(0)
    scores = rng.random((50, 3))
    scores[0] = [0.0, 1.0, 0.5]
    references = (rng.random((50, 3)) < scores**2).astype(dtype)
    found = expected_calibration_error(scores, references, bins)
    assert found == pytest.approx(slow_error(scores, references, bins)) and found > 0.05
    assert expected_calibration_error(scores, references) == pytest.approx(slow_error(scores, references, 15))


def test_of_probabilities_it_is_small_and_of_wrong_certainty_it_is_one():
    rng = np.random.default_rng(0)
    scores = rng.random((20_000, 4))
    references = rng.random((20_000, 4)) < scores
    assert expected_calibration_error(scores, references) < 0.01
    assert expected_calibration_error(scores**3, references) > 0.2
    assert expected_calibration_error(np.array([[0.0, 1.0]]), np.array([[1, 0]])) == 1


def test_unknown_labels_count_nowhere():
    scores, references = np.array([[0.9, 0.2], [0.6, 0.7]]), np.array([[1, -1], [0, -1]])
    assert expected_calibration_error(scores, references) == pytest.approx((0.1 + 0.6) / 2)
    assert expected_calibration_error(scores, np.full((2, 2), -1)) == 0


def test_temperature_is_what_the_logits_were_multiplied_by():
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (3000, 4))
    references = (rng.random(logits.shape) < expit(logits)).astype(int)
    for factor in (0.3, 1.0, 4.0):
        assert fit_temperature(factor * logits, references) == pytest.approx(factor, rel=0.05)
    best = fit_temperature(2 * logits, references)
    losses = [log_loss(references.ravel(), expit(2 * logits / t).ravel()) for t in (best, 0.9 * best, 1.1 * best)]
    assert losses[0] == min(losses)


def test_temperature_sees_nothing_unknown():
    rng = np.random.default_rng(0)
    logits, references = rng.normal(size=(50, 3)), rng.integers(-1, 2, (50, 3))
    changed = np.where(references < 0, 100, logits)
    assert fit_temperature(changed, references) == fit_temperature(logits, references)
