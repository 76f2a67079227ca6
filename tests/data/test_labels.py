import json
import random

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hf_mmclf.data.labels import (
    LabelSet,
    find_delimiter,
    parse_indicator_columns,
    parse_label_column,
)


def table(values, feature=None, **columns):
    rows = Dataset.from_dict({"labels": values, "where": [f"t.csv:{i}" for i in range(2, len(values) + 2)], **columns})
    return rows if feature is None else rows.cast_column("labels", feature)


PETS = ClassLabel(names=["cat", "dog", "guinea pig"])


@pytest.mark.parametrize(
    "values, labels",
    [
        (["1 3", "10", " 3  1 "], [["1", "3"], ["10"], ["3", "1"]]),
        (["1,3", "10", "3, 1,"], [["1", "3"], ["10"], ["3", "1"]]),
        (["1;3", "10"], [["1", "3"], ["10"]]),
        (["traffic light|dog", "traffic light", "dog"], [["traffic light", "dog"], ["traffic light"], ["dog"]]),
        (["red, round|dog", "red, round"], [["red, round", "dog"], ["red, round"]]),  # | goes before ,
        (["cat\tdog", "cat"], [["cat", "dog"], ["cat"]]),
        (["1 1 3"], [["1", "1", "3"]]),  # twice is once, when encoded
        (["1", "", None, "  "], [["1"], [], [], []]),
        ([["cat", "guinea pig"], [], None, ["dog", None, ""]], [["cat", "guinea pig"], [], [], ["dog"]]),
        ([[1, 3], [10], []], [["1", "3"], ["10"], []]),
        ([[1.0, 3.0], [float("nan")]], [["1", "3"], []]),
        ([3, 10, None], [["3"], ["10"], []]),
        ([3.0, float("nan"), None], [["3"], [], []]),  # what pandas makes of indices with gaps
        ([True, False], [["True"], ["False"]]),
    ],
)
def test_labels_in_one_column(values, labels):
    assert parse_label_column(table(values), "labels").rows == labels


@pytest.mark.parametrize(
    "values, feature, labels",
    [
        ([0, 2, None, -1], PETS, [["cat"], ["guinea pig"], [], []]),
        ([[0, 2], [], None, [1, -1]], List(PETS), [["cat", "guinea pig"], [], [], ["dog"]]),
    ],
)
def test_class_indices_become_names(values, feature, labels):
    assert parse_label_column(table(values, feature), "labels").rows == labels


@pytest.mark.parametrize(
    "values, delimiter, labels",
    [
        (["traffic light / dog", "traffic light"], "/", [["traffic light", "dog"], ["traffic light"]]),
        (["traffic light", "dog"], "|", [["traffic light"], ["dog"]]),
        (["a::b", "c"], "::", [["a", "b"], ["c"]]),
        (["cat|black, white"], ",", [["cat|black", "white"]]),
    ],
)
def test_a_given_delimiter_is_the_only_one(values, delimiter, labels):
    assert parse_label_column(table(values), "labels", delimiter).rows == labels


@pytest.mark.parametrize(
    "text, labels",
    [
        ("['cat', 'guinea pig']", ["cat", "guinea pig"]),
        ('["cat", "guinea pig"]', ["cat", "guinea pig"]),
        ("['cat' 'guinea pig']", ["cat", "guinea pig"]),  # numpy's form
        ("['cat'\n 'dog']", ["cat", "dog"]),
        ("array(['cat', 'dog'], dtype=object)", ["cat", "dog"]),
        ("{'cat'}", ["cat"]),
        ("[np.str_('cat'), np.str_('dog')]", ["cat", "dog"]),
        ("tensor([3, 10])", ["3", "10"]),
        ("{cat, guinea pig}", ["cat", "guinea pig"]),
        ("frozenset({'cat'})", ["cat"]),
        ("('cat',)", ["cat"]),
        ("['it\\'s', \"x|y\", 'a, b']", ["it's", "x|y", "a, b"]),
        ("[3, 10]", ["3", "10"]),
        ("[3 10]", ["3", "10"]),
        ("[3.0, nan]", ["3"]),
        ("[cat, guinea pig]", ["cat", "guinea pig"]),
        ("[None, '']", []),
        (" [] ", []),
        ("set()", []),
        ("cat, dog", ["cat", "dog"]),
        ("(dog)", ["(dog)"]),  # brackets in the name of a label
    ],
)
def test_lists_that_are_written_as_text(text, labels):
    parsed = parse_label_column(table([text, "['horse', 'dog']"]), "labels")
    assert parsed.rows == [labels, ["horse", "dog"]] and parsed.form == "lists"


