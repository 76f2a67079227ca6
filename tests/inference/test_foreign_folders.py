"""Folders that somebody else has made: damaged, odd or hostile ones, and outputs that must not harm a folder."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.tiny_folder import TEXT, write_folder, write_table

import hf_mmclf
from hf_mmclf import MMClfConfig, MMClfForImageTextClassification, Predictor
from hf_mmclf.cli import main
from hf_mmclf.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of a folder, and a table with its images beside it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path)
    return shutil.copytree(saved, tmp_path / "m")


def predict(*more):
    main(["predict", "m", "--data", "train.csv", *more])


def error_of(*argv):
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("load", [Predictor.load, hf_mmclf.pipeline])
def test_missing_and_surplus_tensors_are_named(folder, load):
    edit_weights(folder, lambda state: [state.pop(name) for name in ("classifier.weight", "classifier.bias")])
    with pytest.raises(ValueError, match="2 tensors of the weights are missing: classifier.bias, classifier.weight"):
        load(folder)
    shutil.copy(folder / "model.safetensors", folder / "kept")
    edit_weights(folder, lambda state: state.update({f"classifier.{n}": torch.zeros(*s) for n, s in SHAPES.items()}))
    edit_weights(folder, lambda state: state.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match="1 tensors of the weights are not of this model: extra.weight"):
        load(folder)


SHAPES = {"weight": (3, 16), "bias": (3,)}


@pytest.mark.parametrize("own, other", [(60, 400), (400, 60)])
def test_a_tokenizer_of_another_vocabulary_is_an_error(tmp_path, own, other):
    words = [f"{first}{second}" for first, second in itertools.permutations("abcdefghijklmnopqrstuvwxyz", 2)]
    tokenizers = {size: load_tokenizer("train", [" ".join(words)] * 2, size)[0] for size in (own, other)}
    config = MMClfConfig(text_config=dict(TEXT, vocab_size=len(tokenizers[own])), id2label={0: "a", 1: "b"})
    MMClfForImageTextClassification(config).save_pretrained(tmp_path)
    tokenizers[own].save_pretrained(tmp_path)
    Predictor.load(tmp_path)
    tokenizers[other].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its files are those of another model"):
        Predictor.load(tmp_path)


def test_scores_that_are_nan_are_an_error(folder):
    edit_weights(folder, lambda state: state["classifier.bias"].fill_(float("nan")))
    assert "train.csv:2: the logits are NaN, as for 5 of 5 rows" in error_of("predict", "m", "--data", "train.csv")
    with pytest.raises(ValueError, match="the scores are NaN"):
        hf_mmclf.pipeline(folder)(text="a dog")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_code_of_a_folder_does_not_run_and_nobody_is_asked(folder, name, monkeypatch):
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    file = folder / name
    auto = ["AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor"]
    content = {**json.loads(file.read_text()), "auto_map": dict.fromkeys(auto, "evil.Evil")}
    file.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "stdin", None)  # a question would fail
    assert len(hf_mmclf.pipeline(folder)(text="a dog", return_all_scores=True)) == 3
    predict()
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '"x"', "{}"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
)
def test_odd_files_give_one_line_or_the_same_labels(folder, name, content, capsys):
    predict()
    expected = capsys.readouterr().out
    (folder / name).write_text(content)
    try:
        predict()
        assert capsys.readouterr().out == expected
    except SystemExit as error:
        assert isinstance(error.code, str) and error.code.startswith("hf-mmclf predict: error: ")
        assert "\n" not in error.code and "has no attribute" not in error.code


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_files_give_one_line(folder, name, share):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert error_of("predict", "m", "--data", "train.csv").startswith("hf-mmclf predict: error: m")


def test_outputs_replace_neither_inputs_nor_files_of_the_model(folder):
    shutil.copy("train.csv", "rows.csv")
    assert "rows.csv is the input" in error_of(
        "predict", "m", "--data", "rows.csv", "--output", "rows.csv", "--overwrite"
    )
    for name in ("config.json", "metrics.json"):
        (folder / name).touch()
        message = error_of("evaluate", "m", "--data", "train.csv", "--output", f"m/{name}", "--overwrite")
        assert f"m/{name} is a file of the model" in message
    (folder.parent / "rows").mkdir()
    shutil.copy("train.csv", "rows/test.csv")
    given = ["predict", "m", "--data", "rows", "--output", "rows/test.csv", "--overwrite"]
    assert "rows/test.csv is the input" in error_of(*given)
    shutil.copy("train.csv", "old.csv")
    assert "old.csv exists already; give another --output, or --overwrite" in error_of(
        "predict", "m", "--data", "train.csv", "--output", "old.csv"
    )
    for command in (["predict", "m", "--data", "train.csv"], ["compare", "m", "m", "--data", "train.csv"]):
        assert "--overwrite has no effect, because --output is not given" in error_of(*command, "--overwrite")
    predict("--output", "old.csv", "--overwrite")
    assert (folder.parent / "old.csv").read_text().startswith("ImageID,Labels\n0.jpg,")


def test_control_characters_of_labels_are_escaped(folder, capsys):
    edit_config(folder, id2label={0: "a\x1b[31mred", 1: "b\u202e", 2: "dog"}, threshold=0.0)
    predict()
    printed = capsys.readouterr()
    assert "a\\x1b[31mred" in printed.out and "b\\u202e" in printed.out
    main(["evaluate", "m", "--data", "train.csv", "--no_ablations"])
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and "a\\x1b[31mred" in printed.out


def test_an_interruption_is_one_line(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "scores", interrupt)
    with pytest.raises(SystemExit) as caught:
        predict()
    assert caught.value.code == 130 and capsys.readouterr().err.endswith("hf-mmclf predict: interrupted\n")


def test_running_out_of_memory_is_no_bad_image(folder, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError("3 GB")

    monkeypatch.setattr("hf_mmclf.model.image_processing_mmclf._decode", exhausted)
    argv = ["predict", "m", "--data", "train.csv", "--bad_images", "skip"]
    assert error_of(*argv) == "hf-mmclf predict: error: not enough memory: 3 GB"


def test_images_over_the_limit_follow_the_policy(folder, capsys):
    Image.new("L", (1200, 1000)).save("0.jpg")
    message = error_of("predict", "m", "--data", "train.csv", "--pixel_limit", "1")
    assert "train.csv:2: the image has 1200 x 1000 pixels, more than 1 megapixels; --pixel_limit" in message
    predict("--pixel_limit", "1", "--bad_images", "skip")
    printed = capsys.readouterr()
    assert "0.jpg" not in printed.out and printed.out.count("\n") == 4
    assert "Image left out: train.csv:2: 1200 x 1000 pixels are more than the limit of 1 megapixels" in printed.err
    predict("--pixel_limit", "1.2")
    assert capsys.readouterr().out.startswith("0.jpg: ")


def test_nothing_that_is_published_has_a_path_of_this_machine(tmp_path, tiny_model):
    tower, output = tmp_path / "tower", tmp_path / "m"
    write_folder(tmp_path / "base", "text")
    base = Predictor.load(tmp_path / "base")
    base.model.text_model.save_pretrained(tower)
    base.processor.tokenizer.save_pretrained(tower)
    (tmp_path / "t.csv").write_text("text,labels\n" + "a dog,dog\na man,man\n" * 20)
    flags = [
        "--preset",
        "tinybert",
        "--text_backbone",
        str(tower),
        "--data",
        str(tmp_path / "t.csv"),
        "--max_steps",
        "1",
    ]
    hf_mmclf.train(*hf_mmclf.parse_arguments([*flags, "--image_column", "none", "--output_dir", str(output)]))
    for file in output.iterdir():
        if file.suffix in (".json", ".md", ".csv", ".txt", ".py"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file.name
    assert np.isfinite(Predictor.load(output).model.classifier.weight.detach().numpy()).all()
