import csv
import json

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score
from transformers import EvalPrediction

from hf_mmclf import MMClfConfig
from hf_mmclf.evaluation.bootstrap import f1_intervals
from hf_mmclf.evaluation.report import (
    ComputeMetrics,
    decisions,
    format_table,
    label_names,
    prediction_lines,
    report,
    report_table,
    report_text,
    scores_of,
    write_predictions,
)
from hf_mmclf.evaluation.subgroups import by_caption_length, by_label_count
from hf_mmclf.training.arguments import FIGURES

NAMES = {0: "person", 1: "traffic light", 2: "dog"}
THRESHOLDS = {"global": dict(threshold=0.3), "per label": dict(threshold=0.3, label_thresholds={"dog": 0.7})}


def config_of(**fields):
    return MMClfConfig(image_backbone="resnet18", id2label=NAMES, label_ids=["1", "3", "10"], **fields)


def captioned(texts):
    """Rows with these captions, each with a picture."""
    return Dataset.from_dict({"image": ["a.jpg"] * len(texts), "text": texts})


@pytest.fixture
def labelled():
    """Scores of 40 rows that know something of the references, as float32 like a model's."""
    rng = np.random.default_rng(0)
    references = (rng.random((40, 3)) < [0.6, 0.3, 0.1]).astype(np.float32)
    return (0.35 * references + 0.65 * rng.random((40, 3))).astype(np.float32), references


@pytest.fixture
def rows():
    images = ["7.jpg", None, {"bytes": b"", "path": "c.png"}, {"bytes": b"x", "path": None}]
    images = [image if isinstance(image, dict) else {"bytes": None, "path": image} for image in images]
    where = [f"test.csv:{line}" for line in (2, 3, 4, 5)]
    return Dataset.from_dict({"image": images, "text": ["a"] * 4, "where": where})


# three labels, one, none, and all three exactly at the threshold
SCORES = np.array([[0.9, 0.8, 0.95], [0.1, 0.6, 0.2], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]], dtype=np.float32)


@pytest.mark.parametrize("fields", THRESHOLDS.values(), ids=THRESHOLDS)
def test_report_agrees_with_scikit_learn(fields, labelled):
    scores, references = labelled
    config = config_of(**fields)
    figures = report(scores, references, config)
    assert figures["rows"] == 40
    fitted = np.array([0.3, 0.3, fields.get("label_thresholds", {}).get("dog", 0.3)])
    for part, threshold in (("at_0.5", np.full(3, 0.5)), ("fitted", fitted)):
        predicted = scores >= threshold
        assert figures[part]["map"] == pytest.approx(average_precision_score(references, scores, average="macro"))
        assert figures[part]["no_label_rate"] == pytest.approx(1 - predicted.any(1).mean())
        for average in ("micro", "macro", "weighted", "samples"):
            key = "f1" if average == "micro" else f"f1_{average}"
            zero = 1 if average == "samples" else 0  # an unlabelled row without predictions is right
            expected = f1_score(references, predicted, average=average, zero_division=zero)
            assert figures[part][key] == pytest.approx(expected), (part, key)
    assert figures["fitted"]["f1"] != figures["at_0.5"]["f1"]
    for i, label in enumerate(figures["per_label"]):
        truth, predicted = references[:, i], scores[:, i] >= fitted[i]
        assert (label["label"], label["threshold"]) == (NAMES[i], fitted[i])
        assert (label["support"], label["predicted"]) == (truth.sum(), predicted.sum())
        assert label["precision"] == pytest.approx(precision_score(truth, predicted))
        assert label["recall"] == pytest.approx(recall_score(truth, predicted))
        assert label["f1"] == pytest.approx(f1_score(truth, predicted))
        assert label["f1_at_0.5"] == pytest.approx(f1_score(truth, scores[:, i] >= 0.5))
        assert label["average_precision"] == pytest.approx(average_precision_score(truth, scores[:, i]))


def test_report_table_has_each_figure_in_its_place(labelled):
    scores, references = labelled
    config = config_of(**THRESHOLDS["per label"])
    reports = {"validation": report(scores[:25], references[:25], config)}
    reports["test"] = report(scores[25:], references[25:], config)
    header, *lines = report_table(reports).splitlines()
    columns = [
        "label",
        "threshold",
        *(f"{name} {what}" for name in reports for what in ("rows", "F1 at 0.5", "F1", "95%")),
    ]
    assert header.split() == " ".join(columns).split()

    def figures(line, title):
        assert line.startswith(f"{title} ")
        return line.removeprefix(title).split()

    for i, name in NAMES.items():
        labels = [reports[split]["per_label"][i] for split in reports]
        expected = [f"{labels[0]['threshold']:.4f}"]
        for label in labels:
            expected += [str(label["support"]), f"{label['f1_at_0.5']:.4f}", f"{label['f1']:.4f}"]
        assert figures(lines[i], name) == expected
    keys = {"micro": "f1", "macro": "f1_macro", "weighted": "f1_weighted", "samples": "f1_samples"}
    for line, (title, key) in zip(lines[3:], keys.items(), strict=True):
        expected = ["-"]
        for split in reports.values():
            expected += [str(split["rows"]), f"{split['at_0.5'][key]:.4f}", f"{split['fitted'][key]:.4f}"]
            if title != "weighted":
                expected.append("{:.3f}-{:.3f}".format(*split["intervals"][key]))
        assert figures(line, f"= {title} F1") == expected


