"""Features of frozen backbones, computed once and kept on disk.

The rows are cached in shards. A shard is one Arrow file whose name is a fingerprint of the weights, the preprocessing
and the rows, so that a change of any of them needs another file. An interrupted run continues after its last complete
shard.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import convert_bytes
from datasets import Dataset, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import Collator, EvaluationImageTransform, RowTransform
from ..data.images import image_paths
from ..model.configuration_mmclf import MMClfConfig
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import MMClfTrainingArguments
from .cache_folders import ABOUT, default_folder

logger = logging.get_logger(__name__)
SHARD = 2_000  # rows
PACKAGES = ("hf_mmclf", "torch", "torchcodec", "torchvision", "timm", "transformers", "pillow")

# Fields of the configuration that do not change the features: the parts after the backbones, labels and thresholds.
AFTER_BACKBONES = (
    *("fusion", "fusion_layers", "fusion_heads", "fusion_norm", "width", "projection_norm", "dropout"),
    *("learned_missing", "modality_dropout", "modality_classifiers", "feature_dropout"),
    *("min_labels", "threshold", "label_thresholds", "missing_thresholds", "label_ids", "id2label", "label2id"),
    *("image_weights", "text_weights", "transformers_version"),
)


@dataclasses.dataclass
class CachedRows(torch.utils.data.Dataset):
    """
    Rows with features in place of images and texts. Each access draws one of the row's views.

    Args:
        rows (`Dataset`):
            The columns that are not cached: labels, and texts if the text backbone trains.
        features (`Dataset`):
            Columns `image` and `text` with flat half-precision lists: all rows of the first view, then of the next.
        views (`int`):
            Number of views of each row.
    """

    rows: Dataset
    features: Dataset
    views: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # A single view is not drawn, so that the other random numbers are those of a run without a cache.
        views = torch.randint(self.views, (len(indices),)).tolist() if self.views > 1 else [0] * len(indices)
        table = self.features[[view * len(self) + index for view, index in zip(views, indices, strict=True)]]
        columns = {f"{name}_features": _arrays(table[name].combine_chunks()) for name in table.column_names}
        columns |= self.rows[list(indices)]
        return [{name: values[i] for name, values in columns.items()} for i in range(len(indices))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = np.array(lists.flatten())  # a copy, because torch wants writable memory
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1])


@dataclasses.dataclass
class CachedCollator:
    """
    Make one batch of rows with or without cached features. Features are padded to the longest row of the batch.

    Args:
        collator ([`Collator`]):
            Makes the part of the batch that is not cached.
        widths (`dict[str, int]`):
            Size of one token's features by modality, `image` and `text`, for the modalities that are cached.
    """

    collator: Collator
    widths: dict[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        for name, width in self.widths.items():
            if f"{name}_features" not in rows[0]:
                continue
            features = [torch.from_numpy(row[f"{name}_features"].reshape(-1, width)) for row in rows]
            lengths = torch.tensor([len(tokens) for tokens in features])
            one_token = features[0].new_zeros(1, width)  # a batch in which all rows lack the modality needs it
            padded = pad_sequence([*features, one_token], batch_first=True)[:-1]
            batch |= {f"{name}_features": padded, f"{name}_mask": lengths > 0}
            if name == "text":
                batch["attention_mask"] = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return batch


class Shard(NamedTuple):
    """Consecutive rows of one view, the file of their features, and its approximate size in bytes."""

    rows: range
    file: Path
    size: float


class FeatureCache:
    """
    Features of rows under one model and preprocessing, computed where the disk does not have them yet.

    Args:
        model ([`MMClfForImageTextClassification`]):
            A model with a frozen image backbone or, for texts only, a frozen text backbone. Features of the text
            backbone are cached too if it is frozen.
        collator ([`Collator`]):
            Makes batches of transformed rows.
        args ([`MMClfTrainingArguments`]):
            Folder, device, precision and loading of the images.
        recipe (`Mapping`):
            Everything else that changes the features of a row, such as the augmentation, as JSON values.

    Attributes:
        cached_collator ([`CachedCollator`]): Makes batches of the rows that `compute` returns.
        folder (`Path`): The folder of the shards. [`cache_entries`] lists it.

    Raises:
        `ValueError`: If the backbone is not frozen, or only partly.
    """

    def __init__(
        self,
        model: MMClfForImageTextClassification,
        collator: Collator,
        args: MMClfTrainingArguments,
        recipe: Mapping[str, Any],
    ):
        config, processor = model.config, collator.processor
        _check_frozen(config)
        self.model, self.collator, self.args = model.eval().to(args.device), collator, args
        example = {}
        if config.has_image:
            size = processor.image_processor.size["longest_edge"]
            example["pixel_values"] = torch.zeros(1, 3, size, size)
        if config.has_text and config.unfrozen_text_layers == 0:
            example |= processor.collate(text=["a"])
        self.shapes = {name: features.shape[1:] for name, features in self._features(example).items()}
        widths = {name: width for name, (_, width) in self.shapes.items()}
        self.cached_collator = CachedCollator(collator, widths)
        about = {
            "image_backbone": config.image_backbone or "-",
            "text_backbone": config.text_backbone or getattr(config.text_config, "model_type", "-"),
            "widths": widths,
            "config": {**config.to_dict(), **dict.fromkeys(AFTER_BACKBONES)},
            "recipe": recipe,
            "image_processor": processor.image_processor and processor.image_processor.to_dict(),
            "tokenizer": processor.tokenizer and _digest_of_tokenizer(processor.tokenizer),
            "precision": "bf16" if args.bf16 else "fp32",
            "versions": {name: _version(name) for name in PACKAGES},
        }
        self.about = json.dumps(about, sort_keys=True, indent=2, default=str)
        self.key = _digest(self.about, _digest_of_weights(model))
        self.folder = Path(args.feature_cache_dir or default_folder()) / self.key

    def compute(self, wanted: Mapping[str, tuple[Dataset, RowTransform, int]]) -> dict[str, CachedRows]:
        """
        Compute the features that are missing, and return the rows with their features. The processes of one machine
        share the work.

        Args:
            wanted (`Mapping[str, tuple]`):
                By name: the rows (columns `image`, `text`, `where` and `labels`), their transform with its
                augmentation, and the number of views.

        Returns:
            `dict[str, CachedRows]`: The rows by the same names.

        Raises:
            `OSError`: If the disk has not enough space. Nothing has been computed then.
        """
        shards = {name: self._shards(*given) for name, given in wanted.items()}
        flat = [shard for group in shards.values() for shard in group]
        absent = {shard.file for shard in flat if not _is_whole(shard)}
        total = sum(shard.size for shard in flat)
        missing = sum(shard.size for shard in flat if shard.file in absent)
        views = ", ".join(f"{name} {len(rows):,} rows x {count}" for name, (rows, _, count) in wanted.items())
        reused = f", of which {convert_bytes(total - missing)} are reused" if missing < total else ""
        logger.info(f"feature cache: {views}; about {convert_bytes(total)} in {self.folder}{reused}")
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if missing > free:
            raise OSError(
                f"the feature cache needs about {convert_bytes(missing)}, but {self.folder.parent} has "
                f"{convert_bytes(free)} left; give fewer --cached_views or another --feature_cache_dir, free space by "
                "`hf-mmclf cache --clear`, or leave --cache_features out"
            )
        part = self.folder / f"{ABOUT}.{self.args.process_index}"
        part.write_text(self.about, encoding="utf-8")
        part.replace(self.folder / ABOUT)
        self.args.distributed_state.wait_for_everyone()  # no process writes before all have looked for shards
        for name, (rows, transform, _) in wanted.items():
            self._write_share(name, shards[name], absent, rows, transform)
        self.args.distributed_state.wait_for_everyone()
        return {name: self._read(shards[name], *given) for name, given in wanted.items()}

    def _shards(self, rows: Dataset, transform: RowTransform, views: int) -> list[Shard]:
        ranges = [range(start, min(start + SHARD, len(rows))) for start in range(0, len(rows), SHARD)]
        digests = [_digest_of_rows(rows.select(part), transform.folder) for part in ranges]
        augmented = transform.text is not None or not isinstance(transform.image, EvaluationImageTransform | None)
        seed, size = self.args.seed if augmented else None, self._bytes_of_a_row(rows)
        return [
            Shard(
                part,
                self.folder / f"{_digest(self.key, digest, f'{augmented} {view} {seed}')}.arrow",
                size * len(part),
            )
            for view in range(views)
            for part, digest in zip(ranges, digests, strict=True)
        ]

    def _bytes_of_a_row(self, rows: Dataset) -> float:
        numbers = math.prod(self.shapes.get("image", (0,)))
        if "text" in self.shapes:
            texts = [text for text in rows[:1_000]["text"] if text] or [""]
            lengths = map(len, self.collator.processor.tokenizer(texts, truncation=True)["input_ids"])
            numbers += self.shapes["text"][1] * sum(lengths) / len(texts)
        return 2 * numbers

    def _write_share(
        self, name: str, shards: Sequence[Shard], absent: Collection[Path], rows: Dataset, transform: RowTransform
    ) -> None:
        """Write those of the shards that this process computes whose file is absent."""
        local, count = self.args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        missing = [shard for shard in shards[local::count] if shard.file in absent]
        hidden = self.args.disable_tqdm or local > 0
        for shard in tqdm(missing, f"Computing features, {name}", unit="shard", disable=hidden):
            self._write(shard.file, rows.select(shard.rows).with_transform(transform))

    def _write(self, path: Path, rows: Dataset) -> None:
        """Write one shard, which gets its name when it is complete."""
        loader = DataLoader(
            rows,
            self.args.eval_batch_size,
            collate_fn=self.collator,
            num_workers=self.args.dataloader_num_workers,
        )
        schema = pa.schema({name: pa.list_(pa.float16()) for name in self.shapes})
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            torch.manual_seed(int(path.stem[:12], 16))
            part = Path(scratch) / path.name
            try:
                with pa.ipc.new_stream(str(part), schema) as writer:
                    for batch in loader:
                        writer.write_batch(pa.RecordBatch.from_pydict(self._columns(batch), schema))
                part.replace(path)
            except OSError as error:
                raise OSError(
                    f"features cannot be written to {path}: {error}; free space, or give another --feature_cache_dir"
                ) from error

    def _columns(self, batch: Mapping[str, torch.Tensor]) -> dict[str, pa.ListArray]:
        """Return the features of a batch as one flat list a row, without padding, and empty without the modality."""
        columns = {}
        for name, features in self._features(batch).items():
            kept = batch[f"{name}_mask"][:, None].expand(features.shape[:2])
            if name == "text" and features.shape[1] > 1:  # not the pooled vector
                kept = kept & batch["attention_mask"].bool()
            ends = np.cumsum([0, *kept.sum(1).tolist()]) * features.shape[-1]
            columns[name] = pa.ListArray.from_arrays(ends.astype(np.int32), features[kept.numpy()].ravel())
        return columns

    def _read(self, shards: Sequence[Shard], rows: Dataset, transform: RowTransform, views: int) -> CachedRows:
        features = concatenate_datasets([Dataset.from_file(str(shard.file)) for shard in shards])
        if "text" in self.shapes or not self.model.config.has_text:
            rest = rows.select_columns(["labels"]).with_format("numpy")
        else:
            texts_only = RowTransform(transform.folder, None, transform.text)
            rest = rows.select_columns(["text", "labels"]).with_transform(texts_only)
        return CachedRows(rest, features.with_format("arrow"), views)

    @torch.no_grad()
    def _features(self, batch: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Compute the features `(B, T, D)` of the frozen backbones, in half precision, by modality."""
        device, model, found = self.args.device, self.model, {}
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            if "pixel_values" in batch:
                found["image"] = model.frozen_image_features(batch["pixel_values"])
            if "input_ids" in batch and model.config.unfrozen_text_layers == 0:
                names = ("input_ids", "attention_mask", "token_type_ids")
                found["text"] = model.frozen_text_features(**{name: batch[name] for name in names if name in batch})
        found = {name: features.to("cpu", torch.float16).numpy() for name, features in found.items()}
        for name, features in found.items():
            if not np.isfinite(features).all():
                raise ValueError(f"features of the {name} backbone exceed half precision; leave --cache_features out")
        return found


