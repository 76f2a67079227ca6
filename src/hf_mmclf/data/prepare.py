"""From sources to rows in one form: columns found, labels encoded, pictures checked, splits made."""

import dataclasses
import difflib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Image, concatenate_datasets
from tqdm.auto import tqdm

from .collator import is_absent, open_image
from .demo import DEMO_LABELS, demo_dataset
from .labels import LabelSet, find_delimiter, find_unknown, parse_labels
from .splits import stratified_split
from .tables import from_arrow, read_source, with_columns, with_strings

IMAGE_COLUMNS = ("image", "ImageID", "file_name", "image_path", "path", "filename")
TEXT_COLUMNS = ("text", "Caption", "caption", "sentence")
LABEL_COLUMNS = ("labels", "Labels", "label")


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class DataArguments:
    """Where the rows come from. See [`read_source`] for what `data` may be."""

    _argument_group_name = "data"

    data: str | None = _field(
        None, "Table (.csv, .tsv, .jsonl, .parquet), folder, or data set on the Hub. Default: the embedded data set."
    )
    demo_rows: int = _field(3000, "Rows of the embedded data set.")
    validation_data: str | None = _field(None, "Validation rows, if they are in a place of their own.")
    test_data: str | None = _field(None, "Test rows, if they are in a place of their own.")
    image_dir: str | None = _field(None, "Folder that picture names are relative to. Default: the table's.")
    image_column: str | None = _field(None, f"Default: the first there is of {', '.join(IMAGE_COLUMNS)}.")
    text_column: str | None = _field(None, f"Default: the first there is of {', '.join(TEXT_COLUMNS)}.")
    label_column: str | None = _field(None, f"Default: the first there is of {', '.join(LABEL_COLUMNS)}.")
    label_columns: list[str] | None = _field(None, "Columns of 0 and 1, one for each label, instead of label_column.")
    label_delimiter: str | None = _field(None, "Between labels. Default: the first seen of | ; , else white space.")
    empty_is_unknown: bool = _field(False, "An empty label cell means that nobody knows, not that there is no label.")
    label_names_file: str | None = _field(
        None, 'JSON file from label to name: {"1": "person"}. It fixes the set of labels.'
    )
    validation_fraction: float = _field(0.1, "Share of the training rows to validate on when no split is given.")
    test_fraction: float = _field(0.1, "Share of the rows to test on when no split is given.")
    split_seed: int = _field(0, "Seed of the stratified split.")
    streaming: bool = _field(False, "Read training rows as they come, never all of them; needs --max_steps.")
    shuffle_buffer: int = _field(1000, "Rows that a stream is shuffled among.")
    validation_rows: int = _field(0, "Rows at the beginning of a stream to validate on.")
    bad_images: Literal["error", "skip", "missing"] = _field(
        "error", "A picture that cannot be read: stop, leave the row out, or treat the picture as absent."
    )