def test_report_says_how_sure_it_is_and_which_rows_are_hard(labelled):
    scores, references = labelled
    config = config_of(**THRESHOLDS["per label"], text_config=dict(model_type="bert"))
    texts = ["two words", None, "one " * 12, "w"] * 10
    figures = report(scores, references, config, captioned(texts))
    predicted = scores >= [0.3, 0.3, 0.7]
    assert figures["intervals"] == f1_intervals(predicted, references)
    assert figures["by_label_count"] == by_label_count(predicted, references)
    assert figures["by_caption_length"] == by_caption_length(predicted, references, texts)
    assert "by_caption_length" not in report(scores, references, config)
    assert "by_caption_length" not in report(scores, references, config_of(), captioned(texts))
    assert json.loads(json.dumps(figures)) == figures


def test_rows_that_lack_something_have_their_own_thresholds(labelled, tmp_path):
    scores, references = labelled
    config = config_of(
        threshold=0.3, text_config=dict(model_type="bert"), missing_thresholds={"image": 0.6, "text": 1}
    )
    images, texts = ["a.jpg", None, "a.jpg", "a.jpg"] * 10, ["a", "b", None, "c"] * 10
    rows = Dataset.from_dict({"image": images, "text": texts, "where": [str(row) for row in range(40)]})
    hits = scores.astype(float) >= np.array([0.3, 0.6, 1, 0.3] * 10)[:, None]
    figures = report(scores, references, config, rows)
    assert figures["fitted"]["f1"] == pytest.approx(f1_score(references, hits, average="micro"))
    by_label = f1_score(references, hits, average=None)
    assert [row["f1"] for row in figures["per_label"]] == pytest.approx(list(by_label))
    assert [row["threshold"] for row in figures["per_label"]] == [0.3] * 3  # those of rows that lack nothing
    assert np.array_equal(decisions(scores, config, rows), hits)
    assert decisions(scores[:0], config, rows.select([])).shape == (0, 3)
    write_predictions(tmp_path / "p.jsonl", rows, scores, config)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [sorted(line["labels"]) for line in lines] == [sorted(np.array([*NAMES.values()])[row]) for row in hits]


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
        assert self.warnings_of(scores, references) == ["Never predicted, though rows have them: traffic light (2)."]


def test_text_of_reports_has_the_rows_of_the_last_split(labelled):
    scores, references = labelled
    config = config_of(threshold=0.9, text_config=dict(model_type="bert"))
    reports = {name: report(scores, references, config, captioned(["a dog"] * 40)) for name in ("validation", "test")}
    text = report_text(reports)
    assert text.startswith(report_table(reports)) and "\n\nOf the test rows:\n\nrows with" in text
    for title, key in (("labels: 2", "by_label_count"), ("words of the caption: 1-8", "by_caption_length")):
        (group,) = [group for group in reports["test"][key] if group["group"] == title.split(": ")[1]]
        (line,) = [line for line in text.splitlines() if line.startswith(f"{title} ")]
        expected = [str(group["rows"]), f"{group['f1']:.4f}", f"{group['f1_samples']:.4f}"]
        assert line.removeprefix(title).split() == expected
    (warning,) = reports["test"]["warnings"]
    assert text.endswith(f"\n\nWarning: {warning}") and text.count("Warning") == 1
    assert "pictures only" not in text
    reports["test"]["ablations"] = {"image_only": {"f1": 0.125, "f1_macro": 0.25}}
    lines = report_text(reports).splitlines()
    fitted = reports["test"]["fitted"]
    assert f"as they are {fitted['f1']:.4f} {fitted['f1_macro']:.4f}" in [" ".join(line.split()) for line in lines]
    assert "pictures only 0.1250 0.2500" in [" ".join(line.split()) for line in lines]


def test_labels_are_named_in_the_order_of_the_logits(tmp_path):
    """Twelve labels through a file, where "10" sorts before "2", and a dictionary in another order."""
    names = {i: f"label {i}" for i in range(12)}
    config = MMClfConfig(image_backbone="resnet18", id2label=dict(reversed(names.items())))
    config.save_pretrained(tmp_path)
    for made in (config, MMClfConfig.from_pretrained(tmp_path)):
        assert label_names(made) == list(names.values())
        figures = report(np.eye(12) * 0.9, np.eye(12), made)
        assert [label["label"] for label in figures["per_label"]] == list(names.values())
        table = Dataset.from_dict({"image": ["a.jpg"], "where": ["row 1"]})
        assert prediction_lines(table, np.eye(12)[2:3], made) == ["a.jpg: label 2 1.00"]


