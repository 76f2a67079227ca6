import matplotlib
import numpy as np
import pytest
from PIL import Image

from hf_mmclf.evaluation.metrics import multi_label_metrics, per_label_report
from hf_mmclf.evaluation.thresholds import best_threshold
from hf_mmclf.hub.plots import (
    PLOTS,
    f1_by_threshold,
    label_figure,
    precision_recall_figure,
    threshold_figure,
    training_figure,
    write_plots,
)

HISTORY = [
    {"loss": 0.7, "epoch": 0.5, "step": 5},
    {"loss": 0.5, "epoch": 1.0, "step": 10},
    {"eval_loss": 0.6, "eval_f1": 0.4, "eval_f1_macro": 0.3, "epoch": 1.0, "step": 10},
    {"loss": 0.3, "epoch": 2.0, "step": 20},
    {"eval_loss": 0.4, "eval_f1": 0.6, "eval_f1_macro": 0.5, "epoch": 2.0, "step": 20},
    {"train_runtime": 12.0, "train_loss": 0.5, "epoch": 2.0, "step": 20},
]


@pytest.fixture
def outcomes():
    """Makes scores and labels of two splits, the first label without a positive, and the report on the second."""

    def make(labels: int, rows: int = 200):
        rng = np.random.default_rng(0)
        splits = {}
        for split in ("validation", "test"):
            references = rng.random((rows, labels)) < rng.uniform(0.05, 0.4, labels)
            references[:, 0] = False
            noise = rng.normal(size=(rows, labels))
            splits[split] = (1 / (1 + np.exp(1 - noise - 2 * references))).astype(np.float32), references.astype(float)
        names = [f"_odd $label$ {i}^{{_" for i in range(labels)]
        report = per_label_report(*splits["test"], best_threshold(*splits["validation"]), names)
        for row, at_half in zip(report, per_label_report(*splits["test"], 0.5, names), strict=True):
            row["f1_at_0.5"] = at_half["f1"]
        return splits, report

    return make


@pytest.mark.parametrize("labels", [1, 3, 80])
def test_files_are_small_images(labels, outcomes, tmp_path):
    before = dict(matplotlib.rcParams)
    splits, report = outcomes(labels)
    write_plots(tmp_path, splits, report, 0.4, HISTORY, 2.0)
    assert {file.name for file in tmp_path.iterdir()} == set(PLOTS)
    for file in tmp_path.iterdir():
        assert file.stat().st_size < 100_000
        with Image.open(file) as image:
            assert image.format == "PNG" and 600 < image.width < 1000 and image.height > 150
            assert len(image.convert("RGB").getcolors(100_000)) > 5  # not blank
    assert dict(matplotlib.rcParams) == before


def test_f1_by_threshold_equals_the_metric(outcomes):
    scores, references = outcomes(4)[0]["test"]
    thresholds = [0.0, 0.3, float(scores[3, 2]), 0.9, 1.0]
    micro, macro = f1_by_threshold(scores, references, thresholds)
    for i, threshold in enumerate(thresholds):
        expected = multi_label_metrics(scores, references, threshold)
        assert (micro[i], macro[i]) == pytest.approx((expected["f1"], expected["f1_macro"]))


def test_thresholds_are_marked_for_every_split(outcomes):
    splits, _ = outcomes(3)
    (axes,) = threshold_figure(splits, 0.37).axes
    lines = {line.get_label(): line.get_xdata() for line in axes.lines}
    assert list(lines["0.5"]) == [0.5, 0.5] and list(lines["fitted on validation rows, 0.370"]) == [0.37, 0.37]
    assert {"micro, validation", "macro, validation", "micro, test", "macro, test"} < set(lines)
    assert [line.get_linestyle() for line in axes.lines[:4]] == ["-", "-", "--", "--"]  # not by colour alone


def test_labels_are_sorted_by_f1_and_only_the_most_frequent_are_shown(outcomes):
    _, report = outcomes(5)
    (axes,) = label_figure(report, "test").axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == sorted(row["f1"] for row in report)
    names = [text.get_text() for text in axes.get_yticklabels()]
    best = max(report, key=lambda row: row["f1"])
    assert names[-1] == f"{best['label']} ({best['support']:,})"
    marks = dict(zip(names, axes.lines[0].get_xdata(), strict=True))
    assert marks[names[-1]] == best["f1_at_0.5"]

    many = [{"label": str(i), "support": i, "f1": 0.5, "f1_at_0.5": 0.4} for i in range(200)]
    figure = label_figure(many, "test")
    shown = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert len(shown) == 80 and "199 (199)" in shown and "119 (119)" not in shown
    assert "the 80 most frequent" in figure.get_suptitle()


@pytest.mark.parametrize("labels, curves", [(3, 2), (12, 11), (13, 0)])
def test_few_labels_have_a_precision_recall_curve_each(labels, curves, outcomes):
    splits, report = outcomes(labels)
    (axes,) = precision_recall_figure(*splits["test"], report, "test").axes
    named = [line.get_label() for line in axes.lines if "odd" in line.get_label()]
    assert len(named) == curves  # the first label has no positive
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == len(axes.lines)
    if named:
        assert named[0].startswith(f"{report[1]['average_precision']:.3f}")
    scores, references = splits["test"]
    fitted = [row["threshold"] for row in report]
    expected = multi_label_metrics(scores, references, fitted)
    point = axes.lines[-1]
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((expected["recall"], expected["precision"]))


def test_training_shows_what_was_logged():
    loss, f1 = training_figure(HISTORY, kept_epoch=2.0).axes
    assert [list(line.get_ydata()) for line in loss.lines[:2]] == [[0.7, 0.5, 0.3], [0.6, 0.4]]
    assert [list(line.get_xdata()) for line in f1.lines] == [[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]]
    assert [line.get_label() for line in f1.lines] == ["micro", "macro", "kept"]
    only_loss = training_figure(HISTORY[:2])
    assert len(only_loss.axes[0].lines) == 1 and not only_loss.axes[1].lines


def test_a_run_that_logged_nothing_has_no_plot_of_the_training(outcomes, tmp_path):
    splits, report = outcomes(2)
    write_plots(tmp_path, {"validation": splits["validation"]}, report, 0.5, HISTORY[-1:])
    assert {file.name for file in tmp_path.iterdir()} == set(PLOTS) - {"training.png"}