def _is_whole(shard: Shard) -> bool:
    """Return whether the features of all rows are there. A damaged file is named, and replaced later."""
    if not shard.file.exists():
        return False
    try:
        rows = len(Dataset.from_file(str(shard.file)))
        if rows == len(shard.rows):
            return True
        found = f"{rows} of {len(shard.rows)} rows"
    except (OSError, ValueError) as error:
        found = str(error)
    logger.warning(f"{shard.file} is damaged ({found}); its features are computed again")
    return False


def _check_frozen(config: MMClfConfig) -> None:
    part, unit = ("image", "stages") if config.has_image else ("text", "layers")
    unfrozen = getattr(config, f"unfrozen_{part}_{unit}")
    if unfrozen != 0:
        trained = "all of it trains" if unfrozen is None else f"its last {unfrozen} {unit} train"
        raise ValueError(
            f"--cache_features needs a frozen {part} backbone, but {trained}; give --unfrozen_{part}_{unit} 0, or "
            "leave --cache_features out"
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"padding": None, "truncation": tokenizer.model_max_length}  # the text has those of the last call
    return _digest(json.dumps(parts, sort_keys=True))


def _digest_of_weights(model: MMClfForImageTextClassification) -> str:
    digest = hashlib.blake2b()
    for name, tensor in model.frozen_tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset, folder: Path) -> str:
    """Return a digest of the texts and of the images: their bytes, or the name, size and time of their files."""
    digest = hashlib.blake2b()
    for row, (place, text) in enumerate(zip(image_paths(rows), rows["text"][:], strict=True)):
        digest.update(repr((place, text)).encode())
        if place is True:
            digest.update(rows[row]["image"]["bytes"])
        elif place is not None:
            found = (folder / place).stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()
