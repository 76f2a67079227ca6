"""Predicted labels as files and as lines of text."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from datasets import Dataset

from ..data.prepare import presence
from ..model.configuration_mmclf import MMClfConfig

PREDICTION_SUFFIXES = (".csv", ".jsonl")


def check_suffix(path: str | Path, suffixes: tuple[str, ...]) -> None:
    """`ValueError` for a file name that does not end in one of `suffixes`."""
    if Path(path).suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """A text file to write that is there whole or not at all; what it replaces stays until then."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_predictions(path: str | Path, rows: Dataset, scores: np.ndarray, config: MMClfConfig) -> None:
    """
    Writes predicted labels to a file that is there whole or not at all.

    Args:
        path (`str` or `Path`): `.csv` for the competition's form, `ImageID,Labels`, with the labels as the data writes
            them, separated by spaces (by `|` if a label has a space in it); `.jsonl` for one object a row, with the
            labels and all scores by name.
        rows (`Dataset`): The columns `image`, `text` and `where`.
        scores (`np.ndarray` of shape `(rows, labels)`): Probabilities.
        config ([`MMClfConfig`]): Labels and thresholds.
    """
    check_suffix(path, PREDICTION_SUFFIXES)
    with atomic_file(path) as file:
        if Path(path).suffix == ".csv":
            ids = np.array(config.label_ids or config.label_names)
            delimiter = "|" if any(len(label.split()) > 1 for label in ids) else " "
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["ImageID", "Labels"])
            for name, hits in zip(_names(rows), config.decide(scores, *presence(rows)), strict=True):
                writer.writerow([name, delimiter.join(ids[hits])])
        else:
            for name, ranked in zip(_names(rows), _ranked(scores, config, rows), strict=True):
                labels = [label for label, _, hit in ranked if hit]
                line = {"image": name, "labels": labels, "scores": {label: score for label, score, _ in ranked}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def prediction_lines(rows: Dataset, scores: np.ndarray, config: MMClfConfig) -> list[str]:
    """One line of text a row: its name, and its labels with their scores, most likely first."""
    return [
        f"{name}: " + (", ".join(f"{label} {score:.2f}" for label, score, hit in ranked if hit) or "no label")
        for name, ranked in zip(_names(rows), _ranked(scores, config, rows), strict=True)
    ]


def _ranked(scores: np.ndarray, config: MMClfConfig, rows: Dataset) -> Iterator[list[tuple[str, float, bool]]]:
    """Label, score and whether it is predicted, for each row, most likely first."""
    names = config.label_names
    for row, hits in zip(scores, config.decide(scores, *presence(rows)), strict=True):
        order = np.argsort(-row, kind="stable")
        yield [(names[i], round(float(row[i]), 6), bool(hits[i])) for i in order]


def _names(rows: Dataset) -> list[str]:
    """What each row is called: its picture's name, or its place in the source."""
    names = [image if isinstance(image, str) or image is None else image.get("path") for image in rows["image"]]
    return [name or where for name, where in zip(names, rows["where"], strict=True)]
