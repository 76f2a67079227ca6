"""A finished output folder at work: scores, reports and predictions for rows of any source."""

import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .arguments import machine_defaults
from .batches import Collator, EvaluationImageTransform, RowTransform
from .configuration_mmclf import MMClfConfig
from .data import DataArguments, PreparedData, prepare_data
from .evaluation import label_names, report, scores_of
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
        """Loads an output folder; `FileNotFoundError` for none or an unfinished one, `ValueError` for another kind."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            unfinished = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
            raise FileNotFoundError(f"{folder}: no finished model here (no config.json){unfinished}")
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, MMClfConfig):
            raise ValueError(f"{folder}: a {config.model_type} model; expected a folder that `hf-mmclf train` wrote")
        model = MMClfForImageTextClassification.from_pretrained(folder, config=config)
        processor = MMClfImageProcessor.from_pretrained(folder) if config.has_image else None
        return cls(folder, model, processor, AutoTokenizer.from_pretrained(folder) if config.has_text else None)

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

    def scores(self, rows: Dataset, folder: Path, batch_size: int = 64, workers: int | None = None) -> np.ndarray:
        """
        Scores of rows with the columns of [`PreparedData`].

        Args:
            rows (`Dataset`): Columns `image`, `text` and `where`.
            folder (`Path`): What picture names are relative to.
            batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
            workers (`int`, *optional*): Processes that load pictures; by default none for a single batch, else as many
                as suit the machine.

        Returns:
            `np.ndarray` of shape `(rows, labels)`: Probabilities, float32, in the order of the rows.
        """
        size = self.processor.size["longest_edge"] if self.processor else None
        collator = Collator(self.tokenizer, self._max_tokens(), size)
        transform = RowTransform(folder, self.processor and EvaluationImageTransform(self.processor))
        options: dict[str, Any] = {**machine_defaults(), "bf16": False, "remove_unused_columns": False}
        if workers is None and len(rows) <= batch_size:
            workers = 0  # starting some takes longer than the work
        if workers is not None:
            options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0}
        with tempfile.TemporaryDirectory() as scratch:  # Trainer wants a folder, though prediction writes nothing
            args = TrainingArguments(scratch, per_device_eval_batch_size=batch_size, **options)
            trainer = Trainer(self.model, args, data_collator=collator)
            result = trainer.predict(rows.with_transform(transform))
        return scores_of(result.predictions)

    def _max_tokens(self) -> int:
        """What the tokenizer says, but no more than the model has positions for."""
        positions = getattr(self.model.config.text_config, "max_position_embeddings", 512)
        return min(getattr(self.tokenizer, "model_max_length", positions), positions)

    def evaluate(self, rows: Dataset, folder: Path, batch_size: int = 64) -> dict[str, Any]:
        """The figures of [`report`] for labelled rows, at 0.5 and at the model's own thresholds."""
        if "labels" not in rows.column_names:
            raise ValueError("these rows have no labels; name their column by --label_column or --label_columns")
        return report(self.scores(rows, folder, batch_size), rows.with_format("numpy")["labels"][:], self.model.config)
