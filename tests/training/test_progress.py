"""The line of an evaluation, from the state of a run."""

import pytest
from transformers import TrainerState

from hf_mmclf import MMClfTrainingArguments
from hf_mmclf.training.progress import describe_evaluation


@pytest.fixture
def arguments(tmp_path):
    def make(**options):
        return MMClfTrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=4, **options)

    return make


def entry(epoch, **figures):
    return {"epoch": epoch, "step": int(epoch * 10), **figures}


HISTORY = [
    entry(0.5, loss=0.75),
    entry(1, loss=0.5),
    entry(1, eval_loss=0.625, eval_f1=0.5, eval_f1_samples=0.6, eval_map=0.25),
    entry(1.5, loss=0.5),
    entry(2, loss=0.25),
    entry(2, eval_loss=0.375, eval_f1=0.25, eval_map=0.5),
]


def state_of(history, step):
    return TrainerState(log_history=history, global_step=step, max_steps=40)


def test_a_line_has_the_mean_loss_since_the_last_one_the_best_value_and_the_time_left(arguments):
    lines = [
        describe_evaluation(arguments(), state_of(HISTORY[:3], 10), 30.0, 10),
        describe_evaluation(arguments(), state_of(HISTORY, 20), 60.0, 20),
    ]
    assert lines == [
        "epoch 1/4, loss 0.6250, validation loss 0.6250, F1 0.5000, samples-F1 0.6000, best 0.5000 (epoch 1), "
        "0:01:30 left",
        "epoch 2/4, loss 0.3750, validation loss 0.3750, F1 0.2500, best 0.5000 (epoch 1), 0:01:00 left",
    ]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"metric_for_best_model": "map"}, "F1 0.2500, map 0.5000, best 0.5000 (epoch 2), "),
        ({"metric_for_best_model": "eval_loss"}, "F1 0.2500, best 0.3750 (epoch 2), "),
        ({"metric_for_best_model": "accuracy"}, "F1 0.2500, 0:01:00 left"),
    ],
)
def test_the_best_is_that_of_the_metric_that_chooses_the_checkpoint(options, expected, arguments):
    assert expected in describe_evaluation(arguments(**options), state_of(HISTORY, 20), 60.0, 20)


def test_a_run_of_steps_counts_steps_and_a_resumed_one_measures_its_own(arguments):
    line = describe_evaluation(arguments(max_steps=40), state_of(HISTORY, 20), 60.0, 5)
    assert line.startswith("step 20/40, ") and line.endswith("best 0.5000 (step 10), 0:04:00 left")


def test_an_evaluation_without_training(arguments):
    line = describe_evaluation(arguments(), state_of([entry(0, eval_loss=0.5, eval_f1=0.75)], 0), 1.0, 0)
    assert line == "epoch 0/4, validation loss 0.5000, F1 0.7500, best 0.7500 (epoch 0)"
