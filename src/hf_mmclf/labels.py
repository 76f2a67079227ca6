"""Label columns in all their forms, and the fixed order of labels that a model is trained with."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset


def parse_labels(
    data: Dataset, column: str | None = None, columns: Sequence[str] | None = None, delimiter: str | None = None
) -> list[list[str]]:
    r"""
    The labels of each row as strings, whatever the form of the column.

    Args:
        data (`Dataset`):
            The table, with a column `where` that names its rows.
        column (`str`, *optional*):
            Column of delimited text (`"1 3 10"`, `"cat|dog"`), of lists, of class indices or of single labels.
        columns (`Sequence[str]`, *optional*):
            Columns of 0 and 1, one for each label, instead.
        delimiter (`str`, *optional*):
            What separates labels in text. Defaults to the first of `|`, `;`, `,` in the column, else white space.

    Raises:
        `ValueError`: a value that is none of these, with its row.
    """
    if columns:
        return _parse_indicators(data, columns)
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    values = data[column][:]
    if isinstance(inner, ClassLabel):
        names = inner.names
        values = [value if isinstance(value, list) else [value] for value in values]
        return [[names[index] for index in value if index is not None] for value in values]
    texts = [value for value in values if isinstance(value, str)]
    if delimiter is None:
        delimiter = next((mark for mark in "|;," if any(mark in text for text in texts)), None)
    rows = []
    for where, value in zip(data["where"], values, strict=True):
        if value is None:
            value = []
        elif isinstance(value, str):
            value = value.split(delimiter)
        elif not isinstance(value, list):
            value = [value]
        labels = [str(label).strip() for label in value]
        if any(isinstance(label, (float, dict, list)) for label in value):
            raise ValueError(f"{where}: cannot read the labels {value!r}; expected text, a list or class indices")
        rows.append([label for label in labels if label])
    return rows


def _parse_indicators(data: Dataset, columns: Sequence[str]) -> list[list[str]]:
    hits = np.zeros((len(data), len(columns)), dtype=bool)
    for i, column in enumerate(columns):
        for row, value in enumerate(data[column]):
            if str(value) not in ("0", "1", "0.0", "1.0", "False", "True"):
                raise ValueError(f"{data['where'][row]}: column {column!r} is {value!r}; expected 0 or 1")
            hits[row, i] = str(value) in ("1", "1.0", "True")
    return [[columns[i] for i in np.flatnonzero(row)] for row in hits]


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
            names = json.loads(Path(names_file).read_text(encoding="utf-8"))
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f'{names_file}: expected a JSON object such as {{"1": "person"}}')
            if len(set(names.values())) != len(names):
                raise ValueError(f"{names_file}: two labels have one name")
            ids = set(names)
        if not ids:
            raise ValueError("no row has a label; check --label_column and --label_columns")
        numeric = all(label.lstrip("-").isdigit() for label in ids)
        ordered = tuple(sorted(ids, key=int if numeric else str))
        return cls(ordered, tuple(names.get(label, label) for label in ordered))

    def encode(self, rows: Sequence[Sequence[str]], where: Sequence[str]) -> np.ndarray:
        """Multi-hot labels, float32 of shape (rows, labels); `ValueError` naming the row of an unknown label."""
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
        return encoded
