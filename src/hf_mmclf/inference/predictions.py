"""Rows to predict from image files and texts, and predicted labels as files and as lines of text."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from datasets import Dataset

from ..data.prepare import presence
from ..evaluation.report import printable
from ..model.configuration_mmclf import MMClfConfig

PREDICTION_SUFFIXES = (".csv", ".jsonl")


def rows_of(images: Sequence[str] | None, texts: Sequence[str] | None, folder: str | Path = ".") -> Dataset:
    """
    Make rows of image files and texts.

    Args:
        images (`Sequence[str]`, *optional*): Names of image files.
        texts (`Sequence[str]`, *optional*): One text for each image, or texts without images.
        folder (`str` or `Path`, *optional*, defaults to `"."`): The folder to which `images` are relative.

    Returns:
        `Dataset`: The columns `image`, `text` and `where`.

    Raises:
        `ValueError`: if there are images and texts, but not one text for each image.
        `FileNotFoundError`: if an image file does not exist.
    """
    count = len(images or texts)
    images, texts = images or [None] * count, texts or [None] * count
    if len(texts) != count:
        raise ValueError(f"{count} images, but {len(texts)} texts; expected one text for each image")
    if missing := [image for image in images if image and not Path(folder, image).is_file()]:
        raise FileNotFoundError(f"no such image: {', '.join(missing)}")
    return Dataset.from_dict({"image": images, "text": texts, "where": [f"row {row + 1}" for row in range(count)]})


def check_suffix(path: str | Path, suffixes: Sequence[str]) -> None:
    """Raise `ValueError` if a file name ends in none of `suffixes`."""
    if Path(path).suffix not in suffixes:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(suffixes)}")


def check_output(
    path: str | Path,
    suffixes: Sequence[str],
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
    folders: Iterable[str | Path] = (),
) -> None:
    """
    Check the name of a file to write, before any work is done.

    Args:
        path (`str` or `Path`): The file.
        suffixes (`Sequence[str]`): What its name may end in.
        overwrite (`bool`, *optional*, defaults to `False`): Whether it may replace another file.
        inputs (`Iterable[str]`, *optional*): Files that are read, which it must not replace. `None` is left out.
        folders (`Iterable[str]`, *optional*): Folders of models, of which it must not replace any file.

    Raises:
        `ValueError`: if the name ends in something else.
        `FileExistsError`: if the file exists and must not be replaced.
    """
    check_suffix(path, suffixes)
    file = Path(path).resolve()
    if file.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file by --output")
    if parent := next((folder for folder in file.parents if folder.is_file()), None):
        raise FileExistsError(f"{path} cannot be written, because {parent.name} is a file; give another --output")
    if not file.exists():
        return
    if any(file.is_relative_to(Path(given).resolve()) for given in inputs if given is not None):
        raise FileExistsError(f"{path} is the input; give another --output")
    if any(file.is_relative_to(Path(folder).resolve()) for folder in folders):
        raise FileExistsError(f"{path} is a file of the model; give another --output")
    if not overwrite:
        raise FileExistsError(f"{path} exists already; give another --output, or --overwrite to replace it")


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that appears, or replaces an old one, only when everything has been written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        text = {} if "b" in mode else dict(encoding="utf-8", newline="")
        with part.open(mode, **text) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write figures to a JSON file by an atomic write."""
    with atomic_file(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)


def write_vectors(path: str | Path, vectors: np.ndarray) -> None:
    """Write an array to a file (`.npy`) by an atomic write."""
    with atomic_file(path, "wb") as file:
        np.save(file, vectors)


def write_predictions(path: str | Path, rows: Dataset, scores: np.ndarray, config: MMClfConfig) -> None:
    """
    Write predicted labels to a file by an atomic write.

    Args:
        path (`str` or `Path`):
            `.csv` for the form of the competition, `ImageID,Labels`: the labels as the data writes them, separated by
            spaces, or by `|` if a label has a space in it. `.jsonl` for one object a row, with label names and scores.
        rows (`Dataset`): Rows with the columns `image`, `text` and `where`.
        scores (`np.ndarray` of shape `(rows, labels)`): Probabilities.
        config ([`MMClfConfig`]): The labels and thresholds.

    Raises:
        `ValueError`: if `path` has another ending.
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
            for name, ranked in _ranked(rows, scores, config):
                labels = [label for label, _, hit in ranked if hit]
                line = {"image": name, "labels": labels, "scores": {label: score for label, score, _ in ranked}}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def prediction_lines(rows: Dataset, scores: np.ndarray, config: MMClfConfig) -> list[str]:
    """
    Describe each row in one line: its name, and its labels with their scores, most likely first.

    Args:
        rows, scores, config: As for [`write_predictions`].
    """
    return [
        printable(
            f"{name}: " + (", ".join(f"{label} {score:.2f}" for label, score, hit in ranked if hit) or "no label")
        )
        for name, ranked in _ranked(rows, scores, config)
    ]


def _ranked(rows: Dataset, scores: np.ndarray, config: MMClfConfig) -> Iterator[tuple[str, list]]:
    """Yield the name of each row, and for each label its name, score and whether it is predicted, by falling score."""
    labels = config.label_names
    for name, row, hits in zip(_names(rows), scores, config.decide(scores, *presence(rows)), strict=True):
        order = np.argsort(-row, kind="stable")
        yield name, [(labels[i], round(float(row[i]), 6), bool(hits[i])) for i in order]


def _names(rows: Dataset) -> list[str]:
    """Return the name of each row: the name of its image or, without one, its place in the source."""
    names = [image if isinstance(image, str) or image is None else image.get("path") for image in rows["image"]]
    return [name or where for name, where in zip(names, rows["where"], strict=True)]
