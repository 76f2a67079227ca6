import re

import pytest

from hf_mmclf import MMClfConfig
from hf_mmclf.hub.card_tables import (
    average_rows,
    configuration_rows,
    escape,
    in_words,
    label_rows,
    recipe_rows,
    threshold_rows,
)

BERT = dict(model_type="bert", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000)


def values(rows):
    """The rows of a table of names and values as a dictionary."""
    return {re.sub(r"\\", "", name): value for name, value in (row.values() for row in rows)}


@pytest.mark.parametrize(
    "text", ["a|b", "*star*", "_x_", "<b>", "$5$", "`code`", "[link](url)", "two\nlines", "a\\|b"]
)
def test_escaped_text_is_one_line_without_marks_of_markdown(text):
    escaped = escape(text)
    assert re.sub(r"\\(.)", r"\1", escaped) == " ".join(text.split())
    assert not re.search(r"(?<!\\)(?:\\\\)*[*_<>|$`\[\]]", escaped.replace(r"\\", ""))


def test_values_in_words():
    assert in_words({"a_b": 1234, "c": None, "d": [0.25, True], "e": {"f": ""}}) == (
        "a\\_b: 1,234; d: 0.25, yes; e: f: empty"
    )


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_options_of_the_configuration(kind):
    fields, expected = {}, {"dropout": "0.25", "label_ids": None, "threshold": None, "problem_type": None}
    if kind != "text":
        fields |= dict(image_backbone="densenet121", image_backbone_args={"growth_rate": 8}, unfrozen_image_stages=0)
        expected |= {"image_backbone": "densenet121", "image_backbone_args": "growth\\_rate: 8"}
        expected |= {"unfrozen_image_stages": "0", "text_config": None}
    if kind != "image":
        fields |= dict(text_config=BERT, text_weights="a|b")
        expected |= {"text_config": "bert, 2 layers of 16 units, 1,000 tokens", "text_weights": "a\\|b"}
        expected |= {"unfrozen_text_layers": None}
    expected |= {"fusion": "self", "width": "512"} if kind == "both" else {"fusion": None, "width": None}
    expected["text_pooling"] = "pooler" if kind == "text" else None
    found = values(configuration_rows(MMClfConfig(**fields, dropout=0.25, label_ids=["1", "2"])))
    assert {name: found.get(name) for name in expected} == expected


def test_recipe_shows_what_was_recorded_and_nothing_else():
    training = {
        "preset": "demo",
        "recipe": {"learning_rate": 0.001, "max_steps": None, "augmentation": {"flip": 0.5}},
        "missing": {"train": {"picture": 1234, "caption": 0}},
        "bad_images": [["train.csv:3", "not an image"]],
        "history": [{"loss": 0.5}, {"train_runtime": 150.0}],
    }
    found = values(recipe_rows(training))
    assert found == {
        "preset": "demo",
        "training rows without an image": "1,234",
        "images that could not be read": "1",
        "learning rate": "0.001",
        "augmentation": "flip: 0.5",
        "minutes": "2.5",
    }
    assert "minutes" not in values(recipe_rows({**training, "resumed": True}))  # only the last part is known
    assert recipe_rows({}) == []


def test_averages_have_intervals_where_they_were_recorded():
    figures = {"at_0.5": {"f1": 0.5, "map": 0.6}, "fitted": {"f1": 0.75, "map": 0.6}}
    reports = {"validation": figures, "test": {**figures, "intervals": {"f1": [0.7, 0.8125]}}}
    micro, mean_precision = average_rows(reports)
    assert list(micro.values()) == ["F1, micro", 0.5, 0.75, 0.5, "0.750 (0.700–0.812)"]
    assert list(mean_precision.values()) == ["mean average precision", 0.6, 0.6, 0.6, 0.6]


def test_labels():
    (row,) = label_rows([{"label": "a|b", "f1": 0.5, "support": 3}])
    assert (row["label"], row["F1"], row["support"], row["average precision"]) == ("a\\|b", 0.5, 3, None)
    config = MMClfConfig(image_backbone="resnet18", id2label={0: "a_b", 1: "c"}, label_thresholds={"c": 0.25})
    assert threshold_rows(config) == [
        {"label": "a\\_b", "threshold": 0.5},
        {"label": "c", "threshold": 0.25},
    ]


def test_at_most_thirty_labels_are_shown_those_with_the_most_rows():
    per_label = [{"label": str(number), "support": number} for number in range(50)]
    assert [row["label"] for row in label_rows(per_label)] == [str(number) for number in range(20, 50)]
    assert len(threshold_rows(MMClfConfig(image_backbone="resnet18", num_labels=50))) == 30
