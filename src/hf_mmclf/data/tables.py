"""Tables of images, texts and labels. Every row is read, or an error names the line that cannot be read.

[`read_source`] returns one `Dataset` for each split. It keeps the columns of the source and adds a column `where`
("train.csv:7"), by which every later error names its row.
"""

import csv
import difflib
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
COMPETITION_HEADERS = (["ImageID", "Labels", "Caption"], ["ImageID", "Caption"])
ROWS_AT_ONCE = 1_000  # Python objects for a whole table would need several times the memory of its columns
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


def read_source(source: str) -> DatasetDict:
    r"""
    Read a table, a folder or a data set on the Hub.

    Args:
        source (`str`):
            A file (`.csv`, `.tsv`, `.jsonl`, `.json` with one object a line, `.parquet`); a folder with
            `metadata.csv` or `metadata.jsonl` (also one in each split folder), with `train.csv`, `validation.csv`,
            ..., or written by `save_to_disk`; otherwise the name of a data set on the Hub.

    Returns:
        `DatasetDict`: The splits `train`, `validation` and `test` that the source has. A single table is `train`.

    Raises:
        `ValueError`: If the source does not exist, or if a row cannot be read.
    """
    path = Path(source)
    if path.is_file():
        splits = {"train": read_table(path)}
    elif path.is_dir():
        splits = _read_folder(path)
    elif path.suffix in TABLE_SUFFIXES or path.is_absolute() or source.startswith("."):
        raise ValueError(f"{source!r}: no such file or folder")
    else:
        splits = _as_splits(load_dataset(source), source)
    return DatasetDict(splits)


