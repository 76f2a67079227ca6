import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from support.metric_oracle import averages, precision_recall_f
from transformers import EvalPrediction

from hf_mmclf import MMClfConfig
from hf_mmclf.evaluation.bootstrap import by_label_count, by_text_length, f1_intervals
from hf_mmclf.evaluation.report import (
    FIGURES,
    ComputeMetrics,
    format_table,
    report,
    report_table,
    report_text,
    scores_of,
    shown_labels,
)

NAMES = {0: "person", 1: "traffic light", 2: "dog"}
THRESHOLDS = {"global": dict(threshold=0.3), "per label": dict(threshold=0.3, label_thresholds={"dog": 0.7})}


def config_of(**fields):
    return MMClfConfig(image_backbone="resnet18", id2label=NAMES, label_ids=["1", "3", "10"], **fields)


@pytest.fixture
def labelled():
    """Scores of 40 rows that know something of the references, as float32 like a model's."""
    rng = np.random.default_rng(0)
    references = (rng.random((40, 3)) < [0.6, 0.3, 0.1]).astype(np.float32)
    return (0.35 * references + 0.65 * rng.random((40, 3))).astype(np.float32), references


@pytest.mark.parametrize("fields", THRESHOLDS.values(), ids=THRESHOLDS)
def test_report_has_the_figures_of_the_oracle(fields, labelled):
    scores, references = labelled
    figures = report(scores, references, config_of(**fields))
    assert figures["rows"] == 40
    fitted = np.array([0.3, 0.3, fields.get("label_thresholds", {}).get("dog", 0.3)])
    for part, threshold in (("at_0.5", np.full(3, 0.5)), ("fitted", fitted)):
        predicted = scores >= threshold
        expected = averages(predicted, references)
        assert {key: figures[part][key] for key in expected} == pytest.approx(expected)
        assert figures[part]["map"] == pytest.approx(average_precision_score(references, scores, average="macro"))
        assert figures[part]["no_label_rate"] == pytest.approx(1 - predicted.any(1).mean())
    assert figures["fitted"]["f1"] != figures["at_0.5"]["f1"]
    for i, label in enumerate(figures["per_label"]):
        truth, predicted = references[:, i], scores[:, i] >= fitted[i]
        assert (label["label"], label["threshold"]) == (NAMES[i], fitted[i])
        assert (label["support"], label["predicted"]) == (truth.sum(), predicted.sum())
        found = label["precision"], label["recall"], label["f1"]
        assert found == pytest.approx(precision_recall_f(predicted, truth))
        assert label["f1_at_0.5"] == pytest.approx(precision_recall_f(scores[:, i] >= 0.5, truth)[2])
        assert label["average_precision"] == pytest.approx(average_precision_score(truth, scores[:, i]))


def test_a_score_equal_to_its_threshold_is_predicted_everywhere_in_a_report():
    """Half of the scores equal their threshold; without them nothing is right."""
    references = np.array([[1, 0], [0, 1]] * 20)
    for at in (0.5, float(np.float32(0.3))):
        scores = np.where(references, np.float32(at), np.float32(0.1))
        config = MMClfConfig(image_backbone="resnet18", text_config=dict(model_type="bert"), threshold=at)
        figures = report(scores, references, config, texts=["a dog"] * 40)
        assert figures["fitted"]["f1"] == figures["fitted"]["recall"] == 1
        assert figures["at_0.5"]["f1"] == (at == 0.5)
        assert [(row["f1"], row["f1_at_0.5"], row["predicted"]) for row in figures["per_label"]] == [
            (1, float(at == 0.5), 20)
        ] * 2
        assert figures["intervals"] == dict.fromkeys(("f1", "f1_macro", "f1_samples"), [1, 1])
        for key in ("by_label_count", "by_caption_length"):
            assert [(group["rows"], group["f1"]) for group in figures[key]] == [(40, 1)]
        assert figures["warnings"] == []


