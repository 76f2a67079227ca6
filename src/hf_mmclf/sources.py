"""Reading tables of pictures, captions and labels in all their forms. Every row is read, or an error says where not.

[`read_source`] gives one `Dataset` for each split, with the columns of the source as they are and a column `where`
("train.csv:7") by which every later error names its row.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_from_disk

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
COMPETITION_HEADERS = (["ImageID", "Labels", "Caption"], ["ImageID", "Caption"])
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
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SourceError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if path.suffix in (".jsonl", ".json"):
        header, rows = None, list(_json_rows(path, text))
    else:
        header, rows = _csv_rows(path, text)
    if not rows:
        raise SourceError(f"{path}: no rows")
    if header is None:  # objects may leave keys out
        header = list(dict.fromkeys(key for _, row in rows for key in row))
        columns = {name: [row.get(name) for _, row in rows] for name in header}
    else:
        columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    lines = [line for line, _ in rows]
    try:
        return Dataset.from_dict({**columns, "where": [f"{path.name}:{line}" for line in lines]})
    except (pa.ArrowException, OverflowError) as error:
        raise SourceError(f"{path}{_uneven(columns, lines)}: {error}") from None


def _read_parquet(path: Path) -> Dataset:
    try:
        data = Dataset.from_parquet(str(path))
    except Exception as error:  # datasets wraps what Arrow says, in its own classes
        raise SourceError(f"{path}: cannot be read as Parquet: {error.__cause__ or error}") from None
    if not len(data):
        raise SourceError(f"{path}: no rows")
    return _with_where(data, path.name)


def _uneven(columns: dict[str, list], lines: list[int]) -> str:
    """Where a column changes its kind, for an error."""
    for name, values in columns.items():
        kinds = {}
        for line, value in zip(lines, values, strict=True):
            if value is not None:
                kinds.setdefault(type(value).__name__, line)
        if len(kinds) > 1:
            (first, there), (other, line) = list(kinds.items())[:2]
            return f", line {line}: column {name!r} is {other} here, but {first} on line {there}"
    return ""


def _csv_rows(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    first = text.partition("\n")[0].rstrip("\r")
    header = [] if "\r" in first else next(csv.reader([first], delimiter=delimiter), [])
    if len(set(header)) != len(header) or not header:
        raise SourceError(f"{path}, line 1: expected a header of distinct column names, got {first[:200]!r}")
    reader = _competition_rows(path, text, len(header)) if header in COMPETITION_HEADERS else None
    return header, list(reader or _plain_rows(path, text, delimiter, len(header)))


def _plain_rows(path: Path, text: str, delimiter: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of a well-formed CSV; strict, since a lenient reader silently swallows rows after a stray quote."""
    csv.field_size_limit(2**31 - 1)
    lines = re.split(r"(?<=\n)", text)  # only at line feeds: other breaks belong to the fields
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    next(reader)
    start = reader.line_num + 1
    try:
        for row in reader:
            if row and len(row) != width:
                shown = "".join(lines[start - 1 : reader.line_num])[:200]
                raise SourceError(f"{path}, line {start}: {len(row)} columns, expected {width}: {shown!r}")
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        shown = "".join(lines[start - 1 : start + 1])[:200]
        raise SourceError(
            f"{path}, line {start}: {error}: {shown!r}; quote the field and double the quotes inside it"
        ) from None


_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"\s*')


def _competition_rows(path: Path, text: str, width: int) -> Iterator[tuple[int, list[str]]]:
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
    for line, content in enumerate(text.split("\n")[1:], 2):
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


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for line, content in enumerate(text.split("\n"), 1):
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
    return with_columns(data, {"where": [f"{name}:{row}" for row in range(1, len(data) + 1)]})


def with_columns(data: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """`data` with more columns; `Dataset.add_column` would pickle every value for its fingerprint, which is slow."""
    return concatenate_datasets([data, Dataset.from_dict(columns)], axis=1)


def with_strings(data: Dataset, columns: Mapping[str, list[str | None]]) -> Dataset:
    """`data` with text in place of some of its columns."""
    features = Features({**data.features, **dict.fromkeys(columns, Value("string"))})
    return Dataset.from_dict({**data.to_dict(), **columns}, features=features)
