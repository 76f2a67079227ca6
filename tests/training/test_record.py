from types import SimpleNamespace

import pytest

from hf_mmclf import MMClfForImageTextClassification, ModelArguments, parse_arguments
from hf_mmclf.presets import config_from_preset
from hf_mmclf.training.record import _sources, base_models


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, ["timm/densenet121.ra_in1k", "someone/encoder"]),
        ({"image_weights": "backbone.pth"}, ["someone/encoder"]),
        ({"text_weights": "folder"}, ["timm/densenet121.ra_in1k"]),
        ({"text_backbone": "."}, ["timm/densenet121.ra_in1k"]),  # a folder
        ({"from_scratch": True}, []),
    ],
)
def test_base_models_are_those_that_came_from_the_hub(changes, expected):
    model = MMClfForImageTextClassification(config_from_preset("demo", text_backbone="someone/encoder", num_labels=2))
    assert base_models(ModelArguments(**changes), model) == expected


@pytest.mark.parametrize(
    "flags, license, data, datasets",
    [
        ([], "mit", ["the embedded data set"], []),
        (["--license", "cc-by-4.0"], "cc-by-4.0", ["the embedded data set"], []),
        (["--from_scratch", "false"], "unknown", ["the embedded data set"], []),
        (["--data", "someone/animals"], "unknown", ["someone/animals"], ["someone/animals"]),
        (["--data", __file__], "unknown", ["test_record.py"], []),
    ],
)
def test_the_license_depends_on_data_and_weights(flags, license, data, datasets):
    """A model has our license only if nothing but the embedded data set is in it."""
    model = MMClfForImageTextClassification(config_from_preset("demo-image", num_labels=2))
    said = _sources(parse_arguments(["--preset", "demo-image", *flags]), SimpleNamespace(model=model))
    assert (said["license"], said["data"], said["datasets"]) == (license, data, datasets)
