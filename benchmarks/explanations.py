"""Do explanations point at what carries a label? The generator of the embedded data set knows what does.

    python benchmarks/explanations.py [--model outputs/demo] [--rows 3000] [--epochs 10]

For each label that a model predicts and that is right, on the test rows: does the strongest pixel of the heat map lie
in a box that the generator has drawn the label in, is the strongest word one that it has written it with, and does the
score fall more without the picture than without the caption? Beside it stands what chance would reach (a random pixel,
a random word) and what the explanations of other rows reach on this one, in their order.

Not asked about are labels whose evidence is hidden by paper or left out of a vague note, and "striped", whose box is
the whole picture.
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
    """Which pixels lie in a box: (height, width)."""
    inside = np.zeros(size, dtype=bool)
    for left, top, right, bottom in boxes:
        inside[top:bottom, left:right] = True
    return inside


def questions(finished: Predictor, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list]:
    """For each kind of label and part of a row: the strongest place there, and which places are right."""
    asked = defaultdict(list)
    for row in rows:
        for evidence in row["evidence"]:
            label, boxes, words = evidence["label"], evidence["boxes"], evidence["words"]
            boxes = [] if label == "striped" else boxes
            if not (boxes or words):
                continue
            found = explain(finished, image=row["image"], text=row["text"], label=label)
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
    parser.add_argument("--model", help="Folder of a model of the embedded data set (default: trains one).")
    parser.add_argument("--rows", type=int, default=3000, help="Rows it was drawn with (default: %(default)s).")
    parser.add_argument("--epochs", type=int, help="Epochs of training (default: the preset's).")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model
        if folder is None:
            flags = ["--preset", "demo", "--demo_rows", str(options.rows), "--output_dir", f"{scratch}/model"]
            flags += ["--num_train_epochs", str(options.epochs)] if options.epochs else []
            folder = train(*parse_arguments(flags))
        finished = Predictor.load(Path(folder))
    print("\n" + format_table(hit_rates(questions(finished, demo_dataset(options.rows)["test"]))))


if __name__ == "__main__":
    main()
