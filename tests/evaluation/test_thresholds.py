import logging
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit
from sklearn.metrics import f1_score
from support.metric_oracle import averages, draw, precision_recall_f

from hf_mmclf import MMClfConfig
from hf_mmclf.data.demo import DEMO_LABELS, demo_dataset
from hf_mmclf.evaluation.thresholds import OBJECTIVES, best_threshold, label_thresholds

KEYS = {"micro": "f1", "macro": "f1_macro", "samples": "f1_samples"}


# few scores, so that ties are common, and the ones where a cut is hard to place
LEVELS = [0.0, 1e-45, 0.3, float(np.float32(0.3)), 0.5, 0.7, float(np.nextafter(np.float32(1), 0)), 1 - 2**-53, 1.0]


@st.composite
def tables(draw):
    """Scores and references of few rows and labels."""
    shape = draw(st.tuples(st.integers(1, 8), st.integers(1, 4)))
    scores = draw(arrays(np.float64, shape, elements=st.sampled_from(LEVELS) | st.floats(0, 1, width=32)))
    return scores, draw(arrays(np.int64, shape, elements=st.sampled_from([0, 1, 0, 1, -1])))


def objective_value(predicted, references, objective, beta, least):
    """The value of an objective, by the loops of the oracle. A reached precision ranks above one that is not."""
    if objective != "precision":
        return averages(predicted, references, beta)[KEYS[objective]]
    precision, recall, _ = precision_recall_f(predicted, references)
    return 1 + recall if precision >= least and recall > 0 else precision


TARGETS = dict(
    objective=st.sampled_from(OBJECTIVES), beta=st.sampled_from([0.5, 1.0, 2.0]), least=st.sampled_from([0.5, 0.9, 1])
)


@settings(deadline=None)
@given(table=tables(), **TARGETS)
def test_no_threshold_is_better_than_the_best_one(table, objective, beta, least):
    scores, references = table

    def value(threshold):
        return objective_value(scores >= threshold, references, objective, beta, least)

    threshold = best_threshold(scores, references, objective, beta, least)
    assert 0 < threshold < 1
    cuts = np.unique(scores[(scores > 0) & (scores < 1)])
    others = [*cuts, 0.5, 1 - 2**-53]  # the last accepts nothing, unless a score is as high
    assert value(threshold) >= max(map(value, others)) - 1e-9


@settings(deadline=None)
@given(table=tables(), shrinkage=st.sampled_from([0.0, 2.0, 20.0, np.inf, None]), **TARGETS)
def test_label_thresholds_are_never_worse_than_the_global_one(table, shrinkage, objective, beta, least):
    scores, references = table

    def value(threshold):
        return objective_value(scores >= threshold, references, objective, beta, least)

    own = label_thresholds(scores, references, shrinkage, objective, beta, least)
    assert np.all((own > 0) & (own < 1))
    assert value(own) >= value(best_threshold(scores, references, objective, beta, least)) - 1e-9


@pytest.mark.parametrize("shrinkage", [0.0, 2.0, None])
@pytest.mark.parametrize("objective", KEYS)
def test_a_label_that_cannot_be_told_costs_nothing(objective, shrinkage):
    """All rows have the same score for a rare label: micro-F1 was 0.462 when it was accepted everywhere."""
    references = np.zeros((1000, 2), int)
    references[:400, 0] = references[::50, 1] = 1
    scores = np.stack([np.where(references[:, 0], 0.9, 0.1), np.full(1000, 0.3)], axis=1)
    own = label_thresholds(scores, references, shrinkage, objective)
    found, common = (
        averages(scores >= threshold, references)[KEYS[objective]]
        for threshold in (own, best_threshold(scores, references, objective))
    )
    assert found >= common
    if objective == "micro":
        assert found == pytest.approx(0.97561, abs=1e-5)


def test_nothing_is_accepted_where_that_is_best():
    """Two rows without labels have the highest scores: accepting nothing is right for two rows, everything for one."""
    scores, references = [[0.9], [0.8], [0.7]], [[0], [0], [1]]
    assert best_threshold(scores, references, "samples") == pytest.approx(0.95)
    hopeless = np.array([[0.9, 0.8], [0.2, 0.7], [0.1, 0.6]]), [[1, 0], [0, 0], [0, 1]]
    assert label_thresholds(*hopeless, objective="precision")[1] > 0.8


def micro_f1(scores, references, threshold):
    return precision_recall_f(scores >= threshold, references)[2]


