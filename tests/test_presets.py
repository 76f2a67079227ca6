import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModel

from hf_mmclf import PRESETS, MMClfForImageTextClassification, cli, config_from_preset
from hf_mmclf.presets import get_preset, presets_table

ROOT = Path(__file__).parents[1]


class Row(NamedTuple):
    """A row of the table of the poster. `trained` is None for all, else the trained parts of the backbones."""

    parameters: int
    megabytes: float
    threshold: float
    width: int | None
    trained: tuple[str, ...] | None


LAST = ("image_model.features.transition3", "image_model.features.denseblock4", "image_model.features.norm5")
LAST_TWO = (*LAST, "image_model.features.transition2", "image_model.features.denseblock3")
WARM = (*LAST, "text_model.encoder.layer.3")
WARMER = (*LAST_TWO, "text_model.encoder.layer.3", "text_model.encoder.layer.2")

POSTER = {
    "resnet18": Row(11_185_746, 42.74, 0.5, None, None),
    "resnet34": Row(21_293_906, 81.36, 0.5, None, None),
    "densenet201": Row(18_127_506, 70.45, 0.5, None, None),
    "resnet50": Row(23_544_914, 90.12, 0.5, None, None),
    "tinybert": Row(14_355_882, 54.79, 0.5, None, None),
    "bert-tiny": Row(4_388_242, 16.76, 0.635, None, None),
    "densitybert": Row(25_351_722, 97.71, 0.35, 512, ()),
    "modensitybert": Row(25_355_730, 97.72, 0.38, 512, ()),
    "cdbert-text": Row(24_329_666, 93.81, 0.29, 512, ()),
    "cdbert-image": Row(23_600_578, 91.02, 0.461, 512, ()),
    "warmdbert": Row(25_355_730, 97.72, 0.38, 512, WARM),
    "warmerdbert": Row(25_355_730, 97.72, 0.39, 512, WARMER),
    "warmerdbert-extended": Row(25_355_730, 97.72, 0.42, 512, WARMER),
    "wwdbert": Row(25_886_930, 99.77, 0.40, 896, WARMER),
    "bensity": Row(26_152_082, 100.83, 0.33, 512, ()),
    "censity-text": Row(23_546_642, 90.89, 0.33, 512, ()),
    "censity-image": Row(20_990_738, 81.14, 0.38, 512, ()),
    "rest": Row(26_395_986, 100.92, 0.38, 512, ()),
}


def inputs(config):
    batch = {}
    if config.has_image:
        batch["pixel_values"] = torch.randn(2, 3, 64, 64)
    if config.has_text:
        batch["input_ids"] = torch.randint(5, 1000, (2, 6))
    return batch


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_names(model, parts):
    """Names of the parameters in the given parts of the backbones, and of all parameters outside the backbones."""
    names = {name for name, _ in model.named_parameters()}
    if parts is None:
        return names
    backbones = {name for name in names if name.startswith(("image_model.", "text_model."))}
    for part in parts:
        assert any(name.startswith(f"{part}.") for name in names), f"no {part}"
    return names - backbones | {name for name in backbones if name.startswith(tuple(f"{part}." for part in parts))}


def empty_model(name):
    """A model without memory for its parameters, to count them."""
    with torch.device("meta"):
        return MMClfForImageTextClassification(config_from_preset(name, num_labels=18))


# Parameters and MB (of 2^20 bytes) of the presets with a classifier for each modality.
LATE = {"late-lite": (26_132_566, 99.87), "late-b4": (22_164_894, 85.06), "late-clip": (23_236_438, 88.65)}
OURS, DEMO = ["querybert", *LATE, "captions"], ["demo", "demo-image", "demo-text"]


def test_presets_are_those_of_the_poster_and_ours():
    assert [name for name, preset in PRESETS.items() if preset.poster] == list(POSTER)
    assert [name for name, preset in PRESETS.items() if not preset.poster] == [*OURS, *DEMO]


@pytest.mark.parametrize("name", LATE)
def test_late_presets_have_less_than_100_megabytes_and_train_their_classifiers_only(name):
    model = empty_model(name)
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2**20
    assert (sum(parameter.numel() for parameter in model.parameters()), round(megabytes, 2)) == LATE[name]
    trained = {key.split(".")[0] for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"modality_classifiers", "image_projection", "text_projection", "classifier"}


@pytest.mark.parametrize("name", POSTER)
def test_architecture(name):
    model, row = empty_model(name), POSTER[name]
    reported = PRESETS[name].poster
    assert (reported.parameters, reported.megabytes, reported.threshold) == row[:3]
    assert sum(parameter.numel() for parameter in model.parameters()) == row.parameters
    assert model.config.thresholds == 18 * [row.threshold]
    assert row.width is None or model.classifier.in_features == 2 * row.width
    assert trained_names(model) == expected_names(model, row.trained)
    file = io.BytesIO()
    torch.save(model.to_empty(device="cpu").state_dict(), file)
    assert file.tell() / 2**20 == pytest.approx(row.megabytes, rel=0.005)