def test_the_tables_have_each_figure_in_its_place(labelled):
    scores, references = labelled
    config = config_of(**THRESHOLDS["per label"])
    reports = {"validation": report(scores[:25], references[:25], config)}
    reports["test"] = report(scores[25:], references[25:], config)
    keys = {"micro": "f1", "macro": "f1_macro", "weighted": "f1_weighted", "samples": "f1_samples"}
    expected = [["rows", "of", "rows", "F1", "at", "0.5", "fitted", "95%"]]
    for name, split in reports.items():
        for title, key in keys.items():
            line = [name, str(split["rows"]), title, f"{split['at_0.5'][key]:.4f}", f"{split['fitted'][key]:.4f}"]
            interval = [] if title == "weighted" else ["{:.3f}-{:.3f}".format(*split["intervals"][key])]
            expected.append(line + interval)
    assert [line.split() for line in report_table(reports).splitlines()] == expected
    header, *lines = report_text(reports).partition("Test rows:\n\n")[2].splitlines()[:4]
    assert header.split() == ["label", "threshold", "rows", "F1", "at", "0.5", "F1"]
    for line, label in zip(lines, reports["test"]["per_label"], strict=True):
        assert line.startswith(f"{label['label']} ")
        figures = [
            f"{label['threshold']:.4f}",
            str(label["support"]),
            f"{label['f1_at_0.5']:.4f}",
            f"{label['f1']:.4f}",
        ]
        assert line.removeprefix(label["label"]).split() == figures


def test_the_screen_has_thirty_labels_and_a_hundred_columns():
    """Of 80 labels those with the most rows are shown; the first is in 40 rows, and the last 40 are in none."""
    names = {
        i: f"a label with a very long name, in words that go on and on, number {i}: " + "x" * 50 for i in range(80)
    }
    references = (np.arange(40)[:, None] >= np.arange(80)).astype(int)
    config = MMClfConfig(image_backbone="resnet18", id2label=names)
    split = report(references * 0.9, references, config)
    text = report_text(dict.fromkeys(("train", "validation", "test"), split), "figures.json")
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\na label with") == 30
    assert "\n(the 30 labels with the most rows; 50 more are in figures.json)\n" in text
    assert [label["support"] for label in shown_labels(split["per_label"])] == list(range(40, 10, -1))
    assert shown_labels(split["per_label"][::-1]) == split["per_label"][29::-1]
    absent = split["warnings"][-1]
    assert absent.startswith("No row has these labels, which count as 0 in macro averages") and "and 20 more" in absent
    assert split["fitted"]["f1_macro"] == 0.5 and split["intervals"]["f1_macro"][1] == 0.5


def test_report_has_intervals_and_subgroups(labelled):
    scores, references = labelled
    config = config_of(**THRESHOLDS["per label"], text_config=dict(model_type="bert"))
    texts = ["two words", None, "one " * 12, "w"] * 10
    figures = report(scores, references, config, texts=texts)
    predicted = scores >= [0.3, 0.3, 0.7]
    assert figures["intervals"] == f1_intervals(predicted, references)
    assert figures["by_label_count"] == by_label_count(predicted, references)
    assert figures["by_caption_length"] == by_text_length(predicted, references, texts)
    assert "by_caption_length" not in report(scores, references, config)
    assert "by_caption_length" not in report(scores, references, config_of(), texts=texts)
    assert json.loads(json.dumps(figures)) == figures


def test_rows_with_a_missing_modality_have_their_own_thresholds(labelled):
    scores, references = labelled
    config = config_of(
        threshold=0.3, text_config=dict(model_type="bert"), missing_thresholds={"image": 0.6, "text": 1}
    )
    has_image, texts = np.array([True, False, True, True] * 10), ["a", "b", None, "c"] * 10
    predicted = scores.astype(float) >= np.array([0.3, 0.6, 1, 0.3] * 10)[:, None]
    figures = report(scores, references, config, has_image, texts)
    expected = averages(predicted, references)
    assert {key: figures["fitted"][key] for key in expected} == pytest.approx(expected)
    by_label = [precision_recall_f(predicted[:, i], references[:, i])[2] for i in range(3)]
    assert [row["f1"] for row in figures["per_label"]] == pytest.approx(by_label)
    assert [row["threshold"] for row in figures["per_label"]] == [0.3] * 3  # those of rows with both modalities
    assert figures["intervals"] == f1_intervals(predicted, references)


