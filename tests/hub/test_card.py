import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image
from support.hub_server import HubServer
from support.tiny_folder import write_folder

from hf_mmclf import parse_arguments, train
from hf_mmclf.hub.card import PLACEHOLDER, render_card, write_card
from hf_mmclf.hub.card_tables import FIGURE_NAMES
from hf_mmclf.hub.plots import PLOTS

ROOT = Path(__file__).parents[2]
GAPS = re.compile(r"\{[{%#]|[%#}]\}\s|None|\bnan\b|Undefined|\n\n\n")  # what is left where a template is not filled


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the output folder of a short training run of a preset; each preset is trained once."""
    folders = {}

    def make(preset: str = "demo") -> Path:
        if preset not in folders:
            folders[preset] = tmp_path_factory.mktemp("runs") / preset
            flags = ["--preset", preset, "--demo_rows", "60", "--max_steps", "2", "--image_size", "32"]
            flags += ["--dataloader_num_workers", "0", "--disable_tqdm", "true"]
            train(*parse_arguments([*flags, "--output_dir", str(folders[preset])]))
        return folders[preset]

    return make


@pytest.fixture
def edited(trained, tmp_path):
    """Copy the folder of a run and change its JSON files; a change is a function that edits in place."""

    def make(**changes) -> Path:
        folder = shutil.copytree(trained(), tmp_path / "edited")
        for name, change in changes.items():
            values = json.loads((folder / f"{name}.json").read_text())
            change(values)
            (folder / f"{name}.json").write_text(json.dumps(values))
        return folder

    return make


def tables(text: str) -> dict[str, list[list[str]]]:
    """The cells of the tables in Markdown by the first cell of their head, without the rule below the head."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")] for block in blocks]
    cells = [[[cell.strip() for cell in row] for row in [table[0], *table[2:]]] for table in rows]
    return {table[0][0]: table for table in cells}


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.S)


def limits(card: ModelCard) -> str:
    return card.text.split("## Limits")[1].split("## ")[0]


@pytest.mark.parametrize("preset", ["demo", "demo-text"])
def test_metadata_is_valid_for_the_hub(preset, trained, monkeypatch):
    card = ModelCard.load(trained(preset) / "README.md")
    is_text = preset == "demo-text"
    assert card.data.library_name == "transformers" and card.data.license == "mit"
    assert card.data.pipeline_tag == ("text-classification" if is_text else None)  # the Hub has no task for both
    assert card.data.get("language") == "en"
    assert {"image-text-classification", "multi-label-classification", "hf_mmclf", preset} <= set(card.data.tags)
    assert ("timm" in card.data.tags) == (not is_text)
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()  # random, not on the Hub
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        card.validate()


def test_every_figure_is_an_evaluation_result_and_survives_a_round_trip(trained):
    loaded = ModelCard.load(trained() / "README.md").data.eval_results
    assert loaded == render_card(trained()).data.eval_results
    found = {(r.dataset_split, r.metric_name): (r.metric_type, r.metric_value) for r in loaded}
    assert len(found) == len(loaded)  # each has a name of its own
    metrics = json.loads((trained() / "metrics.json").read_text())
    expected = {}
    for split in ("validation", "test"):
        for at, suffix in (("at_0.5", ", at 0.5"), ("fitted", ", at the fitted threshold")):
            assert set(metrics[split][at]) == set(FIGURE_NAMES)
            for figure, value in metrics[split][at].items():
                name = FIGURE_NAMES[figure] + ("" if figure in ("map", "ece") else suffix)  # they do not depend on it
                expected[split, name] = figure, round(value, 4)
    assert found == expected