@pytest.mark.parametrize("text", ["{'cat': 1}", "['cat' ... 'dog']", "[['cat'], ['dog']]", '[{"cat": 1}]'])
def test_lists_that_hold_something_else(text):
    with pytest.raises(ValueError, match="t.csv:3: cannot read the labels"):
        parse_label_column(table(["['cat']", text]), "labels")


MULTI_HOT = {
    "text": ["[1, 0, 0]", "[0 1 1]", "", "[-1, 0, 1]"],
    "lists": [[1, 0, 0], [0, 1, 1], None, [-1, 0, 1]],
    "blanks": ["1 0 0", "0 1 1", "", "-1 0 1"],
    "bools": ["[True, False, False]", "[False, True, True]", "", "[-1, 0, 1]"],
    "floats": [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [], [-1.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("values", MULTI_HOT.values(), ids=MULTI_HOT)
def test_multi_hot_lists_need_names(values):
    with pytest.raises(ValueError, match="t.csv:2: column 'labels' is .* a multi-hot list, .*--label_names_file"):
        parse_label_column(table(values), "labels")
    parsed = parse_label_column(table(values), "labels", positions=["cat", "dog", "bird"])
    assert parsed.rows == [["cat"], ["dog", "bird"], [], ["bird"]] and parsed.unknown == {3: ["cat"]}
    with pytest.raises(ValueError, match="t.csv:2: .* expected a multi-hot list of 2 entries"):
        parse_label_column(table(values), "labels", positions=["cat", "dog"])


def test_a_known_label_with_a_blank_is_one_label():
    values = ["traffic light", "dog"]
    assert parse_label_column(table(values), "labels").rows == [["traffic", "light"], ["dog"]]
    known = ("traffic light", "dog")
    assert parse_label_column(table(values), "labels", known=known).rows == [["traffic light"], ["dog"]]


def test_pairs_of_0_and_1_are_indices_unless_their_order_changes():
    assert parse_label_column(table([[0, 1], [0], [0, 1]]), "labels").rows == [["0", "1"], ["0"], ["0", "1"]]
    for values in ([[0, 1], [1, 0]], ["0 1", "1 0"]):
        with pytest.raises(ValueError, match="t.csv:3: .* a multi-hot list"):
            parse_label_column(table(values), "labels")
    # beside other indices they are indices in any order
    assert parse_label_column(table([[0, 1], [1, 0], [7]]), "labels").rows == [["0", "1"], ["1", "0"], ["7"]]
    assert parse_label_column(table(["0 1", "1 0", "3 7"]), "labels").rows == [["0", "1"], ["1", "0"], ["3", "7"]]


def test_the_delimiter_is_that_of_the_whole_column():
    assert find_delimiter(["a b", None, 3, "a, b", "a|b"]) == "|"
    assert find_delimiter(["a;b", "a, b"]) == ";"
    assert find_delimiter(["a b"]) is None


@pytest.mark.parametrize(
    "cat, dog",
    [
        ([1, 0, 0], [1, 1, 0]),
        (["1", "0", "0"], ["1", "1", "0"]),
        ([True, False, False], [True, True, False]),
        ([1.0, 0.0, 0.0], ["1.0", "1.0", "0.0"]),
        (["true", "false", "FALSE"], ["True", " 1", "0 "]),
    ],
)
def test_a_column_for_each_label(cat, dog):
    rows = table([None] * 3, cat=cat, dog=dog)
    assert parse_indicator_columns(rows, ["dog", "cat"]).rows == [["dog", "cat"], ["dog"], []]


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, 2.5], "t.csv:3: cannot read the labels 2.5"),
        ([[["a"]], [["b"]]], "t.csv:2: cannot read the labels"),
        ([{"a": 1}], "t.csv:2: cannot read the labels {'a': 1}"),
        (
            [[1, 3], [0, 1, 1]],
            r"t.csv:3: column 'labels' is \[0, 1, 1\], a multi-hot list, .*--label_names_file, or a column for each",
        ),
        ([[0.0, 1.0, 0.0]], "t.csv:2: column 'labels' is .* a column for each label"),
    ],
)
def test_values_that_are_no_labels_are_named_with_their_row(values, message):
    with pytest.raises(ValueError, match=message):
        parse_label_column(table(values), "labels")


