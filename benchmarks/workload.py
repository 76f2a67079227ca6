"""One workload for the measurements of `speed.py`: a preset, its rows, and each way to run it.

The rows are 640 px JPEGs: those of `../shared/data/coco301` if it exists, otherwise drawn ones. Everything runs on the
CPU in batches of 16.
"""

import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import baseline
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from hf_mmclf import MMClfTrainer, Predictor, demo_dataset, parse_arguments, pipeline
from hf_mmclf.data.arguments import DataArguments
from hf_mmclf.data.collator import Preprocessing
from hf_mmclf.data.prepare import prepare_data
from hf_mmclf.data.tables import read_table
from hf_mmclf.inference.predictor import machine_defaults
from hf_mmclf.training.feature_cache import FeatureCache
from hf_mmclf.training.inputs import build_config, build_model, build_processor, build_tokenizer, settle_labels

SHARED = Path(__file__).parents[2] / "shared" / "data"
BATCH = 16
SKIPPED = 4  # first steps, in which workers start and buffers fill
AHEAD = 10  # more batches than are measured, so that loading continues until the end


class Clock(TrainerCallback):
    """The time at which each step ends."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())

    @property
    def rate(self) -> float:
        """Rows per second after the first steps."""
        times = self.times[SKIPPED:]
        return BATCH * (len(times) - 1) / (times[-1] - times[0])


class Workload:
    """
    A preset with random weights, on real or drawn images, built in the same way as by `hf_mmclf.train`.

    Args:
        preset (`str`): A preset with both backbones.
        steps (`int`): Number of steps to measure, after the first few.
        flags (`str`): More arguments of a training run.
        rows (`int`, *optional*):
            Rows of the table, which repeats the images. Defaults to as many as the steps need.
    """

    def __init__(self, preset: str, steps: int, *flags: str, rows: int | None = None):
        self._scratch = tempfile.TemporaryDirectory()  # removed together with the workload
        self.steps, self.all_steps = steps, steps + SKIPPED + 1
        source, self.folder = image_rows(Path(self._scratch.name))
        count = rows or (self.all_steps + AHEAD) * BATCH * 5 // 4  # a fifth is held out
        table = source.select([row % len(source) for row in range(count)])
        prepared = prepare_data(DataArguments(image_dir=str(self.folder)), sources={"train": table})
        self.rows = prepared.splits["train"]
        self.measured = self.rows.select(range(min(steps * BATCH, len(self.rows)))).remove_columns("labels")

        model_args, _, augmentation, self.args = parse_arguments([*self._flags(preset), *flags])
        config = build_config(model_args)
        settle_labels(config, prepared, self.rows)
        tokenizer, _ = build_tokenizer(model_args, config, self.rows)
        self.model = build_model(config, model_args, tokenizer, prepared)
        self.processor = build_processor(self.model, model_args, tokenizer)
        self.preprocessing = Preprocessing(self.processor, self.folder)
        self.augmented = self.preprocessing.training(augmentation)

        strengths = dataclasses.asdict(augmentation)
        swap, _ = strengths.pop("swap_words"), strengths.pop("drop_words")
        known = self.processor.image_processor
        by_hand = baseline.augmentation(known.size["longest_edge"], known.image_mean, known.image_std, **strengths)
        positions = config.text_config.max_position_embeddings
        self.by_hand = baseline.ImageTextRows(self.rows.to_list(), self.folder, by_hand, tokenizer, positions, swap)

    def _flags(self, preset: str) -> list[str]:
        vocabulary = SHARED / "bert_vocab" / "vocab.txt"
        flags = ["--preset", preset, "--from_scratch", "--output_dir", f"{self._scratch.name}/output"]
        flags += ["--tokenizer", str(vocabulary) if vocabulary.is_file() else "train"]
        flags += ["--per_device_train_batch_size", str(BATCH), "--max_steps", str(self.all_steps)]
        flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        return [*flags, "--disable_tqdm", "true"]

    def trainer(self, model: nn.Module | None = None, **options: Any) -> MMClfTrainer:
        """Make the trainer of a run, which prints nothing."""
        options = {
            "data_collator": self.preprocessing.collator,
            "train_dataset": self.rows.with_transform(self.augmented),
            **options,
        }
        trainer = MMClfTrainer(self.model if model is None else model, self.args, **options)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def ours(self) -> float:
        """Rows per second of a training run."""
        clock = Clock()
        self.trainer(callbacks=[clock]).train()
        return clock.rate

    @cached_property
    def plain_model(self) -> nn.Module:
        return baseline.frozen_by_hand(self.model)

    def cached(self, views: int) -> float:
        """Rows per second of all epochs with a feature cache, including the time to compute it."""
        with tempfile.TemporaryDirectory() as folder:
            self.args.feature_cache_dir = folder
            began = time.perf_counter()
            cache = FeatureCache(self.model, self.preprocessing.collator, self.args, {})
            rows = cache.compute({"train": (self.rows, self.augmented, views)})
            self.trainer(data_collator=cache.cached_collator, train_dataset=rows["train"]).train()
            return self.args.num_train_epochs * len(self.rows) / (time.perf_counter() - began)

    def baseline(self) -> float:
        """Rows per second of the loop written by hand."""
        steps, clock = baseline.train(self.plain_model, baseline.loader(self.by_hand, BATCH)), Clock()
        for _ in itertools.islice(steps, self.all_steps):
            clock.on_step_end()
        return clock.rate

    @cached_property
    def bare_model(self) -> nn.Module:
        return copy.deepcopy(self.model).to(memory_format=torch.channels_last)

    @cached_property
    def training_batches(self) -> list[dict[str, torch.Tensor]]:
        return in_memory(itertools.islice(self.trainer().get_train_dataloader(), 8))

    def bare_step(self) -> float:
        """Rows per second of the optimizer step on tensors in memory."""
        model, clock = self.bare_model.train(), Clock()
        optimizer = self.trainer(model).create_optimizer()
        for batch in itertools.islice(itertools.cycle(self.training_batches), self.all_steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            clock.on_step_end()
        return clock.rate

    @cached_property
    def evaluation_batches(self) -> list[dict[str, torch.Tensor]]:
        rows = self.preprocessing.dataset(self.measured)
        return in_memory(DataLoader(rows, BATCH, collate_fn=self.preprocessing.collator))

    @torch.inference_mode()
    def bare_forward(self) -> float:
        """Rows per second of the forward pass on tensors in memory."""
        model, batches = self.bare_model.eval(), self.evaluation_batches
        model(**batches[0])
        return self.rate_of(lambda: [model(**batch).logits for batch in batches])

    def scores(self) -> float:
        """Rows per second of `Predictor.scores`."""
        predictor = Predictor(self.folder, self.model.eval(), self.processor)
        return self.rate_of(lambda: predictor.scores(self.measured, self.folder, BATCH))

    def pipeline(self) -> float:
        """Rows per second of `pipeline` on a list of files."""
        pipe = pipeline(self.model, processor=self.processor, device="cpu")
        files = [str(self.folder / name) for name in self.measured["image"]]
        records = [{"image": file, "text": text} for file, text in zip(files, self.measured["text"], strict=True)]
        workers = machine_defaults()["dataloader_num_workers"]
        return self.rate_of(lambda: pipe(records, batch_size=BATCH, num_workers=workers))

    def rate_of(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return len(self.measured) / (time.perf_counter() - began)


def in_memory(batches: Iterable[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Return batches with images in the memory format of the bare model."""
    channels_last = torch.channels_last
    return [
        {name: x.contiguous(memory_format=channels_last) if x.ndim == 4 else x for name, x in batch.items()}
        for batch in batches
    ]


def image_rows(scratch: Path) -> tuple[Dataset, Path]:
    """Return rows with `image`, `text`, `labels` and `where`, and the folder of their images."""
    real = SHARED / "coco301"
    if real.is_dir():
        columns = {"ImageID": "image", "Caption": "text", "Labels": "labels"}
        return read_table(real / "all.csv").rename_columns(columns), real / "data"
    drawn = concatenate_datasets(list(demo_dataset(rows=100, size=640).values()))
    names = [f"{row}.jpg" for row in range(len(drawn))]
    for name, image in zip(names, drawn["image"], strict=True):
        image.save(scratch / name, quality=90)
    return Dataset.from_dict({**drawn.select_columns(["text", "labels"])[:], "image": names, "where": names}), scratch
