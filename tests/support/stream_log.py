"""A training run on a stream that logs which rows each process has seen, step by step."""

import json
import sys
from pathlib import Path

import pytest
import torch

from hf_mmclf import parse_arguments, train
from hf_mmclf.data.streaming import StreamCollator
from hf_mmclf.training.trainer import MMClfTrainer


def train_with_log(log: str | Path, flags: list[str]) -> None:
    """Train, and write the global step and the image numbers of each batch to `<log>-<process>`."""
    call, step = StreamCollator.__call__, MMClfTrainer.training_step

    def named(self, rows):
        batch = call(self, rows)
        if batch:
            batch["rows"] = torch.tensor([int(row["image"][:-4]) for row in rows])
        return batch

    def told(self, model, inputs, *args, **kwargs):
        with open(f"{log}-{self.args.process_index}", "a") as file:
            file.write(json.dumps([self.state.global_step, inputs.pop("rows").tolist()]) + "\n")
        return step(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamCollator, "__call__", named)
        patch.setattr(MMClfTrainer, "training_step", told)
        train(*parse_arguments(flags))


def seen(log: str | Path, process: int = 0) -> list[list]:
    """Return what a process has logged."""
    return [json.loads(line) for line in Path(f"{log}-{process}").read_text().splitlines()]


if __name__ == "__main__":
    train_with_log(sys.argv[1], sys.argv[2:])
