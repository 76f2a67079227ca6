import numpy as np
import pytest

from hf_mmclf.data.suspects import contradictions, label_warnings


def warnings_of(*rows):
    return label_warnings([row.split() for row in rows], [f"t.csv:{line}" for line in range(2, len(rows) + 2)])


@pytest.mark.parametrize(
    "rows, warning",
    [
        (["cat", "NaN", "NaN dog"], "look like missing values, and are labels: 'NaN' (t.csv:3, 2 in all); leave"),
        (["None", "N/A", "cat"], "'None' (t.csv:2, 1 in all), 'N/A' (t.csv:3, 1 in all)"),
        (["cat", "Cat dog", "cat"], "spellings of one label: 'cat' (t.csv:2, 2 in all), 'Cat' (t.csv:3, 1 in all)"),
        (["fire_hydrant", "firehydrant"], "'fire_hydrant' (t.csv:2, 1 in all), 'firehydrant' (t.csv:3, 1 in all)"),
        (["a#b#c", "a#b", "c#a", "b"], "3 of 4 labels contain '#', such as 'a#b#c' (t.csv:2, 1 in all)"),
        (
            ["['cat',", "dog"],
            "these labels look like pieces of lists: \"['cat',\" (t.csv:2, 1 in all); write them as JSON",
        ),
        (["3", "3.0"], "spellings of one label: '3' (t.csv:2, 1 in all), '3.0' (t.csv:3, 1 in all)"),
        (["03", "3"], "spellings of one label: '03'"),
        (["caf\u00e9", "cafe\u0301"], "spellings of one label: 'café'"),
        (["cat", "ca\u200bt"], "spellings of one label: 'cat'"),
        (
            ["cat", '"cat"', "«cat»"],
            "spellings of one label: 'cat' (t.csv:2, 1 in all), '\"cat\"' (t.csv:3, 1 in all)",
        ),
        (["rock&amp;roll", "rock&roll"], "spellings of one label: 'rock&amp;roll'"),
        (["ｃａｔ", "cat"], "spellings of one label: 'ｃａｔ'"),
        (["cat", "?"], "look like missing values, and are labels: '?' (t.csv:3, 1 in all)"),
        (["cat、dog", "dog", "cat"], "1 of 3 labels contain '、'"),
        (["1001", "0110", "0001"], "look like multi-hot lists without separators: '1001' (t.csv:2, 1 in all), '0110'"),
        (["a/b", "b/a", "a", "b"], "if it separates labels, give --label_delimiter '/'"),
    ],
)
def test_each_kind_gives_one_warning_with_examples(rows, warning):
    [found] = warnings_of(*rows)
    assert warning in found


def test_labels_without_a_fault_give_no_warning():
    assert warnings_of("1 10 100", "101 1.25 1.5", "'", '"') == []
    assert warnings_of("cat dog", "traffic_light", "animal/cat animal/dog", "food/pie", "c++ c#", "", "1.5 nan1") == []


def test_images_with_different_labels():
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]])
    places = [f"t.csv:{line}" for line in range(2, 7)]
    names = ["a.png", "b.png", "./a.png", "b.png", "c.png"]
    assert contradictions([1, 1, 2, None, None], names, labels, places) == []
    [warning] = contradictions([1, 2, 1, 2, 3], names, labels, places)
    assert warning.startswith(
        "2 images or texts occur with different labels: './a.png' (t.csv:2 and t.csv:4), 'b.png' (t.csv:3"
    )
