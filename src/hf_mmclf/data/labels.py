"""Labels: reading label columns of all forms, the ordered label set of a model, and stratified splits."""

import ast
import dataclasses
import difflib
import io
import json
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset

# What a cell of an indicator column says; `None` is an unknown label.
INDICATORS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False, "-1": None, "-1.0": None}

# A list that is written as text. Python writes an empty set as "set()".
LISTED = re.compile(
    r"\s*(?:(?:frozenset|set|list|tuple|dict_keys|tensor|Index|(?:np\.)?array)\((.*?)(?:,\s*dtype=\S+)?\)"
    r"|(\[.*\]|\(.*\)|\{.*\}))\s*",
    re.DOTALL,
)


class ParsedLabels(NamedTuple):
    """
    The labels of rows.

    Args:
        rows (`list[list[str]]`): The labels of each row.
        unknown (`dict[int, list[str]]`): The unknown labels by row number; `None` if all labels of a row are unknown.
        form (`str`): How the labels are written, in words.
    """

    rows: list[list[str]]
    unknown: dict[int, list[str] | None]
    form: str


def parse_label_column(
    data: Dataset,
    column: str,
    delimiter: str | None = None,
    empty_is_unknown: bool = False,
    positions: Sequence[str] | None = None,
    known: Collection[str] = (),
) -> ParsedLabels:
    r"""
    Read the labels of each row from one column.

    Args:
        data (`Dataset`):
            The table, with a column `where` that names its rows.
        column (`str`):
            A column of delimited text (`"1 3 10"`, `"cat|dog"`), of lists, of lists that are written as text
            (`"['cat', 'dog']"`), of class indices or of single labels.
        delimiter (`str`, *optional*):
            The separator of labels in text. Defaults to the result of [`find_delimiter`] for the column.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            Whether all labels of a row with an empty cell are unknown. By default the row has no label.
        positions (`Sequence[str]`, *optional*):
            The labels of a multi-hot list such as `[1, 0, 0, 1]`, in its order; an entry of -1 is an unknown label.
            By default multi-hot lists are an error, because they do not name their labels.
        known (`Collection[str]`, *optional*):
            The labels of a trained model. A cell that is one of them is this label, delimiters or not.

    Returns:
        [`ParsedLabels`]: The labels of all rows.

    Raises:
        `ValueError`: If a cell has none of these forms. The message names the row.
    """
    values = data[column][:]
    feature = data.features[column]
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        rows = [_class_names(value, inner.names) for value in values]
        return ParsedLabels(rows, _unknown(rows, empty_is_unknown), "class indices")
    found = delimiter or find_delimiter(values)
    rows, listed = _parse_cells(
        data, values, partial(_parse_cell, delimiter=found, bare=delimiter is None, known=known)
    )
    form = "lists" if listed else f"separated by {found!r}" if found else "separated by white space"
    if (row := _multi_hot(rows, listed)) is None:
        return ParsedLabels(rows, _unknown(rows, empty_is_unknown), form)
    if positions is None:
        raise ValueError(
            f"{data['where'][row]}: column {column!r} is {values[row]!r}, a multi-hot list, which does not name its "
            "labels; give their names in this order by --label_names_file, or a column for each label and "
            "--label_columns"
        )
    wrong = next((row for row, marks in enumerate(rows) if marks and not _is_multi_hot(marks, len(positions))), None)
    if wrong is not None:
        raise ValueError(
            f"{data['where'][wrong]}: column {column!r} is {values[wrong]!r}; expected a multi-hot list of "
            f"{len(positions)} entries, one for each label of --label_names_file"
        )
    return _by_position(rows, positions, _unknown(rows, empty_is_unknown))


def _unknown(rows: Sequence[Sequence[str]], empty_is_unknown: bool) -> dict[int, None]:
    """Return the numbers of the rows whose labels are all unknown. `rows` has what their cells contain."""
    return dict.fromkeys(row for row, entries in enumerate(rows) if not entries) if empty_is_unknown else {}


