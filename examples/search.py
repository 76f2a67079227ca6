"""Search for learning rates, weight decay and dropout with Optuna: `pip install 'hf_mmclf[search]'`.

    python examples/search.py --trials 20 --num_train_epochs 3        # on the embedded data set
    python examples/search.py --trials 20 --preset warmerdbert --data train.csv --image_dir pictures
    hf-mmclf train --config search.yaml --data train.csv --image_dir pictures

All flags but the two below are those of `hf-mmclf train`. A trial trains a new model and is judged by its last
micro-F1 on the validation rows, at the threshold that suits it best; one that lags behind is ended early. The best
values go to `--output`.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hf_mmclf import build_trainer, parse_arguments

if TYPE_CHECKING:
    from optuna import Trial


def model_space(trial: "Trial") -> dict[str, float]:
    """Of the model."""
    return {"dropout": trial.suggest_float("dropout", 0.0, 0.5)}


def training_space(trial: "Trial") -> dict[str, float]:
    """Of its training."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "backbone_learning_rate": trial.suggest_float("backbone_learning_rate", 1e-5, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.3, log=True),
    }


def objective(metrics: Mapping[str, float]) -> float:
    return metrics["eval_f1"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trials", type=int, default=20, help="models to train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default="search.yaml", help="file to write (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    if own.output.exists():
        parser.error(f"{own.output} is there already; give another --output")
    with tempfile.TemporaryDirectory() as scratch:
        # no trial leaves a checkpoint, so none goes back to its best one either
        flags = ["--save_strategy", "no", "--load_best_model_at_end", "false", "--output_dir", scratch]
        arguments = parse_arguments([*rest, *flags], prog=parser.prog)
        trainer = build_trainer(*arguments, model_space)
        best = trainer.hyperparameter_search(
            training_space, objective, n_trials=own.trials, direction="maximize", backend="optuna"
        )
    found = {"preset": arguments[0].preset, **best.hyperparameters}
    about = f"# trial {best.run_id} of {own.trials}: F1 {best.objective:.4f} on the validation rows\n"
    own.output.write_text(about + yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    print(f"\n{about}{yaml.safe_dump(found, sort_keys=False)}\nTrain with them: hf-mmclf train --config {own.output}")


if __name__ == "__main__":
    main()
