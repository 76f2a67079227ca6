"""The plots of the card, as PNG files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from ..evaluation.metrics import Counts

# The files and their titles, in the order of the card.
PLOTS = {
    "f1_by_threshold.png": "F1 against threshold",
    "f1_by_label.png": "F1 of each label",
    "precision_recall.png": "Precision against recall",
    "training.png": "Loss and F1 over training",
}

# the palette of Okabe and Ito, which colour-blind readers can tell apart
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
STYLE = {
    "figure.dpi": 110,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,  # names of labels may contain dollar signs
}
SHOWN_LABELS = 80  # more bars make the plot unreadable

Outcomes = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_plots(
    folder: Path,
    outcomes: Outcomes,
    per_label: Sequence[Mapping[str, Any]],
    threshold: float,
    history: Sequence[Mapping[str, Any]],
    kept_epoch: float | None = None,
) -> None:
    r"""
    Write the files of `PLOTS`. The plot of the training is left out if the training logged no loss.

    Args:
        folder (`Path`): The folder to write to.
        outcomes (`Mapping[str, tuple[np.ndarray, np.ndarray]]`):
            Scores and multi-hot labels by split, both `(rows, labels)`. The plots of labels show the last split.
        per_label (`Sequence[Mapping]`): The figures of [`per_label_report`] on the last split, with `f1_at_0.5`.
        threshold (`float`): The fitted global threshold.
        history (`Sequence[Mapping]`): The log of the `Trainer`.
        kept_epoch (`float`, *optional*): The epoch of the checkpoint that was kept.
    """
    split, (scores, references) = list(outcomes.items())[-1]
    with matplotlib.rc_context(STYLE):
        figures = [
            threshold_figure(outcomes, threshold),
            label_figure(per_label, split),
            precision_recall_figure(scores, references, per_label, split),
            training_figure(history, kept_epoch),
        ]
        for name, figure in zip(PLOTS, figures, strict=True):
            if figure is not None:
                _save(figure, Path(folder) / name)


def threshold_figure(outcomes: Outcomes, threshold: float) -> Figure:
    """Plot micro- and macro-F1 of each split against the threshold."""
    figure, axes = _figure(7, 3.8)
    thresholds = np.linspace(0, 1, 201)
    for (split, (scores, references)), line in zip(outcomes.items(), ("-", "--"), strict=False):
        micro, macro = f1_by_threshold(scores, references, thresholds)
        axes.plot(thresholds, micro, line, color=BLUE, label=f"micro, {split}")
        axes.plot(thresholds, macro, line, color=VERMILLION, label=f"macro, {split}")
    axes.axvline(0.5, color="0.55", linewidth=1, linestyle=":", label="0.5")
    axes.axvline(threshold, color="black", linewidth=1, label=f"fitted on validation rows, {threshold:.3f}")
    axes.set(xlabel="threshold", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02), title=PLOTS["f1_by_threshold.png"])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def f1_by_threshold(
    scores: np.ndarray, references: np.ndarray, thresholds: Iterable[float]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Compute micro-F1 and macro-F1 at several thresholds.

    Args:
        scores, references (`np.ndarray` of shape `(rows, labels)`): Probabilities, and multi-hot labels.
        thresholds (`Iterable[float]`): The thresholds.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Micro-F1 and macro-F1, each of shape `(thresholds,)`.
    """
    scores = np.asarray(scores, dtype=np.float64)
    by_label = [Counts.of(scores >= threshold, references).sum(axis=0) for threshold in thresholds]
    micro = [counts.sum().f_beta() for counts in by_label]
    return np.array(micro), np.array([counts.f_beta().mean() for counts in by_label])


