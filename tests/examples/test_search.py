"""examples/search.py, and the trainer that it searches with."""

import pytest
import torch
import yaml
from support.training_runs import table_flags, write_table
from transformers import TrainerCallback

from hf_mmclf import build_trainer, parse_arguments

optuna = pytest.importorskip("optuna")


@pytest.fixture(autouse=True)
def one_thread():
    """More threads wait for each other with models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example(load_example):
    return load_example("search")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


class Notes(TrainerCallback):
    """Records dropout, learning rates and weights at the start of each trial."""

    def __init__(self):
        self.dropout, self.rates, self.starts = [], [], []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.dropout.append((model.config.dropout, model.dropout.p))
        self.rates.append({group["initial_lr"] for group in optimizer.param_groups})
        self.starts.append(model.classifier.weight.detach().clone())


@pytest.mark.slow
def test_trials_train_new_models_with_what_they_draw(table, tmp_path):
    flags = ["--output_dir", str(tmp_path), "--save_strategy", "no", "--load_best_model_at_end", "false"]
    arguments = parse_arguments([*table_flags(table), *flags, "--num_train_epochs", "4"])
    trainer = build_trainer(*arguments, lambda trial: {"dropout": trial.suggest_float("dropout", 0.0, 0.5)})
    assert len(trainer.train_dataset) == 48 and len(trainer.eval_dataset) == 6
    trainer.add_callback(notes := Notes())
    grid = {"dropout": [0.1, 0.3], "learning_rate": [0.0, 5e-3]}

    def space(trial):
        rate = trial.suggest_float("learning_rate", 0.0, 1.0)
        return {"learning_rate": rate, "backbone_learning_rate": rate / 2}

    best = trainer.hyperparameter_search(
        space,
        lambda metrics: metrics["eval_f1"],
        n_trials=4,
        direction="maximize",
        sampler=optuna.samplers.GridSampler(grid, seed=0),
        pruner=optuna.pruners.NopPruner(),
    )
    assert sorted(notes.dropout) == [(0.1, 0.1), (0.1, 0.1), (0.3, 0.3), (0.3, 0.3)]
    assert sorted(map(sorted, notes.rates)) == [[0.0], [0.0], [2.5e-3, 5e-3], [2.5e-3, 5e-3]]
    assert all(torch.equal(start, notes.starts[0]) for start in notes.starts)  # each trial starts from new weights
    assert best.hyperparameters["learning_rate"] == 5e-3 and best.objective > 0.7
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_example_writes_what_training_reads(example, table, tmp_path, capsys):
    output = tmp_path / "best.yaml"
    flags = [*table_flags(table), "--num_train_epochs", "1"]
    example.main(["--trials", "2", "--output", str(output), *flags])
    found = yaml.safe_load(output.read_text())
    names = ["preset", "dropout", "learning_rate", "backbone_learning_rate", "weight_decay"]
    assert list(found) == names and found["preset"] == "demo"
    said = capsys.readouterr().out
    assert output.read_text().startswith("# trial ") and f"hf-mmclf train --config {output}" in said
    model_args, _, _, args = parse_arguments(["--config", str(output)])
    assert (model_args.preset, model_args.dropout) == ("demo", found["dropout"])
    assert all(getattr(args, name) == found[name] for name in names[2:])
    with pytest.raises(SystemExit):
        example.main(["--output", str(output), *flags])
    assert "best.yaml already exists" in capsys.readouterr().err


def test_a_model_argument_that_is_none(table, tmp_path):
    arguments = parse_arguments([*table_flags(table), "--output_dir", str(tmp_path)])
    trainer = build_trainer(*arguments, lambda trial: {"drop": trial.suggest_float("drop", 0.0, 0.5)})
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop'"):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=1)


@pytest.mark.parametrize("flags", [["--streaming", "--max_steps", "2"], ["--cache_features"]])
def test_what_holds_for_one_run_only_is_refused(flags, table, tmp_path):
    arguments = parse_arguments([*table_flags(table), "--output_dir", str(tmp_path), *flags])
    with pytest.raises(ValueError, match="leave out streaming, cache_features, init_from"):
        build_trainer(*arguments)
