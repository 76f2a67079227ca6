"""Rows in one form: columns found, labels encoded, images checked, splits made."""

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image
from transformers.utils import logging

from .arguments import DataArguments, check_effects, check_splits, refuse_idle
from .demo import DEMO_LABELS, demo_dataset
from .images import check_images, image_groups, image_paths
from .labels import (
    LabelSet,
    ParsedLabels,
    find_delimiter,
    has_text,
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
    is_batch: bool = False,
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
        is_batch (`bool`, *optional*, defaults to `False`): Whether the rows are a batch of a stream, for which no
            notices are logged.

    Returns:
        [`PreparedData`]: The rows of all splits in one form.

    Raises:
        `ValueError`: If a column, a label or a split is missing or wrong. The message names the row and the flag.
        `FileNotFoundError`: If image files do not exist.
    """
    folder = image_folder(args)
    is_new, is_streamed = labels is None, args.streaming and sources is not None
    known = DEMO_LABELS if sources is None and args.data is None else ()
    check_effects(args, sources is not None and not is_streamed, is_streamed, uses_image, with_labels)
    sources = sources or _read_sources(args)
    check_splits(args, sources, is_new)
    args = _same_columns(sources, args)
    parsed = _parse_labels(sources, args, labels.ids if labels else ()) if with_labels else {}
    label_set = labels or _collect_labels(sources, parsed, args, known)
    label_set.check_names(args.label_names_file)
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
    if is_new:
        fractions = args.validation_fraction, args.test_fraction
        splits, how = split_rows(splits, references_of(splits["train"]), *fractions, args.split_seed, folder)
    if args.data is not None and not is_batch:
        _say_what_was_found(sources, parsed, args, ["image"] * uses_image + ["text"] * uses_text)
        _warn_of_labels(sources, rows, parsed, folder)
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
    if own == folder or column is None or _is_encoded(data, column):
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
    columns = _label_columns(sources, args)
    if args.label_columns:
        return {
            name: parse_indicator_columns(sources[name], found, args.empty_is_unknown)
            for name, found in columns.items()
        }
    # All splits have one delimiter, also those in which it does not occur.
    cells = [value for name, [column] in columns.items() for value in sources[name][column][:]]
    if args.label_delimiter and not args.streaming:  # a batch of a stream may have no text
        is_text = has_text(cells) or not any(cells)
        refuse_idle(["label_delimiter"], [(is_text, ["label_delimiter"], "the labels are not delimited text")])
    delimiter = args.label_delimiter or find_delimiter(cells)
    positions = list(read_names(args.label_names_file)) if args.label_names_file else None
    return {
        name: parse_label_column(sources[name], column, delimiter, args.empty_is_unknown, positions, known)
        for name, [column] in columns.items()
    }


def _say_what_was_found(
    sources: dict[str, Dataset],
    parsed: dict[str, ParsedLabels],
    args: DataArguments,
    parts: Sequence[str],
) -> None:
    """Log the columns that were chosen."""
    first = next(iter(sources.values()))
    chosen = [f"{part} {_column(first, args, part)!r}" for part in parts if _column(first, args, part)]
    for name, labels in list(parsed.items())[:1]:
        columns = _label_columns({name: sources[name]}, args)[name]
        chosen.append(f"labels {', '.join(map(repr, columns[:5]))}{', ...' if columns[5:] else ''} ({labels.form})")
    logger.info(f"Columns: {', '.join(chosen)}")


def _warn_of_labels(
    sources: dict[str, Dataset], splits: dict[str, Dataset], parsed: dict[str, ParsedLabels], folder: Path
) -> None:
    """Warn of labels that look wrong, and of images and texts that occur with different labels."""
    for name, labels in parsed.items():
        rows = splits[name]
        texts, paths = rows["text"][:], image_paths(rows)
        groups = [
            text if path is None else group
            for group, path, text in zip(image_groups(rows, folder), paths, texts, strict=True)
        ]
        shown = [path if isinstance(path, str) else text for path, text in zip(paths, texts, strict=True)]
        warnings = label_warnings(labels.rows, sources[name]["where"][:])
        for warning in [*warnings, *contradictions(groups, shown, references_of(rows), rows["where"][:])]:
            logger.warning(f"  {name} rows: {warning}" if len(parsed) > 1 else f"  {warning}")


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
    if image is not None and _is_encoded(data, image):  # the bytes stay where they are
        table = data.select_columns([image, "where"]).cast_column(image, Image(decode=False))
        return with_columns(table.rename_column(image, "image") if image != "image" else table, {"text": texts})
    names = _strings(data, image, convert=True) if image else pa.nulls(len(data), pa.string())
    return from_arrow(pa.table({"image": names, "text": texts, "where": _arrow(data, "where")}))


def _is_encoded(data: Dataset, column: str) -> bool:
    """Return whether the cells of a column are images or their bytes, and not names."""
    kind = data.features.arrow_schema.field(column).type
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    return fields == {"bytes", "path"} or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


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