def test_tables_hold_the_figures_and_the_recipe(trained):
    metrics = json.loads((trained() / "metrics.json").read_text())
    shown = tables(render_card(trained()).text)
    assert list(shown) == ["option", "", "label", "rows with", "rows", "setting"]
    assert ["fusion", "label\\_queries"] in shown["option"] and ["width", "128"] in shown["option"]
    averages = shown[""]
    assert averages[0][1:] == [
        f"{s}, {at}" for s in ("validation", "test") for at in ("at 0.5", "at the fitted threshold")
    ]
    cells = dict(zip(averages[0], zip(*averages[1:], strict=True), strict=True))
    for split in ("validation", "test"):
        fitted, intervals = metrics[split]["fitted"], metrics[split]["intervals"]
        assert cells[f"{split}, at 0.5"] == tuple(f"{metrics[split]['at_0.5'][name]:.3f}" for name in FIGURE_NAMES)
        assert cells[f"{split}, at the fitted threshold"] == tuple(
            f"{fitted[name]:.3f}" + (" ({:.3f}–{:.3f})".format(*intervals[name]) if name in intervals else "")
            for name in FIGURE_NAMES
        )
    for cells, row in zip(shown["label"][1:], metrics["test"]["per_label"], strict=True):
        precision = "–" if row["average_precision"] is None else f"{row['average_precision']:.3f}"
        figures = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1", "f1_at_0.5")]
        assert cells == [row["label"], *figures, precision, str(row["support"]), f"{row['threshold']:.3f}"]
    groups = [*metrics["test"]["by_label_count"], *metrics["test"]["by_caption_length"]]
    assert [cells[1:] for cells in shown["rows with"][1:]] == [
        [str(group["rows"]), "–" if group["f1"] is None else f"{group['f1']:.3f}", f"{group['f1_samples']:.3f}"]
        for group in groups
    ]
    ablations = [metrics["test"]["fitted"], *metrics["test"]["ablations"].values()]
    assert [cells[1:] for cells in shown["rows"][1:]] == [
        [f"{row[key]:.3f}" for key in ("f1", "f1_samples", "f1_macro")] for row in ablations
    ]
    recipe = dict(shown["setting"][1:])
    assert recipe["rows"] == "train: 48; validation: 6; test: 6" and recipe["max steps"] == "2"
    assert recipe["seed"] == "42" and recipe["backbone learning rate"] == "0.002" and recipe["preset"] == "demo"
    assert "flip: 0.5" in recipe["augmentation"] and "transformers: 5" in recipe["versions"]
    assert re.fullmatch(r"\d+ CPU threads?, \w+", recipe["machine"].replace("\\", ""))


@pytest.mark.parametrize("preset", ["demo", "demo-text"])
def test_card_has_no_gaps(preset, trained):
    text = render_card(trained(preset)).text
    assert not GAPS.search(text) and text.endswith("```\n")
    assert text.count("@misc{") == 2 and "COMP5329" in text
    assert [f"![{title}]({file})" in text for file, title in PLOTS.items()] == [True] * len(PLOTS)
    assert "any subset of 12 labels" in text
    both = preset == "demo"
    assert ("Ablations" in text) == ("without an image or without a text" in text) == both


def test_plots_that_are_not_there_are_not_shown(edited):
    folder = edited()
    (folder / "training.png").unlink()
    assert "training.png" not in render_card(folder).text and "f1_by_label.png" in render_card(folder).text


def test_records_of_older_versions_still_make_a_card(edited):
    """Only what the first version wrote is there."""

    def change_metrics(metrics):
        for report in (metrics["validation"], metrics["test"]):
            for name in ("intervals", "by_label_count", "by_caption_length", "ablations", "warnings"):
                report.pop(name, None)
            for at in ("at_0.5", "fitted"):
                del report[at]["ece"]
            for row in report["per_label"]:
                del row["f1_at_0.5"]

    def change_training(training):
        for name in set(training) - {"preset", "recipe"}:
            del training[name]
        training["recipe"] = {"learning_rate": 0.001}

    card = render_card(edited(metrics=change_metrics, training=change_training))
    assert list(tables(card.text)) == ["option", "", "label", "setting"]
    assert "95%" not in card.text and "calibration" not in card.text and not GAPS.search(card.text)


def test_figures_without_a_record_of_the_training(edited):
    folder = edited()
    (folder / "training.json").unlink()
    card = render_card(folder)
    assert {result.dataset_name for result in card.data.eval_results} == {"unnamed rows"}
    assert "setting" not in tables(card.text) and not GAPS.search(card.text)


def test_validation_rows_are_reported_where_there_are_no_test_rows(edited):
    card = render_card(edited(metrics=lambda metrics: metrics.pop("test")))
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "On the validation rows, at the fitted thresholds" in card.text


def test_limits_are_a_fixed_list_and_what_the_run_recorded(edited):
    def change(metrics):
        metrics["test"]["warnings"] = ["Never predicted, though rows have them: a_b (3)."]

    said = limits(render_card(edited(metrics=change)))
    assert "- On the test rows: Never predicted, though rows have them: a\\_b (3).\n" in said
    assert "The model is of no use on other data" in said and "one run with one seed" in said
    assert "inherits the biases" not in said and "No figures" not in said


def test_labels_are_escaped(edited):
    def rename(metrics):
        metrics["test"]["per_label"][0]["label"] = "a|b <i>\n*c*"

    row = tables(render_card(edited(metrics=rename)).text)["label"][1]
    assert len(row) == 8 and row[0] == r"a\|b \<i\> \*c\*"


