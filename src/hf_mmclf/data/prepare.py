"""Rows in one form: columns found, labels encoded, images checked, splits made."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image
from transformers.utils import logging

from .demo import DEMO_LABELS, demo_dataset
from .images import check_images, image_paths
from .labels import (
    LabelSet,
    ParsedLabels,
    find_delimiter,
    parse_indicator_columns,
    parse_label_column,
    read_names,
)
from .splits import split_rows, warn_of_shared_rows
from .suspects import contradictions, label_warnings
from .tables import Source, find_column, from_arrow, read_source, source_name, with_columns, with_where

logger = logging.get_logger(__name__)

IMAGE_COLUMNS = ("image", "ImageID", "file_name", "image_path", "path", "filename")
TEXT_COLUMNS = ("text", "Caption", "caption", "sentence")
LABEL_COLUMNS = ("labels", "Labels", "label")


@dataclasses.dataclass
class DataArguments:
    """
    Where the rows come from, and how they are read and split.

    Args:
        data (`str`, *optional*):
            A table (.csv, .tsv, .jsonl, .json, .parquet, .xlsx, also .csv.gz), a folder, or a data set on the Hub. By
            default, the embedded data set. From Python, also a pandas or `datasets` object.
        demo_rows (`int`, *optional*, defaults to 3000):
            Number of rows of the embedded data set.
        validation_data (`str`, *optional*):
            Validation rows, if they are in a place of their own.
        test_data (`str`, *optional*):
            Test rows, if they are in a place of their own.
        image_dir (`str`, *optional*):
            The folder to which image names are relative. By default, the folder of the table.
        image_column (`str`, *optional*):
            The column of images, or none to go without. By default, the first that exists of image, ImageID,
            file_name, image_path, path, filename.
        text_column (`str`, *optional*):
            The column of texts, or none to go without. By default, the first that exists of text, Caption, caption,
            sentence.
        label_column (`str`, *optional*):
            The column of labels. By default, the first that exists of labels, Labels, label.
        label_columns (`list[str]`, *optional*):
            Columns of 0 and 1, one for each label, in place of a label column. A cell of -1 is an unknown label.
        label_delimiter (`str`, *optional*):
            The separator of labels in a cell. By default, the first of | ; , that occurs in the label column,
            otherwise white space.
        empty_is_unknown (`bool`, *optional*, defaults to `False`):
            An empty label cell means that the labels are unknown. By default, it means that there is no label.
        label_names_file (`str`, *optional*):
            A JSON file with an object from label to name, such as {"1": "person"}. It fixes the set of labels, and
            its order is that of multi-hot lists.
        validation_fraction (`float`, *optional*, defaults to 0.1):
            Share of the training rows that become validation rows when no validation rows are given.
        test_fraction (`float`, *optional*, defaults to 0.1):
            Share of the training rows that become test rows when neither validation nor test rows are given.
        split_seed (`int`, *optional*, defaults to 0):
            Seed of the stratified split.
        streaming (`bool`, *optional*, defaults to `False`):
            Read the training rows one after another and never keep all of them. Needs --max_steps.
        shuffle_buffer (`int`, *optional*, defaults to 1000):
            Number of rows in the buffer that shuffles a stream.
        validation_rows (`int`, *optional*, defaults to 0):
            Number of rows at the beginning of a stream that become validation rows.
        bad_images (`str`, *optional*, defaults to `"error"`):
            What happens if an image cannot be read: error stops, skip leaves the row out, missing keeps the row
            without its image.
        pixel_limit (`float`, *optional*, defaults to 100.0):
            Images with more megapixels count as images that cannot be read. Pillow has a limit of 178 of its own.
    """

    _argument_group_name = "data"

    data: str | None = None
    demo_rows: int = 3000
    validation_data: str | None = None
    test_data: str | None = None
    image_dir: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    label_columns: list[str] | None = None
    label_delimiter: str | None = None
    empty_is_unknown: bool = False
    label_names_file: str | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    streaming: bool = False
    shuffle_buffer: int = 1000
    validation_rows: int = 0
    bad_images: Literal["error", "skip", "missing"] = "error"
    pixel_limit: float = 100.0


@dataclasses.dataclass
class PreparedData:
    """
    Rows in one form, ready for transforms.

    Args:
        splits (`DatasetDict`): Columns `image` (name or bytes), `text`, `labels` (multi-hot, -1: unknown) and `where`.
        labels ([`LabelSet`]): The labels, in the order of the multi-hot columns.
        folder (`Path`): The folder to which image names are relative.
        split_source (`str`): How the splits were made, in words.
        bad_images (`list[tuple[str, str]]`): The row and the reason for each image that cannot be read.
    """

    splits: DatasetDict
    labels: LabelSet
    folder: Path
    split_source: str
    bad_images: list[tuple[str, str]]


def prepare_data(
    args: DataArguments,
    uses_image: bool = True,
    uses_text: bool = True,
    labels: LabelSet | None = None,
    with_labels: bool = True,
    sources: dict[str, Dataset] | None = None,
) -> PreparedData:
    """
    Read, check and split rows.

    Args:
        args ([`DataArguments`]): Where the rows come from.
        uses_image (`bool`, *optional*, defaults to `True`): Whether the model has an image backbone. Without one,
            images are not checked.
        uses_text (`bool`, *optional*, defaults to `True`): Whether the model has a text backbone.
        labels ([`LabelSet`], *optional*): The labels of a trained model. Nothing is split then, and rows may be
            unlabelled.
        with_labels (`bool`, *optional*, defaults to `True`): Whether to read labels; prediction does not need them.
        sources (`dict[str, Dataset]`, *optional*): Tables by split, in place of those that `args` name.

    Returns:
        [`PreparedData`]: The rows of all splits in one form.

    Raises:
        `ValueError`: If a column, a label or a split is missing or wrong. The message names the row and the flag.
        `FileNotFoundError`: If image files do not exist.
    """
    folder = image_folder(args)
    known = DEMO_LABELS if sources is None and args.data is None else ()
    is_read, sources = sources is None, sources or _read_sources(args)
    if labels is None and "train" not in sources:
        raise ValueError(f"no training rows; the source has only {', '.join(sources)}")
    args = _same_columns(sources, args)
    parsed = _parse_labels(sources, args, labels.ids if labels else ()) if with_labels else {}
    label_set = labels or _collect_labels(sources, parsed, args, known)
    splits, bad_images = {}, []
    for name, source in sources.items():
        split = _standardize(source, args, name, uses_image, uses_text)
        if name in parsed:
            split = _with_labels(split, label_set, parsed[name])
        if uses_image:
            split, bad = check_images(split, folder, args.bad_images, args.pixel_limit, args.streaming)
            bad_images += bad
        _check_modalities(split, uses_image, uses_text)
        splits[name] = split
    rows, how = splits, "given"
    if labels is None:
        fractions = args.validation_fraction, args.test_fraction
        splits, how = split_rows(splits, references_of(splits["train"]), *fractions, args.split_seed)
    if is_read and args.data is not None:
        _say_what_was_found(sources, rows, parsed, args)
        warn_of_shared_rows(splits, folder, uses_image)
    return PreparedData(DatasetDict(splits), label_set, folder, how, bad_images)


# Sources


def image_folder(args: DataArguments) -> Path:
    """Return the folder to which image names are relative."""
    return Path(args.image_dir) if args.image_dir else _folder_of(args.data)


def _folder_of(source: Source | None) -> Path:
    path = Path(source if isinstance(source, str | Path) else ".")
    return path if path.is_dir() else path.parent


def _read_sources(args: DataArguments) -> dict[str, Dataset]:
    if args.data is None:
        demo = demo_dataset(args.demo_rows)
        sources = {name: with_where(split, f"demo/{name}") for name, split in demo.items()}
    else:
        sources = read_source(args.data)
    return {**sources, **read_given_splits(args, sources)}


def read_given_splits(args: DataArguments, taken: Collection[str]) -> dict[str, Dataset]:
    """Read the rows of --validation_data and --test_data. Raises `ValueError` for a split that `taken` contains."""
    sources = {}
    for name, source in (("validation", args.validation_data), ("test", args.test_data)):
        if source is None:
            continue
        if name in taken:
            place = "the embedded data set" if args.data is None else repr(source_name(args.data))
            raise ValueError(f"--{name}_data is given, but {place} has a split {name!r} already; leave one out")
        found = read_source(source)
        if name not in found and len(found) > 1:
            raise ValueError(
                f"--{name}_data: {source_name(source)} has the splits {', '.join(found)}; give one of them"
            )
        rows = found[name if name in found else next(iter(found))]
        sources[name] = rows if args.image_dir else _relative_to(rows, args, _folder_of(source))
    return sources


def _relative_to(data: Dataset, args: DataArguments, own: Path) -> Dataset:
    """Make image names that are relative to the folder `own` relative to the folder of all images."""
    folder, column = image_folder(args), _column(data, args, "image")
    if own == folder or column is None or isinstance(data.features[column], Image):
        return data
    names = [name and os.path.relpath(own / str(name), folder) for name in data[column][:]]
    return with_columns(data, {column: names})


# Columns


def _column(data: Dataset, args: DataArguments, part: str, needed_by: str | None = None) -> str | None:
    """Find the column of `image` or `text`. `None` if it is not there, which is an error for a split that needs it."""
    defaults = {"image": IMAGE_COLUMNS, "text": TEXT_COLUMNS}[part]
    given = getattr(args, f"{part}_column")
    if given == "none" and given not in data.column_names:
        return None
    column = find_column(data.column_names, given, defaults, f"{part}_column")
    if column is None and needed_by:
        raise ValueError(
            f"{needed_by}: no {part} column among {column_names(data)}; name it by --{part}_column, or give "
            f"--{part}_column none to go without"
        )
    return column


def _label_columns(sources: dict[str, Dataset], args: DataArguments) -> dict[str, list[str]]:
    """Find the label columns of each labelled split. Given ones must be in at least one of the splits."""
    flag = "label_columns" if args.label_columns else "label_column"
    given = args.label_columns or ([] if args.label_column is None else [args.label_column])
    labelled = {name: source for name, source in sources.items() if not given or set(given) & set(source.column_names)}
    columns = {
        name: [find_column(source.column_names, column, LABEL_COLUMNS, flag) for column in given or [None]]
        for name, source in (labelled or sources).items()
    }
    return {name: found for name, found in columns.items() if found != [None]}


def _same_columns(sources: dict[str, Dataset], args: DataArguments) -> DataArguments:
    """Return the arguments with the image and text columns of the first split, if the other splits have them too."""
    first, *others = sources.values()
    shared = set(first.column_names).intersection(*(more.column_names for more in others))
    chosen = {f"{part}_column": _column(first, args, part) for part in ("image", "text")}
    return dataclasses.replace(args, **{flag: column for flag, column in chosen.items() if column in shared})


def _parse_labels(sources: dict[str, Dataset], args: DataArguments, known: Collection[str]) -> dict[str, ParsedLabels]:
    if args.label_columns and args.label_column:
        raise ValueError("--label_column and --label_columns are both given; leave one out")
    if args.label_delimiter == "":
        raise ValueError("--label_delimiter is empty; leave it out for white space")
    columns = _label_columns(sources, args)
    if args.label_columns:
        return {
            name: parse_indicator_columns(sources[name], found, args.empty_is_unknown)
            for name, found in columns.items()
        }
    # All splits have one delimiter, also those in which it does not occur.
    cells = (value for name, [column] in columns.items() for value in sources[name][column][:])
    delimiter = args.label_delimiter or find_delimiter(cells)
    positions = list(read_names(args.label_names_file)) if args.label_names_file else None
    return {
        name: parse_label_column(sources[name], column, delimiter, args.empty_is_unknown, positions, known)
        for name, [column] in columns.items()
    }


def _say_what_was_found(
    sources: dict[str, Dataset], splits: dict[str, Dataset], parsed: dict[str, ParsedLabels], args: DataArguments
) -> None:
    """Log the columns that were chosen, and warn of labels that look wrong."""
    first = next(iter(sources.values()))
    chosen = [f"{part} {_column(first, args, part)!r}" for part in ("image", "text") if _column(first, args, part)]
    for name, labels in list(parsed.items())[:1]:
        columns = _label_columns({name: sources[name]}, args)[name]
        chosen.append(f"labels {', '.join(map(repr, columns[:5]))}{', ...' if columns[5:] else ''} ({labels.form})")
    logger.info(f"Columns: {', '.join(chosen)}")
    for name, labels in parsed.items():
        keys = [
            os.path.normpath(path) if isinstance(path, str) else text if path is None else None
            for path, text in zip(image_paths(splits[name]), splits[name]["text"][:], strict=True)
        ]
        warnings = label_warnings(labels.rows, sources[name]["where"][:])
        for warning in [*warnings, *contradictions(keys, references_of(splits[name]), splits[name]["where"][:])]:
            logger.warning(f"  {name} rows: {warning}")


def _collect_labels(
    sources: dict[str, Dataset],
    parsed: dict[str, ParsedLabels],
    args: DataArguments,
    known: Collection[str],
) -> LabelSet:
    """Collect the labels of the training rows, and those that are `known` without a row that has them."""
    for name in ("train", "validation"):
        if name in sources and name not in parsed:
            raise no_label_column(name, sources[name])
    return LabelSet.from_rows([*parsed["train"].rows, args.label_columns or known], args.label_names_file)


def column_names(data: Dataset) -> str:
    """Return the names of the columns of a source, for an error."""
    return ", ".join(repr(name) for name in data.column_names if name != "where")


def no_label_column(split: str, data: Dataset) -> ValueError:
    """Return the error for a split that must have labels and has none."""
    return ValueError(
        f"no label column in the {split} rows among {column_names(data)}; expected {' or '.join(LABEL_COLUMNS)}, or "
        "name it by --label_column or --label_columns"
    )


def _with_labels(data: Dataset, label_set: LabelSet, parsed: ParsedLabels) -> Dataset:
    encoded = label_set.encode(parsed.rows, data["where"], parsed.unknown)
    cells = pa.FixedSizeListArray.from_arrays(encoded.ravel(), encoded.shape[1])
    return with_columns(data, {"labels": cells.cast(pa.list_(pa.float32()))})


def _standardize(data: Dataset, args: DataArguments, split: str, uses_image: bool, uses_text: bool) -> Dataset:
    """Return a table with the columns `image`, `text` and `where`."""
    image = _column(data, args, "image", needed_by=split if uses_image else None)
    text = _column(data, args, "text", needed_by=split if uses_text else None)
    texts = _strings(data, text) if text else pa.nulls(len(data), pa.string())
    if image is not None and isinstance(data.features[image], Image):  # the bytes stay where they are
        table = data.select_columns([image, "where"]).cast_column(image, Image(decode=False))
        return with_columns(table.rename_column(image, "image") if image != "image" else table, {"text": texts})
    names = _strings(data, image, convert=True) if image else pa.nulls(len(data), pa.string())
    return from_arrow(pa.table({"image": names, "text": texts, "where": _arrow(data, "where")}))


def _arrow(data: Dataset, column: str) -> pa.ChunkedArray:
    """Return a column without a Python object for each row."""
    return data.with_format("arrow")[column][:]


def _strings(data: Dataset, column: str, convert: bool = False) -> pa.ChunkedArray:
    """Return a column of text, null where a cell is blank. Other values are converted, or are an error."""
    cells = _arrow(data, column)
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        row = pc.index(cells.is_valid(), True).as_py()
        if row >= 0 and not convert:
            raise ValueError(f"{data['where'][row]}: column {column!r} is {data[column][row]!r}; expected text")
        values = [None if value is None else str(value) for value in data[column][:]]
        cells = pa.chunked_array([values], pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)


def presence(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each row has an image and whether it has a text: two bool arrays of shape `(rows,)`."""
    has_image = np.array([path is not None for path in image_paths(data)], dtype=bool)
    return has_image, _arrow(data, "text").is_valid().to_numpy()


def references_of(rows: Dataset) -> np.ndarray:
    """Return the multi-hot labels of rows, `(rows, labels)`. Raises `ValueError` if the rows have none."""
    if "labels" not in rows.column_names:
        raise ValueError("these rows have no labels; name their column by --label_column or --label_columns")
    return rows.with_format("numpy")["labels"][:]


def _check_modalities(data: Dataset, uses_image: bool, uses_text: bool) -> None:
    needed = " or ".join(["image"] * uses_image + ["text"] * uses_text)
    has_image, has_text = presence(data)
    empty = np.flatnonzero(~(has_image & uses_image | has_text & uses_text))
    if len(empty):
        shown = ", ".join(data[empty[:5]]["where"])
        raise ValueError(f"{len(empty):,} of {len(data):,} rows have no {needed}, which this model needs: {shown}")
