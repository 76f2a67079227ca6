import pytest

from hf_mmclf import MMClfForImageTextClassification, ModelArguments, parse_arguments, train
from hf_mmclf.presets import config_from_preset
from hf_mmclf.training import inputs
from hf_mmclf.training import record as records
from hf_mmclf.training import train as training

TINY = ["--image_size", "32", "--vocab_size", "80", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]


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
    assert records.base_models(ModelArguments(**changes), model) == expected


@pytest.mark.parametrize(
    "flags, expected",
    [([], "mit"), (["--license", "cc-by-4.0"], "cc-by-4.0"), (["--from_scratch", "false"], "unknown")],
)
def test_licence_of_the_card(flags, expected, tmp_path, monkeypatch):
    """A model is ours to license only if it knows nothing but the embedded data set."""
    written = {}
    monkeypatch.setattr(records, "base_models", lambda args, model: [] if args.from_scratch else ["timm/some"])
    monkeypatch.setattr(training, "write_records", lambda *args: written.update(args[3]))
    monkeypatch.setattr(inputs, "build_model", lambda config, *_: MMClfForImageTextClassification(config))
    flags = ["--demo_rows", "60", "--preset", "demo-image", "--max_steps", "1", *TINY, *flags]
    train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "m")]))
    assert written["license"] == expected and written["data"] == ["the embedded data set"]