def test_backbones_and_data_on_the_hub_are_linked(edited):
    backbones = ["timm/densenet121.tv_in1k", "huawei-noah/TinyBERT_General_4L_312D"]
    data = {"data": ["user/rows", "my test.csv"], "datasets": ["user/rows"]}
    card = render_card(edited(training=lambda training: training.update(base_models=backbones, **data)))
    assert card.data.base_model == backbones and card.data.datasets == ["user/rows"]
    assert {(r.dataset_type, r.dataset_name) for r in card.data.eval_results} == {
        ("user/rows", "user/rows + my test.csv")
    }
    assert card.data.get("language") is None
    assert f"biases of the data that these models were trained on: {', '.join(backbones)}" in limits(card)


def test_name_of_local_data_becomes_an_identifier(edited):
    card = render_card(edited(training=lambda training: training.update(data=["mes données (2).csv"])))
    assert {r.dataset_type for r in card.data.eval_results} == {"mes-donn-es-2-.csv"}
    assert "trained on mes données (2).csv" in card.text


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_three_snippets_run(kind, tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "model", kind)
    found = snippets(render_card(folder))
    assert len(found) == 3
    Image.new("RGB", (50, 40), "red").save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    for code in found:
        assert PLACEHOLDER in code
        # a folder may stand where the name stands
        exec(compile(code.replace(PLACEHOLDER, str(folder)), "README.md", "exec"), {})
    by_transformers, by_us, by_hand = capsys.readouterr().out.strip().split("\n")[-3:]
    assert by_transformers == by_us
    labels = [row["label"] for row in ast.literal_eval(by_us)]
    assert labels and sorted(labels) == sorted(ast.literal_eval(by_hand))
    assert ("image=" in found[1]) == (kind != "text") and ("text=" in found[1]) == (kind != "image")


METADATA = {"library_name", "license", "tags"}


@pytest.mark.parametrize("kind", ["both", "image", "text"])
def test_card_of_a_model_without_records(kind, tmp_path, monkeypatch):
    """As from a training loop of one's own: it shows the configuration and that nothing was measured."""
    folder = write_folder(tmp_path / "model", kind, threshold=0.4, unfrozen_image_stages=None if kind == "text" else 2)
    card = ModelCard.load(write_card(folder))
    tag = {"image": "image-classification", "text": "text-classification"}.get(kind)
    assert card.data.pipeline_tag == tag and set(card.data.to_dict()) - {"pipeline_tag"} == METADATA
    assert card.data.license == "unknown" and card.data.eval_results is None
    shown = tables(card.text)
    assert list(shown) == ["option", "label"]
    assert shown["label"][1:] == [["person", "0.400"], ["traffic light", "0.400"], ["dog", "0.400"]]
    assert (["unfrozen\\_image\\_stages", "2"] in shown["option"]) == (kind != "text")
    assert "No figures came with the model" in limits(card)
    assert "Training" not in card.text and "png" not in card.text and not GAPS.search(card.text)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        card.validate()


def test_card_is_written_again_over_the_old_one(edited):
    folder = edited(training=lambda training: training.update(license="cc-by-4.0"))
    assert write_card(folder) == folder / "README.md"
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-4.0"


def test_no_card_without_a_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        render_card(tmp_path)


def test_template_is_installed_with_the_package(tmp_path):
    """From a wheel and from a source distribution; an editable install has it where it is."""
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "src" / "hf_mmclf", tmp_path / "src" / "hf_mmclf")
    build = "import setuptools.build_meta as build; build.build_wheel('dist'); build.build_sdist('dist')"
    built = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wheel, source = next((tmp_path / "dist").glob("*.whl")), next((tmp_path / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as files:
        assert "hf_mmclf/hub/card_template.md" in files.namelist()
    with tarfile.open(source) as files:
        assert any(name.endswith("src/hf_mmclf/hub/card_template.md") for name in files.getnames())


def test_a_card_of_many_labels_says_where_the_others_are(tmp_path):
    folder = write_folder(tmp_path)
    assert "labels; " not in render_card(folder).text
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {str(number): f"label {number}" for number in range(1050)}, "label_ids": None}
    config["label2id"] = {name: number for number, name in enumerate(config["id2label"].values())}
    (folder / "config.json").write_text(json.dumps(config))
    text = render_card(folder).text
    assert "\n\nThe first labels; 1,020 more are in `config.json`.\n\n" in text and "label 30 " not in text