@pytest.mark.parametrize("name", POSTER)
def test_trains_and_reloads(name, tmp_path):
    model = MMClfForImageTextClassification(config_from_preset(name, num_labels=18)).train()
    output = model(**inputs(model.config), labels=torch.randint(0, 2, (2, 18)))
    assert output.logits.shape == (2, 18)
    output.loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained_names(model)
    model.eval().save_pretrained(tmp_path)
    copied = AutoModel.from_pretrained(tmp_path)
    assert type(copied) is MMClfForImageTextClassification
    assert trained_names(copied) == trained_names(model)
    batch = inputs(model.config)
    with torch.no_grad():
        torch.testing.assert_close(copied(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


def test_unfrozen_stages_of_resnet():
    config = config_from_preset("rest", unfrozen_image_stages=1, unfrozen_text_layers=1)
    with torch.device("meta"):
        model = MMClfForImageTextClassification(config)
    assert trained_names(model) == expected_names(model, ["image_model.layer4", "text_model.encoder.layer.1"])


@pytest.mark.parametrize(("name", "megabytes"), [("querybert", 100), ("captions", 16.8)])
def test_our_presets_have_their_size_and_are_trained_whole(name, megabytes):
    model = MMClfForImageTextClassification(config_from_preset(name, num_labels=18))
    assert sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20 < megabytes
    model(**inputs(model.config), labels=torch.ones(2, 18)).loss.backward()
    trained = trained_names(model)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert {name for name, _ in model.named_parameters()} - trained <= {
        "image_model.head.norm.weight",
        "image_model.head.norm.bias",
    }


@pytest.mark.parametrize("name", DEMO)
def test_demo_presets_are_small_and_trained_whole(name):
    config = config_from_preset(name, num_labels=4)
    model = MMClfForImageTextClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    output = model(**inputs(config), labels=torch.ones(2, 4))
    assert output.logits.shape == (2, 4)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("call", [get_preset, config_from_preset])
def test_unknown_preset(call):
    with pytest.raises(ValueError, match="'warmerbert'; did you mean warmerdbert or"):
        call("warmerbert")
    with pytest.raises(ValueError, match="expected one of resnet18, .*, demo-text"):
        call("?")


def test_unknown_field():
    with pytest.raises(ValueError, match="no field 'fussion'; did you mean 'fusion'"):
        config_from_preset("demo", fussion="self")
    with pytest.raises(ValueError, match="no field 'zzz'$"):
        config_from_preset("demo", zzz=1)


def test_overrides_win():
    labels = {0: "cat", 1: "dog"}
    text_config = dict(model_type="distilbert", dim=12, n_layers=1, n_heads=2)
    config = config_from_preset("warmerdbert", fusion="concat", id2label=labels, threshold=1, text_config=text_config)
    assert (config.fusion, config.id2label, config.threshold) == ("concat", labels, 1)
    assert config.text_config.model_type == "distilbert"
    assert (config.image_backbone, config.unfrozen_image_stages) == ("densenet121.tv_in1k", 2)  # the rest stays
    assert config_from_preset("demo", num_labels=5).num_labels == 5


def test_changing_a_config_does_not_change_the_presets():
    before = {name: config_from_preset(name).to_dict() for name in PRESETS}
    for name in PRESETS:
        config = config_from_preset(name)
        config.threshold = 0.9
        if config.has_text:
            config.text_config.hidden_size = 1
        if config.image_backbone_args:
            config.image_backbone_args["growth_rate"] = 1
    assert {name: config_from_preset(name).to_dict() for name in PRESETS} == before


@pytest.mark.parametrize("file", ["README.md", "model_cards/systems.md"])
def test_table_of_the_presets_is_in_the_documentation(file, capsys):
    cli.main(["presets", "--markdown"])
    table = capsys.readouterr().out
    assert table.count("\n") == len(PRESETS) + 2
    assert f"\n\n{table}\n" in (ROOT / file).read_text(encoding="utf-8")


def test_table_of_the_presets_shows_architecture_and_figures():
    header, *lines = presets_table().splitlines()
    assert header.split()[:5] == ["preset", "image", "backbone", "text", "backbone"]
    assert [line.split()[0] for line in lines] == list(PRESETS)
    cells = dict(zip(PRESETS, (re.split(r"\s{2,}", line.strip()) for line in lines), strict=True))
    assert cells["warmdbert"][1:] == ["densenet121", "TinyBERT_General…", "self + norm", "1 / 1", "97.72", "0.8310"]
    assert cells["resnet18"][2:] == ["-", "-", "all", "42.74", "0.6612"]
    assert cells["demo"] == ["demo", "densenet121", "own", "label_queries", "all", "-", "-"]
    assert max(map(len, [header, *lines])) <= 100
    (line,) = [line for line in presets_table(markdown=True).splitlines() if line.startswith("| `warmdbert`")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        *("densenet121", "TinyBERT_General_4L_312D", "self + norm", "1 / 1", "512"),
        *("25,355,730", "97.72", "0.38", "0.8505", "0.8310", "50"),
    ]