@pytest.mark.parametrize("value", [2, "yes", "", None, 0.5])
def test_columns_of_anything_but_0_and_1(value):
    rows = Dataset.from_dict({"cat": [type(value or "")(1), value], "where": ["t.csv:2", "t.csv:3"]})
    with pytest.raises(ValueError, match=f"t.csv:3: column 'cat' is {value!r}; expected 0 or 1"):
        parse_indicator_columns(rows, ["cat"])


# The set


@pytest.mark.parametrize(
    "labels, ordered",
    [
        (["10", "9", "1", "-2"], ("-2", "1", "9", "10")),
        (["10.5", "9", "1.0"], ("1.0", "9", "10.5")),
        (["10", "9", "cat"], ("10", "9", "cat")),
        (["²", "10", "9"], ("10", "9", "²")),
        (["dog", "Cat", "cat"], ("Cat", "cat", "dog")),
        (["1", "01", "001"], ("001", "01", "1")),
        (["--1", "2"], ("--1", "2")),
    ],
)
def test_labels_are_in_numeric_order_when_all_are_numbers_else_alphabetical(labels, ordered):
    rows = [[label] for label in labels] + [labels, []]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert LabelSet.from_rows(rows) == LabelSet(ordered, ordered)


def test_a_names_file_fixes_the_set(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"10": "traffic light", "2": "fahrrad ü", "1": "person"}), encoding="utf-8")
    labels = LabelSet.from_rows([["1"], ["10"]], str(path))
    assert labels == LabelSet(("1", "2", "10"), ("person", "fahrrad ü", "traffic light"))
    with pytest.raises(ValueError, match="t.csv:2: unknown label '3'; .*--label_names_file"):
        labels.encode([["3"]], ["t.csv:2"])


@pytest.mark.parametrize(
    "content, message",
    [
        ('["person"]', "expected a JSON object"),
        ('{"1": 5}', "expected a JSON object"),
        ('{"1": "a", "2": "a"}', "the name 'a' is there twice"),
        ('{"1": "a", "1": "b"}', "the label '1' is there twice"),
        ('{"1": " "}', "a name is empty"),
        ('{"": "a"}', "a label is empty"),
        ("[]", "expected a JSON object"),
        ("{1: a}", "names.json: not JSON"),
    ],
)
def test_names_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "names.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        LabelSet.from_rows([["1"]], str(path))


def test_rows_without_any_label_make_no_set():
    with pytest.raises(ValueError, match="no row has a label; check --label_column"):
        LabelSet.from_rows([[], []])


def test_encoded_labels_decode_to_what_they_were():
    rng = random.Random(0)
    names = [str(i) for i in range(1, 20)]
    rows = [rng.sample(names, rng.randrange(5)) for _ in range(200)]
    labels = LabelSet.from_rows(rows)
    encoded = labels.encode(rows, [""] * len(rows))
    assert encoded.dtype == np.float32 and encoded.shape == (200, len(labels.ids))
    decoded = [[labels.ids[i] for i in np.flatnonzero(row)] for row in encoded]
    assert decoded == [sorted(row, key=int) for row in rows]
    assert labels.encode([["3", "3"]], [""]).sum() == 1  # a label that is there twice


