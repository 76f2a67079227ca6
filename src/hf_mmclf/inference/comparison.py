"""Which of two models is better, and whether these rows can tell."""

from typing import Any

import numpy as np

from ..data.prepare import DataArguments, presence, references_of
from ..evaluation.bootstrap import paired_difference
from ..evaluation.report import format_table
from .predictor import Predictor

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
    Two models on the same rows, each at its own thresholds. They may read other modalities.

    Args:
        a, b ([`Predictor`]): With the same labels, in any order.
        data ([`DataArguments`]): Where the rows come from.
        split (`str`, *optional*): As for [`Predictor.choose_split`]; by default what each model's training held
            out. Rows that only one of the models takes are left out.
        batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
        resamples, seed (`int`, *optional*, default to 1000 and 0): Of the bootstrap.

    Returns:
        `dict`: `a` and `b` (folders), `split`, `rows`, `left_out` (rows that only one takes), `bad_images` (row and
        reason), `figures` (of [`paired_difference`]), `right` (how many rows have exactly their labels by `both`, only
        `a`, only `b`, `neither`) and `only_one_right` (of those rows: `row`, `right`, and the ids of the `labels` and
        of what `a` and `b` predict).

    Raises:
        `ValueError`: other labels; no row that both take; rows without labels.
    """
    order = _label_order(a, b)
    prepared = [model.prepare(data) for model in (a, b)]
    names, rows = zip(
        *(model.choose_split(found, split, held_out=True) for model, found in zip((a, b), prepared, strict=True)),
        strict=True,
    )
    places = [{where: row for row, where in enumerate(own["where"][:])} for own in rows]
    shared = [where for where in places[0] if where in places[1]]
    if not shared:
        raise ValueError(
            f"no row is in both the {names[0]} rows of {a.folder} and the {names[1]} rows of {b.folder}; give rows "
            "that neither was trained on, or choose by --split"
        )
    rows = [own.select([place[where] for where in shared]) for own, place in zip(rows, places, strict=True)]
    references = references_of(rows[0])
    predicted_a, predicted_b = (
        model.model.config.decide(model.scores(own, found.folder, batch_size), *presence(own))
        for model, own, found in zip((a, b), rows, prepared, strict=True)
    )
    predicted_b = predicted_b[:, order]
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "split": " and ".join(dict.fromkeys(names)),
        "rows": len(shared),
        "left_out": len(set().union(*places)) - len(shared),
        "bad_images": list(dict.fromkeys(bad for found in prepared for bad in found.bad_images)),
        "figures": paired_difference(predicted_a, predicted_b, references, resamples=resamples, seed=seed),
        **_right_rows(predicted_a, predicted_b, references, shared, np.array(_label_ids(a))),
    }


def comparison_text(comparison: dict[str, Any]) -> str:
    """What [`compare`] found as plain text: a table of F1, how many rows each has right, and some of those."""
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
        rows += f"; {comparison['left_out']:,} that only one of them takes are left out"
    right = "Rows with exactly their labels: both {both:,}, only A {a:,}, only B {b:,}, neither {neither:,}"
    parts = [f"A: {comparison['a']}\nB: {comparison['b']}\n{rows}", table, right.format(**comparison["right"])]
    shown = []
    for model in ("a", "b"):
        for row in [row for row in comparison["only_one_right"] if row["right"] == model][:SHOWN_ROWS]:
            labels = {title: " ".join(row[title.lower()]) or "-" for title in ("labels", "A", "B")}
            shown.append({"row": row["row"], "only right": model.upper(), **labels})
    return "\n\n".join([*parts, format_table(shown)] if shown else parts)


def _label_ids(finished: Predictor) -> list[str]:
    """How the data writes the labels, in the order of the logits."""
    config = finished.model.config
    return list(config.label_ids or config.label_names)


def _label_order(a: Predictor, b: Predictor) -> list[int]:
    """For each label of `a` its place among those of `b`."""
    ids, others = _label_ids(a), _label_ids(b)
    if set(ids) != set(others):
        only = [(a.folder, set(ids) - set(others)), (b.folder, set(others) - set(ids))]
        known = "; ".join(f"only {folder} knows {', '.join(sorted(labels))}" for folder, labels in only if labels)
        raise ValueError(f"the models have different labels: {known}. Expected the same set, in any order")
    return [others.index(label) for label in ids]


def _right_rows(
    predicted_a: np.ndarray, predicted_b: np.ndarray, references: np.ndarray, where: list[str], ids: np.ndarray
) -> dict[str, Any]:
    """A row is right where every decision on a label that is known is."""
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
