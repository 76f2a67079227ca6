import pytest
import timm
import torch
from transformers import AutoModel, TorchAoConfig

from hf_mmclf import MMClfForImageTextClassification
from hf_mmclf.training.arguments import MMClfTrainingArguments
from hf_mmclf.training.trainer import MMClfTrainer

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0]])


@pytest.fixture
def model(tiny_config):
    return MMClfForImageTextClassification(tiny_config())


def batch(config):
    texts = {"input_ids": torch.randint(5, 60, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    return {"pixel_values": torch.randn(2, 3, 64, 64), **texts} if config.has_image else texts


def test_embeddings_of_the_text_backbone_are_resized(model, tmp_path):
    assert model.get_input_embeddings() is model.text_model.embeddings.word_embeddings
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(70)
    assert model.config.text_config.vocab_size == 70
    assert torch.equal(model.get_input_embeddings().weight[:60], before)
    model.save_pretrained(tmp_path)
    again = MMClfForImageTextClassification.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_model_without_texts_has_no_embeddings(tiny_config):
    model = MMClfForImageTextClassification(tiny_config("image"))
    assert model.get_input_embeddings() is None
    with pytest.raises(NotImplementedError, match="no text backbone"):
        model.set_input_embeddings(torch.nn.Embedding(3, 4))


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_main_input_is_one_that_the_model_has(kind, tiny_config):
    model = MMClfForImageTextClassification(tiny_config(kind))
    assert model.main_input_name == ("input_ids" if kind == "text" else "pixel_values")


def test_outputs_of_the_text_backbone(model, tiny_config):
    inputs = batch(model.eval().config)
    outputs = model(**inputs, output_hidden_states=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(2, 6, 16)] * 3
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, outputs.logits)
    image_model = MMClfForImageTextClassification(tiny_config("image"))
    with pytest.raises(ValueError, match="only text backbones have hidden states"):
        image_model(pixel_values=inputs["pixel_values"], output_hidden_states=True)


def test_return_dict_of_the_config_counts(model):
    inputs = batch(model.eval().config)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)
    assert torch.equal(model(**inputs)[0], model(**inputs, return_dict=True).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_float32_images(dtype, model, tmp_path):
    model.save_pretrained(tmp_path)
    inputs = batch(model.config)
    with torch.no_grad():
        half = AutoModel.from_pretrained(tmp_path, dtype=dtype)(**inputs).logits
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), model.eval()(**inputs).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_missing_tensors_of_the_image_backbone_are_as_in_a_new_timm_model(name, tiny_config):
    config = tiny_config("image", image_backbone=name, image_backbone_args=None)
    loaded = MMClfForImageTextClassification.from_pretrained(None, config=config, state_dict={}).image_model
    new = timm.create_model(name, num_classes=0).state_dict()
    for key, value in loaded.state_dict().items():
        value, expected = value.float(), new[key].float()
        if expected.unique().numel() == 1:
            assert torch.equal(value, expected), key
        elif expected.numel() > 100:  # drawn at random
            assert 0.6 < value.std() / expected.std() < 1.6, key


def test_tensors_of_another_size_are_as_in_a_new_timm_model(tiny_config, tmp_path):
    config = tiny_config("image", image_backbone="test_vit", image_backbone_args={"img_size": 32})
    model = MMClfForImageTextClassification(config)
    model.save_pretrained(tmp_path)
    larger = MMClfForImageTextClassification.from_pretrained(
        tmp_path, image_backbone_args={"img_size": 64}, ignore_mismatched_sizes=True
    )
    assert 0.01 < larger.image_model.pos_embed.std() < 0.03 and larger.image_model.pos_embed.shape == (1, 17, 64)
    weights = larger.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items() if "pos" not in name)


def test_neftune(model, tiny_config, tmp_path):
    args = MMClfTrainingArguments(
        str(tmp_path), neftune_noise_alpha=5.0, max_steps=2, learning_rate=0.0, eval_strategy="no", save_strategy="no"
    )
    args.load_best_model_at_end = False
    row = {**{name: column[0] for name, column in batch(model.config).items()}, "labels": LABELS[0]}
    model.text_model.embeddings.dropout.p, seen = 0.0, []
    model.text_model.embeddings.register_forward_hook(lambda module, _, output: seen.append(output.detach()))
    MMClfTrainer(model, args, train_dataset=[row]).train()
    assert len(seen) == 2 and not torch.equal(*seen)  # the same row with other noise
    with pytest.raises(ValueError, match="neftune_noise_alpha is set, but the model has no text backbone"):
        MMClfTrainer(MMClfForImageTextClassification(tiny_config("image")), args, train_dataset=[row])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
@pytest.mark.parametrize("kind", ["both", "text"])
def test_an_adapter_of_peft_gives_the_same_model_again(task, kind, tiny_config, tmp_path):
    """Also the statistics of BatchNorm layers, which an adapter does not save."""
    peft = pytest.importorskip("peft")
    MMClfForImageTextClassification(tiny_config(kind)).save_pretrained(tmp_path / "model")
    lora = peft.LoraConfig(task_type=task, target_modules=["query", "value"], modules_to_save=["classifier"])
    base = MMClfForImageTextClassification.from_pretrained(tmp_path / "model")
    adapted, inputs = peft.get_peft_model(base, lora), batch(base.config)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(**inputs, labels=LABELS).loss.backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    base = MMClfForImageTextClassification.from_pretrained(tmp_path / "model")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, adapted.eval()(**inputs).logits)


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_quantization_of_torchao(kind, tiny_config, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = MMClfForImageTextClassification(tiny_config(kind)).eval()
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = MMClfForImageTextClassification.from_pretrained(tmp_path, quantization_config=config)
    inputs = {name: value for name, value in batch(model.config).items() if kind != "image" or name == "pixel_values"}
    with torch.no_grad():
        torch.testing.assert_close(quantized(**inputs).logits, model(**inputs).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_backbones_of_a_finished_model_start_another_one(kind, tiny_config, tmp_path):
    finished = MMClfForImageTextClassification(tiny_config(kind))
    finished.save_pretrained(tmp_path)
    weights = {name: str(tmp_path) if getattr(finished.config, f"has_{name}") else None for name in ("image", "text")}
    model = MMClfForImageTextClassification.from_backbones(tiny_config(), weights["image"], weights["text"])
    for name, given in weights.items():
        assert getattr(model.config, f"{name}_weights") == (tmp_path.name if given else "scratch")
        if given:
            own, kept = (getattr(one, f"{name}_model").state_dict() for one in (finished, model))
            assert kept and all(torch.equal(own[key], kept[key]) for key in kept)
        else:
            fields = {f"{part}_weights": str(tmp_path) if part == name else None for part in ("image", "text")}
            with pytest.raises(ValueError, match="does not fit"):
                MMClfForImageTextClassification.from_backbones(tiny_config(), **fields)


def test_text_weights_need_no_configuration(tiny_config, tmp_path):
    tower = MMClfForImageTextClassification(tiny_config("text")).text_model
    tower.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    model = MMClfForImageTextClassification.from_backbones(tiny_config("text"), text_weights=str(tmp_path))
    state = model.text_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.state_dict().items())
