"""Predictor: a saved model, applied to rows of any source."""

import csv
import dataclasses
import os
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..data.arguments import DataArguments
from ..data.collator import Preprocessing
from ..data.labels import LabelSet
from ..data.prepare import PreparedData, prepare_data, presence, references_of
from ..data.splits import row_digests
from ..evaluation.ablation import REMOVED, ablation_figures, shuffled_texts
from ..evaluation.report import report, scores_of
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import load_model
from ..model.processing_mmclf import MMClfProcessor
from .folders import check_file
from .quiet import no_progress_bars

logger = logging.get_logger(__name__)


def machine_defaults() -> dict[str, Any]:
    """Return training arguments that suit this machine: bf16 and pinned memory with an accelerator, and workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))
    accelerated = torch.accelerator.is_available()
    return {
        "bf16": is_torch_bf16_gpu_available(),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": accelerated,
        "accelerator_config": {"non_blocking": True} if accelerated else None,
    }


@dataclasses.dataclass
class Predictor:
    """
    A model with its processor, which prepares, scores and evaluates rows.

    Args:
        folder (`Path`): The folder of the model.
        model ([`MMClfForImageTextClassification`]): The model, with labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): The image processor and the tokenizer, as far as the model needs them.
        trainer (`Trainer`, *optional*):
            Computes the logits. By default each call makes a trainer that suits the machine.
        bad_images (`str`, *optional*, defaults to `"error"`):
            What happens to an image that becomes unreadable after its row was prepared; see [`RowTransform`].

    Example:

    ```python
    >>> from pathlib import Path
    >>> from hf_mmclf import DataArguments, MMClfConfig, MMClfForImageTextClassification
    >>> from hf_mmclf import MMClfImageProcessor, MMClfProcessor, Predictor

    >>> config = MMClfConfig(image_backbone="test_resnet", num_labels=2)  # tiny and untrained
    >>> model = MMClfForImageTextClassification(config)
    >>> predictor = Predictor(Path("."), model, MMClfProcessor(MMClfImageProcessor(size=32)))  # or Predictor.load(".")
    >>> prepared = predictor.prepare(DataArguments(demo_rows=20), with_labels=False)
    >>> name, rows = predictor.choose_split(prepared)
    >>> name, predictor.scores(rows, prepared.folder).shape == (len(rows), 2)
    ('test', True)

    ```
    """

    folder: Path
    model: MMClfForImageTextClassification
    processor: MMClfProcessor
    trainer: Trainer | None = None
    bad_images: str = "error"

    @classmethod
    def load(cls, folder: str | Path) -> "Predictor":
        """
        Load the output folder of a training run. No code of the folder is executed.

        Raises:
            `FileNotFoundError`: if there is no model in the folder, or training has not finished.
            `ValueError`: if the folder holds another kind of model, if tensors are missing or surplus, or if a file is
                damaged or missing.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            unfinished = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
            raise FileNotFoundError(f"{folder}: no model here (no config.json){unfinished}")
        try:
            for file in [*folder.glob("*config.json"), *folder.glob("tokenizer.json"), *folder.glob("*.safetensors")]:
                check_file(file)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}; copy or download the folder again, or train again") from error
        with no_progress_bars():
            return cls(folder, *load_model(folder))

    @property
    def labels(self) -> LabelSet:
        """[`LabelSet`]: The labels in the order of the logits, as the data writes them and by name."""
        config = self.model.config
        return LabelSet(tuple(config.label_ids or config.label_names), tuple(config.label_names))

    def prepare(
        self, args: DataArguments, with_labels: bool = True, sources: dict[str, Dataset] | None = None
    ) -> PreparedData:
        """
        Read and check rows for this model. They are encoded with its labels and not split.

        Args:
            args, with_labels, sources: As for [`prepare_data`].
        """
        config = self.model.config
        return prepare_data(args, config.has_image, config.has_text, self.labels, with_labels, sources)

    def choose_split(
        self, prepared: PreparedData, name: str | None = None, held_out: bool = False
    ) -> tuple[str, Dataset]:
        """
        Choose one split of the source. The rows of a table without splits are recognised as those of training.

        Rows are recognised by their content; see [`row_digests`]. What is chosen is logged.

        Args:
            prepared ([`PreparedData`]): From [`Predictor.prepare`].
            name (`str`, *optional*): train, validation or test. Defaults to the last of these that the source has.
            held_out (`bool`, *optional*, defaults to `False`):
                Whether the default may be a split that training made: if all rows of a table are rows of training,
                only those that training has held out are chosen.

        Returns:
            `tuple[str, Dataset]`: The name of the split and its rows.

        Raises:
            `ValueError`: if the source has no such split.
        """
        splits = dict(prepared.splits)
        if list(splits) == ["train"] and (name or held_out):
            splits |= self._recognised(splits["train"], prepared.folder, name)
        if name is None:
            name = next(key for key in ("test", "validation", "train") if key in splits)
        if name not in splits:
            raise ValueError(f"no split {name!r}; the source has {', '.join(splits)}")
        if held_out and name != "train" and name in prepared.splits:
            trained = self._recorded_splits(splits[name], prepared.folder).count("train")
            if trained:
                logger.warning(f"{trained:,} of {len(splits[name]):,} {name} rows are training rows of this model")
        return name, splits[name]

    def _recognised(self, rows: Dataset, folder: Path, wanted: str | None) -> dict[str, Dataset]:
        """Return the splits of training if all rows belong to them; else say how many do, and return nothing."""
        found = self._recorded_splits(rows, folder)
        counts = Counter(name for name in found if name is not None)
        if None not in found:
            name = wanted or next(key for key in ("test", "validation", "train") if key in counts)
            logger.info(f"{counts[name]:,} of {len(rows):,} rows: the {name} rows of training")
            return {name: rows.select(np.flatnonzero(np.array(found) == name)) for name in counts}
        known = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        if counts and wanted:
            raise ValueError(f"--split {wanted}: {known} rows of training are among these {len(rows):,} rows, not all")
        if counts:
            logger.warning(f"All {len(rows):,} rows, of which training knows some: {known} rows of training")
        else:
            logger.info(f"All {len(rows):,} rows; none is recognised as a row of training")
        return {}

    def _recorded_splits(self, rows: Dataset, folder: Path) -> list[str | None]:
        """Return the split in which training had each row, as `splits.csv` records it; `None` for other rows."""
        file = self.folder / "splits.csv"
        if not file.is_file():
            logger.info(f"{file} is not there, so nobody knows which rows are those of training")
            return [None] * len(rows)
        recorded = _read_splits(file)
        if recorded and "digest" not in recorded[0]:  # written by version 0.1
            logger.warning(f"{file.name} has no digests, so rows are recognised by file name and line")
            split_of = {line["row"]: line["split"] for line in recorded}
            return [split_of.get(where) for where in rows["where"]]
        digests = row_digests(rows, folder, self.model.config.has_image)
        # Rows of equal content are told apart by their places, if these are still the same, else by their order.
        # Copies beyond the number of training rows have the split of the last of these rows.
        split_of = {(line["digest"], line["row"]): line["split"] for line in recorded}
        same = [split_of.get(key) for key in zip(digests, rows["where"][:], strict=True)]
        if None not in same:
            return same
        left = defaultdict(deque)
        for line in recorded:
            left[line["digest"]].append(line["split"])
        queues = (left.get(digest) for digest in digests)
        return [queue and (queue.popleft() if len(queue) > 1 else queue[0]) for queue in queues]

    def predict(
        self,
        rows: Dataset,
        folder: Path,
        batch_size: int = 64,
        workers: int | None = None,
        replaced: tuple[str, Mapping[str, Any] | None] | None = None,
    ) -> PredictionOutput:
        """
        Compute the logits of rows. Under `accelerate launch` each process computes a share and returns all logits.

        Args:
            rows (`Dataset`): Rows with the columns `image`, `text` and `where`.
            folder (`Path`): The folder to which image names are relative.
            batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
            workers (`int`, *optional*):
                Processes that load images. By default none for a single batch, else as many as suit the machine.
            replaced (`tuple`, *optional*): A column and its new cells; see [`ReplacedColumn`].

        Returns:
            `PredictionOutput`: `predictions` are the logits `(rows, labels)`, float32, in the order of the rows.
        """
        preprocessing = Preprocessing(self.processor, folder, self.bad_images)
        dataset = preprocessing.dataset(rows, *(replaced or ()))
        if self.trainer is not None:
            return _checked(self.trainer.predict(dataset), rows)
        options = {**machine_defaults(), "bf16": False, "remove_unused_columns": False}
        options["use_cpu"] = not torch.accelerator.is_available()  # else Trainer overlooks several processes on CPUs
        if workers is None and len(rows) <= batch_size:
            workers = 0  # starting processes takes longer than the work
        options["disable_tqdm"] = len(rows) <= batch_size  # a bar of one step says nothing
        if workers is not None:
            options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        with tempfile.TemporaryDirectory() as scratch:  # Trainer needs a folder, though prediction writes nothing
            args = TrainingArguments(scratch, per_device_eval_batch_size=batch_size, **options)
            trainer = Trainer(self.model, args, data_collator=preprocessing.collator)
            return _checked(trainer.predict(dataset), rows)

    def scores(self, rows: Dataset, folder: Path, batch_size: int = 64, workers: int | None = None) -> np.ndarray:
        """
        Compute the scores of rows.

        Args:
            rows, folder, batch_size, workers: As for [`Predictor.predict`].

        Returns:
            `np.ndarray` of shape `(rows, labels)`: Probabilities, float32.
        """
        return scores_of(self.predict(rows, folder, batch_size, workers).predictions)

    def embed(self, rows: Dataset, folder: Path, batch_size: int = 64, workers: int | None = None) -> np.ndarray:
        """
        Compute the fused vectors of rows, for search, duplicates and choosing rows to label.

        Args:
            rows, folder, batch_size, workers: As for [`Predictor.predict`].

        Returns:
            `np.ndarray` of shape `(rows, size)`: Vectors, float32.
        """
        embedder = dataclasses.replace(self, model=_Embedder(self.model), trainer=None)
        return embedder.predict(rows, folder, batch_size, workers).predictions

    def ablated_scores(self, rows: Dataset, folder: Path, batch_size: int = 64) -> dict[str, np.ndarray]:
        """
        Compute the scores of rows without their texts, without their images and with texts of other rows.

        Args:
            rows, folder, batch_size: As for [`Predictor.predict`].

        Returns:
            `dict[str, np.ndarray]`: Scores `(rows, labels)` by ablation. `shuffled_captions` is left out where fewer
            than two rows have a text.
        """
        replaced = {name: (column, None) for name, column in REMOVED.items()}
        texts = rows["text"][:]
        if sum(text is not None for text in texts) > 1:
            replaced["shuffled_captions"] = "text", dict(zip(rows["where"][:], shuffled_texts(texts), strict=True))
        return {
            name: scores_of(self.predict(rows, folder, batch_size, replaced=change).predictions)
            for name, change in replaced.items()
        }

    def report(
        self, rows: Dataset, scores: np.ndarray, folder: Path | None = None, batch_size: int = 64
    ) -> dict[str, Any]:
        """
        Compute the figures of labelled rows from their scores.

        Args:
            rows (`Dataset`): Rows with the columns `image`, `text`, `where` and `labels`.
            scores (`np.ndarray` of shape `(rows, labels)`): Their scores.
            folder (`Path`, *optional*):
                The folder to which image names are relative. With it, and for a model of both modalities, the figures
                have `ablations` of [`ablation_figures`], which take three more passes over the rows.
            batch_size (`int`, *optional*, defaults to 64): As for [`Predictor.predict`].

        Returns:
            `dict`: The figures of [`report`].

        Raises:
            `ValueError`: if the rows have no labels.
        """
        config, references, present = self.model.config, references_of(rows), presence(rows)
        figures = report(scores, references, config, present[0], rows["text"][:])
        if folder is not None and config.has_image and config.has_text:
            ablated = self.ablated_scores(rows, folder, batch_size)
            figures["ablations"] = ablation_figures(ablated, references, config, *present)
        return figures

    def evaluate(self, rows: Dataset, folder: Path, batch_size: int = 64, ablations: bool = True) -> dict[str, Any]:
        """
        Compute the scores of labelled rows and their figures.

        Args:
            rows, folder, batch_size: As for [`Predictor.report`].
            ablations (`bool`, *optional*, defaults to `True`): Whether to add `ablations`.

        Returns:
            `dict`: The figures of [`Predictor.report`].

        Raises:
            `ValueError`: if the rows have no labels.
        """
        references_of(rows)  # raises its error before the rows are scored
        scores = self.scores(rows, folder, batch_size)
        return self.report(rows, scores, folder if ablations else None, batch_size)


