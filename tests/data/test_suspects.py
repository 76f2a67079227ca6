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
        (["a/b", "b/a", "a", "b"], "if it separates labels, give --label_delimiter '/'"),
    ],
)
def test_each_kind_gives_one_warning_with_examples(rows, warning):
    [found] = warnings_of(*rows)
    assert warning in found


def test_labels_without_a_fault_give_no_warning():
    assert warnings_of("cat dog", "traffic_light", "animal/cat animal/dog", "food/pie", "c++ c#", "", "1.5 nan1") == []


def test_images_with_different_labels():
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]])
    places = [f"t.csv:{line}" for line in range(2, 7)]
    assert contradictions(["a.png", "a.png", "b.png", None, None], labels, places) == []
    [warning] = contradictions(["a.png", "b.png", "a.png", "b.png", "c.png"], labels, places)
    assert warning.startswith(
        "2 images or texts occur with different labels: 'a.png' (t.csv:2 and t.csv:4), 'b.png' (t.csv:3"
    )
