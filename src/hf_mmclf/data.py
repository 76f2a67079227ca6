"""From sources to rows in one form: columns found, labels encoded, pictures checked, splits made."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, Image
from iterstrat.ml_stratifiers import IterativeStratification
from tqdm.auto import tqdm

from .batches import is_absent, open_image
from .demo import demo_dataset
from .labels import LabelSet, parse_labels
from .sources import read_source

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
    validation_data: str | None = _field(None, "Validation rows, if they are in a place of their own.")
    test_data: str | None = _field(None, "Test rows, if they are in a place of their own.")
    image_dir: str | None = _field(None, "Folder that picture names are relative to. Default: the table's.")
    image_column: str | None = _field(None, f"Default: the first there is of {', '.join(IMAGE_COLUMNS)}.")
    text_column: str | None = _field(None, f"Default: the first there is of {', '.join(TEXT_COLUMNS)}.")
    label_column: str | None = _field(None, f"Default: the first there is of {', '.join(LABEL_COLUMNS)}.")
    label_columns: list[str] | None = _field(None, "Columns of 0 and 1, one for each label, instead of label_column.")
    label_delimiter: str | None = _field(None, "Between labels. Default: the first seen of | ; , else white space.")
    label_names_file: str | None = _field(
        None, 'JSON file from label to name: {"1": "person"}. It fixes the set of labels.'
    )
    validation_fraction: float = _field(0.1, "Share of the training rows to validate on when no split is given.")
    test_fraction: float = _field(0.1, "Share of the rows to test on when no split is given.")
    split_seed: int = _field(0, "Seed of the stratified split.")
    bad_images: Literal["error", "skip", "missing"] = _field(
        "error", "A picture that cannot be read: stop, leave the row out, or treat the picture as absent."
    )


@dataclasses.dataclass
class PreparedData:
    """
    Rows in one form, ready for transforms.

    Args:
        splits (`DatasetDict`): Columns `image` (name, or bytes), `text`, `labels` (multi-hot, where known), `where`.
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
    sources = sources or _read_sources(args)
    folder = Path(args.image_dir or ".")
    if args.data and not args.image_dir:
        folder = Path(args.data) if Path(args.data).is_dir() else Path(args.data).parent
    trained = labels
    splits, parsed = {}, {}
    for name, source in sources.items():
        splits[name], parsed[name] = _standardize(source, args, name, with_labels)
        if parsed[name] is not None and labels is None and name == "train":
            labels = LabelSet.from_rows(parsed[name], args.label_names_file)
    if labels is None:
        raise ValueError(f"no label column in the training rows; expected {' or '.join(LABEL_COLUMNS)}, or a flag")

    bad_images = []
    for name, split in splits.items():
        if parsed[name] is not None:
            encoded = labels.encode(parsed[name], split["where"])
            split = split.add_column("labels", list(encoded))
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


def _read_sources(args: DataArguments) -> dict[str, Dataset]:
    if args.data is None:
        return {
            name: split.cast_column("image", Image(decode=False)).add_column(
                "where", [f"demo/{name}:{row}" for row in range(1, len(split) + 1)]
            )
            for name, split in demo_dataset().items()
        }
    sources = dict(read_source(args.data))
    for name, place in (("validation", args.validation_data), ("test", args.test_data)):
        if place is None:
            continue
        if name in sources:
            raise ValueError(f"--{name}_data is given, but {args.data!r} has a split {name!r} already; leave one out")
        (sources[name],) = dict(read_source(place)).values()
    return sources


def _find_column(data: Dataset, given: str | None, defaults: Sequence[str], flag: str) -> str | None:
    if given is None:
        return next((name for name in defaults if name in data.column_names), None)
    if given not in data.column_names:
        near = difflib.get_close_matches(given, data.column_names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(data.column_names)}"
        raise ValueError(f"--{flag}: no column {given!r}; {hint}")
    return given


def _standardize(
    data: Dataset, args: DataArguments, split: str, with_labels: bool
) -> tuple[Dataset, list[list[str]] | None]:
    """The columns `image`, `text`, `where`, and the labels of each row (`None` for an unlabelled table)."""
    image = _find_column(data, args.image_column, IMAGE_COLUMNS, "image_column")
    text = _find_column(data, args.text_column, TEXT_COLUMNS, "text_column")
    if image is None and text is None:
        raise ValueError(
            f"{split}: neither a picture nor a caption column among {data.column_names}; name them by "
            "--image_column and --text_column"
        )
    labels = None
    if not with_labels:
        pass
    elif args.label_columns:
        for column in args.label_columns:
            _find_column(data, column, (), "label_columns")
        labels = parse_labels(data, columns=args.label_columns)
    elif column := _find_column(data, args.label_column, LABEL_COLUMNS, "label_column"):
        labels = parse_labels(data, column, delimiter=args.label_delimiter)

    texts = data[text][:] if text else [None] * len(data)
    where = data["where"][:]
    for row, value in enumerate(texts):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where[row]}: the caption is {value!r}; expected text")
    columns = {"text": [value if value and value.strip() else None for value in texts], "where": where}
    if image is None:
        return Dataset.from_dict({"image": [None] * len(data), **columns}), labels
    if isinstance(data.features[image], Image):  # keeps the bytes where they are; decoding is ours
        table = data.cast_column(image, Image(decode=False)).select_columns([image])
        table = table.rename_column(image, "image") if image != "image" else table
        for name, values in columns.items():
            table = table.add_column(name, values)
        return table, labels
    names = [None if value in (None, "") else str(value) for value in data[image][:]]
    return Dataset.from_dict({"image": names, **columns}), labels


