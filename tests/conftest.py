import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from support.hub_server import HubServer

from hf_mmclf import MMClfConfig, MMClfForImageTextClassification

# a DenseNet of four blocks with a 2 x 2 last map at 64 px, and a BERT of two layers: 16 thousand parameters
TINY_IMAGE = dict(
    image_backbone="densenet121",
    image_backbone_args=dict(growth_rate=8, block_config=[1, 1, 1, 1], stem_type=""),
)
TINY_TEXT = dict(
    text_config=dict(
        model_type="bert",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=60,
        max_position_embeddings=32,
    )
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def notices(capsys):
    """Returns the notices that the package has written so far, as a user reads them."""
    return lambda: [line.strip() for line in capsys.readouterr().err.splitlines()]


@pytest.fixture(scope="session")
def load_example():
    """Imports a file of `examples/` by its name."""

    def load(name):
        file = Path(__file__).parents[1] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_config():
    """Makes a tiny configuration of `kind` "both", "image" or "text"."""

    def make(kind="both", **overrides):
        image = TINY_IMAGE if kind in ("both", "image") else {}
        text = TINY_TEXT if kind in ("both", "text") else {}
        return MMClfConfig(**{**image, **text, "num_labels": 3, "width": 8, **overrides})

    return make


@pytest.fixture
def tiny_model(tiny_config):
    """Makes a tiny model with random weights, in evaluation mode."""

    def make(kind="both", **overrides):
        return MMClfForImageTextClassification(tiny_config(kind, **overrides)).eval()

    return make


@pytest.fixture
def tiny_batch():
    """Makes three rows of inputs for a tiny model, their captions of 7, 4 and 2 tokens."""

    def make(kind="both", size=64):
        batch = {}
        if kind in ("both", "image"):
            batch["pixel_values"] = torch.randn(3, 3, size, size)
        if kind in ("both", "text"):
            attention_mask = (torch.arange(7) < torch.tensor([[7], [4], [2]])).long()
            batch.update(input_ids=torch.randint(5, 60, (3, 7)) * attention_mask, attention_mask=attention_mask)
        return batch

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub on the loopback, for `HfApi(endpoint=hub.endpoint)` here and for children in `hub.environment`."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read from the environment at import
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer() as server:
        yield server
