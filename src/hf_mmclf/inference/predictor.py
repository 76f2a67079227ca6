"""A finished output folder: written whole, and at work on rows of any source."""

import csv
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput
from transformers.utils import is_torch_bf16_gpu_available

from ..data.collator import Preprocessing
from ..data.labels import LabelSet
from ..data.prepare import DataArguments, PreparedData, prepare_data, presence, references_of
from ..evaluation.ablation import REMOVED, ablation_figures, shuffled_texts
from ..evaluation.report import report, scores_of
from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import TASK, ImageTextClassificationPipeline
from ..model.processing_mmclf import MMClfProcessor


def machine_defaults() -> dict[str, Any]:
    """What the machine suggests: bf16 where an accelerator has it, and workers for the cores each process has.

    Batches for an accelerator come from pinned memory and are copied while it computes.
    """
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


@contextmanager
def atomic_folder(output: str | Path, stage: str | Path | None = None) -> Iterator[Path]:
    """
    A folder to write to; what it holds in the end moves to `output`, config.json last.

    Without config.json a folder does not load, so that one that was left half-written never looks whole.

    Args:
        output (`str` or `Path`): Where the files go; what else is there stays.
        stage (`str` or `Path`, *optional*): The folder to write to, emptied first; on the disk of `output`.
    """
    output = Path(output)
    stage = output / ".unfinished" if stage is None else Path(stage)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        (output / "config.json").unlink(missing_ok=True)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(output / file.name)
    finally:
        shutil.rmtree(stage)


def save_model(model: MMClfForImageTextClassification, processor: MMClfProcessor, folder: str | Path) -> None:
    """Writes weights (safetensors), configuration, preprocessing, their code and which pipeline they belong to."""
    # transformers writes down a folder's pipeline only where a pipeline saves it
    pipe = ImageTextClassificationPipeline(model=model, processor=processor, task=TASK, device=model.device)
    pipe.save_pretrained(folder)


