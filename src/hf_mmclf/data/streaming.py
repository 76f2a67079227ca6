"""Training rows that are streamed: read one after another, shuffled in a buffer, repeated without an end.

A stream repeats itself, so every process gets the same number of batches, and a run that was interrupted continues
after a number of batches. Reading, sharding and resuming are done by `datasets`, accelerate and `Trainer`. Each batch
goes through the same steps as the rows of a table.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers.utils import logging

from .arguments import DataArguments
from .collator import Collator, RowTransform
from .labels import LabelSet, find_delimiter
from .prepare import IMAGE_COLUMNS, LABEL_COLUMNS, PreparedData, no_label_column, prepare_data, read_given_splits
from .tables import TABLE_SUFFIXES, find_column, find_splits, with_columns

logger = logging.get_logger(__name__)
STREAMED = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclasses.dataclass
class Stream:
    """
    Training rows that are streamed.

    Args:
        rows (`IterableDataset`): The rows with the columns of the source. Images are not decoded. It has no end.
        head (`Dataset`): The first rows, in the form of [`PreparedData`].
        features (`Features`): The features of `rows`.
        args ([`DataArguments`]): How a row is read.
        labels ([`LabelSet`]): The labels.
    """

    rows: IterableDataset
    head: Dataset
    features: Features
    args: DataArguments
    labels: LabelSet


def open_stream(args: DataArguments, uses_image: bool, uses_text: bool, seed: int) -> tuple[Stream, PreparedData]:
    """
    Open the training rows as a stream, and read the other splits whole.

    Args:
        args ([`DataArguments`]): `data` is a data set on the Hub, or a file or folder of Parquet or JSON lines.
        uses_image (`bool`): Whether the model has an image backbone.
        uses_text (`bool`): Whether the model has a text backbone.
        seed (`int`): Seed of the shuffle.

    Returns:
        `tuple[Stream, PreparedData]`: The training rows, and the rows of the other splits.

    Raises:
        `ValueError`: If the source cannot be streamed, if its labels are not known in advance, or if there are no
            validation rows.
    """
    if args.shuffle_buffer < 1 or args.validation_rows < 0:
        raise ValueError(
            f"--shuffle_buffer is {args.shuffle_buffer} and --validation_rows is {args.validation_rows}; expected at "
            "least 1 and at least 0"
        )
    streams = _open(args.data)
    if "train" not in streams:
        raise ValueError(f"no training rows; the source has only {', '.join(streams)}")
    rows = streams.pop("train")
    first = _read(rows.take(args.shuffle_buffer), args.data)
    if not first:
        raise ValueError(f"{args.data}: no training rows")
    features = rows.features or Dataset.from_list(first).features
    column = find_column(features, args.label_column, LABEL_COLUMNS, "label_column")
    labels = _labels(args, features.get(column))
    # All batches have one delimiter, also those in which it does not occur.
    delimiter = args.label_delimiter or find_delimiter(row.get(column) for row in first)
    args = dataclasses.replace(args, label_delimiter=delimiter)
    sources = {
        name: _table(_read(stream, f"{args.data}/{name}"), stream.features, f"{args.data}/{name}")
        for name, stream in streams.items()
    }
    sources |= read_given_splits(args, sources)
    how = "given"
    if args.validation_rows:
        if "validation" in sources:
            raise ValueError("--validation_rows is given, but there are validation rows already; leave one out")
        held = _read(rows.take(args.validation_rows), args.data)
        sources["validation"] = _table(held, features, f"{args.data}/train")
        # By image, not by number: workers and processes read parts of the stream, and rows share images.
        rows = rows.filter(_NotHeld(held, args.image_column))
        first = _read(rows.take(args.shuffle_buffer), args.data)
        how = f"the first {len(held):,} rows of the stream, and all rows with their images, are for validation"
        if not first:
            raise ValueError(f"--validation_rows {args.validation_rows} leaves no training rows")
    if "validation" not in sources:
        raise ValueError(
            f"{args.data!r} has no validation rows, which choose the threshold; give --validation_data, or "
            "--validation_rows to take them from the stream"
        )
    sources["train"] = _table(first, features, args.data)
    prepared = prepare_data(args, uses_image, uses_text, labels, sources=sources)
    for name in ("train", "validation"):
        if "labels" not in prepared.splits[name].column_names:
            raise no_label_column(name, sources[name])
    endless = rows.repeat(None).shuffle(seed=seed, buffer_size=args.shuffle_buffer)
    stream = Stream(endless, prepared.splits.pop("train"), features, args, labels)
    return stream, dataclasses.replace(prepared, split_source=f"{how}; training rows are streamed")


def _read(rows: IterableDataset, source: str) -> list[dict[str, Any]]:
    """Read rows now. Raises `ValueError` with the name of the source if they cannot be read."""
    try:
        return list(rows)
    except (DatasetGenerationError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source}: cannot be read as a stream: {reason}") from error


def _open(source: str | None) -> dict[str, IterableDataset]:
    if source is None:
        raise ValueError("--streaming needs --data; the embedded data set is drawn here")
    path = Path(source)
    if path.suffix in STREAMED and not path.is_file():
        raise FileNotFoundError(f"{source!r}: no such file")
    if path.suffix not in STREAMED and (path.suffix in TABLE_SUFFIXES or path.is_file()):
        raise ValueError(
            f"{source}: {path.suffix} tables are read whole; make it .parquet or .jsonl, or leave --streaming out"
        )
    given = {"path": STREAMED[path.suffix], "data_files": source} if path.is_file() else {"path": source}
    try:
        found = load_dataset(**given, streaming=True)
    except StopIteration:  # the first row, from which datasets infers the columns
        raise ValueError(f"{source}: no training rows") from None
    return {  # images are decoded when batches are made
        split: found[name].decode(False) if found[name].features else found[name]
        for split, name in find_splits({name: name for name in found}, source).items()
    }


def _labels(args: DataArguments, feature: Any) -> LabelSet:
    """Return the labels, which must be known before the last row is read."""
    if args.label_names_file is not None:
        return LabelSet.from_rows([], args.label_names_file)
    if args.label_columns:
        return LabelSet.from_rows([args.label_columns])
    inner = feature.feature if isinstance(feature, List) else feature
    if isinstance(inner, ClassLabel):
        return LabelSet.from_rows([inner.names])
    raise ValueError(
        f"{args.data!r}: a stream has no last row after which all labels are known; give --label_names_file with "
        'them, such as {"1": "person"}, or a column of ClassLabel features, or --label_columns'
    )


def _table(rows: Sequence[Mapping[str, Any]], features: Features | None, source: str) -> Dataset:
    """Make a table of streamed rows. They have no number, so its column `where` names them by their content."""
    features = features or Dataset.from_list(rows).features
    where = []
    for row in rows:
        shown = {name: cell.get("path") if isinstance(cell, Mapping) else cell for name, cell in row.items()}
        shown = {name: cell for name, cell in shown.items() if isinstance(cell, str | int)}
        where.append(f"{source}: row {str(shown)[:200]}")
    table = Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=features)
    return with_columns(table, {"where": where})


class _NotHeld:
    """Whether a row has none of the images of the rows held out or, if its image is missing, none of their texts."""

    def __init__(self, held: Sequence[Mapping[str, Any]], column: str | None):
        self.columns = (column,) if column else IMAGE_COLUMNS
        self.keys = {self._key(row) for row in held}

    def _key(self, row: Mapping[str, Any]) -> Any:
        image = next((row[column] for column in self.columns if row.get(column)), None)
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        return image or tuple(value for value in row.values() if isinstance(value, str))

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return self._key(row) not in self.keys


class StreamCollator:
    """
    Make one batch of streamed rows, which are read, checked, encoded and transformed like those of a table.

    Args:
        stream ([`Stream`]): The stream that the rows come from.
        transform ([`RowTransform`]): The transform of training rows.
        collator ([`Collator`]): The collator of transformed rows.
        skipped (`int`, *optional*, defaults to 0):
            Number of first batches that are left empty, without decoding an image. A resumed run has used them
            already, and `Trainer` skips them.
    """

    def __init__(self, stream: Stream, transform: RowTransform, collator: Collator, skipped: int = 0):
        self.stream, self.transform, self.collator, self.skipped = stream, transform, collator, skipped
        self.made = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        # Workers take turns. If some have no rows, the others have more of the batches, never fewer.
        number = self.made if worker is None else self.made * worker.num_workers + worker.id
        self.made += 1
        if number < self.skipped:
            return {}
        stream, processor = self.stream, self.collator.processor
        sources = {"train": _table(rows, stream.features, stream.args.data)}
        uses = processor.image_processor is not None, processor.tokenizer is not None
        prepared = prepare_data(stream.args, *uses, stream.labels, sources=sources, is_batch=True)
        fate = "left out" if stream.args.bad_images == "skip" else "taken as missing"
        for where, reason in prepared.bad_images:
            logger.warning_once(f"Image {fate}: {where}: {reason}")
        rows = prepared.splits["train"]
        return self.collator(rows.with_transform(self.transform).__getitems__(list(range(len(rows)))))
