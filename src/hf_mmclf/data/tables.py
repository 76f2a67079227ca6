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

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, concatenate_datasets, load_dataset, load_from_disk
from PIL import Image as PILImage
from transformers.utils import logging

from .csv_files import LineError, csv_readers, read_lines
from .reachability import check_reachable

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx")
ROWS_AT_ONCE = 1_000  # Python objects for a whole table would need several times the memory of its columns
SPLITS = {  # and their names, in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
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
        source = _from_pandas(source)
    if isinstance(source, Dataset | DatasetDict):
        return DatasetDict(_as_splits(source, "data"))
    if not isinstance(source, str | Path):
        raise ValueError(
            f"data is a {type(source).__name__}; expected a path, a name on the Hub, a pandas.DataFrame, a "
            "datasets.Dataset or a datasets.DatasetDict"
        )
    path = Path(source)
    if path.is_file():
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
        formulas = pd.read_excel(path, dtype=str, keep_default_na=False, engine_kwargs={"data_only": False})
    except Exception as error:  # zip, XML and openpyxl have errors of their own
        raise ValueError(f"{path}: cannot be read as Excel: {error}") from None
    name, sheet = next(iter(sheets.items()))
    if len(sheets) > 1:
        logger.info(f"{path.name}: the sheet {name!r} is read, {len(sheets) - 1} more are left out")
    # Rows and columns at the end with nothing but formulas without a value are not in the sheet.
    has_value = sheet.notna().reindex(index=formulas.index, columns=formulas.columns, fill_value=False)
    is_formula = formulas.map(lambda cell: cell.startswith("=")).to_numpy(bool)
    empty = np.argwhere(is_formula & ~has_value.to_numpy(bool))
    if len(empty):
        row, column = empty[0]
        name, formula = str(formulas.columns[column]), formulas.iat[row, column]
        raise ValueError(
            f"{path.name}:{row + 2}: column {name!r} has the formula {formula!r} and no value; open the file in "
            "Excel and save it, which computes the values"
        )
    for column in sheet:  # Excel stores "1" among other texts as a number
        if len({isinstance(value, str) for value in sheet[column].dropna()}) > 1:
            sheet[column] = sheet[column].map(str, na_action="ignore")
    for number, row in enumerate(sheet.to_dict("records"), 2):
        yield number, {str(column): None if pd.isna(value) else value for column, value in row.items()}


def _read_folder(path: Path) -> dict[str, Dataset]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _as_splits(load_from_disk(str(path)), path.name)
    tables = {file.name: file for file in sorted(path.iterdir()) if table_suffix(file) in TABLE_SUFFIXES}
    inside = [file for file in sorted(path.glob("*/[mM]etadata.*")) if table_suffix(file) in TABLE_SUFFIXES]
    tables |= {f"{file.parent.name}/{file.name}": file for file in inside}
    stems = {name: name.split("/" if "/" in name else ".")[0] for name in tables}
    if not any(map(_split_of, stems.values())):  # one table for the whole folder
        stems = {name: "train" if stem.lower() == "metadata" else stem for name, stem in stems.items()}
    if not any(map(_split_of, stems.values())):
        found = f"; its tables are {', '.join(tables)}" if tables else ""
        raise ValueError(
            f"{path}: nothing to read; expected metadata.csv, or train.csv (validation.csv, test.csv), or a data set "
            f"written by save_to_disk{found}"
        )
    splits = {}
    for split, name in find_splits(stems, str(path)).items():
        splits[split] = read_table(tables[name])
        if tables[name].parent != path:  # names are relative to the folder of the split
            splits[split] = _prefixed(splits[split], tables[name].parent.name)
    return splits


def _split_of(name: str) -> str | None:
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def find_splits(names: Mapping[str, str], source: str) -> dict[str, str]:
    """
    Find the splits of a source. Parts of it that are none are said to be left out.

    Args:
        names (`Mapping[str, str]`): The name of each part, by a description of the part.
        source (`str`): The name of the source.

    Returns:
        `dict[str, str]`: The description of each split that the source has, by `train`, `validation` and `test`.

    Raises:
        `ValueError`: If no part is a split, or if several are the same one.
    """
    found = {split: [part for part, name in names.items() if _split_of(name) == split] for split in SPLITS}
    several = {split: parts for split, parts in found.items() if len(parts) > 1}
    if several or not any(found.values()):
        wrong = "; ".join(f"{' and '.join(parts)} are both {split!r}" for split, parts in several.items())
        raise ValueError(
            f"{source!r} has the splits {', '.join(names)}; {wrong or 'none of them has a known name'}. Expected "
            f"{'; '.join(' or '.join(known) for known in SPLITS.values())}, each once"
        )
    if others := [part for part, name in names.items() if _split_of(name) is None]:
        logger.warning(f"{source}: left out, because it is no split: {', '.join(others)}")
    return {split: parts[0] for split, parts in found.items() if parts}


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
    found = find_splits({name: name for name in data}, source)
    for name in found.values():
        if data[name].format["type"] == "custom":
            raise ValueError(
                f"{source}/{name} has a transform, which would not be applied; apply it to the rows by map(), or "
                "remove it by reset_format()"
            )
        if not len(data[name]):
            raise ValueError(f"{source}/{name}: no rows")
    return {split: with_where(data[name].with_format(None), f"{source}/{name}") for split, name in found.items()}


def _from_pandas(frame: pd.DataFrame) -> Dataset:
    """Convert a table of pandas. Images of Pillow become encoded images."""
    frame = frame.rename(columns=str)
    if not frame.columns.is_unique or not len(frame.columns):
        raise ValueError(f"data: expected columns with different names, got {list(frame.columns)}")
    columns = []
    for name, cells in frame.items():
        try:
            if any(isinstance(cell, PILImage.Image) for cell in cells):
                images = [None if isinstance(cell, float) else cell for cell in cells]  # NaN is no image
                columns.append(Dataset.from_dict({name: images}, Features({name: Image()})))
            else:
                columns.append(Dataset.from_pandas(cells.to_frame(), preserve_index=False))
        except (pa.ArrowException, TypeError) as error:
            kinds = sorted({type(cell).__name__ for cell in cells})
            raise ValueError(f"data: column {name!r} has cells of the types {', '.join(kinds)}: {error}") from None
    return concatenate_datasets(columns, axis=1)


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
