import pytest
import torch
from huggingface_hub import constants
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    SiglipConfig,
    SiglipModel,
    T5Config,
    ViTConfig,
)

from hf_mmclf import MMClfForImageTextClassification, ModelArguments, parse_arguments, train
from hf_mmclf.training.inputs import build_config, build_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat"]
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
TEXT = dict(vocab_size=8, max_position_embeddings=12, bos_token_id=2, eos_token_id=3, pad_token_id=0, **SMALL)
TOWERS = {
    "clip": (CLIPConfig, CLIPModel),
    "siglip": (SiglipConfig, SiglipModel),
}


@pytest.fixture
def table(tmp_path):
    (tmp_path / "t.csv").write_text("text,labels\n" + "a dog,dog\na cat,cat\n" * 20)
    return str(tmp_path / "t.csv")


@pytest.mark.parametrize("name", TOWERS)
def test_the_text_tower_of_a_repository_of_images_and_texts(name, tmp_path):
    kind, model = TOWERS[name]
    whole = model(kind(text_config=TEXT, vision_config=dict(image_size=32, patch_size=16, **SMALL))).eval()
    whole.save_pretrained(tmp_path)
    args = ModelArguments(preset="demo", text_backbone=str(tmp_path))
    config = build_config(args)
    assert config.text_config.model_type == f"{name}_text_model" and str(tmp_path) not in str(config.to_dict())
    own = MMClfForImageTextClassification.from_backbones(config, None, args.backbone_weights()["text"]).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        expected = whole.text_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.equal(own.encode_text(ids, torch.ones_like(ids))[0], expected)
    assert own.max_tokens == 12
    inputs = dict(pixel_values=torch.rand(2, 3, 64, 64), input_ids=ids.repeat(2, 1), attention_mask=torch.ones(2, 4))
    own.train()(**inputs, labels=torch.ones(2, config.num_labels)).loss.backward()
    unused = [n for n, p in own.named_parameters() if p.grad is None and p.requires_grad]
    assert unused == []  # DistributedDataParallel does not allow them


@pytest.mark.parametrize(
    "config, reason",
    [
        (GPT2Config(), "a gpt2 model cannot be the text backbone: it generates text"),
        (T5Config(), "a t5 model cannot be the text backbone: it has a decoder"),
        (ViTConfig(), "a vit model cannot be the text backbone: it has no vocabulary"),
    ],
)
def test_what_is_no_text_encoder_is_refused_by_name(config, reason, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        build_config(ModelArguments(preset="demo", text_backbone=str(tmp_path)))


def test_a_tokenizer_without_words_is_an_error(table, tmp_path, tiny_model):
    tiny_model("text").text_model.save_pretrained(tmp_path / "tower")
    flags = ["--data", table, "--preset", "tinybert", "--text_backbone", str(tmp_path / "tower"), "--max_steps", "1"]
    with pytest.raises(ValueError, match="tower: its tokenizer knows special tokens only .*--tokenizer"):
        train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "m")]))
    assert not (tmp_path / "m").exists()


def test_weights_that_are_given_win_over_from_scratch(tmp_path, tiny_model):
    args = ModelArguments(from_scratch=True)
    assert args.backbone_weights() == {"image": None, "text": None}
    assert ModelArguments().backbone_weights() == {"image": "hub", "text": "hub"}
    args = ModelArguments(from_scratch=True, image_weights="w.safetensors", text_weights="tower")
    assert args.backbone_weights() == {"image": "w.safetensors", "text": "tower"}
    given = tiny_model("text")
    given.text_model.save_pretrained(tmp_path / "tower")
    args = ModelArguments(from_scratch=True, text_weights=str(tmp_path / "tower"))
    model = build_model(
        given.config, args, BertTokenizer(vocab={w: i for i, w in enumerate([*WORDS, *map(str, range(52))])})
    )
    state = model.text_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.text_model.state_dict().items())


def test_a_tokenizer_of_another_vocabulary_does_not_fit_pretrained_weights(tiny_model):
    config = tiny_model("text").config
    few = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    with pytest.raises(ValueError, match="--tokenizer x has 8 tokens, the pretrained text backbone 60"):
        build_model(config, ModelArguments(tokenizer="x", text_weights="tower"), few)


def test_without_a_network_one_line_says_what_to_do(table, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError) as error:
        train(*parse_arguments(["--data", table, "--preset", "tinybert", "--output_dir", str(tmp_path / "m")]))
    message = str(error.value)
    assert "'huawei-noah/TinyBERT_General_4L_312D' cannot be loaded" in message and "\n" not in message
    assert "HF_HUB_OFFLINE=1" in message and "--from_scratch" in message
    assert not (tmp_path / "m").exists()
