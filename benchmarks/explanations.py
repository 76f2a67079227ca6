"""Do explanations point at the evidence of a label? The generator of the embedded data set knows the evidence.

    python benchmarks/explanations.py [--model outputs/demo] [--rows 3000] [--epochs 10]

It looks at each correct label that a model predicts on the test rows. Is the strongest pixel of the heat map in a box
in which the generator has drawn the label? Is the strongest word one that the generator has written for the label?
Does the score fall more without the image than without the text? The table also has the hit rates of chance (a random
pixel, a random word) and of the explanation of another row.

Labels are left out if paper hides their evidence or if a vague note does not mention it. So is the image evidence of
"striped", whose box is the whole image.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from hf_mmclf import Predictor, demo_dataset, parse_arguments, train
from hf_mmclf.data.demo import DEMO_LABELS
from hf_mmclf.evaluation.report import format_table
from hf_mmclf.inference.explanation import explain

KINDS = {"image": "seen", "text": "read", "both": "seen and read"}


def area(boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> np.ndarray:
    """Return a mask of the pixels inside a box, of shape `(height, width)`."""
    inside = np.zeros(size, dtype=bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    return inside


def questions(predictor: Predictor, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list]:
    """Return the strongest place and a mask of the correct places, by kind of label and part of a row."""
    asked = defaultdict(list)
    for row in rows:
        for evidence in row["evidence"]:
            label, boxes, words = evidence["label"], evidence["boxes"], evidence["words"]
            boxes = [] if label == "striped" else boxes
            if not (boxes or words):
                continue
            found = explain(predictor, image=row["image"], text=row["text"], label=label)
            if found.score < found.threshold:
                continue
            kind = KINDS[DEMO_LABELS[label]]
            if boxes:
                inside = area(boxes, found.heat_map.shape)
                asked[kind, "strongest pixel"].append((found.heat_map.argmax(), inside.ravel()))
            if words:
                weights = [word.weight for word in found.words]
                asked[kind, "strongest word"].append((np.argmax(weights), np.isin(np.arange(len(weights)), words)))
            if DEMO_LABELS[label] != "both":
                scores = (found.score_without_image, found.score_without_text)
                right = np.array([DEMO_LABELS[label] == "image", DEMO_LABELS[label] == "text"])
                asked[kind, "decisive modality"].append((np.argmin(scores), right))
    return asked


def hit_rates(asked: dict[tuple[str, str], list]) -> list[dict[str, Any]]:
    """Return one table row for each kind of label and part of a row."""
    table = []
    for (kind, part), cases in sorted(asked.items()):
        hits = sum(right[place] for place, right in cases)
        interval = binomtest(int(hits), len(cases)).proportion_ci(method="wilson")
        places = [place for place, _ in cases]
        shifted = zip(places[1:] + places[:1], (right for _, right in cases), strict=True)
        table.append(
            {
                "labels that are": kind,
                "asked": part,
                "cases": len(cases),
                "hit rate": hits / len(cases),
                "95% from": interval.low,
                "to": interval.high,
                "chance": np.mean([right.mean() for _, right in cases]),
                "other row's": np.mean([place < len(right) and right[place] for place, right in shifted]),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="Folder of a model of the embedded data set (default: train one).")
    parser.add_argument(
        "--rows", type=int, default=3000, help="Number of rows of its data set (default: %(default)s)."
    )
    parser.add_argument("--epochs", type=int, help="Number of training epochs (default: the preset's).")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            flags = ["--preset", "demo", "--demo_rows", str(options.rows), "--output_dir", f"{scratch}/model"]
            flags += ["--num_train_epochs", str(options.epochs)] if options.epochs else []
            folder = train(*parse_arguments(flags))
        predictor = Predictor.load(Path(folder))
    print("\n" + format_table(hit_rates(questions(predictor, demo_dataset(options.rows)["test"]))))


if __name__ == "__main__":
    main()
