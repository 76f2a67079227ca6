import copy
import csv
import json

import pytest
import torch

from hf_mmclf import Predictor, parse_arguments, train
from hf_mmclf.data.arguments import DataArguments
from hf_mmclf.training.continuation import StartingModel

TINY = ["--max_steps", "2", "--dataloader_num_workers", "0", "--disable_tqdm", "true"]


def write_table(path, labels):
    rows = [(f"a {label} and a {other}", f"{label}|{other}") for label in labels for other in labels] * 3
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "labels"), *rows])
    return str(path)


@pytest.fixture(scope="module", params=["demo-text", "queries"])
def first(request, tmp_path_factory):
    """A model of three labels, with one linear layer or with label queries."""
    folder = tmp_path_factory.mktemp("first")
    flags = ["--data", write_table(folder / "t.csv", ["cat", "dog", "bird"]), "--output_dir", str(folder / "m"), *TINY]
    flags += ["--preset", "demo-text", "--label_thresholds", "true", "--image_column", "none"]
    if request.param == "queries":
        flags += ["--fusion", "label_queries", "--width", "32"]
    return train(*parse_arguments(flags))


def label_tensors(predictor):
    state = predictor.model.state_dict()
    names = [name for name in ("classifier.weight", "classifier.bias", "fusion.queries") if name in state]
    return {label: [state[name][i] for name in names] for i, label in enumerate(predictor.labels.ids)}


def test_known_labels_keep_their_classifier_in_any_order(first, tmp_path, notices):
    table = write_table(tmp_path / "t.csv", ["zebra", "dog", "ant", "cat"])
    flags = ["--init_from", str(first), "--data", table, "--learning_rate", "0", "--backbone_learning_rate", "0"]
    output = train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "m"), *TINY]))
    said = notices()
    assert (
        "labels: 2 of m are kept, 2 are new, 1 are dropped" in said and "Recipe: that of the preset demo-text" in said
    )
    old, new = Predictor.load(first), Predictor.load(output)
    assert new.labels.ids == ("ant", "cat", "dog", "zebra")
    before, after = label_tensors(old), label_tensors(new)
    for label in ("cat", "dog"):
        assert all(torch.equal(a, b) for a, b in zip(before[label], after[label], strict=True))
    assert not torch.equal(after["ant"][0], after["zebra"][0])
    rest = [name for name in old.model.state_dict() if not name.startswith(("classifier", "fusion.queries"))]
    assert rest and all(torch.equal(old.model.state_dict()[n], new.model.state_dict()[n]) for n in rest)
    assert new.processor.tokenizer.get_vocab() == old.processor.tokenizer.get_vocab()
    prepared = new.prepare(DataArguments(data=table), with_labels=False)
    scores = [p.scores(prepared.splits["train"], prepared.folder) for p in (old, new)]
    for label in ("cat", "dog") if new.model.config.fusion != "label_queries" else ():  # queries see each other
        columns = [s[:, p.labels.ids.index(label)] for s, p in zip(scores, (old, new), strict=True)]
        assert columns[0] == pytest.approx(columns[1], abs=1e-6)
    config = new.model.config
    assert config.threshold != 0.5 and config.label_thresholds is None  # fitted anew, globally
    record = json.loads((output / "training.json").read_text())
    assert record["started_from"] == "m" and record["base_models"] == [] and record["license"] == "unknown"
    assert "started from the model" in (output / "README.md").read_text()


@pytest.mark.parametrize("flags", [["--from_scratch", "true"], ["--width", "8"], ["--text_backbone", "x/y"]])
def test_what_a_finished_model_brings_cannot_be_given(first, tmp_path, flags):
    given = ["--init_from", str(first), "--data", write_table(tmp_path / "t.csv", ["cat", "dog"]), *TINY]
    with pytest.raises(ValueError, match=f"--init_from brings architecture and preprocessing; leave out {flags[0]}"):
        train(*parse_arguments([*given, "--output_dir", str(tmp_path / "m"), *flags]))
    assert not (tmp_path / "m").exists()


def test_a_preset_beside_a_finished_model(first, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--init_from", str(first), "--preset", "demo"])
    assert "leave out --preset" in capsys.readouterr().err


def test_known_labels_keep_the_classifiers_of_each_modality(tiny_model):
    old = tiny_model(modality_classifiers=True, id2label={0: "cat", 1: "dog", 2: "bird"})
    config = copy.deepcopy(old.config)
    config.id2label = {0: "ant", 1: "bird", 2: "cat"}
    config.label2id, config.label_ids = {name: i for i, name in config.id2label.items()}, ["ant", "bird", "cat"]
    new = StartingModel("old", old, None).start(config)
    for part in ("image", "text"):
        for kind in ("weight", "bias"):
            own, kept = (getattr(getattr(model.modality_classifiers, part), kind) for model in (old, new))
            assert torch.equal(kept[1], own[2]) and torch.equal(kept[2], own[0])