def _parse_cells(data: Dataset, values: Sequence[Any], parse: Callable) -> tuple[list[list[str]], int]:
    """Return the labels of each row, and how many cells are lists."""
    parse = cache(parse)  # few cells are distinct
    rows, listed = [], 0
    for row, value in enumerate(values):
        try:
            labels, is_list = parse(tuple(value) if isinstance(value, list) else value)
        except (TypeError, ValueError) as error:  # a TypeError also for cells without a hash, such as nested lists
            reason = error if isinstance(error, ValueError) else "expected text, lists or indices"
            raise ValueError(f"{data['where'][row]}: cannot read the labels {value!r}; {reason}") from None
        rows.append(labels)
        listed += is_list
    return rows, listed


def _by_position(rows: Sequence[Sequence[str]], positions: Sequence[str], empty: Mapping[int, None]) -> ParsedLabels:
    """Name the labels of multi-hot lists. An empty cell has no entries."""
    found = {
        kind: [
            [name for name, mark in zip(positions, marks, strict=False) if INDICATORS[mark.lower()] is kind]
            for marks in rows
        ]
        for kind in (True, None)
    }
    unknown = {row: labels for row, labels in enumerate(found[None]) if labels}
    form = "multi-hot lists in the order of --label_names_file"
    return ParsedLabels(found[True], {**unknown, **empty}, form)


def _is_multi_hot(marks: Sequence[str], length: int) -> bool:
    return len(marks) == length and all(mark.lower() in INDICATORS for mark in marks)


def _class_names(value: Any, names: Sequence[str]) -> list[str]:
    indices = value if isinstance(value, list) else [value]
    return [names[index] for index in indices if index not in (None, -1)]  # in datasets, -1 means no label


def _multi_hot(rows: Sequence[Sequence[str]], listed: int) -> int | None:
    """Return a row whose labels can only be a multi-hot list: indices neither repeat nor change their order."""
    pairs, others = {}, False
    for row, labels in enumerate(rows):
        if len(labels) < 2 or not _is_multi_hot(labels, len(labels)):
            others |= len(labels) > 0
        elif len(set(labels)) < len(labels) and (listed or len(labels) > 2):
            return row
        else:
            pairs.setdefault(tuple(labels), row)
    in_both_orders = len(set(map(frozenset, pairs))) < len(pairs)
    return max(pairs.values()) if in_both_orders and not others else None


def _parse_cell(cell: Any, delimiter: str | None, bare: bool, known: Collection[str]) -> tuple[list[str], bool]:
    """Return the labels of a cell, and whether it is a list."""
    if isinstance(cell, str) and cell.strip() in known:
        return [cell.strip()], False
    entries = cell if isinstance(cell, tuple) else list_entries(cell, bare) if isinstance(cell, str) else None
    parts = entries if entries is not None else cell.split(delimiter) if isinstance(cell, str) else (cell,)
    return [label for label in map(_as_label, parts) if label], entries is not None


def list_entries(text: str, bare: bool = True) -> list | None:
    """
    Read a list that is written as text: JSON, Python (also a tuple or a set), or numpy's form without commas.

    Args:
        text (`str`): The text of a cell.
        bare (`bool`, *optional*, defaults to `True`): Whether entries in square brackets may lack their quotes.

    Returns:
        `list`, *optional*: The entries; `None` if the text is not a list.

    Raises:
        `ValueError`: If entries are left out, nested or named.
    """
    match = LISTED.fullmatch(text)
    if not match:
        return None
    inner = match[1] if match[2] is None else match[2]
    inner = re.sub(r"\b(?:np|numpy)\.\w+\(([^()]*)\)", r"\1", inner)  # numpy 2 writes np.str_('a')
    try:
        entries = json.loads(inner)
        return entries if isinstance(entries, list) else _python_entries(inner)
    except json.JSONDecodeError:
        pass
    try:
        return _python_entries(inner)
    except (SyntaxError, tokenize.TokenError):
        if not bare or not (inner.startswith("[") or "," in inner):  # "(a)" can be the name of a label
            return None
        return [part.strip(" '\"\n") for part in inner[1:-1].split("," if "," in inner else None)]