def label_figure(per_label: Sequence[Mapping[str, Any]], split: str) -> Figure:
    """Plot the F1 of each label: bars at the fitted thresholds, marks at 0.5, the best label at the top."""
    shown = sorted(per_label, key=lambda row: -row["support"])[:SHOWN_LABELS]
    shown.sort(key=lambda row: (row["f1"], row["f1_at_0.5"]))
    figure, axes = _figure(7, 1.2 + 0.2 * len(shown))
    places = np.arange(len(shown))
    axes.barh(places, [row["f1"] for row in shown], height=0.7, color=SKY, label="at the fitted threshold")
    axes.plot(
        [row["f1_at_0.5"] for row in shown], places, "D", color="black", markersize=3.5, linestyle="", label="at 0.5"
    )
    axes.set_yticks(places, [f"{_short(row['label'])} ({row['support']:,})" for row in shown])
    axes.grid(axis="y", visible=False)
    selection = "" if len(shown) == len(per_label) else f", the {len(shown)} most frequent"
    title = f"{PLOTS['f1_by_label.png']}, {split} rows (support in brackets{selection})"
    axes.set(xlabel="F1", xlim=(0, 1.02), ylim=(-0.7, len(shown) - 0.3))
    figure.suptitle(title, x=0.01, ha="left", fontsize=STYLE["axes.titlesize"])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def precision_recall_figure(
    scores: np.ndarray, references: np.ndarray, per_label: Sequence[Mapping[str, Any]], split: str
) -> Figure:
    """
    Plot precision against recall, for all decisions together and for each label if there are at most 12.

    Args:
        scores, references (`np.ndarray` of shape `(rows, labels)`): Probabilities, and multi-hot labels.
        per_label (`Sequence[Mapping]`): The figures of [`per_label_report`], at the fitted thresholds.
        split (`str`): The name of the split, for the title.
    """
    figure, axes = _figure(7, 4.2)
    known, references = np.asarray(references) >= 0, np.asarray(references) == 1
    looks = [(color, line) for line in ("-", "--") for color in (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)]
    for i, row in enumerate(per_label if len(per_label) <= len(looks) else ()):
        if not references[:, i].any():
            continue  # recall is undefined
        precision, recall, _ = precision_recall_curve(references[known[:, i], i], scores[known[:, i], i])
        color, line = looks[i]
        # the number comes first, because legends leave out names that begin with an underscore
        label = f"{row['average_precision']:.3f}  {_short(row['label'])}"
        axes.plot(recall, precision, line, color=color, linewidth=1, drawstyle="steps-post", label=label)
    if references.any():
        flat = references[known], scores[known]
        precision, recall, _ = precision_recall_curve(*flat)
        label = f"{average_precision_score(*flat):.3f}  all decisions"
        axes.plot(recall, precision, color="black", linewidth=2, drawstyle="steps-post", label=label)
        hits = sum(row["recall"] * row["support"] for row in per_label)
        point = hits / references.sum(), hits / max(sum(row["predicted"] for row in per_label), 1)
        axes.plot(*point, "o", color="black", markersize=7, label="at the fitted thresholds")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="average precision", alignment="left")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
    axes.set_title(f"{PLOTS['precision_recall.png']}, {split} rows")
    return figure


def training_figure(history: Sequence[Mapping[str, Any]], kept_epoch: float | None = None) -> Figure | None:
    """Plot losses and the F1 of the validation rows by epoch. Returns `None` if no loss was logged."""

    def curve(axes: Axes, key: str, look: str, color: str, label: str) -> None:
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), look, color=color, markersize=3, label=label)

    if not any(key in entry for entry in history for key in ("loss", "eval_loss")):
        return None
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    loss, f1 = figure.subplots(1, 2)
    curve(loss, "loss", "-", BLUE, "training rows")
    curve(loss, "eval_loss", "o--", VERMILLION, "validation rows")
    curve(f1, "eval_f1", "o-", BLUE, "micro")
    curve(f1, "eval_f1_macro", "o--", VERMILLION, "macro")
    for axes, title in ((loss, "Loss"), (f1, "F1 of validation rows, best threshold")):
        axes.set(xlabel="epoch", title=title, ylim=(0, None if axes is loss else 1.02))
        if kept_epoch is not None:
            axes.axvline(kept_epoch, color="0.55", linewidth=1, linestyle=":", label="kept")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _save(figure: Figure, path: Path) -> None:
    """Save a figure with a palette of 64 colours, which looks the same and needs a third of the bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64).save(path, optimize=True)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _short(name: str, length: int = 28) -> str:
    """Shorten the name of a label to one line."""
    name = " ".join(name.split())
    return name if len(name) <= length else f"{name[: length - 1]}…"
