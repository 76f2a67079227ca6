"""Training rows that are never all on this machine: read as they come, shuffled in a buffer, without an end.

The stream repeats itself, so that all processes have the same number of batches, and so that the place where a run was
interrupted is a number of batches. Reading, sharding and going on are those of `datasets`, accelerate and `Trainer`;
rows become batches by the same steps as those of a table, a batch at a time.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, load_dataset

from .collator import Collator, RowTransform
from .labels import LabelSet, find_delimiter
from .prepare import IMAGE_COLUMNS, LABEL_COLUMNS, DataArguments, PreparedData, prepare_data
from .tables import SPLIT_NAMES, TABLE_SUFFIXES, read_source, with_columns

STREAMED = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclasses.dataclass
class Stream:
    """
    Training rows as they come.

    Args:
        rows (`IterableDataset`): Columns of the source, pictures not decoded; without an end.
        head (`Dataset`): The first of them, in the form of [`PreparedData`].
        features (`Features`): Of `rows`.
        args ([`DataArguments`]): How to read a row.
        labels ([`LabelSet`]): The labels.
        folder (`Path`): What picture names are relative to.
    """

    rows: IterableDataset
    head: Dataset
    features: Features
    args: DataArguments
    labels: LabelSet
    folder: Path


def open_stream(args: DataArguments, uses_image: bool, uses_text: bool, seed: int) -> tuple[Stream, PreparedData]:
    """
    The training rows as a stream, and the other splits, which are read whole.

    Args:
        args ([`DataArguments`]): With `data` on the Hub, or a file or folder of Parquet or JSON lines.
        uses_image, uses_text (`bool`): What the model looks at.
        seed (`int`): Of the shuffling.

    Raises:
        `ValueError`: a source that cannot be streamed; labels that no feature and no file names; no validation rows.
    """
    streams = _open(args.data)
    if "train" not in streams:
        raise ValueError(f"no training rows; the source has only {', '.join(streams)}")
    first = list(itertools.islice(streams["train"], args.shuffle_buffer))
    if not first:
        raise ValueError(f"{args.data}: no training rows")
    features = streams["train"].features or Dataset.from_list(first).features
    folder = Path(args.image_dir or (args.data if Path(args.data).is_dir() else Path(args.data).parent))
    column = args.label_column or next((name for name in LABEL_COLUMNS if name in features), None)
    # one for all batches: a batch that happens to lack it is cut alike
    delimiter = args.label_delimiter or find_delimiter(row.get(column) for row in first)
    args = dataclasses.replace(args, image_dir=str(folder), label_delimiter=delimiter)
    labels = _labels(args, features, column)

    sources = {name: _whole(stream, f"{args.data}/{name}") for name, stream in streams.items() if name != "train"}
    for name, place in (("validation", args.validation_data), ("test", args.test_data)):
        if place is not None and name in sources:
            raise ValueError(f"--{name}_data is given, but {args.data!r} has a split {name!r} already; leave one out")
        if place is not None:
            found = read_source(place)
            sources[name] = found[name] if name in found else next(iter(found.values()))
    rows, how = streams["train"], "given"
    if args.validation_rows:
        if "validation" in sources:
            raise ValueError("--validation_rows is given, but there are validation rows already; leave one out")
        held = list(itertools.islice(rows, args.validation_rows))
        sources["validation"] = _table(held, features, f"{args.data}/train")
        # by picture, not by number: workers and processes read parts of the stream, and captions share pictures
        rows = rows.filter(_NotHeld(held, args.image_column))
        how = f"the first {len(held):,} rows of the stream, and all of their pictures, are for validation"
        first = list(itertools.islice(rows, args.shuffle_buffer))
        if not first:
            raise ValueError(f"--validation_rows {args.validation_rows} leaves no training rows")
    if "validation" not in sources:
        raise ValueError(
            f"{args.data!r} has no validation rows, which choose the threshold; give --validation_data, or "
            "--validation_rows to take so many off the stream"
        )
    prepared = prepare_data(args, uses_image, uses_text, labels, sources=sources)
    head = prepare_data(args, uses_image, uses_text, labels, sources={"train": _table(first, features, args.data)})
    endless = rows.repeat(None).shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    stream = Stream(endless, head.splits["train"], features, args, labels, folder)
    return stream, dataclasses.replace(prepared, split_source=f"{how}; training rows are streamed")


def _open(source: str | None) -> dict[str, IterableDataset]:
    path = Path(source or "")
    if source is None:
        raise ValueError("--streaming needs --data; the embedded data set is drawn here")
    if path.suffix in TABLE_SUFFIXES and path.suffix not in STREAMED:
        raise ValueError(
            f"{source}: {path.suffix} tables are read whole; make it .parquet or .jsonl, or leave --streaming out"
        )
    if path.suffix in STREAMED and not path.is_file():
        raise FileNotFoundError(f"{source!r}: no such file")
    given = (STREAMED[path.suffix], None, None, source) if path.is_file() else (source,)
    found = load_dataset(*given, streaming=True)
    splits = {SPLIT_NAMES[name]: stream for name, stream in found.items() if name in SPLIT_NAMES}
    for name, stream in splits.items():
        for column, feature in (stream.features or {}).items():
            if isinstance(feature, Image):  # decoded where batches are made
                splits[name] = splits[name].cast_column(column, Image(decode=False))
    return splits


def _labels(args: DataArguments, features: Features, column: str | None) -> LabelSet:
    if column is None and not args.label_columns:
        raise ValueError(
            f"no label column among {', '.join(features)}; expected {' or '.join(LABEL_COLUMNS)}, or name it by "
            "--label_column or --label_columns"
        )
    if args.label_names_file is not None:
        return LabelSet.from_rows([], args.label_names_file)
    if args.label_columns:
        return LabelSet.from_rows([args.label_columns])
    feature = features.get(column)
    inner = feature.feature if isinstance(feature, List) else feature
    if isinstance(inner, ClassLabel):
        return LabelSet.from_rows([inner.names])
    raise ValueError(
        f"{args.data!r}: a stream has no last row after which all labels are known; give --label_names_file with "
        'them, such as {"1": "person"}, or a column of ClassLabel features, or --label_columns'
    )


def _table(rows: Sequence[Mapping[str, Any]], features: Features, source: str) -> Dataset:
    """Rows of a stream as a table, with a column `where` that names them by their content: they have no number."""
    names = [name for name in features if name != "where"]
    where = []
    for row in rows:
        shown = {name: cell.get("path") if isinstance(cell, Mapping) else cell for name, cell in row.items()}
        shown = {name: cell for name, cell in shown.items() if isinstance(cell, str | int)}
        where.append(f"{source}: row {str(shown)[:200]}")
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = Dataset.from_dict(columns, features=Features({name: features[name] for name in names}))
    return with_columns(table, {"where": where})


def _whole(stream: IterableDataset, source: str) -> Dataset:
    rows = list(stream)
    return _table(rows, stream.features or Dataset.from_list(rows).features, source)


class _NotHeld:
    """Whether a row has none of the pictures of the rows held out; without a picture, none of their captions."""

    def __init__(self, held: Sequence[Mapping[str, Any]], column: str | None):
        self.columns = (column,) if column else IMAGE_COLUMNS
        self.keys = {self._key(row) for row in held}

    def _key(self, row: Mapping[str, Any]) -> Any:
        picture = next((row[column] for column in self.columns if row.get(column)), None)
        if isinstance(picture, Mapping):
            picture = picture.get("bytes") or picture.get("path")
        return picture or tuple(value for value in row.values() if isinstance(value, str))

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return self._key(row) not in self.keys


class StreamCollator:
    """
    Rows of a stream to one batch: read, checked, encoded and decoded like those of a table.

    Args:
        stream ([`Stream`]): Where the rows come from.
        transform ([`RowTransform`]): With the augmentation.
        collator ([`Collator`]): For rows that have been transformed.
        skipped (`int`, *optional*, defaults to 0):
            First batches, which a resumed run has seen already and `Trainer` will drop: they are not decoded.
    """

    def __init__(self, stream: Stream, transform: RowTransform, collator: Collator, skipped: int = 0):
        self.stream, self.transform, self.collator, self.skipped = stream, transform, collator, skipped
        self.made = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        # workers take turns; if some have no rows the others have more of the batches, never less
        number = self.made if worker is None else self.made * worker.num_workers + worker.id
        self.made += 1
        if number < self.skipped:
            return {}
        stream, collator = self.stream, self.collator
        table = _table(rows, stream.features, stream.args.data)
        uses = collator.processor.image_processor is not None, collator.processor.tokenizer is not None
        prepared = prepare_data(stream.args, *uses, stream.labels, sources={"train": table})
        transformed = prepared.splits["train"].with_transform(self.transform)
        return collator(transformed.__getitems__(list(range(len(transformed)))))