def _python_entries(text: str) -> list:
    """Return the strings and numbers of a list. Adjacent strings stay apart, which `ast.literal_eval` would join."""
    entries, sign, depth = [], "", 0
    for kind, token, *_ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind in (tokenize.STRING, tokenize.NUMBER):
            entries.append(ast.literal_eval(sign + token))
        elif kind == tokenize.NAME and token in ("None", "null", "nan", "NaN"):
            entries.append(None)
        elif token == "..." or (kind == tokenize.OP and token in ":"):
            raise ValueError(f"expected all labels of a list, got {token!r} in it")
        elif kind == tokenize.OP and token not in "-,[](){}" or kind in (tokenize.NAME, tokenize.ERRORTOKEN):
            raise SyntaxError(token)
        depth += (token in "[({") - (token in "])}") if kind == tokenize.OP else 0
        if depth > 1:
            raise ValueError("expected labels, got a list in a list")
        sign = token if token == "-" else ""
    return entries


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
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise ValueError(f"--label_columns names {repeated[0]!r} twice")
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
    return ParsedLabels(labels, unknown, "a column each")


def has_text(values: Iterable[Any]) -> bool:
    """Return whether any cell is a text other than a list that is written as text."""
    return any(isinstance(value, str) and value.strip() and not LISTED.fullmatch(value) for value in values)


def find_delimiter(values: Iterable[Any]) -> str | None:
    """Return the first of `|`, `;` and `,` that occurs in any text; `None`, for white space, if none does."""
    texts = [value for value in values if has_text([value])]
    marks = {mark for text in texts for mark in "|;," if mark in text}
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
        names = {} if names_file is None else read_names(names_file)
        ids = {label for row in rows for label in row} if names_file is None else set(names)
        if not ids:
            raise ValueError("no row has a label; check --label_column and --label_columns")
        numeric = all(re.fullmatch(r"-?\d+(\.\d+)?", label) for label in ids)
        ordered = tuple(sorted(ids, key=lambda label: (float(label) if numeric else 0, label)))
        return cls(ordered, tuple(names.get(label, label) for label in ordered))

    def check_names(self, names_file: str | None) -> None:
        """Raise `ValueError` if a file of names has other labels or other names than this set."""
        if names_file is None:
            return
        own, named = dict(zip(self.ids, self.names, strict=True)), read_names(names_file)
        for label, name in named.items():
            if own.get(label) != name and name not in own:
                has = f"has the name {own[label]!r} for it" if label in own else f"has {', '.join(self.ids)}"
                raise ValueError(f"{names_file}: the label {label!r} with the name {name!r}, but the model {has}")
        if len(named) < len(own):
            raise ValueError(f"{names_file}: {len(named)} labels, but the model has {len(own)}: {', '.join(self.ids)}")

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
                    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.ids)}."
                    raise ValueError(
                        f"{where[row]}: unknown label {label!r}; {hint} Labels are those of the training rows, or of "
                        "--label_names_file"
                    )
                encoded[row, index[label]] = 1
        for row, labels in (unknown or {}).items():
            encoded[row, ... if labels is None else [index[label] for label in labels if label in index]] = -1
        return encoded


def read_names(file: str) -> dict[str, str]:
    """Read a JSON file with an object from label to name. Raises `ValueError` if it is something else."""
    try:
        pairs = json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=list)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    is_object = isinstance(pairs, list) and pairs and all(isinstance(pair, tuple) for pair in pairs)
    if not is_object or not all(isinstance(name, str) for _, name in pairs):
        raise ValueError(f'{file}: expected a JSON object such as {{"1": "person"}}')
    for what, values in zip(("label", "name"), zip(*pairs, strict=True), strict=True):
        if not all(map(str.strip, values)):
            raise ValueError(f"{file}: a {what} is empty")
        value, count = Counter(values).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{file}: the {what} {value!r} is there twice")
    return dict(pairs)
