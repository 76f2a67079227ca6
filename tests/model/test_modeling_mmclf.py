import copy
import itertools
import math
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertForPreTraining, BertModel

from hf_mmclf import MMClfConfig, MMClfForImageTextClassification
from hf_mmclf.model.fusion_mmclf import FeatureNorm
from hf_mmclf.presets import config_from_preset

KINDS = ("self", "cross_text", "cross_image", "concat")
ALL_KINDS = (*KINDS, "label_queries")
EVERY_FUSION = [
    dict(fusion=kind, image_tokens=tokens, fusion_norm=norm)
    for kind, tokens, norm in itertools.product(KINDS, ("pooled", "spatial"), (False, True))
]
QUERIES = [
    dict(kind=kind, fusion="label_queries", image_tokens="spatial", fusion_layers=layers)
    for kind, layers in (("both", 1), ("both", 2), ("text", 1))
] + [dict(kind=kind, fusion="label_queries", image_tokens="stages", fusion_heads=8) for kind in ("both", "text")]
TEXT_ONLY = [dict(kind="text", text_pooling="pooler"), dict(kind="text", text_pooling="mean")]


def ids(fields):
    return "-".join(str(value) for value in fields.values())


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def scramble(module):
    """Random values for what starts as zeros or ones, BatchNorm statistics too, and attention that chooses."""
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.ndim == 1:
            tensor.normal_()
        elif name.startswith("fusion."):
            tensor.normal_(std=0.5)
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_same_state(module, other):
    assert list(module.state_dict()) == list(other.state_dict())
    assert not changed(module.state_dict(), other.state_dict())


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def reload(model, folder):
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder)


# What is computed


@pytest.mark.parametrize("fields", EVERY_FUSION + TEXT_ONLY + QUERIES, ids=ids)
def test_padding_has_no_effect(fields, tiny_model, tiny_batch):
    model = scramble(tiny_model(**fields))
    batch = tiny_batch(fields.get("kind", "both"))
    expected = logits(model, batch)
    mask = F.pad(batch["attention_mask"], (0, 5))
    garbage = torch.randint(0, 60, mask.shape)
    batch["input_ids"] = torch.where(mask.bool(), F.pad(batch["input_ids"], (0, 5)), garbage)
    batch["attention_mask"] = mask
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=0)


def slow_linear(layer, x):
    return x @ layer.weight.T + layer.bias


def slow_attention(attention, asking, answering):
    keys = [slow_linear(attention.key, token) for token in answering]
    values = [slow_linear(attention.value, token) for token in answering]
    attended = []
    for token in asking:
        query = slow_linear(attention.query, token)
        weights = [math.exp((query * key).sum().item() / math.sqrt(len(query))) for key in keys]
        attended.append(sum(weight / sum(weights) * value for weight, value in zip(weights, values, strict=True)))
    return attended


def slow_norm(norm, token):
    token = token * norm.scale
    deviation = (token.var(unbiased=False) + norm.norm.eps).sqrt()
    return (token - token.mean()) / deviation * norm.norm.weight + norm.norm.bias


def slow_projection(layers, vector):
    if isinstance(layers, nn.Linear):
        return slow_linear(layers, vector)
    vector, norm = slow_linear(layers[0], vector), layers[1]
    vector = (vector - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    return vector.clamp(min=0)


def slow_logits(model, pixels, input_ids):
    """One row without padding, written down from systems.md."""
    feature_map = model.image_model.forward_features(pixels[None])[0]
    cells = [feature_map[:, y, x] for y, x in itertools.product(*map(range, feature_map.shape[1:]))]
    image = cells if model.config.image_tokens == "spatial" else [sum(cells) / len(cells)]
    text = list(model.text_model(input_ids[None]).last_hidden_state[0])
    fusion = model.fusion
    if fusion.kind == "self":
        image = slow_attention(fusion.image_attention, image, image)
        text = slow_attention(fusion.text_attention, text, text)
    elif fusion.kind == "cross_text":
        image = slow_attention(fusion.image_attention, text, image)
    elif fusion.kind == "cross_image":
        image = slow_attention(fusion.image_attention, image, text)
    if model.config.fusion_norm:
        image = [slow_norm(fusion.image_norm, token) for token in image]
        text = [slow_norm(fusion.text_norm, token) for token in text]
    image = slow_projection(model.image_projection, sum(image) / len(image))
    text = slow_projection(model.text_projection, sum(text) / len(text))
    return slow_linear(model.classifier, torch.cat([image, text]))


@torch.no_grad()
@pytest.mark.parametrize("fields", EVERY_FUSION, ids=ids)
def test_fusion_against_loops(fields, tiny_model, tiny_batch):
    model = scramble(tiny_model(projection_norm=fields["fusion_norm"], **fields))
    batch = tiny_batch()
    rows = zip(batch["pixel_values"], batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
    expected = torch.stack([slow_logits(model, pixels, tokens[:length]) for pixels, tokens, length in rows])
    torch.testing.assert_close(model(**batch).logits, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_pooled_self_attention_is_the_value_projection(tiny_model, tiny_batch):
    model = scramble(tiny_model(fusion="self"))
    seen = []
    model.image_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = tiny_batch()
    model(**batch)
    pooled = model.image_model(batch["pixel_values"])
    torch.testing.assert_close(seen[0], model.fusion.image_attention.value(pooled))


@torch.no_grad()
@pytest.mark.parametrize("fields", [dict(kind="image"), *TEXT_ONLY], ids=ids)
def test_one_backbone(fields, tiny_model, tiny_batch):
    model = scramble(tiny_model(**fields))
    batch = tiny_batch(fields["kind"])
    if fields["kind"] == "image":
        features = model.image_model(batch["pixel_values"])
    elif fields["text_pooling"] == "pooler":
        first = model.text_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        features = slow_linear(model.text_model.pooler.dense, first).tanh()
    else:
        rows = zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
        features = torch.cat([model.text_model(row[None, :n]).last_hidden_state.mean(1) for row, n in rows])
    torch.testing.assert_close(model(**batch).logits, slow_linear(model.classifier, features), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("projection_norm", "zeros"), [(False, 0.5), (True, 0.75)])
def test_dropout_comes_once(projection_norm, zeros, tiny_model, tiny_batch):
    """Before the classifier, or after the ReLU, which makes half of them zeros itself."""
    model = tiny_model(dropout=0.5, projection_norm=projection_norm, width=2048).train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(**tiny_batch())
    assert (seen[0] == 0).float().mean().item() == pytest.approx(zeros, abs=0.1)


@pytest.mark.parametrize("labels", [torch.eye(3), torch.eye(3).long(), torch.ones(3, 3).bool()])
def test_loss(labels, tiny_model, tiny_batch):
    output = tiny_model()(**tiny_batch(), labels=labels)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels.float()))


def test_loss_is_fp32_under_bf16(tiny_model, tiny_batch):
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    output = tiny_model(image_tokens="spatial", fusion_norm=True, learned_missing=True).to(torch.bfloat16)(
        **batch, image_mask=torch.tensor([1, 0, 1]), labels=torch.eye(3)
    )
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits.float(), torch.eye(3)))


