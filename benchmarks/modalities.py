"""Is an image with its text better than either of them? Three small models on the embedded data set.

    python benchmarks/modalities.py [--seeds 3] [--epochs 12]

Prints the micro-F1 on the test rows of the image-only, the text-only and the fused model, over all labels and by the
modality that a label needs. `possible` is the F1 of an ideal model with the same modalities: the generator of the data
knows it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score

from hf_mmclf import DataArguments, demo_dataset, parse_arguments, train
from hf_mmclf.data.demo import DEMO_LABELS
from hf_mmclf.evaluation.metrics import multi_label_metrics
from hf_mmclf.evaluation.report import format_table
from hf_mmclf.evaluation.thresholds import best_threshold
from hf_mmclf.inference.predictor import Predictor

MODELS = {"demo-image": "image", "demo-text": "text", "demo": "both"}


def possible_f1(rows: Dataset, modality: str) -> float:
    """Compute the micro-F1 of the exact probabilities given the modality (`"image"`, `"text"` or `"both"`)."""
    chances = [row[modality] for row in rows["chances"]]
    references = [[label in labels for label in DEMO_LABELS] for labels in rows["labels"]]
    return multi_label_metrics(chances, references, best_threshold(chances, references))["f1"]


def test_f1(folder: Path) -> dict[str, float]:
    """Compute the micro-F1 on the test rows, over all labels and over those that need the same modality."""
    predictor = Predictor.load(folder)
    prepared = predictor.prepare(DataArguments())
    rows, config = prepared.splits["test"], predictor.model.config
    hits = config.decide(predictor.scores(rows, prepared.folder))
    references = np.array(rows["labels"], dtype=bool)
    kinds = np.array([DEMO_LABELS[label] for label in config.label_ids])
    figures = {"all": f1_score(references, hits, average="micro")}
    for kind in ("image", "text", "both"):
        figures[kind] = f1_score(references[:, kinds == kind], hits[:, kinds == kind], average="micro")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seeds", type=int, default=1, help="Number of training runs of each model (default: %(default)s)."
    )
    parser.add_argument("--epochs", type=int, help="Number of epochs of each run (default: the preset's).")
    options = parser.parse_args()
    test, table = demo_dataset()["test"], []
    for preset, modality in MODELS.items():
        runs = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as scratch:
                flags = ["--preset", preset, "--seed", str(seed), "--output_dir", f"{scratch}/model"]
                flags += ["--num_train_epochs", str(options.epochs)] if options.epochs else []
                runs.append(test_f1(train(*parse_arguments(flags))))
        totals = [run["all"] for run in runs]
        row = {"model": preset, "test F1": statistics.mean(totals), "lowest": min(totals), "highest": max(totals)}
        row["possible"] = possible_f1(test, modality)
        for kind, title in (("image", "seen labels"), ("text", "read labels"), ("both", "labels of both")):
            row[title] = statistics.mean(run[kind] for run in runs)
        table.append(row)
    print("\n" + format_table(table))


if __name__ == "__main__":
    main()
