"""What a training run shows: a progress bar of steps, and one line for each evaluation."""

import sys
import time
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StepBar(ProgressCallback):
    """The progress bar of transformers, without the logs that it prints; `training.json` records them."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


class EvaluationLines(TrainerCallback):
    """
    Log one line for each evaluation: epoch, losses, F1, the best value so far and the time that is left.

    The best value is that of `metric_for_best_model`, over all evaluations of the run, also those before it was
    resumed. The time left is estimated from the time that the steps of this process took, evaluations included.
    """

    def __init__(self):
        self.started, self.first_step = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to measure time."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the line of the evaluation that has just ended."""
        if state.is_world_process_zero and state.log_history:
            seconds = time.monotonic() - self.started
            with tqdm.external_write_mode(file=sys.stderr):  # the line is above the progress bar
                logger.info(describe_evaluation(args, state, seconds, state.global_step - self.first_step))


def describe_evaluation(args: TrainingArguments, state: TrainerState, seconds: float, steps: int) -> str:
    """
    Describe the last evaluation of a run in one line.

    Args:
        args (`TrainingArguments`): The arguments of the run.
        state (`TrainerState`): The state of the run, with the evaluation as the last entry of its history.
        seconds (`float`): How long the last `steps` steps took.
        steps (`int`): Number of steps since the run was started or resumed.

    Returns:
        `str`: Such as `epoch 3/15, loss 0.31, validation loss 0.33, F1 0.81, samples-F1 0.84, best 0.82 (epoch 2),
        0:01:23 left`, with four digits.
    """
    *history, last = state.log_history
    before = [number for number, entry in enumerate(history) if "eval_loss" in entry]
    losses = [entry["loss"] for entry in history[before[-1] + 1 if before else 0 :] if "loss" in entry]
    metric = (args.metric_for_best_model or "f1").removeprefix("eval_")
    figures = {"loss": sum(losses) / len(losses)} if losses else {}
    figures |= {"validation loss": last.get("eval_loss"), "F1": last.get("eval_f1")}
    figures |= {"samples-F1": last.get("eval_f1_samples")}
    if metric not in ("f1", "f1_samples", "loss"):
        figures[metric] = last.get(f"eval_{metric}")
    parts = [_place(args, state, last)]
    parts += [f"{name} {value:.4f}" for name, value in figures.items() if value is not None]
    tried = [entry for entry in state.log_history if f"eval_{metric}" in entry]
    if tried:
        choose = min if args.greater_is_better is False else max
        best = choose(tried, key=lambda entry: entry[f"eval_{metric}"])
        parts.append(f"best {best[f'eval_{metric}']:.4f} ({_place(args, state, best).partition('/')[0]})")
    if steps > 0:
        left = seconds / steps * (state.max_steps - state.global_step)
        parts.append(f"{timedelta(seconds=round(left))} left")
    return ", ".join(parts)


def _place(args: TrainingArguments, state: TrainerState, entry: dict[str, Any]) -> str:
    """Return how far the run was at an entry of its history: in steps if their number was given, else in epochs."""
    if args.max_steps > 0:
        return f"step {entry['step']}/{state.max_steps}"
    return f"epoch {round(entry['epoch'], 2):g}/{args.num_train_epochs:g}"