def test_return_dict(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    output = model(**batch, labels=torch.eye(3))
    assert list(output) == ["loss", "logits"]  # more would make Trainer's predictions a tuple
    loss, scores = model(**batch, labels=torch.eye(3), return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(scores, output.logits)
    assert len(model(**batch, return_dict=False)) == 1


def test_trainer_must_divide_the_loss_itself():
    assert MMClfForImageTextClassification.accepts_loss_kwargs is False


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_compiles_without_graph_breaks(kind, tiny_model, tiny_batch):
    fields = dict(fusion=kind, image_tokens="spatial", fusion_norm=True, learned_missing=True)
    fields |= dict(modality_classifiers=True)
    small = dict(image_backbone="resnet18", image_backbone_args=dict(layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]))
    model = tiny_model(**small, **fields)
    batch = tiny_batch() | dict(image_mask=torch.tensor([1, 0, 1]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, batch), logits(model, batch))
    if kind in ("cross_text", "label_queries"):
        exported = torch.export.export(model, (), batch).module()
        torch.testing.assert_close(logits(exported, batch), logits(model, batch))


# A missing modality


@pytest.mark.parametrize("learned", [False, True], ids=["zero", "learned"])
@pytest.mark.parametrize("tokens", ["pooled", "spatial"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_content_of_missing_modalities_has_no_effect(kind, tokens, learned, tiny_model, tiny_batch):
    fields = dict(learned_missing=learned, fusion_norm=learned, modality_classifiers=learned)
    model = tiny_model(fusion=kind, image_tokens=tokens, **fields)
    image_mask, text_mask = torch.tensor([False, True, True]), torch.tensor([True, False, True])
    batch = tiny_batch() | dict(image_mask=image_mask, text_mask=text_mask, labels=torch.eye(3))
    other = {name: value.clone() for name, value in batch.items()}
    other["pixel_values"][0] = torch.tensor([math.nan, math.inf, 1e30])[:, None, None]
    other["input_ids"][1] = 59
    other["attention_mask"][1] = 0
    for mode in (False, True):  # in training too the statistics of BatchNorm must not see it
        results = []
        for inputs in (batch, other):
            model.train(mode)
            model.zero_grad()
            torch.manual_seed(0)
            output = model(**inputs)
            output.loss.backward()
            results.append([output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)  # NaN is not equal to itself


@pytest.mark.parametrize("learned", [False, True], ids=["zero", "learned"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_all_missing_equals_not_given(kind, learned, tiny_model, tiny_batch):
    model = scramble(
        tiny_model(fusion=kind, image_tokens="spatial", learned_missing=learned, modality_classifiers=learned)
    )
    batch = tiny_batch()
    pixels = dict(pixel_values=batch.pop("pixel_values"))
    missing = torch.zeros(3, dtype=torch.bool)
    no_image, no_text = logits(model, batch), logits(model, pixels)
    torch.testing.assert_close(logits(model, pixels | batch | dict(image_mask=missing)), no_image)
    torch.testing.assert_close(logits(model, pixels | batch | dict(text_mask=missing)), no_text)
    no_tokens = dict(attention_mask=torch.zeros_like(batch["attention_mask"]))
    torch.testing.assert_close(logits(model, pixels | batch | no_tokens), no_text)
    both = logits(model, pixels | batch)
    assert not torch.allclose(both, no_image, atol=1e-3) and not torch.allclose(both, no_text, atol=1e-3)


def by_heads(q, k, v):
    """Attention of four heads, as its definition says."""
    heads = [
        torch.softmax(a @ b.T / math.sqrt(a.shape[1]), -1) @ c
        for a, b, c in zip(q.chunk(4, 1), k.chunk(4, 1), v.chunk(4, 1), strict=True)
    ]
    return torch.cat(heads, 1)


def attend(attention, x, tokens):
    weights = [part.chunk(3) for part in (attention.in_proj_weight, attention.in_proj_bias)]
    return attention.out_proj(by_heads(*(y @ w.T + b for y, w, b in zip((x, tokens, tokens), *weights, strict=True))))


def decode(layer, x, memory):
    x = x + attend(layer.self_attn, layer.norm1(x), layer.norm1(x))
    x = x + attend(layer.multihead_attn, layer.norm2(x), memory)
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm3(x))))


@pytest.mark.parametrize("kind", ["both", "text"])
def test_label_queries_row_by_row(kind, tiny_model, tiny_batch):
    """Texts attend to images, labels to both and to the result; padding has no effect, each label has a classifier."""
    model = scramble(tiny_model(kind, fusion="label_queries", image_tokens="spatial"))
    batch = tiny_batch(kind)
    tokens = [model.encode_text(batch["input_ids"], batch["attention_mask"])]
    if kind == "both":
        tokens.insert(0, model.encode_image(batch["pixel_values"]))
    found = logits(model, batch)
    for row in range(3):
        seen = [features[row][mask[row]] for features, mask in tokens]
        if kind == "both":
            grounding = model.fusion.grounding
            q, k, v = grounding.query(seen[1]), grounding.key(seen[0]), grounding.value(seen[0])
            seen.append(by_heads(q, k, v))
        memory = [project(features) for project, features in zip(model.fusion.projections, seen, strict=True)]
        vectors = decode(model.fusion.decoder.layers[0], model.fusion.queries, torch.cat(memory))
        vectors = model.fusion.decoder.norm(vectors)
        for project, features in zip(model.fusion.means, seen[-2:], strict=True):
            vectors = vectors + project(features.mean(0))
        expected = [vectors[i] @ model.classifier.weight[i] + model.classifier.bias[i] for i in range(3)]
        torch.testing.assert_close(found[row], torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_modality_dropout_makes_modalities_missing_but_never_both(kind, tiny_model, tiny_batch):
    model = tiny_model(fusion=kind, image_tokens="spatial", modality_dropout=0.6)
    batch = {name: value[[0] * 300] for name, value in tiny_batch().items()}
    with_text, with_image = torch.arange(300) != 0, torch.arange(300) != 1
    drawn = model._drop_modalities(batch["input_ids"], with_image, with_text)
    assert [mask.float().mean() for mask in drawn] == [pytest.approx(0.7, abs=0.08)] * 2
    assert (drawn[0] | drawn[1]).all() and drawn[0][0] and drawn[1][1] and not drawn[1][0] and not drawn[0][1]
    assert not (~drawn[0] & ~drawn[1]).any()
    whole = logits(model, batch)
    torch.testing.assert_close(whole, whole[:1].expand_as(whole))  # in evaluation nothing is dropped
    for module in model.modules():
        module.training = module is model  # no other dropout, no batch statistics
    once = {name: value[:1] for name, value in batch.items()}
    missing = torch.tensor([False])
    variants = [logits(model.eval(), once | mask) for mask in ({}, dict(image_mask=missing), dict(text_mask=missing))]
    model.training = True
    found = logits(model, batch)
    nearest = torch.stack([(found - variant).abs().amax(1) for variant in variants])
    assert (nearest.amin(0) < 1e-5).all()
    assert torch.bincount(nearest.argmin(0), minlength=3).float().div(300).tolist() == pytest.approx(
        [0.4, 0.3, 0.3], abs=0.1
    )
    assert model.missing_image.vector is not None and model.missing_text.vector is not None


@pytest.mark.parametrize("tokens", ["pooled", "mean_max", "spatial"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_modality_classifiers_row_by_row(kind, tokens, tiny_model, tiny_batch):
    """Logits are those of each modality that is there and, if both are, those of the fusion."""
    fields = dict(fusion=kind, image_tokens=tokens, projection_norm=kind == "concat", learned_missing=True)
    model = scramble(tiny_model(**fields, modality_classifiers=True, feature_dropout=0.5))
    own = model.modality_classifiers
    for linear in (own.image, own.text):
        linear.weight.data.normal_(std=0.3)
    masks = dict(image_mask=torch.tensor([True, False, True]), text_mask=torch.tensor([True, True, False]))
    batch = tiny_batch()
    image, _ = model.encode_image(batch["pixel_values"])
    text, mask = model.encode_text(batch["input_ids"], batch["attention_mask"])
    found = logits(model, batch | masks)
    model.modality_classifiers = None
    fused = logits(model, batch)
    for row in range(3):
        vectors = {"image": image[row].mean(0), "text": text[row][mask[row]].mean(0)}
        for name, vector in vectors.items():
            norm = model.feature_norms[name]
            vectors[name] = (vector - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        alone = {name: getattr(own, name)(vector) for name, vector in vectors.items()}
        expected = (fused[row] + alone["image"] + alone["text"], alone["text"], alone["image"])[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_calibration_divides_all_logits(tiny_model, tiny_batch):
    model = scramble(tiny_model(modality_classifiers=True))
    batch = tiny_batch()
    before = logits(model, batch)
    model.calibrate(2.0)
    torch.testing.assert_close(logits(model, batch), before / 2)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_mean_max_tokens_are_those_of_the_last_feature_map(name, tiny_model, tiny_batch):
    pixels = tiny_batch()["pixel_values"][:, :, :32, :32].repeat(1, 1, 5, 5)
    fields = dict(image_backbone=name, image_backbone_args=None)
    cells, model = tiny_model(image_tokens="spatial", **fields), tiny_model(image_tokens="mean_max", **fields)
    model.image_model.load_state_dict(cells.image_model.state_dict())
    (tokens, _), (found, mask) = cells.encode_image(pixels), model.encode_image(pixels)
    torch.testing.assert_close(found[:, 0], torch.cat([tokens.mean(1), tokens.amax(1)], 1))
    assert mask.shape == (3, 1) and model.classify((found, mask)).shape == (3, 3)


def test_each_modality_with_a_classifier_has_a_loss_of_its_own(tiny_model, tiny_batch):
    """Rows that lack a modality count in the loss of the other one, and in no loss twice."""
    model = scramble(tiny_model(modality_classifiers=True)).train()
    batch = tiny_batch() | dict(image_mask=torch.tensor([True, False, True]))
    labels = torch.tensor([[1.0, -1, 0], [1, 0, 0], [0, 1, 1]])
    output = model(**batch, labels=labels)
    image, text = output.modality_logits.unbind(1)
    assert image.isnan().any(1).tolist() == [False, True, False] and not text.isnan().any()

    def loss(logits, rows):
        known = labels[rows] >= 0
        return F.binary_cross_entropy_with_logits(logits[rows][known], labels[rows][known])

    expected = loss(output.logits, [0, 2]) + loss(image, [0, 2]) + loss(text, [0, 1, 2])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.eval()(**batch).modality_logits is None


def test_standardisation_counts_the_tokens_that_are_there(tiny_model, tiny_batch):
    model = tiny_model(modality_classifiers=True).train()
    model.text_model.eval()  # without dropout
    batch, norm = tiny_batch(), model.feature_norms["text"]
    rows = {name: value[[0, 2]] for name, value in batch.items()}
    tokens, mask = model.encode_text(rows["input_ids"], rows["attention_mask"])
    model(**batch | dict(text_mask=torch.tensor([True, False, True])))
    torch.testing.assert_close(norm.running_mean, 0.1 * tokens[mask].mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * tokens[mask].var(0, correction=0))
    found = state(norm)
    one = {name: value[:1] for name, value in batch.items()}
    for present in (False, True):  # no row has no spread, and neither has a single one
        model(**one | dict(text_mask=torch.tensor([present])))
    torch.testing.assert_close(found, state(norm))
    tokens, mask = model.encode_text(one["input_ids"], one["attention_mask"])
    expected = (tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(norm(tokens, mask)[mask], expected[mask])


@pytest.mark.parametrize("missing", ["image", "text"])
def test_all_parameters_have_gradients_if_no_row_has_a_modality(missing, tiny_model, tiny_batch):
    """DistributedDataParallel does not allow parameters without one."""
    model = tiny_model(feature_dropout=0.5, modality_classifiers=True, learned_missing=True).train()
    mask = {f"{missing}_mask": torch.zeros(3, dtype=torch.bool)}
    model(**tiny_batch(), **mask, labels=torch.ones(3, 3)).loss.backward()
    unused = {"classifier.weight", "classifier.bias"}  # of rows with both modalities
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert unused <= {name for name, weight in model.named_parameters() if (weight.grad == 0).all()}


def test_pixels_of_missing_images_may_be_nan(tiny_model, tiny_batch):
    model, batch = tiny_model(feature_dropout=0.5).train(), tiny_batch()
    batch["pixel_values"][1] = torch.nan
    model(**batch, image_mask=torch.tensor([True, False, True]), labels=torch.ones(3, 3)).loss.backward()
    assert not any(weight.grad.isnan().any() for weight in model.parameters() if weight.grad is not None)


def test_feature_dropout_drops_the_same_features_of_all_tokens(tiny_model):
    norm = FeatureNorm(50, 0.5).train()
    tokens, mask = torch.randn(4, 6, 50), torch.rand(4, 6) < 0.8
    dropped = norm(tokens, mask)
    for row, there in zip(dropped, mask, strict=True):
        zeros = row[there] == 0
        assert (zeros == zeros[0]).all() and 10 < zeros[0].sum() < 40 and (row[~there] == 0).all()
    there = tokens[mask]
    standard = (there - there.mean(0)) / (there.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(dropped[mask], torch.where(dropped[mask] == 0, 0, 2 * standard))
    for kind, rates in (("both", {"image": 0.8, "text": 0.5}), ("image", {"image": 0.8}), ("text", {"text": 0.5})):
        norms = tiny_model(kind, feature_dropout=0.8).feature_norms
        assert {name: norm.dropout.p for name, norm in norms.items()} == rates
    assert tiny_model().feature_norms is None and tiny_model("text", modality_classifiers=True).feature_norms is None


@pytest.mark.parametrize("kind, fields", [("both", {}), ("both", dict(modality_classifiers=True)), ("text", {})])
def test_the_first_scores_can_be_the_frequencies_of_the_labels(kind, fields, tiny_model, tiny_batch):
    model = tiny_model(kind, **fields, feature_dropout=0.5).eval()
    model.init_biases(torch.tensor([0.5, 0.01, 0.0]))
    for name, parameter in model.named_parameters():
        if "classifier" in name and name.endswith("weight"):
            parameter.data.zero_()
    batch = tiny_batch()
    if kind == "text":
        del batch["pixel_values"]
    torch.testing.assert_close(model(**batch).logits.sigmoid(), torch.tensor([[0.5, 0.01, 0.001]]).expand(3, -1))


def test_unknown_labels_are_left_out_of_the_loss(tiny_model, tiny_batch):
    model, batch = tiny_model(), tiny_batch()
    labels = torch.tensor([[1.0, -1, 0], [-1, -1, -1], [0, 1, 1]])
    known = labels >= 0
    expected = F.binary_cross_entropy_with_logits(logits(model, batch)[known], labels[known])
    assert model(**batch, labels=labels).loss.item() == pytest.approx(expected.item())
    assert model(**batch, labels=torch.full((3, 3), -1)).loss.item() == 0


@pytest.mark.parametrize("fusion", ["self", "label_queries"])
def test_calibration_divides_all_logits_and_is_saved(fusion, tiny_model, tiny_batch, tmp_path):
    model, batch = tiny_model(fusion=fusion), tiny_batch()
    before = logits(model, batch)
    model.calibrate(2.5)
    torch.testing.assert_close(logits(reload(model, tmp_path), batch), before / 2.5)


def test_learned_missing(tiny_model, tiny_batch):
    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    model = tiny_model(learned_missing=True)
    assert count(model) - count(tiny_model()) == model.image_model.num_features + 16
    vectors = [model.missing_image.vector, model.missing_text.vector]
    present = torch.tensor([True, False, True])
    model(**tiny_batch(), image_mask=present, text_mask=~present, labels=torch.eye(3)).loss.backward()
    assert all(vector.std() > 0 and vector.grad.abs().sum() > 0 for vector in vectors)
    model.zero_grad()  # where nothing is missing the gradient is zero, not None: DDP wants one
    model(**tiny_batch(), labels=torch.eye(3)).loss.backward()
    assert all(vector.grad is not None and not vector.grad.any() for vector in vectors)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("both", [], "expected pixel_values or input_ids, got neither"),
        ("image", [], "expected pixel_values, got neither"),
        ("text", [], "expected input_ids, got neither"),
        ("text", ["pixel_values"], "no image backbone"),
        ("image", ["input_ids"], "no text backbone"),
        ("image", ["pixel_values", "input_ids"], "no text backbone"),
    ],
)
def test_wrong_inputs(kind, given, message, tiny_model, tiny_batch):
    batch = tiny_batch()
    with pytest.raises(ValueError, match=message):
        tiny_model(kind)(**{name: batch[name] for name in given})


def test_no_backbone():
    with pytest.raises(ValueError, match="neither image_backbone nor text_config"):
        MMClfForImageTextClassification(MMClfConfig())


# Freezing

DENSENET_PARTS = {
    0: (),
    1: ("features.transition3", "features.denseblock4", "features.norm5"),
    2: (
        "features.transition2",
        "features.denseblock3",
        "features.transition3",
        "features.denseblock4",
        "features.norm5",
    ),
}
BERT_PARTS = {0: (), 1: ("encoder.layer.1",)}
CASES = [(0, 0), (1, 1), (2, 1)]  # unfrozen image stages and text layers


def of(names, parts):
    return {name for name in names if name.startswith(tuple(f"{part}." for part in parts))}


@pytest.mark.parametrize("origin", ["built", "loaded", "copied", "pickled"])
@pytest.mark.parametrize(("stages", "layers"), CASES)
def test_training_changes_only_what_is_unfrozen(stages, layers, origin, tiny_model, tiny_batch, tmp_path):
    original = tiny_model(unfrozen_image_stages=stages, unfrozen_text_layers=layers)
    model = {
        "built": lambda: original,
        "loaded": lambda: reload(original, tmp_path),
        "copied": lambda: copy.deepcopy(original),
        "pickled": lambda: pickle.loads(pickle.dumps(original)),
    }[origin]()
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        model.train()  # as Trainer does, each step
        model(**tiny_batch(), labels=torch.eye(3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    image = {f"image_model.{name}" for name in of(model.image_model.state_dict(), DENSENET_PARTS[stages])}
    text = {f"text_model.{name}" for name in of(model.text_model.state_dict(), BERT_PARTS[layers])}
    rest = {name for name in before if not name.startswith(("image_model.", "text_model."))}
    # with one image token the attention is constant: queries and keys get weight decay, but no gradient
    indifferent = {
        name for name in rest if name.startswith(("fusion.image_attention.query", "fusion.image_attention.key"))
    }
    # a constant added to all keys changes no softmax
    indifferent |= {name for name in before if name.endswith("key.bias")}
    assert changed(before, state(model)) - indifferent == (image | text | rest) - indifferent
    if model is not original:
        assert not changed(before, state(original))


def is_recorded(output):
    output = output if torch.is_tensor(output) else output[0]
    return output.requires_grad or output.grad_fn is not None


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
def test_autograd_records_nothing_in_frozen_parts(loaded, tiny_model, tiny_batch, tmp_path):
    model = tiny_model(unfrozen_image_stages=1, unfrozen_text_layers=1)
    model = (reload(model, tmp_path) if loaded else model).train()
    image, layers = model.image_model.features, model.text_model.encoder.layer
    recorded = {}
    for module in (image.denseblock3, image.transition3, model.text_model.embeddings, *layers):
        module.register_forward_hook(lambda module, _, output: recorded.update({module: is_recorded(output)}))
    model(**tiny_batch())
    assert not any(recorded[module] for module in (image.denseblock3, model.text_model.embeddings, layers[0]))
    assert recorded[image.transition3] and recorded[layers[1]]


def test_dropout_of_frozen_layers_is_off(tiny_model, tiny_batch, tiny_config):
    text_config = tiny_config().text_config.to_dict() | dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    model = tiny_model("text", text_config=text_config, unfrozen_text_layers=1).train()
    batch = tiny_batch("text")
    first, second = (model.text_model(**batch, output_hidden_states=True).hidden_states for _ in range(2))
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("image", dict(unfrozen_image_stages=5), "DenseNet has 5 stages with the stem; give 0 to 4, or None"),
        ("text", dict(unfrozen_text_layers=2), "BertModel has 2 layers; give 0 to 1, or None"),
    ],
)
def test_unfreezing_too_much(kind, fields, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, **fields)


# Frozen features: the tokens of backbones that are frozen whole


@pytest.mark.parametrize("tokens", ["pooled", "spatial", "stages"])
def test_frozen_features_replace_images_and_texts(tokens, tiny_model, tiny_batch):
    model = tiny_model(unfrozen_image_stages=0, unfrozen_text_layers=0, image_tokens=tokens)
    batch = tiny_batch()
    mask = {"attention_mask": batch["attention_mask"]}
    features = {
        "image_features": model.frozen_image_features(batch["pixel_values"]),
        "text_features": model.frozen_text_features(batch["input_ids"], **mask),
    }
    assert not any(value.requires_grad for value in features.values())
    torch.testing.assert_close(model(**features, **mask).logits, model(**batch).logits)

    gradients = []
    for given in (batch, {**features, **mask}):
        torch.manual_seed(1)  # for dropout
        model.train().zero_grad()
        model(**given, labels=torch.eye(3)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("unfrozen", [None, 1])
def test_only_wholly_frozen_backbones_have_frozen_features(unfrozen, tiny_model, tiny_batch):
    model = tiny_model(unfrozen_image_stages=unfrozen, unfrozen_text_layers=unfrozen)
    assert model.frozen_image_features(tiny_batch()["pixel_values"]) is None
    assert model.frozen_text_features(**tiny_batch("text")) is None


@pytest.mark.parametrize("stages", [None, 0, 1])
def test_rows_do_not_depend_on_their_batch(stages, tiny_model):
    model = tiny_model("image", unfrozen_image_stages=stages)
    pixels = torch.randn(6, 3, 64, 64)
    for module in model.modules():  # statistics that differ from any batch's
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    with torch.no_grad():
        one_by_one = torch.cat([model(pixel_values=pixels[i : i + 1]).logits for i in range(6)])
        torch.testing.assert_close(model(pixel_values=pixels).logits, one_by_one)


def test_gradients_reach_pixels_through_frozen_parts(tiny_model):
    model = tiny_model("image", unfrozen_image_stages=0)
    pixels = torch.randn(6, 3, 64, 64, requires_grad=True)
    model(pixel_values=pixels).logits.sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("stages", [None, 1])
def test_activation_checkpointing_changes_no_gradient(stages, tiny_model, tiny_batch):
    plain = tiny_model(unfrozen_image_stages=stages).train()
    again = copy.deepcopy(plain)
    again.activation_checkpointing_enable()
    batch, saved = tiny_batch(), []
    for model in (plain, again):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        torch.manual_seed(1)  # for dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, labels=torch.eye(3)).loss
        saved.append(count)
        loss.backward()
    torch.testing.assert_close(state(again), state(plain))  # running statistics too: one update a batch
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (plain, again)]
    torch.testing.assert_close(*gradients)
    assert saved[1] < 0.9 * saved[0]
    torch.testing.assert_close(again.eval()(**batch).logits, plain.eval()(**batch).logits)


def last_norm(model):
    """A BatchNorm layer inside a checkpointed block."""
    return [module for module in model.image_model.modules() if isinstance(module, torch.nn.BatchNorm2d)][-2]


def train_step(model, batch):
    model.train()
    model(**batch, labels=torch.eye(3)).loss.backward()
    model.zero_grad()


@pytest.mark.parametrize("kind", ["both", "image"])
def test_activation_checkpointing_can_be_enabled_twice_disabled_copied_and_pickled(kind, tiny_model, tiny_batch):
    plain, batch = tiny_model(kind), tiny_batch(kind)
    again = copy.deepcopy(plain)
    for _ in range(2):
        again.activation_checkpointing_enable()
    assert again.is_activation_checkpointing
    copied, unpickled = copy.deepcopy(again), pickle.loads(pickle.dumps(again))
    for model in (plain, again, copied, unpickled):
        torch.manual_seed(1)  # for dropout
        train_step(model, batch)
        assert int(last_norm(model).num_batches_tracked) == 1 and last_norm(model).momentum == 0.1
        torch.testing.assert_close(last_norm(model).running_mean, last_norm(plain).running_mean)
    before = last_norm(again).running_mean.clone()
    again.activation_checkpointing_enable()
    train_step(again, batch)
    assert int(last_norm(again).num_batches_tracked) == 2
    assert (last_norm(again).running_mean - before).abs().max() > 1e-6
    again.activation_checkpointing_disable()
    assert not again.is_activation_checkpointing
    assert not any(getattr(module, "grad_checkpointing", False) for module in again.image_model.modules())
    assert copied.is_activation_checkpointing


def test_activation_checkpointing_and_two_backward_passes_of_one_graph(tiny_model, tiny_batch):
    model = tiny_model("image", image_backbone="test_resnet", image_backbone_args={}).train()
    model.activation_checkpointing_enable()
    loss = model(**tiny_batch("image"), labels=torch.eye(3)).loss
    loss.backward(retain_graph=True)
    loss.backward()
    norms = [module for module in model.image_model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}


def test_activation_checkpointing_that_timm_does_not_have(tiny_model):
    with pytest.raises(ValueError, match="vgg11 has no activation checkpointing in timm"):
        tiny_model("image", image_backbone="vgg11", image_backbone_args={}).activation_checkpointing_enable()


# Other architectures

SWIN = dict(img_size=64, embed_dim=12, depths=[2, 1], num_heads=[1, 2], window_size=4)
EVA = dict(img_size=64, patch_size=16, embed_dim=24, depth=2, num_heads=2)
IMAGE_MODELS = [  # name, arguments, what trains with one unfrozen stage, cells of the last map at 64 px
    ("test_resnet", {}, ("layer4",), 4),
    ("test_efficientnet", {}, ("blocks.4", "conv_head", "bn2"), 4),
    ("test_convnext", {}, ("stages.3", "head"), 4),
    ("test_vit", dict(img_size=64), ("blocks.5", "norm"), 16),
    ("swin_tiny_patch4_window7_224", SWIN, ("layers.1", "norm"), 64),  # NHWC, tables of positions
    ("eva02_tiny_patch14_224", EVA, ("blocks.1", "fc_norm"), 16),  # rotary positions
]
SIZES = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=60)
TEXT_MODELS = [  # configuration, what trains with one unfrozen layer, whether it has a pooler
    (
        dict(model_type="distilbert", n_layers=2, dim=16, n_heads=2, hidden_dim=32, vocab_size=60),
        "transformer.layer.1",
        0,
    ),
    (dict(model_type="roberta", **SIZES), "encoder.layer.1", 1),
    (dict(model_type="electra", embedding_size=8, **SIZES), "encoder.layer.1", 0),
    (dict(model_type="modernbert", pad_token_id=0, cls_token_id=1, sep_token_id=2, **SIZES), "layers.1|final_norm", 0),
]


@pytest.mark.parametrize("tokens", ["pooled", "spatial"])
@pytest.mark.parametrize(("name", "args", "parts", "cells"), IMAGE_MODELS, ids=[row[0] for row in IMAGE_MODELS])
def test_image_architectures(name, args, parts, cells, tokens, tiny_model, tiny_batch, tmp_path):
    fields = dict(image_backbone=name, image_backbone_args=args, image_tokens=tokens, fusion="cross_text")
    model = tiny_model(unfrozen_image_stages=1, **fields)
    batch = tiny_batch()
    assert model.encode_image(batch["pixel_values"])[0].shape[1] == (cells if tokens == "spatial" else 1)
    names = {name for name, _ in model.image_model.named_parameters()}
    head = ("head.", "fc_norm.") if tokens == "spatial" else ()  # which spatial tokens do not pass
    assert trained_names(model.image_model) == {x for x in of(names, parts) if not x.startswith(head)}
    loaded = reload(model, tmp_path)
    assert trained_names(loaded) == trained_names(model)
    assert_same_state(loaded, model)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_image_tokens_are_cells_of_the_map(name, tiny_model):
    """The pooled token of a model that pools by the mean is the mean of the cells, up to the norm that follows."""
    args = dict(img_size=64, global_pool="avg") if name == "test_vit" else {}
    model = tiny_model(image_backbone=name, image_backbone_args=args, image_tokens="spatial")
    pixels = torch.randn(2, 3, 64, 64)
    cells, mask = model.encode_image(pixels)
    assert mask.all() and mask.shape == cells.shape[:2]
    head = model.image_model
    mean = cells.mean(1)
    if name == "test_vit":
        mean = head.fc_norm(mean)
    elif name == "test_convnext":
        mean = head.head.norm(mean[..., None, None]).flatten(1)
    torch.testing.assert_close(mean, head(pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("config", "parts", "pools"), TEXT_MODELS, ids=[row[0]["model_type"] for row in TEXT_MODELS])
def test_text_architectures(config, parts, pools, tiny_model, tiny_batch, tmp_path):
    model = tiny_model(text_config=config, unfrozen_text_layers=1, fusion="cross_text", image_tokens="spatial")
    batch = tiny_batch()
    names = {name for name, _ in model.text_model.named_parameters()}
    assert trained_names(model.text_model) == of(names, parts.split("|"))
    loaded = reload(model, tmp_path)
    assert trained_names(loaded) == trained_names(model)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), atol=1e-6, rtol=0)
    alone = tiny_model("text", text_config=config, text_pooling="mean")
    assert logits(alone, tiny_batch("text")).shape == (3, 3)
    if pools:
        assert logits(tiny_model("text", text_config=config), tiny_batch("text")).shape == (3, 3)
    else:
        with pytest.raises(ValueError, match='has no pooler: set text_pooling to "mean"'):
            tiny_model("text", text_config=config)


# Weights


@pytest.fixture
def image_donor(tiny_config):
    config = tiny_config("image")
    return scramble(timm.create_model(config.image_backbone, num_classes=1000, **config.image_backbone_args))


@pytest.mark.parametrize(
    "form", ["model.safetensors", "weights.pth", "timm-folder", "timm-folder-safe", "plain-folder"]
)
@pytest.mark.parametrize("kind", ["both", "image"])
def test_image_weights_from_disk(form, kind, image_donor, tiny_config, tmp_path):
    path = tmp_path / form
    if form == "model.safetensors":
        save_file(image_donor.state_dict(), path)
    elif form == "weights.pth":
        torch.save(image_donor.state_dict(), path)
    elif form == "plain-folder":
        path.mkdir()
        torch.save(image_donor.state_dict(), path / "pytorch_model.bin")
    else:
        timm.models.save_for_hf(image_donor, path, safe_serialization=form.endswith("safe"))
    config = tiny_config(kind, unfrozen_image_stages=1)
    model = MMClfForImageTextClassification.from_backbones(config, image_weights=str(path), text_weights=None)
    image_donor.reset_classifier(0)
    assert_same_state(model.image_model, image_donor)
    assert model.image_model.features.norm0.num_batches_tracked == 7  # the statistics were no defaults
    assert config.image_weights == form and config.text_weights == ("scratch" if kind == "both" else None)
    assert str(tmp_path) not in model.config.to_json_string()
    assert trained_names(model.image_model) == of(image_donor.state_dict(), DENSENET_PARTS[1]) & trained_names(
        image_donor
    )


@pytest.mark.parametrize("donor_class", [BertForPreTraining, BertModel])
@pytest.mark.parametrize(("kind", "pooling"), [("both", "pooler"), ("text", "pooler"), ("text", "mean")])
def test_text_weights_from_disk(donor_class, kind, pooling, tiny_config, tmp_path):
    config = tiny_config(kind, text_pooling=pooling, unfrozen_text_layers=1)
    donor = scramble(donor_class(BertConfig(**config.text_config.to_dict())))
    donor.save_pretrained(tmp_path / "my-bert")
    model = MMClfForImageTextClassification.from_backbones(
        config, image_weights=None, text_weights=str(tmp_path / "my-bert")
    )
    encoder = getattr(donor, "bert", donor)
    names = [name for name in encoder.state_dict() if (kind, pooling) == ("text", "pooler") or "pooler" not in name]
    assert list(model.text_model.state_dict()) == names
    assert not changed(model.text_model.state_dict(), encoder.state_dict())
    assert config.text_weights == "my-bert" and config.image_weights == ("scratch" if kind == "both" else None)
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("donor", ["test_resnet", "deeper", "shallower", "no-model"])
def test_image_weights_that_do_not_fit(donor, tiny_config, tmp_path):
    args = dict(channels=[8, 8, 16, 16])
    layers = {"deeper": [1, 1, 1, 2], "shallower": [1, 1, 1, 0]}
    if donor == "no-model":
        save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    else:
        name, more = ("resnet18", dict(layers=layers[donor], **args)) if donor in layers else (donor, {})
        save_file(timm.create_model(name, **more).state_dict(), tmp_path / "w.safetensors")
    config = tiny_config("image", image_backbone="resnet18", image_backbone_args=dict(layers=[1, 1, 1, 1], **args))
    with pytest.raises(ValueError, match="w.safetensors (does not fit|cannot be loaded into) 'resnet18': "):
        MMClfForImageTextClassification.from_backbones(config, image_weights=str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize("fields", [dict(model_type="bert", **SIZES | {"num_hidden_layers": 3}), TEXT_MODELS[0][0]])
def test_text_weights_that_do_not_fit(fields, tiny_config, tmp_path):
    BertModel(tiny_config().text_config).save_pretrained(tmp_path)
    config = tiny_config("text", text_config=fields, text_pooling="mean")
    with pytest.raises(ValueError, match="does not fit text_config: |cannot be loaded into 'text_config': "):
        MMClfForImageTextClassification.from_backbones(config, text_weights=str(tmp_path))


def test_weights_that_are_not_there(tiny_config, tmp_path):
    load = MMClfForImageTextClassification.from_backbones
    for path in (tmp_path, tmp_path / "none.pth"):  # an empty folder, no file
        with pytest.raises(OSError, match="image weights '.*': no such file"):
            load(tiny_config("image"), image_weights=str(path))
    with pytest.raises(OSError, match="text weights '.*': no such folder"):
        load(tiny_config("text"), text_weights=str(tmp_path / "none"))
    with pytest.raises(OSError):
        load(tiny_config("text"), text_weights=str(tmp_path))
    with pytest.raises(ValueError, match="text_backbone names no repository"):
        load(tiny_config("text"))


def test_no_weights(tiny_config):
    config = tiny_config(image_weights="stale", text_weights="stale")
    model = MMClfForImageTextClassification.from_backbones(config, image_weights=None, text_weights=None)
    assert (model.config.image_weights, model.config.text_weights) == ("scratch", "scratch")


@pytest.mark.parametrize(("name", "args"), [row[:2] for row in IMAGE_MODELS], ids=[row[0] for row in IMAGE_MODELS])
def test_timms_initialisation_stands(name, args, tiny_config):
    torch.manual_seed(3)
    expected = timm.create_model(name, num_classes=0, **args)
    torch.manual_seed(3)
    model = MMClfForImageTextClassification(tiny_config(image_backbone=name, image_backbone_args=args))
    assert_same_state(model.image_model, expected)


def test_initialisation_depends_on_the_seed_alone(tiny_model):
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(tiny_model(learned_missing=True, fusion_norm=True))
    first, same, other = models
    assert_same_state(first, same)
    differing = changed(first.state_dict(), other.state_dict())
    assert {"missing_image.vector", "fusion.image_attention.query.weight", "classifier.weight"} <= differing


def test_loading_fills_what_the_file_lacks(tiny_model, tmp_path):
    """Another number of labels, and vectors for missing inputs: drawn anew, and nothing else touched."""
    model = scramble(tiny_model(width=256))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, num_labels=50, learned_missing=True, ignore_mismatched_sizes=True)
    kept = state(model)
    del kept["classifier.weight"], kept["classifier.bias"]
    assert not changed(kept, loaded.state_dict())
    assert loaded.classifier.weight.std().item() == pytest.approx(math.sqrt(2 / (512 + 50)), rel=0.1)
    assert not loaded.classifier.bias.any()
    for vector in (loaded.missing_image.vector, loaded.missing_text.vector):
        assert 0 < vector.std() < 0.1


def test_loading_at_another_image_size_initialises_position_embeddings(tiny_model, tmp_path):
    fields = dict(image_backbone="test_vit", image_backbone_args=dict(img_size=32))
    tiny_model("image", **fields).save_pretrained(tmp_path)
    garbage = [torch.full((17 * 64,), math.nan) for _ in range(500)]  # memory that the new tensor may reuse
    del garbage
    loaded = AutoModel.from_pretrained(tmp_path, image_backbone_args=dict(img_size=64), ignore_mismatched_sizes=True)
    assert 0 < loaded.image_model.pos_embed.std() < 0.1
    assert logits(loaded, dict(pixel_values=torch.randn(1, 3, 64, 64))).isfinite().all()


@pytest.mark.parametrize("preset", ["demo", "demo-image", "demo-text"])
def test_presets_are_one_graph(preset):
    torch.compiler.reset()  # compiled variants of one forward are limited in number
    model = MMClfForImageTextClassification(config_from_preset(preset, num_labels=3)).eval()
    batch = {"pixel_values": torch.randn(2, 3, 64, 64)} if model.config.has_image else {}
    if model.config.has_text:
        batch["input_ids"] = torch.randint(5, 60, (2, 7))
    batch["labels"] = torch.ones(2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