def test_compute_metrics_takes_logits_and_fits_the_threshold(labelled):
    scores, references = labelled
    logits = np.log(scores.astype(np.float64) / (1 - scores)) - 3  # all below 0.5: the fixed threshold finds nothing
    figures = ComputeMetrics()(EvalPrediction(predictions=logits.astype(np.float32), label_ids=references))
    shifted = scores_of(logits)
    best = max(f1_score(references, shifted >= t, average="micro") for t in np.unique(shifted))
    assert figures["f1"] == pytest.approx(best) and figures["f1_at_0.5"] < best
    assert f1_score(references, shifted >= figures["threshold"], average="micro") == pytest.approx(best)
    assert figures["map"] == pytest.approx(average_precision_score(references, shifted, average="macro"))
    assert sorted([*figures, "loss"]) == sorted([*FIGURES, "ece", "no_label_rate", "threshold"])


@pytest.mark.parametrize(
    "fields, labels",
    [
        (dict(threshold=0.5), ["1 3 10", "3", "", "1 3 10"]),
        (dict(threshold=0.5, label_thresholds={"dog": 0.3, "person": 0.51}), ["1 3 10", "3", "", "3 10"]),
        (dict(threshold=0.05), ["1 3 10"] * 4),
    ],
)
def test_csv_is_the_competitions_form(fields, labels, rows, tmp_path):
    """0.3 as float32 lies above 0.3 as float64, and a score that equals its threshold is predicted."""
    path = tmp_path / "not" / "yet" / "there.csv"
    scores = SCORES.copy()
    scores[2, 2] = np.nextafter(np.float32(0.3), np.float32(0)) if "label_thresholds" in fields else 0.3
    write_predictions(path, rows, scores, config_of(**fields))
    names = ["7.jpg", "test.csv:3", "c.png", "test.csv:5"]
    expected = [f"{name},{label}" for name, label in zip(names, labels, strict=True)]
    assert path.read_bytes().decode() == "\n".join(["ImageID,Labels", *expected, ""])


def test_csv_labels_with_spaces_can_be_told_apart(rows, tmp_path):
    config = config_of()
    config.label_ids = None  # the labels are written by their names
    write_predictions(tmp_path / "p.csv", rows, SCORES, config)
    with (tmp_path / "p.csv").open() as file:
        assert [row["Labels"] for row in csv.DictReader(file)][:2] == ["person|traffic light|dog", "traffic light"]


def test_jsonl_has_names_and_all_scores_sorted(rows, tmp_path):
    write_predictions(tmp_path / "p.jsonl", rows, SCORES, config_of(label_thresholds={"dog": 0.97}))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["image"] for line in lines] == ["7.jpg", "test.csv:3", "c.png", "test.csv:5"]
    assert [line["labels"] for line in lines] == [
        ["person", "traffic light"],
        ["traffic light"],
        [],
        ["person", "traffic light"],
    ]
    assert list(lines[0]["scores"].items()) == [("dog", 0.95), ("person", 0.9), ("traffic light", 0.8)]
    for line, scores in zip(lines, SCORES, strict=True):
        assert list(line["scores"].values()) == sorted(line["scores"].values(), reverse=True)
        assert line["scores"] == pytest.approx(dict(zip(NAMES.values(), map(float, scores), strict=True)), abs=1e-6)


def test_lines_for_the_screen(rows):
    assert prediction_lines(rows, SCORES, config_of()) == [
        "7.jpg: dog 0.95, person 0.90, traffic light 0.80",
        "test.csv:3: traffic light 0.60",
        "c.png: no label",
        "test.csv:5: person 0.50, traffic light 0.50, dog 0.50",
    ]


@pytest.mark.parametrize("name", ["p.txt", "p", "p.csv.gz"])
def test_other_suffixes_are_refused_before_anything_is_written(name, rows, tmp_path):
    with pytest.raises(ValueError, match=r"\.csv or \.jsonl"):
        write_predictions(tmp_path / "new" / name, rows, SCORES, config_of())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_failure_leaves_the_old_file_and_nothing_else(suffix, rows, tmp_path):
    path = tmp_path / f"p{suffix}"
    path.write_text("old")
    with pytest.raises(ValueError, match="zip"):
        write_predictions(path, rows, SCORES[:2], config_of())  # two rows are written, then the scores run out
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_predictions(path, rows, SCORES, config_of())
    assert path.read_text() != "old" and list(tmp_path.iterdir()) == [path]


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
