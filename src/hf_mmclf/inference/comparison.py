"""Compare two models on the same rows, and say whether these rows can tell which one is better."""

from typing import Any

import numpy as np
from transformers.utils import logging

from ..data.arguments import DataArguments
from ..data.prepare import presence, references_of
from ..evaluation.bootstrap import paired_difference
from ..evaluation.report import absent_labels, format_table, warning_text
from .predictor import Predictor

logger = logging.get_logger(__name__)
SHOWN_ROWS = 5


def compare(
    a: Predictor,
    b: Predictor,
    data: DataArguments,
    split: str | None = None,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Compare two models on the same rows, each at its own thresholds. They may read different modalities.

    Args:
        a, b ([`Predictor`]): The models, with the same labels in any order.
        data ([`DataArguments`]): The source of the rows.
        split (`str`, *optional*):
            As for [`Predictor.choose_split`]. Defaults to the rows that the training of each model held out. Rows that
            only one of the models takes are left out.
        batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
        resamples (`int`, *optional*, defaults to 1000): Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        `dict`: `a` and `b` (folders), `split`, `rows` (how many), `left_out` (how many rows only one model takes),
        `bad_images` (row and reason), `warnings` (sentences about labels that no row has), `figures` (of
        [`paired_difference`]), `right` (in how many rows `both`, only `a`, only `b` and `neither` predict exactly the
        labels) and `only_one_right` (those rows: `row`, `right`, and the ids of the `labels` and of the predictions of
        `a` and `b`).

    Raises:
        `ValueError`: if the models have different labels, they share no rows, or the rows have no labels.
    """
    order = _label_order(a, b)
    folders, chosen = [], []
    bad_images: dict[tuple[str, str], None] = {}  # without repetitions
    for name, model in (("A", a), ("B", b)):
        logger.info(f"{name}: {model.folder}")  # before what is said of its rows
        prepared = model.prepare(data)
        folders.append(prepared.folder)
        bad_images |= dict.fromkeys(prepared.bad_images)
        chosen.append(model.choose_split(prepared, split, held_out=True))
    (split_a, rows_a), (split_b, rows_b) = chosen
    places_a, places_b = ({where: row for row, where in enumerate(rows["where"][:])} for rows in (rows_a, rows_b))
    shared = [where for where in places_a if where in places_b]
    if not shared:
        raise ValueError(
            f"no row is in both the {split_a} rows of {a.folder} and the {split_b} rows of {b.folder}; give rows that "
            "neither was trained on, or choose by --split"
        )
    rows_a = rows_a.select([places_a[where] for where in shared])
    rows_b = rows_b.select([places_b[where] for where in shared])
    references = references_of(rows_a)
    predicted_a, predicted_b = (
        model.model.config.decide(model.scores(rows, folder, batch_size), *presence(rows))
        for model, rows, folder in zip((a, b), (rows_a, rows_b), folders, strict=True)
    )
    predicted_b = predicted_b[:, order]
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "split": " and ".join(dict.fromkeys([split_a, split_b])),
        "rows": len(shared),
        "left_out": len(places_a.keys() ^ places_b.keys()),
        "bad_images": list(bad_images),
        "warnings": absent_labels(references, a.labels.names),
        "figures": paired_difference(predicted_a, predicted_b, references, resamples=resamples, seed=seed),
        **_right_rows(predicted_a, predicted_b, references, shared, np.array(a.labels.ids)),
    }


def comparison_text(comparison: dict[str, Any]) -> str:
    """Format a result of [`compare`] as plain text: a table of F1, how many rows each has right, and some of them."""
    titles = {"f1": "micro F1", "f1_macro": "macro F1", "f1_samples": "samples F1"}
    table = format_table(
        [
            {
                "": titles[name],
                "A": figures["a"],
                "B": figures["b"],
                "B - A": figures["difference"],
                "95%": "{:+.4f} to {:+.4f}".format(*figures["interval"]),
                "not better": figures["not_better"],
                "p": figures["p"],
            }
            for name, figures in comparison["figures"].items()
        ]
    )
    rows = f"{comparison['rows']:,} rows of {comparison['split']}"
    if comparison["left_out"]:
        rows += f"; {comparison['left_out']:,} that only one model takes are left out"
    right = "Rows with exactly their labels: both {both:,}, only A {a:,}, only B {b:,}, neither {neither:,}"
    parts = [f"A: {comparison['a']}\nB: {comparison['b']}\n{rows}", table]
    parts += map(warning_text, comparison.get("warnings", ()))
    parts.append(right.format(**comparison["right"]))
    shown = [
        {"row": row["row"], "only right": model.upper()}
        | {title: " ".join(row[title.lower()]) or "-" for title in ("labels", "A", "B")}
        for model in ("a", "b")
        for row in [row for row in comparison["only_one_right"] if row["right"] == model][:SHOWN_ROWS]
    ]
    return "\n\n".join([*parts, format_table(shown)] if shown else parts)


def _label_order(a: Predictor, b: Predictor) -> list[int]:
    """Return the index among the labels of `b` of each label of `a`."""
    ids, others = a.labels.ids, b.labels.ids
    if set(ids) != set(others):
        only = [(a.folder, set(ids) - set(others)), (b.folder, set(others) - set(ids))]
        known = "; ".join(f"only {folder} has {', '.join(sorted(labels))}" for folder, labels in only if labels)
        raise ValueError(f"the models have different labels: {known}. Expected the same set, in any order")
    return [others.index(label) for label in ids]


def _right_rows(
    predicted_a: np.ndarray, predicted_b: np.ndarray, references: np.ndarray, where: list[str], ids: np.ndarray
) -> dict[str, Any]:
    """Count and list the rows that a model has right: all its decisions on known labels are right."""
    unknown, actual = references < 0, references == 1
    tables = {"labels": actual, "a": predicted_a, "b": predicted_b}
    a, b = (((predicted == actual) | unknown).all(axis=1) for predicted in (predicted_a, predicted_b))
    counts = {"both": a & b, "a": a & ~b, "b": b & ~a, "neither": ~(a | b)}
    return {
        "right": {name: int(rows.sum()) for name, rows in counts.items()},
        "only_one_right": [
            {"row": where[row], "right": "a" if a[row] else "b"}
            | {name: ids[table[row]].tolist() for name, table in tables.items()}
            for row in np.flatnonzero(a != b)
        ],
    }