@pytest.mark.parametrize("digits", [1, 2, None])
@pytest.mark.parametrize("seed", range(5))
def test_best_threshold_is_that_of_a_search_over_every_cut(seed, digits):
    scores, references = draw(rows=60, labels=3, seed=seed, digits=digits, prevalence=(0.02, 0.3, 0.9)[seed % 3])
    distinct = np.unique(scores[scores > 0])
    found = [micro_f1(scores, references, cut) for cut in distinct]
    threshold = best_threshold(scores, references)
    assert micro_f1(scores, references, threshold) == max(found)
    upper = distinct[np.flatnonzero(np.equal(found, max(found)))[-1]]  # the highest of equally good cuts
    lower = scores[scores < upper].max(initial=0.0)
    assert threshold == pytest.approx((upper + lower) / 2)
    assert threshold not in scores


@pytest.mark.parametrize("objective", [*KEYS, "precision"])
def test_the_highest_of_equally_good_cuts_is_taken(objective):
    """F1 is 2/3 at 0.9 and at 0.3; recall is 1 at 0.9 and at 0.7, both with a precision of at least one half."""
    scores, references = [[0.9], [0.7], [0.6], [0.3]], [[1], [0], [0], [1]]
    assert micro_f1(np.array(scores), references, 0.9) == micro_f1(np.array(scores), references, 0.3) == 2 / 3
    if objective == "precision":
        scores, references = [[0.9], [0.7]], [[1], [0]]
    elif objective == "samples":  # one row with four labels
        scores, references = np.transpose(scores), np.transpose(references)
    assert best_threshold(scores, references, objective, precision=0.5) == pytest.approx(0.8)
    if objective != "samples":
        assert label_thresholds(scores, references, 0, objective, precision=0.5) == pytest.approx([0.8])


def test_cuts_that_differ_by_rounding_are_equally_good():
    """The mean F1 over these rows is the same at 0.7 and at 0.2, but the sums of its changes are not."""
    scores = np.array([[0.7, 0.7, 0.5], [0.8, 0.3, 0.7], [0.3, 0.8, 0.3], [0.2, 0.7, 0.8]])
    references = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]])
    found = [averages(scores >= cut, references)["f1_samples"] for cut in np.unique(scores)]
    assert found[-2] == pytest.approx(found[0], abs=1e-15) and max(found) == pytest.approx(found[0], abs=1e-15)
    assert best_threshold(scores, references, "samples") == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("average", ["micro", "samples"])
def test_thresholds_are_fitted_with_min_labels_in_force(seed, average):
    generator = np.random.default_rng(seed)
    references = (generator.random((40, 4)) < 0.3).astype(int)
    references[references.sum(1) == 0, 0] = 1
    scores = np.clip(0.3 * references + 0.6 * generator.random((40, 4)), 0, 1).round(2)

    def value(threshold, **more):
        config = MMClfConfig(num_labels=4, min_labels=1, threshold=threshold, **more)
        return f1_score(references, config.decide(scores), average=average, zero_division=1)

    found = best_threshold(scores, references, average, min_labels=1)
    assert value(found) == pytest.approx(max(value(cut) for cut in np.unique(scores)), abs=1e-12)
    own = label_thresholds(scores, references, 0, average, min_labels=1)
    names = MMClfConfig(num_labels=4).label_names
    assert value(found, label_thresholds=dict(zip(names, own.tolist(), strict=True))) >= value(found) - 1e-12


def test_best_threshold_on_every_small_table():
    levels = (0.0, 0.3, 1.0)
    for scores, references in product(product(levels, repeat=3), product((0, 1), repeat=3)):
        scores, references = np.array([scores]), np.array([references])
        threshold = best_threshold(scores, references)
        assert 0 < threshold < 1
        assert micro_f1(scores, references, threshold) == max(micro_f1(scores, references, t) for t in (0.3, 1.0))


@pytest.mark.parametrize("upper", [1.0, 0.3, 1e-6])
def test_neighbouring_scores_are_separated_in_single_and_double_precision(upper):
    upper = np.float32(upper)
    scores = np.array([[upper, np.nextafter(upper, np.float32(0))]])
    threshold = best_threshold(scores, [[1, 0]])
    assert 0 < threshold < 1
    assert (scores.astype(np.float64) >= threshold).tolist() == [[True, False]]
    assert (scores >= np.float32(threshold)).tolist() == [[True, False]]