@dataclasses.dataclass
class PreparedData:
    """
    Rows in one form, ready for transforms.

    Args:
        splits (`DatasetDict`): Columns `image` (name, or bytes), `text`, `labels` (multi-hot, -1: unknown), `where`.
        labels ([`LabelSet`], *optional*): The labels, in the order of the multi-hot columns; `None` without any.
        folder (`Path`): What picture names are relative to.
        split_source (`str`): How the splits came about.
        bad_images (`list[tuple[str, str]]`): Row and reason of each picture that was skipped or taken as absent.
    """

    splits: DatasetDict
    labels: LabelSet | None
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
    Reads, checks and splits the rows.

    Args:
        args ([`DataArguments`]): Where the rows come from.
        uses_image, uses_text (`bool`, *optional*, defaults to `True`): What the model looks at; only that is checked.
        labels ([`LabelSet`], *optional*): Labels of a trained model: nothing is split, and rows may be unlabelled.
        with_labels (`bool`, *optional*, defaults to `True`): Whether to read labels; not for prediction.
        sources (`dict[str, Dataset]`, *optional*): Tables by split, instead of those that `args` name.

    Raises:
        `ValueError`, `FileNotFoundError`: naming file, row and column.
    """
    folder = Path(args.image_dir or ".")
    if args.data and not args.image_dir:
        folder = _folder_of(args.data)
    drawn = sources is None and args.data is None
    sources = sources or _read_sources(args, folder)
    if labels is None and "train" not in sources:
        raise ValueError(f"no training rows; the source has only {', '.join(sources)}")
    trained = labels
    columns = _label_columns(sources, args) if with_labels else {}
    delimiter = args.label_delimiter or find_delimiter(  # of all splits: one that happens to lack it is cut alike
        value for name, found in columns.items() if len(found) == 1 for value in sources[name][found[0]][:]
    )
    parsed, unknown = {}, {}
    for name, found in columns.items():
        multiple = {"columns": found} if args.label_columns else {"column": found[0]}
        multiple["empty_is_unknown"] = args.empty_is_unknown
        parsed[name] = parse_labels(sources[name], **multiple, delimiter=delimiter)
        unknown[name] = find_unknown(sources[name], **multiple)
    if labels is None:
        for name in ("train", "validation"):
            if name in sources and name not in parsed:
                raise ValueError(
                    f"no label column in the {name} rows among {', '.join(sources[name].column_names)}; expected "
                    f"{' or '.join(LABEL_COLUMNS)}, or name it by --label_column or --label_columns"
                )
        # a column of zeros only is a label too, and so is one that few drawn rows happen not to have
        named = args.label_columns or (DEMO_LABELS if drawn else ())
        labels = LabelSet.from_rows([*parsed["train"], named], args.label_names_file)

    splits, bad_images = {}, []
    for name, source in sources.items():
        split = _standardize(source, args, name)
        if name in parsed:
            encoded = labels.encode(parsed[name], split["where"], unknown[name])
            ends = np.arange(0, encoded.size + 1, encoded.shape[1], dtype=np.int32)
            split = with_columns(split, {"labels": pa.ListArray.from_arrays(ends, encoded.ravel())})
        if uses_image:
            _check_paths(split, folder)
            if args.bad_images != "error":
                split, bad = _without_bad_images(split, folder, args.bad_images)
                bad_images += bad
        _check_modalities(split, uses_image, uses_text)
        splits[name] = split
    how = "given"
    if trained is None:
        splits, how = _split(splits, args)
    return PreparedData(DatasetDict(splits), labels, folder, how, bad_images)


def _folder_of(source: str) -> Path:
    return Path(source) if Path(source).is_dir() else Path(source).parent


def _read_sources(args: DataArguments, folder: Path) -> dict[str, Dataset]:
    given = {"validation": args.validation_data, "test": args.test_data}
    if args.data is None:
        for name in ("validation", "test"):
            if given[name] is not None:
                raise ValueError(f"--{name}_data needs --data; the embedded data set has its own {name} rows")
        sources = {
            name: split.cast_column("image", Image(decode=False))
            for name, split in demo_dataset(args.demo_rows).items()
        }
        return {
            name: with_columns(split, {"where": [f"demo/{name}:{row}" for row in range(1, len(split) + 1)]})
            for name, split in sources.items()
        }
    sources = dict(read_source(args.data))
    for name, place in given.items():
        if place is None:
            continue
        if name in sources:
            raise ValueError(f"--{name}_data is given, but {args.data!r} has a split {name!r} already; leave one out")
        found = read_source(place)
        if name not in found and len(found) > 1:
            raise ValueError(f"--{name}_data: {place!r} has the splits {', '.join(found)}; give one of them")
        sources[name] = found[name] if name in found else next(iter(found.values()))
        column = _find_column(sources[name], args.image_column, IMAGE_COLUMNS, "image_column")
        if args.image_dir is None and _folder_of(place) != folder and column:
            sources[name] = _relative_to(sources[name], column, _folder_of(place), folder)
    return sources


def _relative_to(data: Dataset, column: str, own: Path, folder: Path) -> Dataset:
    """Picture names relative to `folder` instead of to the table's `own`."""
    if isinstance(data.features[column], Image):
        return data
    names = [value and os.path.relpath(own / str(value), folder) for value in data[column][:]]
    return with_strings(data, {column: names})


