"""Search for learning rates, weight decay and dropout with Optuna: `pip install 'hf_mmclf[search]'`.

    python examples/search.py --trials 20 --num_train_epochs 3        # on the embedded data set
    python examples/search.py --trials 20 --preset warmerdbert --data train.csv --image_dir images
    hf-mmclf train --config search.yaml --data train.csv --image_dir images

All flags except `--trials` and `--output` are those of `hf-mmclf train`. Each trial trains a new model. Its score is
the last micro-F1 on the validation rows, at the best threshold. A trial that is worse than the others ends early. The
best values are written to `--output`.
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
    """Draw model arguments."""
    return {"dropout": trial.suggest_float("dropout", 0.0, 0.5)}


def training_space(trial: "Trial") -> dict[str, float]:
    """Draw training arguments."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
        "backbone_learning_rate": trial.suggest_float("backbone_learning_rate", 1e-5, 1e-2, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-4, 0.3, log=True),
    }


def objective(metrics: Mapping[str, float]) -> float:
    """Return the score of a trial."""
    return metrics["eval_f1"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--trials", type=int, default=20, help="number of models to train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default="search.yaml", help="file to write (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    if own.output.exists():
        parser.error(f"{own.output} already exists; give another --output")
    with tempfile.TemporaryDirectory() as scratch:
        # trials save no checkpoints, so they cannot load the best one either
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
