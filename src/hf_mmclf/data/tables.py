"""Reading tables of pictures, captions and labels in all their forms. Every row is read, or an error says where not.

[`read_source`] gives one `Dataset` for each split, with the columns of the source as they are and a column `where`
("train.csv:7") by which every later error names its row.
"""

import csv
import itertools
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_from_disk

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
COMPETITION_HEADERS = (["ImageID", "Labels", "Caption"], ["ImageID", "Caption"])
ROWS_AT_ONCE = 1_000  # a whole table of Python's objects would take several times the memory of its columns
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


class SourceError(ValueError):
    """A source that cannot be read; the message names file, line and text."""


def read_source(source: str) -> DatasetDict:
    r"""
    Reads a table, a folder or a data set of the Hub.

    Args:
        source (`str`):
            A file (`.csv`, `.tsv`, `.jsonl`, `.json` with one object a line, `.parquet`); a folder with
            `metadata.csv`/`.jsonl` (also one in each of its split folders), with `train.csv`, `validation.csv`, ...,
            or written by `save_to_disk`; else the name of a data set on the Hub.

    Returns:
        `DatasetDict`: splits `train`, `validation`, `test` where the source has them; a single table is `train`.

    Raises:
        `SourceError`: nothing there, or a row that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        splits = {"train": read_table(path)}
    elif path.is_dir():
        splits = _read_folder(path)
    elif path.suffix in TABLE_SUFFIXES or path.is_absolute() or source.startswith("."):
        raise SourceError(f"{source!r}: no such file or folder")
    else:
        splits = _as_splits(load_dataset(source), source)
    return DatasetDict(splits)


def read_table(path: str | Path) -> Dataset:
    """One file as a `Dataset`, with a column `where`; see [`read_source`]."""
    path = Path(path)
    if path.suffix not in TABLE_SUFFIXES:
        raise SourceError(f"{path}: unknown kind of table; expected one of {', '.join(TABLE_SUFFIXES)}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    read_rows = _json_rows if path.suffix in (".jsonl", ".json") else _csv_rows
    rows, tables = read_rows(path), []
    try:
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(name for _, row in chunk for name in row)  # objects may leave keys out
            columns = {name: pa.array([row.get(name) for _, row in chunk]) for name in names}
            tables.append(pa.table({**columns, "where": pa.array([f"{path.name}:{line}" for line, _ in chunk])}))
        if not tables:
            raise SourceError(f"{path}: no rows")
        return from_arrow(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(f"{path}{_uneven(read_rows(path))}: {error}") from None


def _read_parquet(path: Path) -> Dataset:
    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps what Arrow says, in its own classes
        raise SourceError(f"{path}: cannot be read as Parquet: {error.__cause__ or error}") from None
    if not len(data):
        raise SourceError(f"{path}: no rows")
    return _with_where(data, path.name)


def _uneven(rows: Iterator[tuple[int, dict]]) -> str:
    """Where a column changes its kind, for an error."""
    kinds: dict[str, dict[str, int]] = {}  # of each column the line on which each kind is first seen
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
    """Lines with their ends, which are line feeds only: other breaks belong to the fields."""
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from None
            yield line


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    delimiter, lines = "\t" if path.suffix == ".tsv" else ",", _lines(path)
    first = next(lines, "").rstrip("\r\n")
    header = [] if "\r" in first else next(csv.reader([first], delimiter=delimiter), [])
    if len(set(header)) != len(header) or not header:
        raise SourceError(f"{path}, line 1: expected a header of distinct column names, got {first[:200]!r}")
    if header in COMPETITION_HEADERS:
        rows = _competition_rows(path, lines, len(header))
    else:
        rows = _plain_rows(path, lines, delimiter, len(header))
    return ((line, dict(zip(header, row, strict=True))) for line, row in rows)


def _plain_rows(path: Path, lines: Iterator[str], delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of a well-formed CSV; strict, since a lenient reader silently swallows rows after a stray quote."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 2  # after the header

    def shown(end: int) -> str:
        return repr("".join(itertools.islice(_lines(path), start - 1, end))[:200])

    try:
        for row in reader:
            if row and len(row) != width:
                end = reader.line_num + 1
                raise SourceError(f"{path}, line {start}: {len(row)} columns, expected {width}: {shown(end)}")
            if row:
                yield start, row
            start = reader.line_num + 2
    except csv.Error as error:
        raise SourceError(
            f"{path}, line {start}: {error}: {shown(start + 1)}; quote the field and double the quotes inside it"
        ) from None


_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"\s*')


def _competition_rows(path: Path, lines: Iterator[str], width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of the competition's own CSV, which no CSV reader gets right.

    The caption is last and may hold commas, line breaks and bare quotes, quoted or not. So a row is a line that starts
    with a picture's name, or with a comma where it has none; all other lines continue the caption before them, which
    must then be in quotes.
    """
    labels = r'(?:"([^"]*)"|([^,"]*)),' if width == 3 else "()()"
    start = re.compile(
        rf'("?)([^,"]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)|(?=\1,\S))\1,{labels}(.*)', re.IGNORECASE | re.DOTALL
    )
    row, quoted = None, False  # quoted: the row's caption has opened a quote and not closed it
    for line, content in enumerate(lines, 2):
        content = content.removesuffix("\n")
        match = start.match(content)
        if match and not (quoted and not match[2]):
            if quoted and _QUOTED.fullmatch("\n".join([*row[2], content])):
                raise SourceError(
                    f"{path}, line {line}: a row, or the end of the caption before it? {content[:200]!r}"
                )
            if row:
                yield _finish_competition_row(path, *row)
            _, name, label_text, bare_label_text, caption = match.groups()
            row = (line, [name, label_text or bare_label_text or ""][: width - 1], [caption])
            quoted = caption.startswith('"') and caption.count('"') % 2 == 1
        elif quoted:
            row[2].append(content)
            quoted = content.count('"') % 2 == 0
        elif content.strip():
            raise SourceError(
                f"{path}, line {line}: neither a row (picture.jpg,...) nor inside a quoted caption: {content[:200]!r}"
            )
    if row:
        yield _finish_competition_row(path, *row)


