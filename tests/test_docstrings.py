"""The examples in the docstrings of the classes and functions where people start."""

import doctest
from importlib import import_module

import pytest

MODULES = [
    "hf_mmclf.inference.predictor",
    "hf_mmclf.model.configuration_mmclf",
    "hf_mmclf.model.modeling_mmclf",
    "hf_mmclf.model.pipeline_mmclf",
    "hf_mmclf.model.processing_mmclf",
    "hf_mmclf.training.train",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, attempted = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS)
    assert attempted and not failed