def _check_paths(data: Dataset, folder: Path) -> None:
    """All missing files at once, before anything else is done."""
    missing = []
    for where, image in zip(data["where"], data["image"], strict=True):
        path = image if isinstance(image, str) else None
        if isinstance(image, Mapping) and image.get("bytes") is None:
            path = image.get("path")
        if path and not (folder / path).is_file():
            missing.append(f"{where}: {path}")
    if missing:
        shown = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing):,} of {len(data):,} pictures are not in {str(folder)!r} ({shown}). Give the folder by "
            "--image_dir; leave the cell empty where a row has no picture"
        )


def _check_modalities(data: Dataset, uses_image: bool, uses_text: bool) -> None:
    needed = " or ".join(["picture"] * uses_image + ["caption"] * uses_text)
    absent = [
        where
        for where, image, text in zip(data["where"], data["image"], data["text"], strict=True)
        if not (uses_image and not is_absent(image)) and not (uses_text and text is not None)
    ]
    if absent:
        raise ValueError(
            f"{len(absent):,} of {len(data):,} rows have no {needed}, which this model needs: {', '.join(absent[:5])}"
        )


def _without_bad_images(data: Dataset, folder: Path, policy: str) -> tuple[Dataset, list[tuple[str, str]]]:
    """Opens every picture once. Known before training, bad ones can be listed, and no worker needs to count."""

    def problem(row: int) -> str | None:
        image = data[row]["image"]
        try:
            if not is_absent(image):
                open_image(image, folder, data[row]["where"])
        except ValueError as error:
            return str(error.__cause__)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(tqdm(pool.map(problem, range(len(data))), total=len(data), desc="Checking pictures"))
    bad = {row: reason for row, reason in enumerate(problems) if reason is not None}
    listed = [(data[row]["where"], reason) for row, reason in bad.items()]
    if not bad:
        return data, listed
    if policy == "skip":
        return data.select([row for row in range(len(data)) if row not in bad]), listed
    feature = data.features["image"]
    images = [None if row in bad else image for row, image in enumerate(data["image"])]
    return data.remove_columns("image").add_column("image", images, feature=feature), listed


def _split(splits: dict[str, Dataset], args: DataArguments) -> tuple[dict[str, Dataset], str]:
    """Given splits stay; validation rows, and test rows when nothing was given, come out of the training rows."""
    if "train" not in splits:
        raise ValueError(f"no training rows; the source has only {', '.join(splits)}")
    fractions = {}
    if "validation" not in splits:
        fractions["validation"] = args.validation_fraction
        if "test" not in splits:
            fractions["test"] = args.test_fraction
    if not fractions:
        return splits, "given"
    train = splits["train"]
    parts = stratified_split(
        np.asarray(train["labels"], dtype=bool),
        [1 - sum(fractions.values()), *fractions.values()],
        args.split_seed,
        groups=[image if isinstance(image, str) else row for row, image in enumerate(train["image"])],
    )
    for name, rows in zip(["train", *fractions], parts, strict=True):
        if fractions.get(name, 1) > 0:
            if len(rows) == 0:
                raise ValueError(f"the {name} split is empty: {len(train)} rows are too few for {fractions}")
            splits[name] = train.select(rows)
    return splits, f"{', '.join(fractions)} by iterative stratification of the training rows, seed {args.split_seed}"


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], seed: int, groups: Sequence[Any] | None = None
) -> list[np.ndarray]:
    """
    Splits rows so that each label has its share in each part (Sechidis, Tsoumakas and Vlahavas, 2011).

    Args:
        labels (`np.ndarray` of shape `(rows, labels)`): Multi-hot.
        fractions (`Sequence[float]`): Share of each part; they add up to 1.
        seed (`int`): Of the draws among equals.
        groups (`Sequence`, *optional*): Rows of one group (captions of one picture) stay together.

    Returns:
        `list[np.ndarray]`: Row numbers of each part, ascending.
    """
    if any(share < 0 for share in fractions) or not np.isclose(sum(fractions), 1) or fractions[0] <= 0:
        raise ValueError(f"fractions are {[round(share, 3) for share in fractions]}; expected shares that add up to 1")
    index = {group: i for i, group in enumerate(dict.fromkeys(groups))} if groups is not None else range(len(labels))
    member = np.array([index[group] for group in groups]) if groups is not None else np.arange(len(labels))
    merged = np.zeros((len(index), labels.shape[1]), dtype=bool)
    np.logical_or.at(merged, member, labels)
    part = IterativeStratification(merged, np.array(fractions, dtype=float), np.random.RandomState(seed))
    return [np.flatnonzero(part[member] == i) for i in range(len(fractions))]