def read_table(path: str | Path) -> Dataset:
    """Read one file as a `Dataset` with a column `where`; see [`read_source`]. Raises `ValueError`."""
    path = Path(path)
    if path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of table; expected one of {', '.join(TABLE_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    read_rows = _json_rows if path.suffix in (".jsonl", ".json") else _csv_rows
    rows, tables = read_rows(path), []
    try:
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(name for _, row in chunk for name in row)  # an object may lack a key
            columns = {name: pa.array([row.get(name) for _, row in chunk]) for name in names}
            tables.append(pa.table({**columns, "where": pa.array([f"{path.name}:{line}" for line, _ in chunk])}))
        if not tables:
            raise ValueError(f"{path}: no rows")
        return from_arrow(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}{_uneven(read_rows(path))}: {error}") from None


def _read_parquet(path: Path) -> Dataset:
    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets raises its own classes, with Arrow's error as the cause
        raise ValueError(f"{path}: cannot be read as Parquet: {error.__cause__ or error}") from None
    if not len(data):
        raise ValueError(f"{path}: no rows")
    return with_where(data, path.name)


def _uneven(rows: Iterator[tuple[int, dict]]) -> str:
    """Say where a column changes its type, for an error message."""
    kinds: dict[str, dict[str, int]] = {}  # column -> type -> the first line with it
    for line, row in rows:
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, {}).setdefault(type(value).__name__, line)
    for name, seen in kinds.items():
        if len(seen) > 1:
            (first, there), (other, line) = list(seen.items())[:2]
            return f", line {line}: column {name!r} is {other} here, but {first} on line {there}"
    return ""


def _lines(path: Path) -> Iterator[str]:
    """Yield lines with their ends. Only line feeds end a line; other line breaks belong to the fields."""
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from None
            yield line


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter, lines = "\t" if path.suffix == ".tsv" else ",", _lines(path)
    first = next(lines, "").rstrip("\r\n")
    header = [] if "\r" in first else next(csv.reader([first], delimiter=delimiter), [])
    if len(set(header)) != len(header) or not header:
        raise ValueError(f"{path}, line 1: expected a header of distinct column names, got {first[:200]!r}")
    if header in COMPETITION_HEADERS:
        rows = _competition_rows(path, lines, len(header))
    else:
        rows = _plain_rows(path, lines, delimiter, len(header))
    return ((line, dict(zip(header, row, strict=True))) for line, row in rows)


def _plain_rows(path: Path, lines: Iterator[str], delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a well-formed CSV. The reader is strict: a lenient one loses rows after a stray quote."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 2  # after the header

    def shown(end: int) -> str:
        return repr("".join(itertools.islice(_lines(path), start - 1, end))[:200])

    try:
        for row in reader:
            if row and len(row) != width:
                end = reader.line_num + 1
                raise ValueError(f"{path}, line {start}: {len(row)} columns, expected {width}: {shown(end)}")
            if row:
                yield start, row
            start = reader.line_num + 2
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {start}: {error}: {shown(start + 1)}; quote the field and double the quotes inside it"
        ) from None


_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"\s*')


def _competition_rows(path: Path, lines: Iterator[str], width: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of the competition's CSV, which no CSV reader reads correctly.

    The text is the last field. It may contain commas, line breaks and bare quotes, in quotes or not. A line that
    starts with the name of an image, or with a comma where the image is missing, is therefore a row. All other lines
    continue the text before them, which must then be in quotes.
    """
    labels = r'(?:"([^"]*)"|([^,"]*)),' if width == 3 else "()()"
    start = re.compile(
        rf'("?)([^,"]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)|(?=\1,\S))\1,{labels}(.*)', re.IGNORECASE | re.DOTALL
    )
    row, quoted = None, False  # quoted: the text of the row has an open quote
    for line, content in enumerate(lines, 2):
        content = content.removesuffix("\n")
        match = start.match(content)
        if match and not (quoted and not match[2]):
            if quoted and _QUOTED.fullmatch("\n".join([*row[2], content])):
                raise ValueError(f"{path}, line {line}: a row, or the end of the text before it? {content[:200]!r}")
            if row:
                yield _finish_competition_row(path, *row)
            _, name, quoted_labels, bare_labels, text = match.groups()
            row = (line, [name, quoted_labels or bare_labels or ""][: width - 1], [text])
            quoted = text.startswith('"') and text.count('"') % 2 == 1
        elif quoted:
            row[2].append(content)
            quoted = content.count('"') % 2 == 0
        elif content.strip():
            raise ValueError(
                f"{path}, line {line}: neither a row (image.jpg,...) nor inside a quoted text: {content[:200]!r}"
            )
    if row:
        yield _finish_competition_row(path, *row)


def _finish_competition_row(path: Path, line: int, fields: list[str], lines: list[str]) -> tuple[int, list[str]]:
    text = "\n".join(lines).rstrip("\r\n")
    if _QUOTED.fullmatch(text):
        text = text.rstrip()[1:-1].replace('""', '"')
    elif "\n" in text:
        raise ValueError(f"{path}, line {line}: the quote of the text is never closed: {text[:200]!r}")
    return line, [*fields, text]


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(_lines(path), 1):
        content = content.removesuffix("\n")
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: not JSON ({error.msg}): {content[:200]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {line}: expected one JSON object a line, got {content[:200]!r}")
        yield line, row


def _read_folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _as_splits(load_from_disk(str(path)), path.name)
    splits = {}
    for stem, split in SPLIT_NAMES.items():
        files = [
            file for suffix in TABLE_SUFFIXES for file in (path / f"{stem}{suffix}", path / stem / f"metadata{suffix}")
        ]
        for file in filter(Path.is_file, files):
            if split in splits:
                raise ValueError(f"{path}: more than one table for the split {split!r}, such as {file}")
            splits[split] = read_table(file)
            if file.stem == "metadata":  # names are relative to the folder of the split
                splits[split] = _prefixed(splits[split], stem)
    for file in (path / f"metadata{suffix}" for suffix in TABLE_SUFFIXES):
        if not splits and file.is_file():
            splits["train"] = read_table(file)
    if not splits:
        raise ValueError(
            f"{path}: nothing to read; expected metadata.csv, or train.csv (validation.csv, test.csv), "
            "or a data set written by save_to_disk"
        )
    return splits


def _prefixed(table: Dataset, folder: str) -> Dataset:
    if "file_name" not in table.column_names:
        raise ValueError(f"{folder}/metadata: expected a column file_name, got {table.column_names}")
    prefixed = {
        name: [value and str(Path(folder) / value) for value in table[name][:]] for name in ("file_name", "where")
    }
    return with_columns(table, prefixed)


def _as_splits(data: Dataset | DatasetDict, source: str) -> dict[str, Dataset]:
    if isinstance(data, Dataset):
        data = {"train": data}
    names = [name for name in data if name in SPLIT_NAMES]
    if not names or len({SPLIT_NAMES[name] for name in names}) < len(names):
        raise ValueError(
            f"{source!r} has the splits {list(data)}; expected some of {', '.join(SPLIT_NAMES)}, each once"
        )
    return {SPLIT_NAMES[name]: with_where(data[name], f"{source}/{name}") for name in names}


def with_where(data: Dataset, name: str) -> Dataset:
    """Return `data` with a column `where` that names each row by its number: "name:1", "name:2", ..."""
    return with_columns(data, {"where": [f"{name}:{row}" for row in range(1, len(data) + 1)]})


def find_column(names: Iterable[str], given: str | None, defaults: Sequence[str], flag: str) -> str | None:
    """
    Choose a column of a table.

    Args:
        names (`Iterable[str]`): The columns of the table.
        given (`str`, *optional*): The column that the flag names.
        defaults (`Sequence[str]`): The columns to look for otherwise.
        flag (`str`): The flag, for an error.

    Returns:
        `str`, *optional*: The column; `None` if none is given and no default exists.

    Raises:
        `ValueError`: If the given column does not exist.
    """
    names = list(names)
    if given is None:
        return next((name for name in defaults if name in names), None)
    if given not in names:
        near = difflib.get_close_matches(given, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"--{flag}: no column {given!r}; {hint}")
    return given


def from_arrow(table: pa.Table) -> Dataset:
    """Return a table as a `Dataset`. Without a fingerprint, `datasets` would pickle all of it, which takes memory."""
    return Dataset(table, fingerprint=uuid.uuid4().hex)


def with_columns(data: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Return `data` with more columns, or other ones of the same names: Arrow arrays, or lists that can become one."""
    data = data.remove_columns([name for name in columns if name in data.column_names])
    return concatenate_datasets([data, from_arrow(pa.table(dict(columns)))], axis=1)
