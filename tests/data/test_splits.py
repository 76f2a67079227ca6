import itertools
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from hf_mmclf.data.splits import row_digests, stratified_split


def test_each_label_has_its_share_of_each_part():
    rng = np.random.default_rng(0)
    rates = np.array([0.6, 0.3, 0.1, 0.03, 0.01, 0.005])
    labels = rng.random((4000, 6)) < rates
    fractions = np.array([0.8, 0.1, 0.1])

    def worst(parts, counted=labels):
        """Largest gap between a label's rows in a part and its share, in rows."""
        shares = zip(parts, fractions, strict=True)
        return max(np.abs(counted[part].sum(0) - share * counted.sum(0)).max() for part, share in shares)

    def rare(parts):
        return worst(parts, labels[:, 3:])

    parts = stratified_split(labels, fractions, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(4000))
    np.testing.assert_allclose([len(part) for part in parts], 4000 * fractions, atol=40)
    at_random = [np.split(np.random.default_rng(seed).permutation(4000), [3200, 3600]) for seed in range(20)]
    assert rare(parts) <= 1 < np.median([rare(parts) for parts in at_random])
    assert worst(parts) < np.median([worst(parts) for parts in at_random])


@pytest.mark.parametrize("fractions", [[0.5, 0.6], [1.1, -0.1], [0.0, 1.0]])
def test_fractions_that_do_not_add_up(fractions):
    with pytest.raises(ValueError, match="expected shares that add up to 1"):
        stratified_split(np.ones((10, 1), bool), fractions, 0)


def test_parts_come_from_everywhere_and_differ_by_seed():
    labels = np.random.default_rng(0).random((2000, 12)) < 0.2
    tests = [stratified_split(labels, [0.8, 0.1, 0.1], seed)[2] for seed in range(5)]
    assert all(abs(rows.mean() / 2000 - 0.5) < 0.05 for rows in tests)
    overlaps = [len(np.intersect1d(a, b)) / len(a) for a, b in itertools.combinations(tests, 2)]
    assert 0.05 < np.mean(overlaps) < 0.15


def test_a_label_of_few_rows_can_be_learned():
    labels = np.zeros((200, 21), dtype=bool)
    labels[:, 0] = True
    labels[np.arange(40), 1 + np.arange(40) // 2] = True  # two rows for each of 20 labels
    for seed in range(3):
        assert labels[stratified_split(labels, [0.8, 0.1, 0.1], seed)[0]].any(axis=0).all()


def test_rows_are_recognised_by_their_content(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name, size in (("a.png", 3), ("b.png", 9)):
            PILImage.new("RGB", (size, size)).save(tmp_path / folder / "sub" / name)
    rows = {"image": ["sub/a.png", "sub/b.png", None, "sub/a.png"], "text": ["x", "x", "x", "y"]}
    digests = row_digests(Dataset.from_dict(rows), tmp_path / "one")
    assert len(set(digests)) == 4
    moved = {"image": ["a.png", None, "b.png", "a.png"], "text": ["y", "x", "x", "x"]}
    assert row_digests(Dataset.from_dict(moved), tmp_path / "two" / "sub") == [digests[i] for i in (3, 2, 1, 0)]
    PILImage.new("RGB", (5, 5), "red").save(tmp_path / "one" / "sub" / "a.png")
    assert row_digests(Dataset.from_dict(rows), tmp_path / "one")[1:3] == digests[1:3]
    assert row_digests(Dataset.from_dict(rows), tmp_path / "one")[0] != digests[0]
    texts = row_digests(Dataset.from_dict(rows), Path("nowhere"), uses_image=False)
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_images_in_the_table_are_recognised_by_their_bytes():
    cells = [{"bytes": content, "path": None} for content in (b"one", b"two", b"one")]
    rows = Dataset.from_dict({"image": cells, "text": [None] * 3}).cast_column("image", Image(decode=False))
    first, second, third = row_digests(rows, Path("."))
    assert first == third != second
