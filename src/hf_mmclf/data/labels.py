"""Label columns in all their forms, and the fixed order of labels that a model is trained with."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset


def parse_labels(
    data: Dataset,
    column: str | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    empty_is_unknown: bool = False,
) -> list[list[str]]:
    r"""
    The labels of each row as strings, whatever the form of the column.

    Args:
        data (`Dataset`):
            The table, with a column `where` that names its rows.
        column (`str`, *optional*):
            Column of delimited text (`"1 3 10"`, `"cat|dog"`), of lists, of class indices or of single labels.
        columns (`Sequence[str]`, *optional*):
            Columns of 0 and 1, one for each label, instead; -1 where nobody knows.
        delimiter (`str`, *optional*):
            What separates labels in text. Defaults to [`find_delimiter`] of the column.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            Whether empty cells are allowed in `columns`. [`find_unknown`] tells where they are.

    Raises:
        `ValueError`: a value that is none of these, with its row.
    """
    if columns:
        return _parse_indicators(data, columns, empty_is_unknown)
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    values = data[column][:]
    if isinstance(inner, ClassLabel):  # -1 is how datasets say that there is no label
        values = [value if isinstance(value, list) else [value] for value in values]
        return [[inner.names[index] for index in value if index not in (None, -1)] for value in values]
    delimiter = delimiter or find_delimiter(values)

    @cache  # a long table repeats few combinations, and its rows share their lists
    def parse(cell: Any) -> list[str]:
        parts = cell.split(delimiter) if isinstance(cell, str) else cell if isinstance(cell, tuple) else (cell,)
        if len(parts) > 2 and all(part in (0, 1) for part in parts):
            raise ValueError
        return [label for label in map(_as_label, parts) if label]

    rows = []
    for row, value in enumerate(values):
        try:
            rows.append(parse(tuple(value) if isinstance(value, list) else value))
        except TypeError:  # also of what cannot be hashed, such as lists of lists
            where = data["where"][row]
            raise ValueError(f"{where}: cannot read the labels {value!r}; expected text, lists or indices") from None
        except ValueError:
            raise ValueError(
                f"{data['where'][row]}: the labels are {value!r}, of 0 and 1; give such labels a column each"
            ) from None
    return rows


def find_unknown(
    data: Dataset, column: str | None = None, columns: Sequence[str] | None = None, empty_is_unknown: bool = False
) -> dict[int, list[str] | None]:
    """
    What is not known: of a row, the labels whose column is -1 (or empty); `None`, all, where the cell of `column` is
    empty. Empty ones only if `empty_is_unknown`; the other arguments are those of [`parse_labels`].
    """
    unknown: dict[int, list[str] | None] = {}
    for name in columns or ():
        for row, value in enumerate(data[name][:]):
            if _is_minus_one(value) or (empty_is_unknown and _is_empty(value)):
                unknown.setdefault(row, []).append(name)
    if not columns and empty_is_unknown:
        unknown = {row: None for row, value in enumerate(data[column][:]) if _is_empty(value) or value == []}
    return unknown


def _is_empty(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _is_minus_one(value: Any) -> bool:
    return str(value).strip() in ("-1", "-1.0")


def find_delimiter(values: Iterable[Any]) -> str | None:
    """The first of `|`, `;`, `,` that is anywhere in the texts; `None`, white space, if none is."""
    marks = {mark for value in values if isinstance(value, str) for mark in "|;," if mark in value}
    return next((mark for mark in "|;," if mark in marks), None)


def _as_label(value: Any) -> str:
    """A label as text; empty if there is none. A column of indices with gaps is stored as floats: 3.0 and NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int)):
        raise TypeError
    return str(value).strip()


def _parse_indicators(data: Dataset, columns: Sequence[str], empty_is_unknown: bool) -> list[list[str]]:
    rows = [[] for _ in range(len(data))]
    for column in columns:
        for i, value in enumerate(data[column][:]):
            if _is_minus_one(value) or (empty_is_unknown and _is_empty(value)):
                continue
            text = str(value).strip().lower()
            if text not in ("0", "1", "0.0", "1.0", "false", "true"):
                raise ValueError(
                    f"{data['where'][i]}: column {column!r} is {value!r}; expected 0 or 1, or -1 for unknown"
                )
            if text in ("1", "1.0", "true"):
                rows[i].append(column)
    return rows


@dataclasses.dataclass(frozen=True)
class LabelSet:
    """The labels of a model, in the order of its logits.

    Args:
        ids (`tuple[str]`): How they are written in the data.
        names (`tuple[str]`): What they are called; the same as `ids` where no names are given.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[str]], names_file: str | None = None) -> "LabelSet":
        """
        The labels that occur in `rows`, in numeric order when all are numbers, else alphabetically.

        Args:
            rows: Labels of each row of the training split.
            names_file (`str`, *optional*): A JSON object from id to name. It fixes the set: its ids are the labels.
        """
        ids = {label for row in rows for label in row}
        names = {}
        if names_file is not None:
            try:
                names = json.loads(Path(names_file).read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{names_file}: not JSON: {error}") from None
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f'{names_file}: expected a JSON object such as {{"1": "person"}}')
            if len(set(names.values())) != len(names):
                raise ValueError(f"{names_file}: two labels have one name")
            ids = set(names)
        if not ids:
            raise ValueError("no row has a label; check --label_column and --label_columns")
        numeric = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in ids)
        ordered = tuple(sorted(ids, key=lambda label: (float(label) if numeric else 0, label)))
        return cls(ordered, tuple(names.get(label, label) for label in ordered))

    def encode(
        self,
        rows: Sequence[Sequence[str]],
        where: Sequence[str],
        unknown: Mapping[int, Sequence[str] | None] = MappingProxyType({}),
    ) -> np.ndarray:
        """Multi-hot labels, float32 of shape (rows, labels), with -1 for what [`find_unknown`] found.

        Raises `ValueError` naming the row of a label that is not in the set.
        """
        index = {label: i for i, label in enumerate(self.ids)}
        codes: dict[tuple[str, ...], int] = {}  # of each combination, in the order in which they are first seen
        code = np.array([codes.setdefault(tuple(labels), len(codes)) for labels in rows], dtype=int)
        encoded = np.zeros((len(codes), len(self.ids)), dtype=np.float32)
        for labels, i in codes.items():
            for label in labels:
                if label not in index:
                    near = difflib.get_close_matches(label, self.ids, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.ids)}"
                    raise ValueError(
                        f"{where[int(np.argmax(code == i))]}: unknown label {label!r}; {hint}. Labels are those of "
                        "the training rows, or of --label_names_file"
                    )
                encoded[i, index[label]] = 1
        encoded = encoded[code]
        for row, labels in unknown.items():
            encoded[row, ... if labels is None else [index[label] for label in labels if label in index]] = -1
        return encoded
