"""Multi-label metrics by plain loops over decisions: the oracle of the tests."""

import numpy as np


def draw(rows=200, labels=5, seed=0, digits=None, prevalence=0.3):
    """Draw scores that agree with the references to some degree; `digits` rounds the scores, which makes ties."""
    rng = np.random.default_rng(seed)
    references = rng.random((rows, labels)) < prevalence
    scores = 1 / (1 + np.exp(-rng.normal(2.0 * references - 1.5, 1.5)))
    return (scores if digits is None else scores.round(digits)), references.astype(int)


def precision_recall_f(predicted, references, beta=1.0, empty=0.0):
    """Count decisions of any shape one by one; `empty` is the F-measure without anything to count."""
    right = wrong = missed = 0
    for guess, truth in zip(np.ravel(predicted).tolist(), np.ravel(references).tolist(), strict=True):
        right += guess and truth == 1
        wrong += guess and truth == 0
        missed += not guess and truth == 1
    precision = right / (right + wrong) if right + wrong else 0.0
    recall = right / (right + missed) if right + missed else 0.0
    if not right:
        return precision, recall, 0.0 if wrong + missed else empty
    return precision, recall, (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def averages(predicted, references, beta=1.0, absent_labels=True):
    """Compute all averages. The macro mean can leave out labels that no row has and none is predicted to have."""
    predicted, references = np.asarray(predicted), np.asarray(references)
    each = [precision_recall_f(*column, beta) for column in zip(predicted.T, references.T, strict=True)]
    support = (references == 1).sum(axis=0)
    counted = [i for i in range(len(each)) if absent_labels or support[i] or predicted[references[:, i] == 0, i].any()]
    macro = np.mean([each[i] for i in counted], axis=0) if counted else np.zeros(3)
    rows = [
        precision_recall_f(*row, beta, empty=1.0)[2]
        for row in zip(predicted, references, strict=True)
        if (row[1] >= 0).any()
    ]
    precision, recall, micro = precision_recall_f(predicted, references, beta)
    return {
        "f1": micro,
        "f1_macro": macro[2],
        "f1_samples": np.mean(rows) if rows else 0.0,
        "f1_weighted": sum(f * n for (_, _, f), n in zip(each, support, strict=True)) / max(support.sum(), 1),
        "precision": precision,
        "precision_macro": macro[0],
        "recall": recall,
        "recall_macro": macro[1],
    }


def f1_averages(predicted, references):
    """Compute the three averages that have intervals, as for resamples and subgroups."""
    found = averages(predicted, references, absent_labels=False)
    return {name: found[name] for name in ("f1", "f1_macro", "f1_samples")}