def test_thresholds_stay_below_one_where_double_precision_has_no_number_left():
    scores = [[1.0, np.nextafter(1.0, 0)]]
    assert 0 < best_threshold(scores, [[1, 0]]) < 1
    assert np.all(label_thresholds(scores, [[1, 0]]) < 1)


def test_no_positives_gives_one_half_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_mmclf"):
        assert best_threshold([[0.2, 0.9]], [[0, 0]]) == 0.5
        assert label_thresholds([[0.2, 0.9]], [[0, 0]]).tolist() == [0.5, 0.5]
    assert "no threshold can be fitted" in caplog.text


def test_label_thresholds_lie_between_the_label_s_own_and_the_global_one():
    scores, references = draw(rows=300, labels=4, prevalence=[0.5, 0.2, 0.02, 0.0])
    common = best_threshold(scores, references)
    own = [best_threshold(scores[:, [i]], references[:, [i]]) for i in range(3)]
    assert label_thresholds(scores, references, shrinkage=0) == pytest.approx([*own, common])
    assert label_thresholds(scores, references, 1e12, "micro") == pytest.approx([common] * 4)
    # with the macro objective, some labels take its own global threshold, or the mean would be below that one's
    macro = best_threshold(scores, references, "macro")
    for threshold in label_thresholds(scores, references, shrinkage=1e12):
        assert threshold == pytest.approx(common) or threshold == macro
    support = references.sum(axis=0)[:3]
    half = [label_thresholds(scores, references, shrinkage=n)[i] for i, n in enumerate(support)]
    logits = [np.log(t / (1 - t)) for t in (np.array(half), np.array(own), common)]
    assert logits[0] == pytest.approx((logits[1] + logits[2]) / 2)
    assert label_thresholds(scores, references)[3] == common


def test_a_label_s_threshold_depends_on_other_labels_only_through_the_global_one():
    scores, references = draw(rows=300, labels=3)
    changed = scores.copy()
    changed[:, 1:] = changed[::-1, 1:]
    first, second = (label_thresholds(table, references, shrinkage=0)[0] for table in (scores, changed))
    assert first == second


def test_shrinking_helps_where_labels_are_rare():
    """Thresholds fitted on 300 rows, macro-F1 on 5,000 others: naive per-label, shrunk, and global."""
    rng = np.random.default_rng(0)
    prevalence = np.geomspace(0.5, 0.005, 18)

    def rows(count, separation, offset):
        references = rng.random((count, 18)) < prevalence
        evidence = rng.normal(separation * (references - 0.5))
        logits = np.log(prevalence / (1 - prevalence)) + separation * evidence + offset
        return 1 / (1 + np.exp(-logits)), references

    found = []
    for _ in range(20):
        separation, offset = rng.uniform(1, 4, 18), rng.normal(0, 0.5, 18)
        scores, references = rows(300, separation, offset)
        test_scores, test_references = rows(5000, separation, offset)
        candidates = (
            label_thresholds(scores, references, shrinkage=0),
            label_thresholds(scores, references),
            best_threshold(scores, references),
        )
        each = [f1_score(test_references, test_scores >= t, average="macro", zero_division=0) for t in candidates]
        found.append(each)
    naive, shrunk, common = np.mean(found, axis=0)
    assert shrunk > naive + 0.003
    assert shrunk > common + 0.008


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("objective", KEYS)
def test_every_objective_is_maximised(objective, beta):
    for seed, digits in product(range(4), (1, None)):
        scores, references = draw(rows=30, labels=3, seed=seed, digits=digits)
        references[:3, 1] = -1

        def value(threshold, table=scores, labels=references):
            return averages(table >= threshold, labels, beta)[KEYS[objective]]

        found = [value(cut) for cut in np.unique(scores[scores > 0])]
        assert value(best_threshold(scores, references, objective, beta)) == pytest.approx(max(found))


@pytest.mark.parametrize("objective", ["micro", "samples"])
def test_joint_label_thresholds_are_better_than_the_global_one(objective):
    scores, references = draw(rows=300, labels=4, prevalence=[0.6, 0.3, 0.1, 0.03])
    scores = expit(np.log(scores / (1 - scores)) + [0, 1, 2, 3])  # each label's scores lie elsewhere
    own = label_thresholds(scores, references, 0, objective)

    def value(thresholds):
        return averages(scores >= thresholds, references)[KEYS[objective]]

    assert value(own) > value(best_threshold(scores, references, objective)) + 0.02
    for label, step in product(range(4), (-0.05, -0.01, 0.01, 0.05)):  # no label's threshold can be bettered alone
        other = own.copy()
        other[label] = np.clip(other[label] + step, 0.001, 0.999)
        assert value(other) <= value(own) + 1e-12


