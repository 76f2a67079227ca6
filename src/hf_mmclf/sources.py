"""Reading tables of pictures, captions and labels in all their forms. Every row is read, or an error says where not.

[`read_source`] gives one `Dataset` for each split, with the columns of the source as they are and a column `where`
("train.csv:7") by which every later error names its row.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

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
    return DatasetDict({name: _with_where(split, f"{source}/{name}") for name, split in splits.items()})


def read_table(path: str | Path) -> Dataset:
    """One file as a `Dataset`, with a column `where`; see [`read_source`]."""
    path = Path(path)
    if path.suffix == ".parquet":
        return _with_where(Dataset.from_parquet(str(path)), path.name)
    if path.suffix not in TABLE_SUFFIXES:
        raise SourceError(f"{path}: unknown kind of table; expected one of {', '.join(TABLE_SUFFIXES)}")
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
    return Dataset.from_dict({**columns, "where": [f"{path.name}:{line}" for line, _ in rows]})


def _csv_rows(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    header = next(csv.reader([text.partition("\n")[0].rstrip("\r")], delimiter=delimiter), [])
    if len(set(header)) != len(header) or not header:
        raise SourceError(f"{path}, line 1: expected a header of distinct column names, got {header}")
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


def _competition_rows(path: Path, text: str, width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows of the competition's own CSV, which no CSV reader gets right.

    The caption is last and may hold commas, line breaks and bare quotes, quoted or not. So a row is a line that starts
    with a picture's name; all other lines continue the caption before them, which must then be in quotes.
    """
    labels = r'("?)([^,"]*)\2,' if width == 3 else "()()"
    start = re.compile(rf'([^,"]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)),{labels}(.*)', re.IGNORECASE | re.DOTALL)
    row = None
    for line, content in enumerate([*text.split("\n")[1:], None], 2):
        match = content is not None and start.match(content.removesuffix("\r"))
        if row and (match or content is None):
            yield _finish_competition_row(path, *row)
            row = None
        if match:
            name, _, label_text, caption = match.groups()
            row = (line, [name, label_text][: width - 1], caption)
        elif row and row[2].startswith('"') and not _QUOTED.fullmatch(row[2]):
            row = (*row[:2], f"{row[2]}\n{content.removesuffix(chr(13))}")
        elif content and content.strip():
            raise SourceError(
                f"{path}, line {line}: neither a row (picture,...) nor inside a quoted caption: {content[:200]!r}"
            )


_QUOTED = re.compile(r'"(?:[^"]|"")*"\s*')


def _finish_competition_row(path: Path, line: int, fields: list[str], caption: str) -> tuple[int, list[str]]:
    if _QUOTED.fullmatch(caption):
        caption = caption.rstrip()[1:-1].replace('""', '"')
    elif "\n" in caption.rstrip("\n"):
        raise SourceError(f"{path}, line {line}: the caption's quote is never closed: {caption[:200]!r}")
    return line, [*fields, caption.rstrip("\n")]


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
        return _as_splits(load_from_disk(str(path)), str(path))
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
    names = [f"{folder}/{name}" if name else name for name in table["file_name"]]
    return table.remove_columns("file_name").add_column("file_name", names)


def _as_splits(data: Dataset | DatasetDict, source: str) -> dict[str, Dataset]:
    if isinstance(data, Dataset):
        return {"train": data}
    splits = {SPLIT_NAMES[name]: split for name, split in data.items() if name in SPLIT_NAMES}
    if not splits:
        raise SourceError(f"{source!r} has the splits {list(data)}; expected some of {sorted(set(SPLIT_NAMES))}")
    return splits


def _with_where(data: Dataset, name: str) -> Dataset:
    if "where" in data.column_names:
        return data
    return data.add_column("where", [f"{name}:{row}" for row in range(1, len(data) + 1)])