def _label_columns(sources: dict[str, Dataset], args: DataArguments) -> dict[str, list[str]]:
    """The label columns of each split that has any; those given by a flag must be in at least one of the splits."""
    columns = {}
    given, flag = args.label_columns, "label_columns"
    if not given and args.label_column is not None:
        given, flag = [args.label_column], "label_column"
    everywhere = {name for source in sources.values() for name in source.column_names}
    for name, source in sources.items():
        if not given:
            found = [_find_column(source, None, LABEL_COLUMNS, flag)]
        elif everywhere.intersection(given) and not set(given) & set(source.column_names):
            found = [None]  # unlabelled, next to a split that has them
        else:
            found = [_find_column(source, column, (), flag) for column in given]
        if found[0] is not None:
            columns[name] = found
    return columns


def _find_column(data: Dataset, given: str | None, defaults: Sequence[str], flag: str) -> str | None:
    if given is None:
        return next((name for name in defaults if name in data.column_names), None)
    if given not in data.column_names:
        near = difflib.get_close_matches(given, data.column_names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(data.column_names)}"
        raise ValueError(f"--{flag}: no column {given!r}; {hint}")
    return given


def _standardize(data: Dataset, args: DataArguments, split: str) -> Dataset:
    """The columns `image`, `text` and `where`."""
    image = _find_column(data, args.image_column, IMAGE_COLUMNS, "image_column")
    text = _find_column(data, args.text_column, TEXT_COLUMNS, "text_column")
    if image is None and text is None:
        raise ValueError(
            f"{split}: neither a picture nor a caption column among {data.column_names}; name them by "
            "--image_column and --text_column"
        )
    texts = _captions(data, text) if text else pa.nulls(len(data), pa.string())
    if image is not None and isinstance(data.features[image], Image):  # the bytes stay where they are
        table = data.select_columns([image, "where"]).cast_column(image, Image(decode=False))
        return with_columns(table.rename_column(image, "image") if image != "image" else table, {"text": texts})
    names = _picture_names(data, image) if image else pa.nulls(len(data), pa.string())
    return from_arrow(pa.table({"image": names, "text": texts, "where": _arrow(data, "where")}))


def _arrow(data: Dataset, column: str) -> pa.ChunkedArray:
    """A column without an object of Python for each row."""
    return data.with_format("arrow")[column][:]


def _is_text(cells: pa.ChunkedArray) -> bool:
    return pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)


def _captions(data: Dataset, column: str) -> pa.ChunkedArray:
    """Null where there is none, or nothing but white space."""
    cells = _arrow(data, column)
    if not _is_text(cells):
        row = pc.index(cells.is_valid(), True).as_py()
        if row >= 0:
            raise ValueError(f"{data['where'][row]}: the caption is {data[column][row]!r}; expected text")
        cells = cells.cast(pa.string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)


def _picture_names(data: Dataset, column: str) -> pa.ChunkedArray:
    cells = _arrow(data, column)
    if not _is_text(cells):
        cells = pa.chunked_array([[None if name is None else str(name) for name in data[column][:]]], pa.string())
    return pc.if_else(pc.equal(cells, ""), None, cells)


def picture_paths(data: Dataset) -> list[str | bool | None]:
    """Of each row the picture's path, `True` where its bytes are in the table, `None` where there is no picture.

    Looks at no bytes: they may be more than the memory holds.
    """
    paths = []
    for batch in data.select_columns(["image"]).with_format("arrow").iter(1000):
        cells = batch["image"]
        if pa.types.is_struct(cells.type):
            inside = pc.is_valid(pc.struct_field(cells, "bytes")).to_pylist()
            named = pc.struct_field(cells, "path").to_pylist()
            paths += [here or path or None for here, path in zip(inside, named, strict=True)]
        else:
            paths += cells.to_pylist()
    return paths


