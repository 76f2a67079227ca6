"""The poster's backbones by their names, from a Hub that has them as the real one does, with random weights.

timm's repositories hold a config of timm's own and safetensors. TinyBERT's and BERT-tiny's are older than
`model_type`, tokenizer files and safetensors: a few sizes, a vocabulary, a pickle in the first of torch's formats.
"""

import json
import os
import re
import string
import subprocess
import sys

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from support.hub_server import HubServer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForPreTraining
from transformers.utils.hub import hf_api

from hf_mmclf import MMClfForImageTextClassification, Predictor, config_from_preset, parse_arguments
from hf_mmclf.data.tokenizer import load_tokenizer
from hf_mmclf.training.inputs import build_config

DENSENET = "timm/densenet121.tv_in1k"
TINYBERT, BERT_TINY = "huawei-noah/TinyBERT_General_4L_312D", "prajjwal1/bert-tiny"
SIZES = {  # hidden size, layers, heads, intermediate size
    TINYBERT: (312, 4, 12, 1200),
    BERT_TINY: (128, 2, 2, 512),
}
OF_GENERAL_DISTILLATION = {"cell": {}, "emb_size": 312, "pre_trained": "", "structure": [], "training": ""}
WORDS = ["a", "dog", "cat", "red", "blue", "on", "bench", "##es"]


def bert_config(name):
    """config.json, as of 2019."""
    hidden, layers, heads, intermediate = SIZES[name]
    return {
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 512,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "type_vocab_size": 2,
        "vocab_size": 30522,
        **(OF_GENERAL_DISTILLATION if name == TINYBERT else {}),
    }


def vocabulary():
    """30,522 word pieces, the special ones at BERT's places."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [*string.ascii_lowercase[1:], *(f"##{letter}" for letter in string.ascii_lowercase)]
    return [*pieces, *(f"piece{i}" for i in range(30522 - len(pieces)))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Make the folder and the weights of each repository, by its name."""
    made = {}
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("densenet")
    densenet = timm.create_model("densenet121.tv_in1k")
    for name, tensor in densenet.state_dict().items():
        if "running" in name:  # else they would be what any new model has
            tensor.uniform_(0.5, 1.5)
    timm.models.save_for_hf(densenet, folder, safe_serialization=True)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    made[DENSENET] = folder, densenet.state_dict()
    for name in SIZES:
        folder = tmp_path_factory.mktemp("bert")
        config = bert_config(name)
        state = BertForPreTraining(BertConfig(**config)).state_dict()
        if name == TINYBERT:  # which learned to match the width of its teacher
            state |= {"fit_dense.weight": torch.randn(768, 312), "fit_dense.bias": torch.randn(768)}
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in vocabulary()))
        made[name] = folder, state
    return made


@pytest.fixture(scope="module")
def here(checkpoints, tmp_path_factory):
    """A Hub with these models, for this process too; one for all tests, since clients remember the last commit."""
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        for name, (folder, _) in checkpoints.items():
            hub.add_model(name, folder)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(hf_api(), "endpoint", hub.endpoint)  # made earlier, it would try the real Hub for 20 seconds
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "no-token"))
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # a thread that would outlive the tests
        yield hub


def downloads(hub):
    """Files that were asked for and there, with their repositories, of any revision."""
    paths = {request.path.lstrip("/") for request in hub.requests if request.status in (200, 302)}
    return {re.sub("/resolve/[^/]+/", "/", path) for path in paths}


def assert_has(model, state, prefix=""):
    own = model.state_dict()
    assert own and all(torch.equal(tensor, state[prefix + name]) for name, tensor in own.items())


@pytest.mark.parametrize("preset, text", [("warmerdbert", TINYBERT), ("tinybert", TINYBERT), ("bert-tiny", BERT_TINY)])
def test_presets_start_from_exactly_these_weights(preset, text, here, checkpoints):
    config = config_from_preset(preset)
    model = MMClfForImageTextClassification.from_backbones(config)
    assert_has(model.text_model, checkpoints[text][1], "bert.")
    assert config.text_weights == text
    if config.has_image:
        assert_has(model.image_model, checkpoints[DENSENET][1])
        assert config.image_weights == "densenet121.tv_in1k"
        assert f"{DENSENET}/model.safetensors" in downloads(here)
        trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "image_model" in n}
        assert trained == {"transition2", "denseblock3", "transition3", "denseblock4", "norm5"}


@pytest.mark.parametrize("name", [TINYBERT, BERT_TINY])
def test_their_tokenizer_is_berts(name, here):
    tokenizer, description = load_tokenizer(name, config=config_from_preset("tinybert").text_config)
    assert description == f"{name} (30,522 tokens)"
    pieces = ["[CLS]", "a", "red", "dog", "on", "bench", "##es", "z", "##q", "[UNK]", "[SEP]"]
    numbers = [vocabulary().index(piece) for piece in pieces]
    assert tokenizer("A RED dóg on benches zq 狗")["input_ids"] == numbers
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (0, "right")


