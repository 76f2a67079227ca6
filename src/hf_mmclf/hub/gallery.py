"""The gallery of mistakes: one HTML file with a model's figures, its worst predictions and labels that look wrong."""

import base64
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import Environment
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from ..data.images import open_image
from ..data.prepare import presence, references_of
from ..evaluation.metrics import Counts, multi_label_metrics, per_label_report
from ..inference.predictor import Predictor
from ..model.configuration_mmclf import best_labels

TEMPLATE = Path(__file__).with_name("gallery_template.html")
CARDS = 2_000  # rows shown as mistakes, of all labels together
MISTAKES = 8  # of one kind and one label at most
SUSPECTS = 100  # given labels that look wrong
PAIRS = 30
EDGE = 96  # pixels of the short edge of a thumbnail
CUTS = np.round(np.arange(1, 100) / 100, 2)  # of the slider


def render_gallery(predictor: Predictor, rows: Dataset, folder: Path, scores: np.ndarray) -> str:
    """
    Render the gallery of labelled rows.

    Args:
        predictor ([`Predictor`]): The model.
        rows (`Dataset`): Rows with the columns `image`, `text`, `where` and `labels`.
        folder (`Path`): The folder to which image names are relative.
        scores (`np.ndarray` of shape `(rows, labels)`): Their scores.

    Returns:
        `str`: An HTML page that loads nothing else. Labels, texts and names of rows are escaped.

    Raises:
        `ValueError`: If the rows have no labels, or an image cannot be read.
    """
    config, references, present = predictor.model.config, references_of(rows), presence(rows)
    names, predicted = config.label_names, config.decide(scores, *present)
    many = max(1, min(MISTAKES, CARDS // (2 * len(names))))
    false_positives, false_negatives = mistakes(scores, predicted, references, many)
    ranked = suspects(scores, references)
    shown = {row for found in (*false_positives, *false_negatives) for row in found}
    shown |= {row for row, _ in ranked or ()}
    texts, where = rows["text"][:], rows["where"][:]
    cards = {}
    for row in tqdm(sorted(shown), desc="thumbnails", leave=False):
        cards[row] = {
            "image": _thumbnail(rows[row]["image"], folder, where[row]) if config.has_image else None,
            "text": texts[row] if config.has_text else None,
            "where": where[row],
            "given": [names[i] for i in np.flatnonzero(references[row] == 1)],
            "predicted": [names[i] for i in np.flatnonzero(predicted[row])],
        }
    figures = per_label_report(scores, references, config.cuts(scores, *present), names)
    labels = [
        figure | {"threshold": threshold, "false_positives": positives, "false_negatives": negatives}
        for figure, threshold, positives, negatives in zip(
            figures, config.thresholds, false_positives, false_negatives, strict=True
        )
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        model=predictor.folder.resolve().name,
        rows=len(rows),
        figures=multi_label_metrics(scores, references, config.cuts(scores, *present)),
        labels=labels,
        scores=scores,
        cards=cards,
        many=many,
        suspects=ranked,
        unknown=int((references < 0).any(1).sum()),
        confusions=confusions(predicted, references, names),
        reads=config,
        curves=curves(scores, references, config.min_labels),
    )


def mistakes(
    scores: np.ndarray, predicted: np.ndarray, references: np.ndarray, many: int
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Find the most confident mistakes of each label.

    Args:
        scores, predicted, references (`np.ndarray` of shape `(rows, labels)`): Probabilities, decisions and labels.
        many (`int`): The largest number of mistakes of one kind and one label.

    Returns:
        `tuple[list[list[int]], list[list[int]]]`: For each label the rows that wrongly have it, highest score first,
        and the rows that wrongly lack it, lowest score first.
    """
    found: tuple[list, list] = ([], [])
    for label, column in enumerate(scores.T):
        for rows, wrong, order in (
            (found[0], predicted[:, label] & (references[:, label] == 0), np.argsort(-column, kind="stable")),
            (found[1], ~predicted[:, label] & (references[:, label] == 1), np.argsort(column, kind="stable")),
        ):
            rows.append(order[wrong[order]][:many].tolist())
    return found


def suspects(scores: np.ndarray, references: np.ndarray) -> list[tuple[int, int]] | None:
    """
    Rank the given labels that look wrong, by confident learning (Northcutt et al. 2021) as cleanlab does it.

    Args:
        scores, references (`np.ndarray` of shape `(rows, labels)`): Probabilities and multi-hot labels, -1 for
            unknown. Rows with an unknown label are left out.

    Returns:
        `list[tuple[int, int]]`: The most suspicious decisions as row and label, the worst first; `None` if cleanlab is
        not installed.
    """
    if find_spec("cleanlab") is None:
        return None
    from cleanlab.multilabel_classification.rank import get_label_quality_scores_per_class

    known = np.flatnonzero((references >= 0).all(1))
    if not len(known):
        return []
    given = [np.flatnonzero(row).tolist() for row in references[known] == 1]
    quality = get_label_quality_scores_per_class(given, scores[known].astype(np.float64))
    rows, labels = np.unravel_index(np.argsort(quality, axis=None, kind="stable")[:SUSPECTS], quality.shape)
    return list(zip(known[rows].tolist(), labels.tolist(), strict=True))


def confusions(predicted: np.ndarray, references: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Count the rows that lack one label and wrongly have another, for the most frequent pairs of labels."""
    missed, wrong = (references == 1) & ~predicted, (references == 0) & predicted
    together = missed.T.astype(np.int64) @ wrong
    pairs = np.argsort(-together, axis=None, kind="stable")[:PAIRS]
    found = [(*np.unravel_index(pair, together.shape), together.flat[pair]) for pair in pairs]
    return [{"given": names[a], "predicted": names[b], "rows": int(count)} for a, b, count in found if count]


def curves(scores: np.ndarray, references: np.ndarray, min_labels: int) -> dict[str, list]:
    """Compute micro-F1, samples-F1 and the figures of each label, as percentages, at each threshold of the slider."""
    best, known = best_labels(scores, min_labels), references >= 0
    found: dict[str, list] = {"cuts": CUTS.tolist(), "micro": [], "samples": [], "labels": []}
    for cut in CUTS:
        counts = Counts.of((scores >= cut) | best, references)
        labels = counts.sum(axis=0)
        found["micro"].append(_percent(counts.sum().f_beta()))
        found["samples"].append(_percent(counts.sum(axis=1).f_beta(empty=1.0)[known.any(1)].mean()))
        columns = labels.precision(), labels.recall(), labels.f_beta()
        found["labels"].append([[_percent(value) for value in label] for label in zip(*columns, strict=True)])
    return found


def _percent(value: float) -> float:
    return round(100 * float(value), 1)


def _thumbnail(cell: Any, folder: Path, where: str) -> str | None:
    """Return an image as a small JPEG in a data URL, or `None` if there is none."""
    if cell is None:
        return None
    image = to_pil_image(open_image(cell, folder, where, short_edge=EDGE))
    image.thumbnail((2 * EDGE, EDGE))
    content = BytesIO()
    image.save(content, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