def presence(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return whether each row has an image and whether it has a text: two bool arrays of shape `(rows,)`."""
    has_image = np.array([path is not None for path in picture_paths(data)], dtype=bool)
    return has_image, _arrow(data, "text").is_valid().to_numpy()


def references_of(rows: Dataset) -> np.ndarray:
    """Return the multi-hot labels of rows, `(rows, labels)`; raises `ValueError` where the rows have none."""
    if "labels" not in rows.column_names:
        raise ValueError("these rows have no labels; name their column by --label_column or --label_columns")
    return rows.with_format("numpy")["labels"][:]


def _check_paths(data: Dataset, folder: Path) -> None:
    """All missing files at once, before anything else is done."""
    start = str(folder)
    missing = [
        (row, path)
        for row, path in enumerate(picture_paths(data))
        if isinstance(path, str) and not os.path.isfile(os.path.join(start, path))  # pathlib takes twice the time
    ]
    if missing:
        shown = "; ".join(f"{data['where'][row]}: {path}" for row, path in missing[:5])
        shown += "; ..." if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{len(missing):,} of {len(data):,} pictures are not in {str(folder)!r} ({shown}). Give the folder by "
            "--image_dir; leave the cell empty where a row has no picture"
        )


def _check_modalities(data: Dataset, uses_image: bool, uses_text: bool) -> None:
    needed = " or ".join(["picture"] * uses_image + ["caption"] * uses_text)
    has_image, has_text = presence(data)
    absent = np.flatnonzero(~(has_image & uses_image | has_text & uses_text))
    if len(absent):
        shown = ", ".join(data[absent[:5]]["where"])
        raise ValueError(f"{len(absent):,} of {len(data):,} rows have no {needed}, which this model needs: {shown}")


def _without_bad_images(data: Dataset, folder: Path, policy: str) -> tuple[Dataset, list[tuple[str, str]]]:
    """Opens every picture once. Known before training, bad ones can be listed, and no worker needs to count."""

    def problem(row: int) -> str | None:
        image, where = data[row]["image"], data[row]["where"]
        try:
            if not is_absent(image):
                open_image(image, folder, where)
        except ValueError as error:
            return str(error.__cause__)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(tqdm(pool.map(problem, range(len(data))), total=len(data), desc="Checking pictures", delay=1))
    bad = {row: reason for row, reason in enumerate(problems) if reason is not None}
    listed = [(data[row]["where"], reason) for row, reason in bad.items()]
    if not bad:
        return data, listed
    good = [row for row in range(len(data)) if row not in bad]
    if policy == "skip":
        if not good:
            raise ValueError(
                f"no row is left: none of {len(data):,} pictures can be read ({': '.join(listed[0])}; ...)"
            )
        return data.select(good), listed
    absent = {**data.select(list(bad)).to_dict(), "image": [None] * len(bad)}  # no other picture is moved or copied
    both = concatenate_datasets([data.select(good), Dataset.from_dict(absent, features=data.features)])
    return both.select(np.argsort([*good, *bad])), listed


def _split(splits: dict[str, Dataset], args: DataArguments) -> tuple[dict[str, Dataset], str]:
    """Given splits stay; validation rows, and test rows when nothing was given, come out of the training rows."""
    fractions = {}
    if "validation" not in splits:
        fractions["validation"] = args.validation_fraction
        if "test" not in splits:
            fractions["test"] = args.test_fraction
    if not fractions:
        return splits, "given"
    if args.validation_fraction <= 0:
        raise ValueError(f"--validation_fraction is {args.validation_fraction}; validation rows choose the threshold")
    train = splits["train"]
    groups = _picture_groups(train)
    parts = stratified_split(
        pc.list_flatten(_arrow(train, "labels")).to_numpy().reshape(len(train), -1) > 0,
        [1 - sum(fractions.values()), *fractions.values()],
        args.split_seed,
        groups=groups,
    )
    for name, rows in zip(["train", *fractions], parts, strict=True):
        if fractions.get(name, 1) > 0:
            if len(rows) == 0:
                rows = f"{len(train)} rows, {len(set(groups))} without those of one picture,"
                raise ValueError(f"the {name} split is empty: {rows} are too few for {fractions}")
            splits[name] = train.select(rows)
    return splits, f"{', '.join(fractions)} by iterative stratification of the training rows, seed {args.split_seed}"


def _picture_groups(data: Dataset) -> list[Any]:
    """Of each row what names its picture: its path, a digest of its bytes, or the row where there is none."""

    def digest(row: int) -> bytes:
        return hashlib.blake2b(data[row]["image"]["bytes"], digest_size=16).digest()

    paths = enumerate(picture_paths(data))
    return [digest(row) if path is True else row if path is None else path for row, path in paths]