class TestWarnings:
    def warnings_of(self, scores, references):
        return report(np.array(scores), np.array(references), config_of(threshold=0.5))["warnings"]

    @pytest.mark.parametrize("empty, said", [(0, False), (2, False), (3, True)])
    def test_rows_for_which_nothing_is_predicted(self, empty, said):
        """Two of twenty are put up with; the row without a label does not count."""
        references = [[1, 1, 1]] * 20 + [[0, 0, 0]]
        scores = [[0.4] * 3] * empty + [[0.6] * 3] * (20 - empty) + [[0.1] * 3]
        warning = "Nothing is predicted for 3 of the 20 rows that have a label (15%)."
        assert self.warnings_of(scores, references) == ([warning] if said else [])

    def test_labels_that_are_never_predicted_but_not_those_that_no_row_has(self):
        references = [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
        scores = [[0.6, 0.4, 0.4]] * 3
        assert self.warnings_of(scores, references) == [
            "Never predicted, though rows have them: traffic light (2).",
            "No row has these labels, which count as 0 in macro averages and are left out of the mean average "
            "precision: dog.",
        ]


def test_report_text_has_the_subgroups_of_the_last_split(labelled):
    scores, references = labelled
    config = config_of(threshold=0.9, text_config=dict(model_type="bert"))
    texts = ["a dog"] * 40
    reports = {name: report(scores, references, config, texts=texts) for name in ("validation", "test")}
    text = report_text(reports)
    assert text.startswith(report_table(reports)) and "\n\nTest rows:\n\nlabel " in text
    for title, key in (("labels: 2", "by_label_count"), ("words of the text: 1-8", "by_caption_length")):
        (group,) = [group for group in reports["test"][key] if group["group"] == title.split(": ")[1]]
        (line,) = [line for line in text.splitlines() if line.startswith(f"{title} ")]
        expected = [str(group["rows"]), f"{group['f1']:.4f}", f"{group['f1_samples']:.4f}"]
        assert line.removeprefix(title).split() == expected
    (warning,) = reports["test"]["warnings"]
    assert " ".join(text.split()).endswith(f" Warning: {warning}") and text.count("Warning") == 1
    assert "images only" not in text
    reports["test"]["ablations"] = {"image_only": {"f1": 0.125, "f1_macro": 0.25}}  # of version 0.1
    lines = [" ".join(line.split()) for line in report_text(reports).splitlines()]
    fitted = reports["test"]["fitted"]
    assert f"as they are {fitted['f1']:.4f} {fitted['f1_samples']:.4f} {fitted['f1_macro']:.4f}" in lines
    assert "images only 0.1250 - 0.2500" in lines


def test_labels_are_named_in_the_order_of_the_logits():
    """With twelve labels "10" sorts before "2"; the dictionary has another order."""
    names = {i: f"label {i}" for i in range(12)}
    config = MMClfConfig(image_backbone="resnet18", id2label=dict(reversed(names.items())))
    figures = report(np.eye(12) * 0.9, np.eye(12), config)
    assert [label["label"] for label in figures["per_label"]] == list(names.values())


def test_compute_metrics_takes_logits_and_fits_the_threshold(labelled):
    scores, references = labelled
    logits = np.log(scores.astype(np.float64) / (1 - scores)) - 3  # all below 0.5: the fixed threshold finds nothing
    figures = ComputeMetrics()(EvalPrediction(predictions=logits.astype(np.float32), label_ids=references))
    shifted = scores_of(logits)
    best = max(precision_recall_f(shifted >= cut, references)[2] for cut in np.unique(shifted))
    assert figures["f1"] == pytest.approx(best) and figures["f1_at_0.5"] < best
    assert precision_recall_f(shifted >= figures["threshold"], references)[2] == pytest.approx(best)
    assert figures["map"] == pytest.approx(average_precision_score(references, shifted, average="macro"))
    assert sorted([*figures, "loss"]) == sorted([*FIGURES, "ece", "no_label_rate", "threshold"])


class TestFormatTable:
    ROWS = [
        {"label": "cat", "support": 1200, "f1": 0.5, "ap": np.float32(0.25), "95%": "0.4-0.6"},
        {"label": "traffic light", "support": 7, "f1": 1.0, "ap": None, "95%": ""},
    ]

    def test_plain_text(self):
        assert format_table(self.ROWS).splitlines() == [
            "label            support      f1      ap  95%",
            "cat                 1200  0.5000  0.2500  0.4-0.6",
            "traffic light          7  1.0000       -",
        ]

    def test_markdown(self):
        assert format_table(self.ROWS, markdown=True).splitlines() == [
            "| label         |   support |    f1 |    ap | 95%     |",
            "|:--------------|----------:|------:|------:|:--------|",
            "| cat           |     1,200 | 0.500 | 0.250 | 0.4-0.6 |",
            "| traffic light |         7 | 1.000 |     – |         |",
        ]

    def test_a_column_with_a_text_is_left_aligned_and_texts_of_digits_stay(self):
        lines = format_table([{"width": "0.62000", "best": 1}, {"width": 512, "best": "all"}]).splitlines()
        assert lines == ["width    best", "0.62000  1", "512      all"]

    def test_without_rows(self):
        assert format_table([]) == format_table([], markdown=True) == ""