@pytest.mark.parametrize("label, hint", [("brid", "did you mean 'bird'?"), ("zzz", "known are bird, boat")])
def test_an_unknown_label_is_an_error_with_its_row_and_the_nearest(label, hint):
    labels = LabelSet(("bird", "boat"), ("bird", "boat"))
    with pytest.raises(ValueError) as error:
        labels.encode([["boat"], ["bird", label]], ["t.csv:2", "t.csv:3"])
    assert str(error.value).startswith(f"t.csv:3: unknown label {label!r}; {hint}")


def test_an_error_names_the_first_row_with_a_cell_that_repeats():
    cells = [["cat", "dog"], ["cat"], ["dog", "cat"], ["cat"], ["cat", "boat"], ["cat", "boat"]]
    rows = parse_label_column(table(cells), "labels").rows
    assert rows == cells
    with pytest.raises(ValueError, match="t.csv:6: unknown label 'boat'"):
        LabelSet.from_rows(rows[:4]).encode(rows, [f"t.csv:{line}" for line in range(2, 8)])
    with pytest.raises(ValueError, match=r"t.csv:4: column 'labels' is \[0, 1, 1\], a multi-hot"):
        parse_label_column(table([[2, 3], [2, 3], [0, 1, 1], [0, 1, 1]]), "labels")


def test_a_whole_table_of_every_form_gives_the_same_matrix():
    features = Features({"a": List(ClassLabel(names=["x", "y"])), "b": Value("string"), "where": Value("string")})
    rows = {"a": [[0], [0, 1], []], "b": ["x", "y x", ""], "where": ["1", "2", "3"]}
    data = Dataset.from_dict(rows, features=features)
    data = data.add_column("x", [1, 1, 0]).add_column("y", [0, 1, 0])
    parsed = [parse_label_column(data, name).rows for name in ("a", "b")]
    for rows in (*parsed, parse_indicator_columns(data, ["x", "y"]).rows):
        matrix = LabelSet.from_rows(rows).encode(rows, data["where"])
        np.testing.assert_array_equal(matrix, [[1, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize("minus", [-1, -1.0, "-1"])
def test_unknown_labels_in_columns(minus):
    rows = Dataset.from_dict(
        {"cat": [type(minus)(1), minus, type(minus)(0)], "dog": [1, 0, 1], "where": ["a", "b", "c"]}
    )
    labels, unknown, _ = parse_indicator_columns(rows, ["cat", "dog"])
    assert (labels, unknown) == ([["cat", "dog"], [], ["dog"]], {1: ["cat"]})
    encoded = LabelSet(("cat", "dog"), ("cat", "dog")).encode(labels, rows["where"], unknown)
    assert encoded.tolist() == [[1, 1], [-1, 0], [0, 1]]


def test_empty_indicators_are_unknown_only_on_demand():
    rows = Dataset.from_dict({"cat": ["1", "", None], "dog": ["1", "0", "1"], "where": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="b: column 'cat' is ''; expected 0 or 1, or -1 for unknown"):
        parse_indicator_columns(rows, ["cat", "dog"])
    parsed = parse_indicator_columns(rows, ["cat", "dog"], empty_is_unknown=True)
    assert parsed[:2] == ([["cat", "dog"], [], ["dog"]], {1: ["cat"], 2: ["cat"]})


@pytest.mark.parametrize("values", [["cat dog", "", None, "dog"], [["cat", "dog"], [], None, ["dog"]]])
def test_empty_label_cells_are_unknown_only_on_demand(values):
    data = table(values)
    assert parse_label_column(data, "labels").unknown == {}
    labels, unknown, _ = parse_label_column(data, "labels", empty_is_unknown=True)
    assert unknown == {1: None, 2: None}
    encoded = LabelSet.from_rows(labels).encode(labels, data["where"], unknown)
    assert encoded.tolist() == [[1, 1], [-1, -1], [-1, -1], [0, 1]]