def _finish_competition_row(path: Path, line: int, fields: list[str], lines: list[str]) -> tuple[int, list[str]]:
    caption = "\n".join(lines).rstrip("\r\n")
    if _QUOTED.fullmatch(caption):
        caption = caption.rstrip()[1:-1].replace('""', '"')
    elif "\n" in caption:
        raise SourceError(f"{path}, line {line}: the caption's quote is never closed: {caption[:200]!r}")
    return line, [*fields, caption]


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(_lines(path), 1):
        content = content.removesuffix("\n")
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise SourceError(f"{path}, line {line}: not JSON ({error.msg}): {content[:200]!r}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{path}, line {line}: expected one JSON object a line, got {content[:200]!r}")
        yield line, row


def _read_folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _as_splits(load_from_disk(str(path)), path.name)
    splits = {}
    for stem, split in SPLIT_NAMES.items():
        for suffix in TABLE_SUFFIXES:
            for file in (path / f"{stem}{suffix}", path / stem / f"metadata{suffix}"):
                if not file.is_file():
                    continue
                if split in splits:
                    raise SourceError(f"{path}: more than one table for the split {split!r}, such as {file}")
                splits[split] = read_table(file)
                if file.stem == "metadata":  # names are relative to the split's folder
                    splits[split] = _prefixed(splits[split], stem)
    for suffix in TABLE_SUFFIXES:
        if not splits and (path / f"metadata{suffix}").is_file():
            splits["train"] = read_table(path / f"metadata{suffix}")
    if not splits:
        raise SourceError(
            f"{path}: nothing to read; expected metadata.csv, or train.csv (validation.csv, test.csv), "
            "or a data set written by save_to_disk"
        )
    return splits


def _prefixed(table: Dataset, folder: str) -> Dataset:
    if "file_name" not in table.column_names:
        raise SourceError(f"{folder}/metadata: expected a column file_name, got {table.column_names}")
    names = ("file_name", "where")
    return with_strings(
        table, {name: [value and str(Path(folder) / value) for value in table[name][:]] for name in names}
    )


def _as_splits(data: Dataset | DatasetDict, source: str) -> dict[str, Dataset]:
    if isinstance(data, Dataset):
        data = {"train": data}
    names = [SPLIT_NAMES[name] for name in data if name in SPLIT_NAMES]
    if not names or len(set(names)) < len(names):
        raise SourceError(
            f"{source!r} has the splits {list(data)}; expected some of {', '.join(SPLIT_NAMES)}, each once"
        )
    return {SPLIT_NAMES[name]: _with_where(data[name], f"{source}/{name}") for name in data if name in SPLIT_NAMES}


def _with_where(data: Dataset, name: str) -> Dataset:
    if "where" in data.column_names:
        data = data.remove_columns("where")
    return with_columns(data, {"where": pa.array(f"{name}:{row}" for row in range(1, len(data) + 1))})


def from_arrow(table: pa.Table) -> Dataset:
    """A table as it is; for a fingerprint of the content `datasets` would pickle it all, which doubles the memory."""
    return Dataset(table, fingerprint=uuid.uuid4().hex)


def with_columns(data: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """`data` with more columns, of Arrow arrays or what these can be made from."""
    return concatenate_datasets([data, from_arrow(pa.table(dict(columns)))], axis=1)


def with_strings(data: Dataset, columns: Mapping[str, list[str | None]]) -> Dataset:
    """`data` with text in place of some of its columns."""
    features = Features({**data.features, **dict.fromkeys(columns, Value("string"))})
    return Dataset.from_dict({**data.to_dict(), **columns}, features=features)
