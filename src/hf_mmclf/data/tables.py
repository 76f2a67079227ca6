"""Tables of images, texts and labels. Every row is read, or an error names the line that cannot be read.

[`read_source`] returns one `Dataset` for each split. It keeps the columns of the source and adds a column `where`
("train.csv:7"), by which every later error names its row.
"""

import difflib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from transformers.utils import logging

from .csv_files import LineError, csv_readers, read_lines
from .reachability import check_reachable

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
ROWS_AT_ONCE = 1_000  # Python objects for a whole table would need several times the memory of its columns
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
logger = logging.get_logger(__name__)
Source = str | Path | pd.DataFrame | Dataset | DatasetDict


def read_source(source: Source) -> DatasetDict:
    r"""
    Read a table, a folder, a data set on the Hub or a table in memory.

    Args:
        source (`str`, `Path`, `pandas.DataFrame`, `Dataset` or `DatasetDict`):
            A file (`.csv`, `.tsv`, `.jsonl` or `.json` with one object a line or an array of objects, each also with
            `.gz` at the end; `.parquet`, `.xlsx`); a folder with `metadata.csv` or `metadata.jsonl` (also one in each
            split folder), with `train.csv`, `validation.csv`, ..., or written by `save_to_disk`; otherwise the name of
            a data set on the Hub. From Python, also a table in memory.

    Returns:
        `DatasetDict`: The splits `train`, `validation` and `test` that the source has. A single table is `train`.

    Raises:
        `ValueError`: If the source does not exist, or if a row cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        frame = source.rename(columns=str)
        return DatasetDict(train=with_where(Dataset.from_pandas(frame, preserve_index=False), "data"))
    if isinstance(source, Dataset):
        return DatasetDict(_as_splits(source, "data"))
    path = Path(source) if isinstance(source, str | Path) else None
    if path is None:
        splits = _as_splits(source, "data")
    elif path.is_file():
        splits = {"train": read_table(path)}
    elif path.is_dir():
        splits = _read_folder(path)
    else:
        check_source(source)
        splits = _as_splits(load_dataset(str(source)), str(source))
    return DatasetDict(splits)


def check_source(source: Source | None) -> None:
    """
    Check that a source is there, without reading it.

    Raises:
        `ValueError`: If it names a file or a folder that does not exist.
        `ConnectionError`: If it is a data set on the Hub, and the Hub cannot be reached.
    """
    if not isinstance(source, str | Path) or Path(source).exists():
        return
    path = Path(source)
    if table_suffix(path) in TABLE_SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"{str(source)!r}: no such file or folder")
    check_reachable(str(source))


def source_name(source: Source) -> str:
    """Return the name of a file, a folder or a data set on the Hub; a table in memory has none."""
    return str(source) if isinstance(source, str | Path) else "a table in memory"


def table_suffix(path: Path) -> str:
    """Return the suffix that tells the kind of a table, in lower case and without `.gz`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_table(path: str | Path) -> Dataset:
    """Read one file as a `Dataset` with a column `where`; see [`read_source`]. Raises `ValueError`."""
    path = Path(path)
    suffix = table_suffix(path)
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of table; expected one of {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        return _read_parquet(path)
    readers = csv_readers(path) if suffix in (".csv", ".tsv") else [partial(_excel_rows, path)]
    if suffix in (".jsonl", ".json"):
        readers = [partial(_json_rows, path)]
    failures = []
    for read in readers:
        try:
            return _as_dataset(path, read)
        except LineError as error:
            failures.append(error)
    raise max(reversed(failures), key=lambda error: error.line)  # of the reader that has come further


def _as_dataset(path: Path, read: Callable[[], Iterator[tuple[int, dict]]]) -> Dataset:
    rows, tables = read(), []
    try:
        while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(name for _, row in chunk for name in row)  # an object may lack a key
            _check_names(names, path)
            columns = {name: pa.array([row.get(name) for _, row in chunk]) for name in names}
            tables.append(pa.table({**columns, "where": pa.array([f"{path.name}:{line}" for line, _ in chunk])}))
        if not tables:
            raise ValueError(f"{path}: no rows")
        return from_arrow(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}{_uneven(read())}: {error}") from None


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


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the objects of JSON lines with their lines, or those of an array with their numbers."""
    lines = enumerate(read_lines(path), 1)
    for line, content in lines:
        if content.lstrip().startswith("["):
            rest = "".join([content, *(more for _, more in lines)])
            for number, row in enumerate(_json(path, line, rest), 1):
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, row {number}: expected an object, got {str(row)[:200]}")
                yield number, row
        elif content.strip():
            row = _json(path, line, content.removesuffix("\n"))
            if not isinstance(row, dict):
                raise LineError(path, line, f"expected one JSON object a line, got {content[:200]!r}")
            yield line, row


def _json(path: Path, line: int, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        shown = content.split("\n")[error.lineno - 1][:200]
        raise LineError(path, line + error.lineno - 1, f"not JSON ({error.msg}): {shown!r}") from None


def _excel_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield the rows of the first sheet. The header is row 1."""
    if find_spec("openpyxl") is None:
        raise ImportError(f"{path}: Excel files need openpyxl; run `pip install 'hf_mmclf[excel]'`")
    try:
        sheets = pd.read_excel(path, sheet_name=None, dtype=object, keep_default_na=False, na_values=[""])
    except Exception as error:  # zip, XML and openpyxl have errors of their own
        raise ValueError(f"{path}: cannot be read as Excel: {error}") from None
    name, sheet = next(iter(sheets.items()))
    if len(sheets) > 1:
        logger.info(f"{path.name}: the sheet {name!r} is read, {len(sheets) - 1} more are left out")
    for column in sheet:  # Excel stores "1" among other texts as a number
        if len({isinstance(value, str) for value in sheet[column].dropna()}) > 1:
            sheet[column] = sheet[column].map(str, na_action="ignore")
    for number, row in enumerate(sheet.to_dict("records"), 2):
        yield number, {str(column): None if pd.isna(value) else value for column, value in row.items()}


def _read_folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _as_splits(load_from_disk(str(path)), path.name)
    splits = {}
    for stem, split in SPLIT_NAMES.items():
        for file in [*_tables(path, stem), *_tables(path / stem, "metadata")]:
            if split in splits:
                raise ValueError(f"{path}: more than one table for the split {split!r}, such as {file}")
            splits[split] = read_table(file)
            if file.parent != path:  # names are relative to the folder of the split
                splits[split] = _prefixed(splits[split], stem)
    for file in [] if splits else _tables(path, "metadata"):
        splits["train"] = read_table(file)
    if not splits:
        raise ValueError(
            f"{path}: nothing to read; expected metadata.csv, or train.csv (validation.csv, test.csv), "
            "or a data set written by save_to_disk"
        )
    return splits


def _tables(folder: Path, stem: str) -> list[Path]:
    return [file for file in sorted(folder.glob(f"{stem}.*")) if table_suffix(file) in TABLE_SUFFIXES]


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
    _check_names(data.column_names, name)
    return with_columns(data, {"where": [f"{name}:{row}" for row in range(1, len(data) + 1)]})


def _check_names(names: Iterable[str], source: str | Path) -> None:
    if "where" in names:
        logger.info(f"{source}: its column 'where' is left out, because the places of rows have this name")


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
    names = [name for name in names if name != "where"]
    if given is None:
        return next((name for name in defaults if name in names), None)
    if given not in names:
        near = difflib.get_close_matches(given, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, names))}"
        raise ValueError(f"--{flag}: no column {given!r}; {hint}")
    return given


def from_arrow(table: pa.Table) -> Dataset:
    """Return a table as a `Dataset`. Without a fingerprint, `datasets` would pickle all of it, which takes memory."""
    return Dataset(table, fingerprint=uuid.uuid4().hex)


def with_columns(data: Dataset, columns: Mapping[str, Any]) -> Dataset:
    """Return `data` with more columns, or other ones of the same names: Arrow arrays, or lists that can become one."""
    data = data.remove_columns([name for name in columns if name in data.column_names])
    return concatenate_datasets([data, from_arrow(pa.table(dict(columns)))], axis=1)