class _Embedder(torch.nn.Module):
    """A model whose output is its fused vectors in place of its logits, as `Trainer` predicts."""

    def __init__(self, model: MMClfForImageTextClassification):
        super().__init__()
        self.model = model

    def forward(self, labels: torch.Tensor | None = None, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embeddings": self.model(**inputs, output_embeddings=True).embeddings}


def _read_splits(file: Path) -> list[dict[str, str]]:
    """Read `splits.csv`. Raises `ValueError` if it is damaged."""
    try:
        recorded = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason}); remove it, or copy the folder again") from None
    if not recorded:
        logger.warning(f"{file} is empty, so nobody knows which rows are those of training")
    elif not {"split", "row"} <= set(recorded[0]):
        raise ValueError(f"{file}: expected the columns split, row and digest")
    return recorded


def _checked(output: PredictionOutput, rows: Dataset) -> PredictionOutput:
    """Return the output; raise `ValueError` with the first row whose logits are NaN."""
    wrong = np.flatnonzero(np.isnan(output.predictions).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"{rows['where'][int(wrong[0])]}: the logits are NaN, as for {len(wrong):,} of {len(rows):,} rows; the "
            "weights are damaged, or the training diverged"
        )
    return output


FinishedModel = Predictor  # the name in version 0.1