def test_precision_is_reached_with_the_largest_recall():
    scores, references = draw(rows=80)
    found = [precision_recall_f(scores >= cut, references)[:2] for cut in np.unique(scores)]
    for precision in (0.5, 0.8, 0.95):
        threshold = best_threshold(scores, references, "precision", precision=precision)
        reached, recall, _ = precision_recall_f(scores >= threshold, references)
        assert reached >= precision
        assert recall == max(recall for reached, recall in found if reached >= precision)
    for shrinkage in (0, 20.0, None):
        each = label_thresholds(scores, references, shrinkage, "precision", precision=0.8)
        assert all(precision_recall_f(scores[:, i] >= each[i], references[:, i])[0] >= 0.8 for i in range(5))


def test_a_precision_out_of_reach_gives_a_warning(caplog):
    scores = np.array([[0.9], [0.8], [0.7], [0.1]])
    with caplog.at_level(logging.WARNING, logger="hf_mmclf"):
        threshold = best_threshold(scores, [[0], [1], [1], [0]], "precision", precision=0.9)
    assert 0.1 < threshold < 0.7  # two of three is the best there is
    assert "No threshold has a precision of 0.900: the most precise one has 0.667" in caplog.text


def test_scores_of_unknown_labels_change_nothing():
    scores, references = draw(rows=200, labels=3)
    unknown = np.random.default_rng(1).random(references.shape) < 0.4
    hidden = np.where(unknown, -1, references)
    changed = np.where(unknown, 1 - scores, scores)
    for objective in ("micro", "macro", "samples", "precision"):
        assert best_threshold(scores, hidden, objective) == best_threshold(changed, hidden, objective)
        first, second = (label_thresholds(x, hidden, 2.0, objective) for x in (scores, changed))
        assert first.tolist() == second.tolist()


def test_cross_validation_shrinks_where_it_has_to():
    """One score for all labels: own thresholds are noise. Scores of labels far apart: the global one is useless."""
    rng = np.random.default_rng(0)
    references = (rng.random((300, 12)) < 0.04).astype(int)
    logits = rng.normal(2.5 * references - 3, 1.0)
    alike, apart = expit(logits), expit(logits + np.linspace(-6, 6, 12))
    common = best_threshold(alike, references)
    near = np.abs(np.log(label_thresholds(alike, references, None) / common)).mean()
    far = np.abs(np.log(label_thresholds(alike, references, 0) / common)).mean()
    assert near < far / 2
    own = label_thresholds(apart, references, 0)
    chosen = label_thresholds(apart, references, None)
    assert np.corrcoef(np.log(own), np.log(chosen))[0, 1] > 0.9
    assert f1_score(references, apart >= chosen, average="macro") > 2 * f1_score(
        references, apart >= best_threshold(apart, references), average="macro", zero_division=0
    )


@pytest.mark.parametrize(
    "modality, expected", [("image", 0.7343532684283728), ("text", 0.6161616161616161), ("both", 0.9691011235955056)]
)
def test_the_exact_probabilities_of_the_demo_bound_its_f1(modality, expected, demo_test):
    chances = np.array([row[modality] for row in demo_test["chances"]])
    references = np.array([[label in labels for label in DEMO_LABELS] for labels in demo_test["labels"]])
    assert micro_f1(chances, references, best_threshold(chances, references)) == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def demo_test():
    return demo_dataset(1500)["test"]


def test_bad_requests_are_explained():
    good, hot = [[0.1, 0.9], [0.8, 0.2]], [[0, 1], [1, 0]]
    for search in (best_threshold, label_thresholds):
        with pytest.raises(ValueError, match="unknown objective 'f1'; expected one of micro, macro"):
            search(good, hot, objective="f1")
        with pytest.raises(ValueError, match="beta is 0; expected a number above 0"):
            search(good, hot, beta=0)
        with pytest.raises(ValueError, match="precision is 90; expected a share"):
            search(good, hot, objective="precision", precision=90)
        with pytest.raises(ValueError, match="apply a sigmoid"):
            search([[-3.5, 0.9], [0.8, 7.25]], hot)
    for shrinkage in (-1, np.nan):
        with pytest.raises(ValueError, match=f"shrinkage is {shrinkage}; expected .* 0 switches the shrinking off"):
            label_thresholds(good, hot, shrinkage=shrinkage)
