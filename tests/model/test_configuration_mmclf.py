import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig, PreTrainedConfig

from hf_mmclf import MMClfConfig

LABELS = {i: f"label {i}" for i in range(12)}
BERT = dict(model_type="bert", hidden_size=24, num_hidden_layers=3)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(
            image_backbone="resnet18", image_backbone_args={"layers": [1, 1], "nested": {"a": 0.5}}, image_weights="w"
        ),
        dict(text_backbone="some/bert", text_weights="scratch", text_pooling="mean"),
        dict(fusion="cross_image", fusion_norm=True, image_tokens="spatial", learned_missing=True),
        dict(fusion="label_queries", fusion_heads=8, fusion_layers=2, image_tokens="stages", modality_dropout=0.2),
        dict(width=7, projection_norm=True, dropout=0.25, unfrozen_image_stages=0, unfrozen_text_layers=3),
        dict(dropout=0, threshold=1),
        dict(id2label=LABELS, label_thresholds={"label 3": 0.3, "label 11": 1, "label 0": 0}),
        dict(num_labels=2, label_ids=["12", "7"], threshold=0.635),
    ],
)
def test_round_trip(fields, tmp_path):
    MMClfConfig(**fields).save_pretrained(tmp_path)
    for config in (MMClfConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(config) is MMClfConfig
        assert {name: getattr(config, name) for name in fields} == fields
        assert config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("text_config", "kind", "hidden"),
    [
        (None, type(None), None),
        (BERT, BertConfig, 24),
        (BertConfig(hidden_size=36, num_attention_heads=4), BertConfig, 36),
        (dict(model_type="distilbert", dim=20, n_heads=2), AutoConfig.for_model("distilbert").__class__, 20),
    ],
    ids=["none", "dict", "config", "other-type"],
)
def test_text_config_round_trip(text_config, kind, hidden, tmp_path):
    made = MMClfConfig(image_backbone="resnet18", text_config=text_config)
    made.save_pretrained(tmp_path)
    for config in (made, MMClfConfig.from_pretrained(tmp_path)):
        assert type(config.text_config) is kind
        assert config.has_text is (hidden is not None)
        assert getattr(config.text_config, "hidden_size", None) == hidden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(threshold=1.5), r"threshold of 'threshold' is 1\.5"),
        (dict(threshold=float("nan")), "threshold of 'threshold' is nan"),
        (dict(threshold="0.5"), "threshold"),
        (dict(id2label=LABELS, label_thresholds={"label 1": -0.1}), r"threshold of 'label 1' is -0\.1"),
        (dict(id2label=LABELS, label_thresholds={"lable 1": 0.1}), r"unknown labels \['lable 1'\]"),
        (
            dict(missing_thresholds={"images": 0.1}),
            r"missing_thresholds has the keys \['images'\]; expected image and",
        ),
        (dict(missing_thresholds={"text": 1.1}), r"threshold of 'text' is 1\.1"),
        (dict(id2label={0: "text"}, label_thresholds={"text": 1.5}, missing_thresholds={"text": 0.5}), "is 1.5"),
        (dict(id2label={0: "a", 1: "a"}), "duplicate names"),
        (dict(id2label={1: "a", 3: "b"}), r"keys \[1, 3\]; expected 0 to 1"),
        (dict(num_labels=3, label_ids=["1"]), "label_ids has 1 entries; expected 3"),
        (dict(unfrozen_image_stages=-1), "unfrozen_image_stages is -1"),
        (dict(unfrozen_text_layers=-1), "unfrozen_text_layers is -1"),
        (dict(width=0), "width is 0"),
        (dict(min_labels=-1), "min_labels is -1"),
        (dict(dropout=1), "dropout is 1"),
        (dict(dropout=-0.1), r"dropout is -0\.1"),
        (dict(fusion="add"), "fusion"),
        (dict(image_tokens="all"), "image_tokens"),
        (dict(text_pooling="max"), "text_pooling"),
        (dict(image_backbone_args=["layers"]), "image_backbone_args"),
    ],
)
def test_validation(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MMClfConfig(**fields)


@pytest.mark.parametrize("id2label", [LABELS, dict(reversed(LABELS.items())), {str(i): n for i, n in LABELS.items()}])
def test_thresholds_follow_the_logits(id2label, tmp_path):
    made = MMClfConfig(id2label=id2label, threshold=1, label_thresholds={"label 11": 0.25, "label 2": 0})
    expected = [1.0, 1.0, 0.0] + 8 * [1.0] + [0.25]
    made.save_pretrained(tmp_path)
    for config in (made, MMClfConfig.from_pretrained(tmp_path)):
        assert config.thresholds == expected
        assert all(type(value) is float for value in config.thresholds)


BOTH = dict(image_backbone="resnet18", text_config=dict(model_type="bert"))


def test_thresholds_of_rows_with_a_missing_modality(tmp_path):
    fields = dict(num_labels=2, threshold=0.4, missing_thresholds={"image": 0.2})
    MMClfConfig(**fields, **BOTH).save_pretrained(tmp_path)
    config = MMClfConfig.from_pretrained(tmp_path)
    assert config.thresholds == config.thresholds_for(has_text=False).tolist() == [0.4, 0.4]  # none was fitted
    assert config.thresholds_for(has_image=False).tolist() == [0.2, 0.2]
    assert config.thresholds_for(np.array([True, False]), np.array([True, True])).tolist() == [[0.4, 0.4], [0.2, 0.2]]
    text_only = MMClfConfig(**fields, text_config=dict(model_type="bert"))
    assert text_only.thresholds_for(has_image=False).tolist() == [0.4, 0.4]


def test_a_score_equal_to_its_threshold_is_predicted():
    config = MMClfConfig(
        num_labels=3, threshold=0.25, label_thresholds={"LABEL_2": 0.5}, missing_thresholds={"text": 0.125}, **BOTH
    )
    below = np.nextafter(np.float32(0.25), np.float32(0))
    assert config.decide([0.25, below, 0.5]).tolist() == [True, False, True]
    scores = np.array([[0.25, 0.125, 0.49], [0.25, 0.125, 0.1]], dtype=np.float32)
    decided = config.decide(scores, has_text=np.array([True, False]))
    assert decided.tolist() == [[True, False, False], [True, True, False]]
    decided = config.decide([0.75, 0.25, 0.5], thresholds=np.array([0.75, np.nan, 0.6]))
    assert decided.tolist() == [True, True, False]


def test_a_row_gets_at_least_its_best_labels():
    config = MMClfConfig(num_labels=3, threshold=0.5, min_labels=1)
    scores = np.array([[0.1, 0.3, 0.2], [0.6, 0.7, 0.2], [0.2, 0.2, 0.2]])
    assert config.decide(scores).tolist() == [[False, True, False], [True, True, False], [True, False, False]]
    assert config.decide(scores[0]).tolist() == [False, True, False]
    assert config.decide(scores[0], thresholds=np.full(3, 0.9)).tolist() == [False, True, False]
    assert MMClfConfig(num_labels=3).decide(scores[0]).tolist() == [False] * 3
    assert MMClfConfig(num_labels=3, min_labels=9).decide(scores[0]).tolist() == [True] * 3


def test_a_threshold_that_float32_cannot_hold_is_compared_in_float64():
    score = np.float32(0.1)  # a little more than 0.1
    assert MMClfConfig(num_labels=1, threshold=0.1).decide([score]).all()
    assert not MMClfConfig(num_labels=1, threshold=0.1 + 3e-9).decide([score]).any()


# What version 0.1 wrote
OLD = {
    "architectures": ["MMClfForImageTextClassification"],
    "auto_map": {
        "AutoConfig": "configuration_mmclf.MMClfConfig",
        "AutoModel": "modeling_mmclf.MMClfForImageTextClassification",
    },
    "custom_pipelines": {
        "image-text-classification": {
            "impl": "pipeline_mmclf.ImageTextClassificationPipeline",
            "pt": ["AutoModel"],
        }
    },
    "dropout": 0.0,
    "dtype": "float32",
    "fusion": "label_queries",
    "fusion_heads": 2,
    "fusion_layers": 1,
    "fusion_norm": False,
    "id2label": {"0": "person", "1": "traffic light", "2": "dog"},
    "image_backbone": "test_resnet",
    "image_backbone_args": None,
    "image_tokens": "stages",
    "image_weights": None,
    "label2id": {"dog": 2, "person": 0, "traffic light": 1},
    "label_ids": ["1", "3", "10"],
    "label_thresholds": {"dog": 0.4},
    "learned_missing": False,
    "missing_thresholds": {"image": 0.3, "text": 0.35},
    "modality_dropout": 0.2,
    "model_type": "mmclf",
    "problem_type": "multi_label_classification",
    "projection_norm": False,
    "text_backbone": None,
    "text_config": {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 40},
    "text_pooling": "pooler",
    "text_weights": None,
    "threshold": 0.5,
    "transformers_version": "5.24.0",
    "unfrozen_image_stages": None,
    "unfrozen_text_layers": None,
    "width": 8,
}


def test_a_configuration_of_version_0_1_is_loaded_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD), encoding="utf-8")
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MMClfConfig
    values = config.to_dict()
    assert {name: values[name] for name in OLD} == OLD | {
        "id2label": {0: "person", 1: "traffic light", 2: "dog"},
        "text_config": values["text_config"],
    }
    assert OLD["text_config"].items() <= values["text_config"].items()
    assert config.thresholds_for(has_text=False).tolist() == [0.35] * 3
    assert config.thresholds == [0.5, 0.5, 0.4]


def test_every_field_is_documented_with_its_default():
    """The command line takes the help of its flags from these lines."""
    entry = r"^    (\w+) \([^)]*?(?:, defaults to `?(.*?)`?)?\):$"
    documented = dict(re.findall(entry, inspect.getdoc(MMClfConfig), flags=re.MULTILINE))
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {f.name: f for f in dataclasses.fields(MMClfConfig) if f.name not in inherited}
    assert {name: json.dumps(field.default).title() for name, field in fields.items()} == {
        name: (default or "Null").title() for name, default in documented.items()
    }
    flags = {name for name, field in fields.items() if field.metadata.get("flag")}
    assert {"fusion", "width", "learned_missing", "unfrozen_image_stages"} <= flags
    assert not {"threshold", "label_ids", "image_weights", "text_config"} & flags


def test_auto_config_knows_it():
    assert type(AutoConfig.for_model("mmclf", width=3)) is MMClfConfig
