"""Whether scores are probabilities: of decisions with a score of 0.8, four in five should be right to say yes."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar


def expected_calibration_error(scores: np.ndarray, references: np.ndarray, bins: int = 15) -> float:
    """
    The expected calibration error (ECE) over all `rows x labels` decisions: they are dealt into equally wide bins by
    score, and the distance between a bin's mean score and its share of positives is averaged over the bins, each
    weighing as much as it holds.

    Naeini, Cooper & Hauskrecht 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", who like us
    look at the score of "yes"; 15 bins as Guo et al. 2017, "On Calibration of Modern Neural Networks", who look at the
    score of the one class that is predicted. Where labels are rare most decisions are an easy no, and the error is
    small without much merit: compare models on the same rows.

    Args:
        scores (`np.ndarray` of shape `(rows, labels)`): Probabilities in [0, 1].
        references (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels, bool or numbers; -1 is unknown and
            counts nowhere.
        bins (`int`, *optional*, defaults to 15): How many, from 0 to 1; a score on an edge belongs to the upper one.

    Returns:
        `float`: In [0, 1], 0 for scores that are probabilities, and where nothing is known.
    """
    known = references >= 0
    scores, positive = scores[known], references[known] == 1
    index = np.minimum((scores * bins).astype(int), bins - 1)
    surplus = np.bincount(index, weights=scores - positive)  # of a bin: mean distance times decisions
    return float(np.abs(surplus).sum() / max(scores.size, 1))


def fit_temperature(logits: ArrayLike, references: ArrayLike) -> float:
    """The temperature T at which `sigmoid(logits / T)` has the least binary cross-entropy on the given rows (Guo et
    al. 2017, "On Calibration of Modern Neural Networks"); it changes no order of scores.

    Args:
        logits (`ArrayLike` of shape `(N, L)`): Of validation rows.
        references (`ArrayLike` of shape `(N, L)`): Multi-hot labels, 0 or 1; -1 where nobody knows.

    Returns:
        `float`: between 0.05 and 20; above 1 where the model was too sure of itself.
    """
    logits, references = np.asarray(logits, dtype=np.float64), np.asarray(references)
    known = references >= 0
    logits, references = logits[known], references[known]

    def cross_entropy(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return np.mean(np.logaddexp(0, scaled) - references * scaled)

    return float(np.exp(minimize_scalar(cross_entropy, bounds=(np.log(0.05), np.log(20)), method="bounded").x))
