import numpy as np
import pytest
from iterstrat.ml_stratifiers import IterativeStratification

from hf_mmclf import splits
from hf_mmclf.splits import stratified_split

SHARES = [0.8, 0.1, 0.1]


def drawn(rows, rates, seed=0):
    return np.random.default_rng(seed).random((rows, len(rates))) < rates


def numbers(parts):
    """The part of each row."""
    found = np.full(sum(map(len, parts)), -1)
    for number, rows in enumerate(parts):
        found[rows] = number
    return found


def worst(labels, part, shares):
    """Largest gap between the rows that a label has in a part and its share, in rows."""
    return max(np.abs(labels[part == i].sum(0) - share * labels.sum(0)).max() for i, share in enumerate(shares))


def test_tables_that_are_not_long_are_split_by_iterative_stratification_alone():
    labels = drawn(3_000, [0.6, 0.3, 0.1, 0.03])
    alone = IterativeStratification(labels, np.array(SHARES), np.random.RandomState(3))
    np.testing.assert_array_equal(numbers(stratified_split(labels, SHARES, 3)), alone)


@pytest.mark.parametrize(
    "rates",
    [
        [0.6, 0.3, 0.1, 0.03, 0.01, 0.005],  # a few combinations of labels
        [0.15] * 12,  # most rows in combinations of a few rows
        [0.5] * 30,  # each row a combination of its own
    ],
)
@pytest.mark.parametrize("shares", [SHARES, [0.7, 0.15, 0.15], [2 / 3, 1 / 3], [1 - 1 / np.pi, 1 / np.pi]])
def test_long_tables_are_split_as_evenly_as_short_ones(monkeypatch, rates, shares):
    monkeypatch.setattr(splits, "ITERATIVE_ROWS", 4_000)
    labels = drawn(20_000, rates)
    part = numbers(stratified_split(labels, shares, 0))
    alone = IterativeStratification(labels, np.array(shares), np.random.RandomState(0))
    assert worst(labels, part, shares) <= 2 + 1.2 * worst(labels, alone, shares)
    np.testing.assert_allclose(np.bincount(part) / 20_000, shares, atol=0.005)


def test_most_rows_of_a_long_table_are_dealt_in_blocks_with_the_exact_shares(monkeypatch):
    asked = []

    def spy(labels, *rest):
        asked.append(labels)
        return IterativeStratification(labels, *rest)

    monkeypatch.setattr(splits, "ITERATIVE_ROWS", 1_000)
    monkeypatch.setattr(splits, "IterativeStratification", spy)
    labels = np.repeat([[True, False], [True, True], [False, False]], [19_000, 987, 13], axis=0)
    part = numbers(stratified_split(labels, SHARES, 0))
    assert 1_000 <= len(asked[0]) <= 1_050 and asked[0].any(1).sum() < len(asked[0])
    for rows in (slice(0, 19_000), slice(19_000, 19_987)):
        np.testing.assert_allclose(np.bincount(part[rows]), np.array(SHARES) * len(part[rows]), atol=3)


def test_long_tables_are_drawn_by_seed_and_keep_groups_whole(monkeypatch):
    monkeypatch.setattr(splits, "ITERATIVE_ROWS", 100)
    labels, groups = drawn(4_000, [0.5, 0.2]), np.random.default_rng(1).integers(0, 1_000, 4_000)
    one, same, other = (numbers(stratified_split(labels, SHARES, seed, groups=groups)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert all(len(set(one[groups == group])) == 1 for group in set(groups))
    first = np.bincount(one[:2_000], minlength=3) / 2_000  # no part is the beginning or the end of the table
    np.testing.assert_allclose(first, SHARES, atol=0.05)
