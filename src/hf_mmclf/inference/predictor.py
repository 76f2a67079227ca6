"""A finished output folder: written whole, and at work on rows of any source."""

import csv
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments

from ..data.collator import Collator, EvaluationImageTransform, RowTransform
from ..data.labels import LabelSet
from ..data.prepare import DataArguments, PreparedData, prepare_data
from ..evaluation.ablation import Transform, ablation_figures
from ..evaluation.report import label_names, report, scores_of
from ..model.configuration_mmclf import MMClfConfig
from ..model.image_processing_mmclf import MMClfImageProcessor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import TASK, ImageTextClassificationPipeline
from ..model.processing_mmclf import MMClfProcessor
from ..training.arguments import machine_defaults


@contextmanager
def whole_folder(output: str | Path, stage: str | Path | None = None) -> Iterator[Path]:
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


def save_for_hub(model: MMClfForImageTextClassification, processor: MMClfProcessor, folder: str | Path) -> None:
    """
    Writes a folder that `AutoModel`, `AutoProcessor` and `pipeline` load, where this package is installed and, with
    `trust_remote_code=True`, where it is not; the end of every training run does the same.

    Args:
        model ([`MMClfForImageTextClassification`]): With labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): With the parts that the model needs.
        folder (`str` or `Path`): What else is there stays, so that `metrics.json` or a card of one's own can be there
            already; a card is written where there is none.

    Raises:
        `ValueError`: a processor that lacks a part, or has one too many.
        `FileExistsError`: a folder with parts that would not fit: of a model with other modalities, or in ONNX.
    """
    from ..hub.card import PLOTS, write_card

    config = model.config
    parts = {"image_processor": config.has_image, "tokenizer": config.has_text}
    for name, needed in parts.items():
        if (getattr(processor, name) is not None) != needed:
            wanted = "needs one" if needed else "has no use for it"
            raise ValueError(f"the processor has {'no' if needed else 'a'} {name}, and the model {wanted}")
    unfit = [] if config.has_image else ["preprocessor_config.json"]
    unfit += [] if config.has_text else ["tokenizer.json", "tokenizer_config.json"]
    if found := [name for name in (*unfit, "onnx") if Path(folder, name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(found)} of another model; remove it, or give another folder")
    with whole_folder(folder) as stage:
        save_model(model, processor, stage)
        if not Path(folder, "README.md").exists():
            for name in ("metrics.json", "training.json", *PLOTS):  # which the card shows
                if Path(folder, name).exists():
                    shutil.copyfile(Path(folder, name), stage / name)
            write_card(stage)


@dataclasses.dataclass
class FinishedModel:
    """
    A model with its preprocessing, as a training run leaves it.

    Args:
        folder (`Path`): Where it comes from.
        model ([`MMClfForImageTextClassification`]): With labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): With the image processor and the tokenizer, where the model needs them.
    """

    folder: Path
    model: MMClfForImageTextClassification
    processor: MMClfProcessor

    @classmethod
    def load(cls, folder: str | Path) -> "FinishedModel":
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
        names = label_names(config)
        labels = LabelSet(tuple(config.label_ids or names), tuple(names))
        return prepare_data(args, config.has_image, config.has_text, labels, with_labels, sources)

    def choose_split(
        self, prepared: PreparedData, name: str | None = None, held_out: bool = False
    ) -> tuple[str, Dataset]:
        """
        One split of the source and its name. A table that training has split counts as split in the same way.

        Args:
            prepared ([`PreparedData`]): From [`FinishedModel.prepare`].
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

    def scores(
        self,
        rows: Dataset,
        folder: Path,
        batch_size: int = 64,
        workers: int | None = None,
        change: Callable[[Transform], Transform] | None = None,
    ) -> np.ndarray:
        """
        Scores of rows with the columns of [`PreparedData`]; under `accelerate launch` each process computes its share,
        and all return all of them.

        Args:
            rows (`Dataset`): Columns `image`, `text` and `where`.
            folder (`Path`): What picture names are relative to.
            batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
            workers (`int`, *optional*): Processes that load pictures; by default none for a single batch, else as many
                as suit the machine.
            change (`Callable`, *optional*): From the transform of the rows to another, such as one of [`ablations`].

        Returns:
            `np.ndarray` of shape `(rows, labels)`: Probabilities, float32, in the order of the rows.
        """
        image_processor, tokenizer = self.processor.image_processor, self.processor.tokenizer
        size = image_processor.size["longest_edge"] if image_processor else None
        collator = Collator(tokenizer, getattr(tokenizer, "model_max_length", 0), size)
        transform = RowTransform(folder, image_processor and EvaluationImageTransform(image_processor))
        transform = transform if change is None else change(transform)
        options: dict[str, Any] = {**machine_defaults(), "bf16": False, "remove_unused_columns": False}
        options["use_cpu"] = not torch.accelerator.is_available()  # else Trainer overlooks that there are several
        if workers is None and len(rows) <= batch_size:
            workers = 0  # starting some takes longer than the work
        if workers is not None:
            options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder, though prediction writes nothing
            args = TrainingArguments(scratch, per_device_eval_batch_size=batch_size, **options)
            trainer = Trainer(self.model, args, data_collator=collator)
            result = trainer.predict(rows.with_transform(transform))
        return scores_of(result.predictions)

    def evaluate(self, rows: Dataset, folder: Path, batch_size: int = 64, ablations: bool = True) -> dict[str, Any]:
        """
        Figures of labelled rows.

        Args:
            rows (`Dataset`): Columns `image`, `text`, `where` and `labels`.
            folder, batch_size: As for [`FinishedModel.scores`].
            ablations (`bool`, *optional*, defaults to `True`): For a model with both modalities, `ablations` too; that
                takes three more passes, one of them without pictures.

        Returns:
            `dict`: That of [`report`], with `ablations` of [`ablation_figures`].

        Raises:
            `ValueError`: rows without labels.
        """
        config, references = self.model.config, references_of(rows)
        figures = report(self.scores(rows, folder, batch_size), references, config, rows)
        if ablations and config.has_image and config.has_text:

            def score(change: Callable[[Transform], Transform]) -> np.ndarray:
                return self.scores(rows, folder, batch_size, change=change)

            figures["ablations"] = ablation_figures(score, rows, references, config)
        return figures


def references_of(rows: Dataset) -> np.ndarray:
    """Multi-hot labels of rows, `(rows, labels)`; `ValueError` where they have none."""
    if "labels" not in rows.column_names:
        raise ValueError("these rows have no labels; name their column by --label_column or --label_columns")
    return rows.with_format("numpy")["labels"][:]
