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

from hf_mmclf import MMClfForImageTextClassification, ModelArguments, build_trainer, parse_arguments, train
from hf_mmclf.training.inputs import build_config, build_model, prepare_inputs, warn_of_idle

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
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate([*WORDS, *map(str, range(52))])})
    model = build_model(given.config, args, tokenizer, None)
    state = model.text_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given.text_model.state_dict().items())


def test_a_tokenizer_of_another_vocabulary_does_not_fit_pretrained_weights(tiny_model):
    config = tiny_model("text").config
    few = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    with pytest.raises(ValueError, match="--tokenizer x has 8 tokens, the pretrained text backbone 60"):
        build_model(config, ModelArguments(tokenizer="x", text_weights="tower"), few, None)


def test_without_a_network_one_line_says_what_to_do(table, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError) as error:
        train(*parse_arguments(["--data", table, "--preset", "tinybert", "--output_dir", str(tmp_path / "m")]))
    message = str(error.value)
    assert "'huawei-noah/TinyBERT_General_4L_312D' cannot be loaded" in message and "\n" not in message
    assert "HF_HUB_OFFLINE=1" in message and "--from_scratch" in message
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "demo-text", "--image_size", "32", "--flip", "0.1"], "--flip, because the model has no image"),
        (["--preset", "demo-text", "--unfrozen_image_stages", "1"], "--unfrozen_image_stages, because"),
        (
            ["--preset", "demo", "--image_backbone", "none", "--color_jitter", "0.1"],
            "--color_jitter, because the model",
        ),
        (["--preset", "demo-image", "--max_tokens", "16"], "--max_tokens, because the model has no text backbone"),
        (["--preset", "demo-image", "--width", "64"], "--width, because the model has one backbone"),
        (["--preset", "warmerdbert", "--fusion_heads", "2"], "--fusion_heads, because the fusion self has no such"),
        (["--preset", "querybert", "--vocab_size", "99"], "--vocab_size, because the tokenizer is not trained"),
        (["--preset", "demo-text", "--image_dir", "x"], None),  # named when the rows are read
        (["--preset", "demo-text", "--fusion", "label_queries", "--width", "32", "--fusion_heads", "2"], None),
        (["--preset", "demo-text", "--feature_dropout", "0.2"], None),
        (["--preset", "demo-text", "--image_tokens", "spatial"], "--image_tokens, because the model has no image"),
        (["--preset", "demo", "--projection_norm"], "--projection_norm, because label queries and models"),
        (["--preset", "demo-image", "--fusion_norm"], "--fusion_norm, because label queries and models"),
        (["--image_backbone", "none"], None),  # the recipe of `demo` has an image size and a flip
    ],
)
def test_arguments_of_a_part_that_the_model_does_not_have_are_named(flags, message, notices):
    model_args, _, augmentation, _ = parse_arguments(flags)
    warn_of_idle(build_config(model_args), model_args, augmentation)
    found = " ".join(notices()).replace(" has no effect", "").replace(" have no effect", "")
    assert message in found if message else "no effect" not in found


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image_dir", "."], "--image_dir has no effect, because the embedded data set has no image files"),
        (["--data", "t.csv", "--demo_rows", "9"], "--demo_rows has no effect, because --data has rows of its own"),
        (["--data", "t.csv", "--shuffle_buffer", "9"], "--shuffle_buffer has no effect, because --streaming is not"),
        (["--split_seed", "9"], "--split_seed has no effect, because the rows of validation are given"),
        (["--test_fraction", "0.2"], "--test_fraction has no effect, because the rows of test are given"),
    ],
)
def test_arguments_without_an_effect_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("text,labels\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        train(*parse_arguments([*flags, "--preset", "demo-text", "--output_dir", "m"]))
    assert not (tmp_path / "m").exists()


def test_min_labels_above_the_number_of_labels_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("text,labels\n" + "a,x\nb,y\n" * 20, encoding="utf-8")
    flags = ["--data", str(tmp_path / "t.csv"), "--preset", "demo-text", "--min_labels", "3"]
    with pytest.raises(ValueError, match="--min_labels is 3, but there are 2 labels"):
        prepare_inputs(*parse_arguments(flags))


@pytest.mark.parametrize(
    "given, rows, expected", [(None, "x y", 1), (None, "x ,", 0), ("0", "x y", 0), ("2", "x y", 2)]
)
def test_every_prediction_has_a_label_if_every_training_row_has_one(given, rows, expected, tmp_path, notices):
    lines = "".join(f"text {row},{label}\n" for row in range(9) for label in rows.replace(",", " ").split(" ")[:2])
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text(f"text,labels\n{lines}", encoding="utf-8")
    flags = ["--data", str(tmp_path), "--preset", "demo-text", *(["--min_labels", given] if given else [])]
    assert prepare_inputs(*parse_arguments(flags)).model.config.min_labels == expected
    said = "every training row has a label, so every prediction gets at least one (min_labels 1)"
    assert (said in notices()) == (given is None and expected == 1)


def test_late_fusion_starts_from_the_frequencies_of_the_labels(tmp_path, notices):
    """The first scores are those frequencies, of which unknown labels are no part."""
    rows = ["a,1,0,-1", "b,1,-1,-1", "c,0,-1,-1", "d,1,1,-1"] * 5
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,x,y,z", *rows]), encoding="utf-8")
    columns = ["--data", str(tmp_path), "--label_columns", "x", "y", "z", "--preset", "demo-text"]
    arguments = parse_arguments([*columns, "--feature_dropout", "0.2", "--output_dir", str(tmp_path / "m")])
    said = "the biases of the classifiers start at the frequencies of the labels"
    for make in (prepare_inputs, build_trainer):
        model = make(*arguments).model
        torch.testing.assert_close(model.classifier.bias.sigmoid(), torch.tensor([0.75, 0.5, 0.5]))
        assert said in notices()
    assert prepare_inputs(*parse_arguments(columns)).model.classifier.bias.tolist() == [0, 0, 0]
    assert said not in notices()