@pytest.mark.parametrize("name", [TINYBERT, BERT_TINY])
def test_they_can_be_named_in_place_of_a_presets(name, here):
    config = build_config(parse_arguments(["--preset", "demo", "--text_backbone", name])[0])
    text = config.text_config
    sizes = text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size
    assert (text.model_type, config.text_backbone, sizes) == ("bert", name, SIZES[name])


def test_configs_that_say_too_little_are_refused(here, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"n_layer": 2}))
    for name in ("team/other", str(tmp_path / "other")):
        here.add_model("team/other", tmp_path / "other")
        with pytest.raises(ValueError, match="model_type"):
            build_config(parse_arguments(["--preset", "demo", "--text_backbone", name])[0])


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_pickle_that_runs_code_is_not_read(place, zipped, here, checkpoints, tmp_path):
    folder, mark = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoints[BERT_TINY][0] / "config.json").read_bytes())
    content = {**checkpoints[BERT_TINY][1], "more": Trap(str(mark))}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    name = f"somebody/bert-{zipped}"
    here.add_model(name, folder)
    config = config_from_preset("bert-tiny", text_backbone=name)
    with pytest.raises(OSError, match="not a pickle of tensors alone.*safetensors"):
        MMClfForImageTextClassification.from_backbones(config, text_weights="hub" if place == "hub" else str(folder))
    assert place != "hub" or f"{name}/pytorch_model.bin" in downloads(here)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the trap works


def test_timms_weights_are_no_pickle_either(here, checkpoints, tmp_path):
    """A repository without safetensors, and a local file."""
    folder, mark = tmp_path / "evil", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoints[DENSENET][0] / "config.json").read_bytes())
    torch.save({**checkpoints[DENSENET][1], "more": Trap(str(mark))}, folder / "pytorch_model.bin")
    here.add_model("somebody/densenet", folder)
    config = config_from_preset("resnet18", image_backbone="hf-hub:somebody/densenet")
    for weights in ("hub", str(folder), str(folder / "pytorch_model.bin")):
        with pytest.raises(ValueError, match="cannot be loaded into .*: weights_only=True blocked"):
            MMClfForImageTextClassification.from_backbones(config, image_weights=weights)
    assert not mark.exists() and "somebody/densenet/pytorch_model.bin" in downloads(here)


def write_table(folder):
    """Write images of one colour, with texts that name the colour and an animal."""
    lines = ["ImageID,Labels,Caption"]
    for row in range(16):
        colour, animal = ("red", "blue")[row % 2], ("dog", "cat")[row // 2 % 2]
        Image.new("RGB", (40, 30), colour).save(folder / f"{row}.jpg")
        lines.append(f'{row}.jpg,{1 + row % 2} {3 + row // 2 % 2},"a {colour} {animal}, on benches"')
    table = folder / "train.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.mark.slow
def test_the_command_trains_on_them(here, checkpoints, tmp_path):
    """A process that has nothing but the Hub's address."""
    here.requests.clear()
    table, output = write_table(tmp_path), tmp_path / "model"
    flags = ["--preset", "warmerdbert", "--data", str(table), "--output_dir", str(output), "--image_size", "32"]
    flags += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--dataloader_num_workers", "0"]
    flags += ["--validation_fraction", "0.25", "--test_fraction", "0", "--use_cpu", "--disable_tqdm", "true"]
    command = [sys.executable, "-m", "hf_mmclf.cli", "train", *flags]
    environment = here.environment(tmp_path / "home", token=None) | {"OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    said = child.stderr.splitlines()
    assert "image backbone: pretrained, densenet121.tv_in1k" in said
    assert f"text backbone: pretrained, {TINYBERT}" in said
    assert f"tokenizer: {TINYBERT} (30,522 tokens)" in said
    assert {f"{DENSENET}/model.safetensors", f"{TINYBERT}/pytorch_model.bin"} <= downloads(here)

    model = AutoModel.from_pretrained(output)
    assert (model.config.image_weights, model.config.text_weights) == ("densenet121.tv_in1k", TINYBERT)
    state = checkpoints[TINYBERT][1]
    own = model.text_model.state_dict()
    frozen = {name for name, tensor in own.items() if torch.equal(tensor, state[f"bert.{name}"])}
    assert {name for name in own if name.startswith(("embeddings.", "encoder.layer.0.", "encoder.layer.1."))} == frozen
    assert "densenet121.tv_in1k" in json.loads((output / "training.json").read_text())["image_backbone"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.tokenize("A red dog on benches") == ["a", "red", "dog", "on", "bench", "##es"]
    assert Predictor.load(output).model.config.label_ids == ["1", "2", "3", "4"]
