"""Labels: reading label columns of all forms, the ordered label set of a model, and stratified splits."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset
from iterstrat.ml_stratifiers import IterativeStratification

# What a cell of an indicator column says; `None` is an unknown label.
INDICATORS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "-1": None, "-1.0": None}


class ParsedLabels(NamedTuple):
    """
    The labels of rows.

    Args:
        rows (`list[list[str]]`): The labels of each row.
        unknown (`dict[int, list[str]]`): The unknown labels by row number; `None` if all labels of a row are unknown.
    """

    rows: list[list[str]]
    unknown: dict[int, list[str] | None]


def parse_label_column(
    data: Dataset, column: str, delimiter: str | None = None, empty_is_unknown: bool = False
) -> ParsedLabels:
    r"""
    Read the labels of each row from one column.

    Args:
        data (`Dataset`):
            The table, with a column `where` that names its rows.
        column (`str`):
            A column of delimited text (`"1 3 10"`, `"cat|dog"`), of lists, of class indices or of single labels.
        delimiter (`str`, *optional*):
            The separator of labels in text. Defaults to the result of [`find_delimiter`] for the column.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            Whether all labels of a row with an empty cell are unknown. By default the row has no label.

    Returns:
        [`ParsedLabels`]: The labels of all rows.

    Raises:
        `ValueError`: If a cell has none of these forms. The message names the row.
    """
    values = data[column][:]
    empty = [row for row, value in enumerate(values) if _is_empty(value) or value == []] if empty_is_unknown else []
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        rows = [_class_names(value, inner.names) for value in values]
        return ParsedLabels(rows, dict.fromkeys(empty))
    parse = cache(partial(_parse_cell, delimiter=delimiter or find_delimiter(values)))  # few cells are distinct
    rows = []
    for row, value in enumerate(values):
        try:
            rows.append(parse(tuple(value) if isinstance(value, list) else value))
        except (TypeError, ValueError) as error:  # a TypeError also for cells without a hash, such as nested lists
            reason = error if isinstance(error, ValueError) else "expected text, lists or indices"
            raise ValueError(f"{data['where'][row]}: cannot read the labels {value!r}; {reason}") from None
    return ParsedLabels(rows, dict.fromkeys(empty))


def _class_names(value: Any, names: Sequence[str]) -> list[str]:
    indices = value if isinstance(value, list) else [value]
    return [names[index] for index in indices if index not in (None, -1)]  # in datasets, -1 means no label


def _parse_cell(cell: Any, delimiter: str | None) -> list[str]:
    parts = cell.split(delimiter) if isinstance(cell, str) else cell if isinstance(cell, tuple) else (cell,)
    if len(parts) > 2 and all(part in (0, 1) for part in parts):
        raise ValueError("expected labels, not 0 and 1; give such labels a column each and name --label_columns")
    return [label for label in map(_as_label, parts) if label]


def parse_indicator_columns(data: Dataset, columns: Sequence[str], empty_is_unknown: bool = False) -> ParsedLabels:
    """
    Read the labels of each row from columns of 0 and 1, one for each label.

    Args:
        data (`Dataset`):
            The table, with a column `where` that names its rows.
        columns (`Sequence[str]`):
            The columns, which are the names of the labels. A cell of -1 is an unknown label.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            Whether an empty cell is an unknown label too. By default it is an error.

    Returns:
        [`ParsedLabels`]: The labels of all rows.

    Raises:
        `ValueError`: If a cell is neither 0, 1 nor -1. The message names the row.
    """
    labels: list[list[str]] = [[] for _ in range(len(data))]
    unknown: dict[int, list[str] | None] = {}
    for column in columns:
        for row, value in enumerate(data[column][:]):
            text = "-1" if empty_is_unknown and _is_empty(value) else str(value).strip().lower()
            if text not in INDICATORS:
                raise ValueError(
                    f"{data['where'][row]}: column {column!r} is {value!r}; expected 0 or 1, or -1 for unknown"
                )
            if INDICATORS[text] is None:
                unknown.setdefault(row, []).append(column)
            elif INDICATORS[text]:
                labels[row].append(column)
    return ParsedLabels(labels, unknown)


def find_delimiter(values: Iterable[Any]) -> str | None:
    """Return the first of `|`, `;` and `,` that occurs in any text; `None`, for white space, if none does."""
    marks = {mark for value in values if isinstance(value, str) for mark in "|;," if mark in value}
    return next((mark for mark in "|;," if mark in marks), None)


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _as_label(value: Any) -> str:
    """Convert a label to text, empty for none. A column of indices with gaps is stored as floats: 3.0 and NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int)):
        raise TypeError
    return str(value).strip()


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """
    The labels of a model, in the order of its logits.

    Args:
        ids (`tuple[str]`): The labels as the data writes them.
        names (`tuple[str]`): The labels as people read them; the same as `ids` where no names are given.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]], names_file: str | None = None) -> "LabelSet":
        """
        Collect the labels that occur in rows, in numeric order if all are numbers, else in alphabetical order.

        Args:
            rows (`Iterable[Sequence[str]]`): The labels of each row of the training split.
            names_file (`str`, *optional*): A JSON file with an object from id to name. Its ids are then the labels.

        Raises:
            `ValueError`: If there is no label, or if the file is not such an object with distinct names.
        """
        names = {} if names_file is None else _read_names(names_file)
        ids = {label for row in rows for label in row} if names_file is None else set(names)
        if not ids:
            raise ValueError("no row has a label; check --label_column and --label_columns")
        numeric = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in ids)
        ordered = tuple(sorted(ids, key=lambda label: (float(label) if numeric else 0, label)))
        return cls(ordered, tuple(names.get(label, label) for label in ordered))

    def encode(
        self, rows: Sequence[Sequence[str]], where: Sequence[str], unknown: Mapping[int, Any] | None = None
    ) -> np.ndarray:
        """
        Encode the labels of rows as a matrix.

        Args:
            rows (`Sequence[Sequence[str]]`): The labels of each row.
            where (`Sequence[str]`): The names of the rows, for errors.
            unknown (`Mapping[int, Sequence[str]]`, *optional*): Unknown labels by row number; `None` for all labels.

        Returns:
            `np.ndarray`: float32 of shape `(rows, labels)`: 1 for a label of the row, 0 for another one, -1 for an
            unknown one.

        Raises:
            `ValueError`: If a row has a label that is not in the set. The message names the row.
        """
        index = {label: i for i, label in enumerate(self.ids)}
        encoded = np.zeros((len(rows), len(self.ids)), dtype=np.float32)
        for row, labels in enumerate(rows):
            for label in labels:
                if label not in index:
                    near = difflib.get_close_matches(label, self.ids, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.ids)}"
                    raise ValueError(
                        f"{where[row]}: unknown label {label!r}; {hint}. Labels are those of the training rows, or of "
                        "--label_names_file"
                    )
                encoded[row, index[label]] = 1
        for row, labels in (unknown or {}).items():
            encoded[row, ... if labels is None else [index[label] for label in labels if label in index]] = -1
        return encoded


def _read_names(file: str) -> dict[str, str]:
    try:
        names = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f'{file}: expected a JSON object such as {{"1": "person"}}')
    if len(set(names.values())) != len(names):
        raise ValueError(f"{file}: two labels have the same name")
    return names


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], seed: int, groups: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """
    Split rows so that each label has its share in each part (Sechidis, Tsoumakas and Vlahavas, 2011).

    Args:
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot labels.
        fractions (`Sequence[float]`): The share of each part. The shares add up to 1.
        seed (`int`): Seed of the random choice among equally good parts.
        groups (`Sequence`, *optional*): The group of each row. Rows of one group (texts of one image) stay together.

    Returns:
        `list[np.ndarray]`: The row numbers of each part, ascending.

    Raises:
        `ValueError`: If the shares do not add up to 1.
    """
    if any(share < 0 for share in fractions) or not np.isclose(sum(fractions), 1) or fractions[0] <= 0:
        raise ValueError(f"fractions are {[round(share, 3) for share in fractions]}; expected shares that add up to 1")
    groups = range(len(labels)) if groups is None else groups
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    member = np.array([numbers[group] for group in groups])
    merged = np.zeros((len(numbers), labels.shape[1]), dtype=bool)
    np.logical_or.at(merged, member, labels)
    part = IterativeStratification(merged, np.array(fractions, dtype=float), np.random.RandomState(seed))
    return [np.flatnonzero(part[member] == i) for i in range(len(fractions))]