@dataclasses.dataclass
class Predictor:
    """
    A model with its preprocessing, as a training run leaves it.

    Args:
        folder (`Path`): Where it comes from.
        model ([`MMClfForImageTextClassification`]): With labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): With the image processor and the tokenizer, where the model needs them.
        trainer (`Trainer`, *optional*): Computes the logits, for example under a training run's own processes. By
            default each call makes one that suits the machine.
    """

    folder: Path
    model: MMClfForImageTextClassification
    processor: MMClfProcessor
    trainer: Trainer | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Predictor":
        """Loads an output folder; `FileNotFoundError` for none or an unfinished one, `ValueError` for another kind."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            unfinished = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
            raise FileNotFoundError(f"{folder}: no finished model here (no config.json){unfinished}")
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, MMClfConfig):
            raise ValueError(f"{folder}: a {config.model_type} model; expected a folder that `hf-mmclf train` wrote")
        model = MMClfForImageTextClassification.from_pretrained(folder, config=config)
        image_processor = MMClfImageProcessor.from_pretrained(folder) if config.has_image else None
        tokenizer = AutoTokenizer.from_pretrained(folder) if config.has_text else None
        if tokenizer is not None:  # which may not know how many positions the model has
            tokenizer.model_max_length = min(tokenizer.model_max_length, model.max_tokens)
        return cls(folder, model, MMClfProcessor(image_processor, tokenizer))

    def prepare(
        self, args: DataArguments, with_labels: bool = True, sources: dict[str, Dataset] | None = None
    ) -> PreparedData:
        """Rows for this model, with its labels and nothing split; the arguments are those of [`prepare_data`]."""
        config = self.model.config
        names = config.label_names
        labels = LabelSet(tuple(config.label_ids or names), tuple(names))
        return prepare_data(args, config.has_image, config.has_text, labels, with_labels, sources)

    def choose_split(
        self, prepared: PreparedData, name: str | None = None, held_out: bool = False
    ) -> tuple[str, Dataset]:
        """
        One split of the source and its name. A table that training has split counts as split in the same way.

        Args:
            prepared ([`PreparedData`]): From [`Predictor.prepare`].
            name (`str`, *optional*): train, validation or test; by default the last of these that the source has.
            held_out (`bool`, *optional*, defaults to `False`): Choose the default among training's splits too, so that
                of a table that training has split it is not all rows, but those that it tested on.
        """
        own = prepared.splits
        splits = {**own, **(self._recorded(own["train"]) if list(own) == ["train"] else {})}
        if name is None:
            choices = splits if held_out else own
            name = next(key for key in ("test", "validation", "train") if key in choices)
            return name, choices[name]
        if name not in splits:
            raise ValueError(f"no split {name!r}; the source has {', '.join(splits)}")
        return name, splits[name]

    def _recorded(self, rows: Dataset) -> dict[str, Dataset]:
        """`rows` as training split them, according to its `splits.csv`; nothing if it has not seen all of them."""
        file = self.folder / "splits.csv"
        if not file.is_file():
            return {}
        with file.open(encoding="utf-8", newline="") as lines:
            split_of = {line["row"]: line["split"] for line in csv.DictReader(lines)}
        members: dict[str, list[int]] = {}
        for row, where in enumerate(rows["where"]):
            if where not in split_of:
                return {}
            members.setdefault(split_of[where], []).append(row)
        return {name: rows.select(indices) for name, indices in members.items()}

    def predict(
        self,
        rows: Dataset,
        folder: Path,
        batch_size: int = 64,
        workers: int | None = None,
        replaced: tuple[str, Mapping[str, Any] | None] | None = None,
    ) -> PredictionOutput:
        """
        Compute the logits of rows with the columns of [`PreparedData`]; under `accelerate launch` each process
        computes its share, and all return all of them.

        Args:
            rows (`Dataset`): Columns `image`, `text` and `where`.
            folder (`Path`): What picture names are relative to.
            batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
            workers (`int`, *optional*): Processes that load pictures; by default none for a single batch, else as many
                as suit the machine.
            replaced (`tuple`, *optional*): A column and its other cells; see [`ReplacedColumn`].

        Returns:
            `PredictionOutput`: `predictions` are the logits `(rows, labels)`, float32, in the order of the rows.
        """
        preprocessing = Preprocessing(self.processor, folder)
        dataset = preprocessing.dataset(rows, *(replaced or ()))
        if self.trainer is not None:
            return self.trainer.predict(dataset)
        options: dict[str, Any] = {**machine_defaults(), "bf16": False, "remove_unused_columns": False}
        options["use_cpu"] = not torch.accelerator.is_available()  # else Trainer overlooks that there are several
        if workers is None and len(rows) <= batch_size:
            workers = 0  # starting some takes longer than the work
        if workers is not None:
            options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder, though prediction writes nothing
            args = TrainingArguments(scratch, per_device_eval_batch_size=batch_size, **options)
            return Trainer(self.model, args, data_collator=preprocessing.collator).predict(dataset)

    def scores(self, rows: Dataset, folder: Path, batch_size: int = 64, workers: int | None = None) -> np.ndarray:
        """Compute the scores `(rows, labels)` of rows, float32 in [0, 1]; the arguments are those of `predict`."""
        return scores_of(self.predict(rows, folder, batch_size, workers).predictions)

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

    def report(self, rows: Dataset, scores: np.ndarray) -> dict[str, Any]:
        """Compute the figures of labelled rows from their scores `(rows, labels)`; see [`report`]."""
        return report(scores, references_of(rows), self.model.config, presence(rows)[0], rows["text"][:])

    def evaluate(self, rows: Dataset, folder: Path, batch_size: int = 64, ablations: bool = True) -> dict[str, Any]:
        """
        Figures of labelled rows.

        Args:
            rows (`Dataset`): Columns `image`, `text`, `where` and `labels`.
            folder, batch_size: As for [`Predictor.predict`].
            ablations (`bool`, *optional*, defaults to `True`): For a model with both modalities, `ablations` too; that
                takes three more passes, one of them without pictures.

        Returns:
            `dict`: That of [`report`], with `ablations` of [`ablation_figures`].

        Raises:
            `ValueError`: rows without labels.
        """
        config, references = self.model.config, references_of(rows)
        figures = self.report(rows, self.scores(rows, folder, batch_size))
        if ablations and config.has_image and config.has_text:
            ablated = self.ablated_scores(rows, folder, batch_size)
            figures["ablations"] = ablation_figures(ablated, references, config, *presence(rows))
        return figures


FinishedModel = Predictor  # the name in version 0.1
