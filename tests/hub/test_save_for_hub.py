import json

import numpy as np
import pytest
from huggingface_hub import ModelCard
from support.tiny_folder import write_folder, write_table

from hf_mmclf import DataArguments, MMClfProcessor, Predictor, save_for_hub

KINDS = ["both", "image", "text"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each kind."""
    return {kind: write_folder(tmp_path_factory.mktemp(kind), kind, threshold=0.4) for kind in KINDS}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_for_the_hub_it_loads_again(kind, folders, table, tmp_path):
    predictor = Predictor.load(folders[kind])
    save_for_hub(predictor.model, predictor.processor, tmp_path / "new")
    rows = predictor.prepare(DataArguments(str(table))).splits["train"]
    again = Predictor.load(tmp_path / "new")
    np.testing.assert_array_equal(again.scores(rows, table.parent), predictor.scores(rows, table.parent))
    assert ModelCard.load(tmp_path / "new" / "README.md").data.library_name == "transformers"


def test_saving_keeps_what_is_in_the_folder(folders, tmp_path):
    predictor = Predictor.load(folders["both"])
    (tmp_path / "README.md").write_text("my own card")
    (tmp_path / "metrics.json").write_text("{}")
    save_for_hub(predictor.model, predictor.processor, tmp_path)
    predictor.model.config.threshold = 0.7
    save_for_hub(predictor.model, predictor.processor, tmp_path)
    predictor.model.config.threshold = 0.4
    assert Predictor.load(tmp_path).model.config.threshold == 0.7
    assert (tmp_path / "README.md").read_text() == "my own card"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_card_has_the_figures_that_are_there(folders, table, tmp_path):
    predictor = Predictor.load(folders["both"])
    prepared = predictor.prepare(DataArguments(str(table)))
    figures = predictor.evaluate(prepared.splits["train"], prepared.folder)
    (tmp_path / "metrics.json").write_text(json.dumps({"test": figures}))
    save_for_hub(predictor.model, predictor.processor, tmp_path)
    f1 = {result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results}
    assert round(figures["fitted"]["f1"], 4) in f1


def test_parts_of_another_model_are_refused(folders, tmp_path):
    text, image = (Predictor.load(folders[kind]) for kind in ("text", "image"))
    save_for_hub(text.model, text.processor, tmp_path)
    with pytest.raises(FileExistsError, match="has tokenizer.json, tokenizer_config.json of another model"):
        save_for_hub(image.model, image.processor, tmp_path)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(FileExistsError, match="has onnx of another model"):
        save_for_hub(text.model, text.processor, tmp_path)


def test_a_folder_that_could_not_be_written_does_not_load(folders, tmp_path, monkeypatch):
    predictor = Predictor.load(folders["both"])

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(MMClfProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        save_for_hub(predictor.model, predictor.processor, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_processor_that_does_not_fit_is_refused(folders, tmp_path):
    both, text = (Predictor.load(folders[kind]) for kind in ("both", "text"))
    with pytest.raises(ValueError, match="the processor has no image_processor"):
        save_for_hub(both.model, text.processor, tmp_path / "model")
    with pytest.raises(ValueError, match="the processor has a image_processor, and the model has no use"):
        save_for_hub(text.model, both.processor, tmp_path / "model")
    assert not (tmp_path / "model").exists()
