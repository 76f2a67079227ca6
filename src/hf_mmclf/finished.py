"""A finished output folder at work: scores, reports and predictions for rows of any source."""

import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .arguments import machine_defaults
from .batches import Collator, EvaluationImageTransform, RowTransform
from .data import DataArguments, PreparedData, prepare_data
from .evaluation import report, scores_of
from .image_processing_mmclf import MMClfImageProcessor
from .labels import LabelSet
from .modeling_mmclf import MMClfForImageTextClassification


@dataclasses.dataclass
class FinishedModel:
    """
    A model with its preprocessing, as a training run leaves it.

    Args:
        folder (`Path`): Where it comes from.
        model ([`MMClfForImageTextClassification`]): With labels and thresholds in its `config`.
        processor ([`MMClfImageProcessor`], *optional*): `None` for a model without pictures.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): `None` for a model without captions.
    """

    folder: Path
    model: MMClfForImageTextClassification
    processor: MMClfImageProcessor | None
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def load(cls, folder: str | Path) -> "FinishedModel":
        """Loads an output folder; `FileNotFoundError` where there is none, or an unfinished one."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            unfinished = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
            raise FileNotFoundError(f"{folder}: no finished model here (no config.json){unfinished}")
        model = MMClfForImageTextClassification.from_pretrained(folder)
        config = model.config
        processor = MMClfImageProcessor.from_pretrained(folder) if config.has_image else None
        return cls(folder, model, processor, AutoTokenizer.from_pretrained(folder) if config.has_text else None)

    def prepare(
        self, args: DataArguments, with_labels: bool = True, sources: dict[str, Dataset] | None = None
    ) -> PreparedData:
        """Rows for this model, with its labels and nothing split; the arguments are those of [`prepare_data`]."""
        config = self.model.config
        names = tuple(config.id2label.values())
        labels = LabelSet(tuple(config.label_ids or names), names)
        return prepare_data(args, config.has_image, config.has_text, labels, with_labels, sources)

    def choose_split(self, prepared: PreparedData, name: str | None) -> tuple[str, Dataset]:
        """
        One split of the source and its name: the named one, or else test, validation or train.

        A source without splits has those that training made of it, which `splits.csv` of the folder records.
        """
        splits = prepared.splits
        if name is None:
            name = next(key for key in ("test", "validation", "train") if key in splits)
            return name, splits[name]
        recorded = self.folder / "splits.csv"
        if list(splits) == ["train"] and recorded.is_file():
            with recorded.open(encoding="utf-8", newline="") as file:
                wanted = {row["row"] for row in csv.DictReader(file) if row["split"] == name}
            rows = [row for row, where in enumerate(splits["train"]["where"]) if where in wanted]
            if rows:
                return name, splits["train"].select(rows)
        if name in splits:
            return name, splits[name]
        raise ValueError(f"no split {name!r}: the source has {', '.join(splits)}, {recorded.name} none of its rows")

    def scores(self, rows: Dataset, folder: Path, batch_size: int = 64, workers: int | None = None) -> np.ndarray:
        """
        Scores of rows with the columns of [`PreparedData`].

        Args:
            rows (`Dataset`): Columns `image`, `text` and `where`.
            folder (`Path`): What picture names are relative to.
            batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
            workers (`int`, *optional*): Processes that load pictures; by default chosen from the machine.

        Returns:
            `np.ndarray` of shape `(rows, labels)`: Probabilities, float32, in the order of the rows.
        """
        size = self.processor.size["longest_edge"] if self.processor else None
        collator = Collator(self.tokenizer, getattr(self.tokenizer, "model_max_length", 0), size)
        transform = RowTransform(folder, self.processor and EvaluationImageTransform(self.processor))
        options: dict[str, Any] = {**machine_defaults(), "bf16": False, "remove_unused_columns": False}
        if workers is not None:
            options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder, though prediction writes nothing
            args = TrainingArguments(scratch, per_device_eval_batch_size=batch_size, **options)
            trainer = Trainer(self.model, args, data_collator=collator)
            result = trainer.predict(rows.with_transform(transform))
        return scores_of(result.predictions)

    def evaluate(self, rows: Dataset, folder: Path, batch_size: int = 64) -> dict[str, Any]:
        """The figures of [`report`] for labelled rows, at 0.5 and at the model's own thresholds."""
        if "labels" not in rows.column_names:
            raise ValueError("these rows have no labels; name their column by --label_column")
        return report(self.scores(rows, folder, batch_size), np.asarray(rows["labels"]), self.model.config)
