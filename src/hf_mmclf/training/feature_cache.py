"""What the frozen parts of a model make of the rows, computed once and kept on disk.

Each row has one state a backbone and view: all tokens where the backbone is frozen whole, else the activations at the
cut. Rows are cached in shards, each an Arrow file that `datasets` writes under a fingerprint of weights, transform and
data: a change of any of them is another file, and a run that is killed goes on after the last whole shard.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.constants import HF_HOME
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.collator import Collator, EvaluationImageTransform, RowTransform
from ..data.images import image_paths
from ..model.modeling_mmclf import MMClfForImageTextClassification
from .arguments import MMClfTrainingArguments

SHARD = 2_000  # rows
ABOUT = "about.json"
PACKAGES = ("hf_mmclf", "torch", "torchcodec", "torchvision", "timm", "transformers", "pillow")


def default_folder() -> Path:
    """Where features go unless told otherwise: beside the other caches, which the variable HF_HOME moves."""
    return Path(HF_HOME) / "hf_mmclf" / "features"


@dataclasses.dataclass
class CachedRows(torch.utils.data.Dataset):
    """
    Rows with states in place of pictures and captions; each time a row is asked for, of one of its views.

    Args:
        rows (`Dataset`): What is not cached: labels, and captions where the text backbone trains.
        states (`Dataset`): Columns `image` and `text`, flat half-precision lists; the rows view by view.
        views (`int`): How many there are of each row.
    """

    rows: Dataset
    states: Dataset
    views: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # one view needs no draw, so that all else is drawn as it is without a cache
        views = torch.randint(self.views, (len(indices),)).tolist() if self.views > 1 else [0] * len(indices)
        table = self.states[[view * len(self) + index for view, index in zip(views, indices, strict=True)]]
        columns = {f"{name}_states": _arrays(table[name].combine_chunks()) for name in table.column_names}
        given = self.rows[list(indices)]
        return [{name: values[i] for name, values in {**given, **columns}.items()} for i in range(len(indices))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = np.array(lists.flatten())  # a copy, since torch wants what can be written to
    return np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1])


@dataclasses.dataclass
class CachedCollator:
    """
    Rows of [`CachedRows`] to one batch: states padded to the longest caption's, masks where one is absent.

    Args:
        collator ([`Collator`]): For what is not cached.
        image_shape (`tuple[int, ...]`, *optional*): Of one picture's states, channels last; `None`: not cached.
        text_width (`int`, *optional*): Of one token's states; `None`: not cached.
    """

    collator: Collator
    image_shape: tuple[int, ...] | None
    text_width: int | None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if self.image_shape is not None:
            found = [row["image_states"] for row in rows]
            blank = np.zeros(math.prod(self.image_shape), dtype=np.float16)
            states = np.stack([states if states.size else blank for states in found])
            states = torch.from_numpy(states).unflatten(1, self.image_shape)
            batch["image_states"] = states.permute(0, 3, 1, 2) if states.ndim == 4 else states
            batch["image_mask"] = torch.tensor([states.size > 0 for states in found])
        if self.text_width is not None:
            found = [torch.from_numpy(row["text_states"].reshape(-1, self.text_width)) for row in rows]
            lengths = torch.tensor([len(states) for states in found])
            longest = max(1, int(lengths.max()))
            found[0] = torch.cat([found[0], found[0].new_zeros(longest - len(found[0]), self.text_width)])
            batch["text_states"] = pad_sequence(found, batch_first=True)
            batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
            batch["text_mask"] = lengths > 0
        return batch


class FeatureCache:
    """
    The states of rows under one model and preprocessing, computed where they are not on the disk yet.

    Args:
        model ([`MMClfForImageTextClassification`]): With a frozen image backbone or, without pictures, text backbone;
            a frozen part of it is enough.
        collator ([`Collator`]): For rows with pictures and captions.
        args ([`MMClfTrainingArguments`]): For the folder, the device, the precision and the loading of pictures.
        recipe (`Mapping`): All that states depend on besides weights, rows and views; JSON must be able to say it.

    Attributes:
        cached_collator ([`CachedCollator`]): For the rows that `compute` gives.
        folder (`Path`): Where the shards are; [`cache_entries`] lists it.

    Raises:
        `ValueError`: nothing is frozen, or the architecture cannot be cut.
    """

    def __init__(
        self,
        model: MMClfForImageTextClassification,
        collator: Collator,
        args: MMClfTrainingArguments,
        recipe: Mapping[str, Any],
    ):
        self.model, self.collator, self.args = model.eval().to(args.device), collator, args
        config = model.config
        image = text = None
        if config.has_image:
            size = collator.processor.image_processor.size["longest_edge"]
            image = self._states({"pixel_values": torch.zeros(1, 3, size, size)})[0]
            if image is None:
                name = config.image_backbone + " with image_tokens 'stages'" * (config.image_tokens == "stages")
                raise ValueError(_refusal("image", name, "stages", config.unfrozen_image_stages))
        if config.has_text:
            text = self._states(collator.processor.collate(text=["a"]))[1]
            if text is None and image is None:
                name = config.text_config.model_type
                raise ValueError(_refusal("text", name, "layers", config.unfrozen_text_layers))
        self.image_shape = None if image is None else tuple(image.shape[1:])
        self.text_width = None if text is None else text.shape[-1]
        self.cached_collator = CachedCollator(collator, self.image_shape, self.text_width)
        about = {
            "image_backbone": config.image_backbone or "-",
            "text_backbone": config.text_backbone or getattr(config.text_config, "model_type", "-"),
            "states": {"image": self.image_shape, "text": self.text_width and [None, self.text_width]},
            "unfrozen": [config.unfrozen_image_stages, config.unfrozen_text_layers],
            "config": {**config.to_dict(), **dict.fromkeys(_NOT_OF_THE_CUT)},
            "recipe": recipe,
            "tokenizer": _digest_of_tokenizer(collator.processor.tokenizer),
            "precision": "bf16" if args.bf16 else "fp32",
            "versions": {name: _version(name) for name in PACKAGES},
        }
        self.about = json.dumps(about, sort_keys=True, indent=2, default=str)
        self.key = _digest(self.about, _digest_of_weights(model))
        self.folder = Path(args.feature_cache_dir or default_folder()) / self.key

    def compute(
        self, wanted: Mapping[str, tuple[Dataset, RowTransform, int]], say: Callable[[str], None] = print
    ) -> dict[str, CachedRows]:
        """
        Rows with cached states. The processes of one machine share the work.

        Args:
            wanted (`Mapping`): By name, the rows (columns `image`, `text`, `where` and `labels`), their transform
                with its augmentation, and the number of views.
            say (`Callable`, *optional*): Takes what is to come and where.

        Raises:
            `OSError`: the disk has not enough room; nothing has been computed then.
        """
        work = {name: self._names(*given) for name, given in wanted.items()}
        size = dict.fromkeys(wanted, 0)
        missing = dict.fromkeys(wanted, 0)
        for name, (rows, _, _) in wanted.items():
            width = self._bytes_of_a_row(rows)
            size[name] = sum(width * len(shard) for shard, _ in work[name])
            missing[name] = sum(width * len(shard) for shard, key in work[name] if not self._is_there(key))
        views = ", ".join(f"{name} {len(rows):,} rows x {count}" for name, (rows, _, count) in wanted.items())
        there = sum(size.values()) - sum(missing.values())
        say(
            f"feature cache: {views}; about {in_words(sum(size.values()))} in {self.folder}"
            + (f", of which {in_words(there)} are there already" if there else "")
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if sum(missing.values()) > free:
            raise OSError(
                f"the feature cache needs about {in_words(sum(missing.values()))}, but {self.folder.parent} has "
                f"{in_words(free)} left; give fewer --cached_views or another --feature_cache_dir, make room by "
                "`hf-mmclf cache --clear`, or leave --cache_features out"
            )
        (self.folder / ABOUT).write_text(self.about, encoding="utf-8")
        self.args.distributed_state.wait_for_everyone()  # nobody counts what others write
        return {name: self._rows(name, work[name], *given) for name, given in wanted.items()}

    def _bytes_of_a_row(self, rows: Dataset) -> int:
        width = 2 * math.prod(self.image_shape or (0,))
        if self.text_width is not None:
            some = [text for text in rows[:1_000]["text"] if text] or [""]
            lengths = self.collator.processor.tokenizer(some, truncation=True)["input_ids"]
            width += 2 * self.text_width * sum(map(len, lengths)) // len(some)
        return width

    def _names(self, rows: Dataset, transform: RowTransform, views: int) -> list[tuple[range, str]]:
        """The rows of each shard, and the fingerprint of its states."""
        shards = [range(start, min(start + SHARD, len(rows))) for start in range(0, len(rows), SHARD)]
        prints = [_digest_of_rows(rows.select(shard), transform.folder) for shard in shards]
        augmented = transform.text is not None or not isinstance(transform.image, EvaluationImageTransform | None)
        seed = self.args.seed if augmented else None
        return [
            (shard, _digest(self.key, name, f"{augmented} {view} {seed}"))
            for view in range(views)
            for shard, name in zip(shards, prints, strict=True)
        ]

    def _is_there(self, name: str) -> bool:
        found = (self.folder / name).rglob("dataset_info.json")  # which `datasets` writes last
        return any(not folder.name.endswith(".incomplete") for folder in map(attrgetter("parent"), found))

    def _rows(
        self, desc: str, work: list[tuple[range, str]], rows: Dataset, transform: RowTransform, views: int
    ) -> CachedRows:
        local, count = self.args.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        quiet = are_progress_bars_disabled()
        disable_progress_bars()  # one for each shard
        try:
            with tqdm(total=len(rows) * views, desc=desc, unit="row", disable=quiet or local > 0) as bar:
                for shard, name in work[local::count]:
                    self._shard(rows.select(shard), transform, name, bar)
                self.args.distributed_state.wait_for_everyone()
                bar.update(bar.total - bar.n)  # what was there already, and what the others did
            parts = [self._shard(rows.select(shard), transform, name, bar) for shard, name in work]
        finally:
            if not quiet:
                enable_progress_bars()
        if self.text_width is not None:
            rest = rows.select_columns(["labels"]).with_format("numpy")
        else:
            changed = RowTransform(transform.folder, None, transform.text)
            rest = rows.select_columns(["text", "labels"]).with_transform(changed)
        return CachedRows(rest, concatenate_datasets(parts).with_format("arrow"), views)

    def _shard(self, rows: Dataset, transform: RowTransform, name: str, bar: tqdm) -> Dataset:
        columns = {"image": self.image_shape, "text": self.text_width}
        features = {key: List(Value("float16")) for key, wanted in columns.items() if wanted is not None}
        return Dataset.from_generator(
            self._generate,
            features=Features(features),
            cache_dir=str(self.folder / name),
            gen_kwargs={"rows": rows, "transform": transform, "seed": int(name[:12], 16), "bar": bar},
            fingerprint=name,
            writer_batch_size=100,
        )

    def _generate(self, rows: Dataset, transform: RowTransform, seed: int, bar: tqdm) -> Iterator[dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loader = DataLoader(
                rows.with_transform(transform),
                self.args.eval_batch_size,
                collate_fn=self.collator,
                num_workers=self.args.dataloader_num_workers,
            )
            for batch in loader:
                image, text = self._states(batch)
                for i in range(len(batch["image_mask" if image is not None else "text_mask"])):
                    row = {}
                    if image is not None:
                        row["image"] = image[i].ravel() if batch["image_mask"][i] else image[i, :0].ravel()
                    if text is not None:
                        there = batch["attention_mask"][i].bool() & batch["text_mask"][i]
                        there = there[:1] if text.shape[1] == 1 else there  # the pooler's vector
                        row["text"] = text[i][there.numpy()].ravel()
                    yield row
                    bar.update()

    @torch.no_grad()
    def _states(self, batch: Mapping[str, torch.Tensor]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """States of both backbones in half precision, maps with their channels last; `None` where there are none."""
        device, model, states = self.args.device, self.model, [None, None]
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.args.bf16)):
            if "pixel_values" in batch:
                states[0] = model.image_states(batch["pixel_values"])
            if "input_ids" in batch:
                names = ("input_ids", "attention_mask", "token_type_ids")
                states[1] = model.text_states(**{name: batch[name] for name in names if name in batch})
        for i, found in enumerate(states):
            if found is not None:
                found = found.movedim(1, -1) if found.ndim == 4 else found
                states[i] = found.to("cpu", torch.float16).numpy()
                if not np.isfinite(states[i]).all():
                    name = ("image", "text")[i]
                    raise ValueError(f"states of the {name} backbone exceed half precision; train without the cache")
        return states[0], states[1]


# Fields of the configuration on which states do not depend: what comes after the backbones, and what rows are called.
_NOT_OF_THE_CUT = (
    *("fusion", "fusion_layers", "fusion_heads", "fusion_norm", "width", "projection_norm", "dropout"),
    *("learned_missing", "modality_dropout"),
    *("threshold", "label_thresholds", "missing_thresholds", "label_ids", "id2label", "label2id"),
    *("image_weights", "text_weights", "transformers_version"),
)


def _refusal(part: str, name: str, unit: str, unfrozen: int | None) -> str:
    if unfrozen is None:
        return (
            f"--cache_features keeps what frozen parts make of the rows, but all of the {part} backbone trains; "
            f"freeze some of it by --unfrozen_{part}_{unit}, or leave --cache_features out"
        )
    return (
        f"--cache_features: {name} cannot be cut before its last {unfrozen} {unit}; give --unfrozen_{part}_{unit} 0, "
        "or leave --cache_features out"
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ImportError:
        return None


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def _digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"padding": None, "truncation": tokenizer.model_max_length}  # in the text: those of the last call
    return _digest(json.dumps(parts, sort_keys=True))


def _digest_of_weights(model: MMClfForImageTextClassification) -> str:
    digest = hashlib.blake2b()
    for name, tensor in model.frozen_tensors():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _digest_of_rows(rows: Dataset, folder: Path) -> str:
    """Of captions, and of pictures: their bytes, or the name, size and time of their file."""
    digest = hashlib.blake2b()
    for row, (place, text) in enumerate(zip(image_paths(rows), rows["text"][:], strict=True)):
        digest.update(repr((place, text)).encode())
        if place is True:
            digest.update(rows[row]["image"]["bytes"])
        elif place is not None:
            found = (folder / place).stat()
            digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def in_words(size: float) -> str:
    """Bytes as people say them."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, int(size).bit_length() - 1) // 10)
    return f"{size / 1024**power:.{min(power, 1)}f} {units[power]}"


def cache_entries(folder: Path | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """The caches in a folder with what is known of each, that used last at the end."""
    found = sorted((folder or default_folder()).glob(f"*/{ABOUT}"), key=lambda file: file.stat().st_mtime)
    return [(file.parent, json.loads(file.read_text(encoding="utf-8"))) for file in found]
