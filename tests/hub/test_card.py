import ast
import json
import re
import runpy
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
PRESETS = {"both": "demo", "image": "demo-image", "text": "demo-text"}
KINDS = list(PRESETS)
GAPS = re.compile(r"\{[{%#]|[%#}]\}\s|None|\bnan\b|Undefined")  # what is left where a template is not filled


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes the output folder of a short training run of a `kind` of model; each is trained once."""
    folders = {}

    def make(kind: str = "both") -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("runs") / kind
            flags = ["--preset", PRESETS[kind], "--demo_rows", "60", "--max_steps", "2", "--image_size", "32"]
            flags += ["--dataloader_num_workers", "0", "--disable_tqdm", "true"]
            train(*parse_arguments([*flags, "--output_dir", str(folders[kind])]))
        return folders[kind]

    return make


@pytest.fixture
def edited(trained, tmp_path):
    """Copies the folder of a run and changes what its JSON files say; a change is a function that edits in place."""

    def make(kind: str = "both", **changes) -> Path:
        folder = shutil.copytree(trained(kind), tmp_path / "edited")
        for name in ("config", "metrics", "training"):
            values = json.loads((folder / f"{name}.json").read_text())
            changes.get(name, lambda values: None)(values)
            (folder / f"{name}.json").write_text(json.dumps(values))
        return folder

    return make


def tables(text: str) -> list[list[list[str]]]:
    """The cells of the tables in Markdown, without the rule below the head."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.M)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")] for block in blocks]
    return [[[cell.strip() for cell in row] for row in [table[0], *table[2:]]] for table in rows]


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.S)


def limits(card: ModelCard) -> str:
    return card.text.split("## Limits")[1].split("## ")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_is_what_the_hub_takes(kind, trained, monkeypatch):
    card = ModelCard.load(trained(kind) / "README.md")
    assert card.data.library_name == "transformers" and card.data.license == "mit"
    assert card.data.pipeline_tag == ("text-classification" if kind == "text" else "image-classification")
    assert card.data.get("language") == (None if kind == "image" else "en")
    assert {"image-text-classification", "multi-label-classification", "hf_mmclf", PRESETS[kind]} <= set(
        card.data.tags
    )
    assert ("timm" in card.data.tags) == (kind != "text")
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


def test_tables_hold_the_figures_of_the_test_rows(trained):
    metrics = json.loads((trained() / "metrics.json").read_text())
    averages, labels, _, _, recipe = tables(render_card(trained()).text)
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
        assert set(intervals) == {"f1", "f1_macro", "f1_samples"}
    assert len(averages) == 1 + len(FIGURE_NAMES)
    for cells, row in zip(labels[1:], metrics["test"]["per_label"], strict=True):
        precision = "–" if row["average_precision"] is None else f"{row['average_precision']:.3f}"
        figures = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1", "f1_at_0.5")]
        assert cells == [row["label"], *figures, precision, str(row["support"]), f"{row['threshold']:.3f}"]
    recipe = dict(recipe[1:])
    assert recipe["training rows"] == "48" and "at most 2 steps" in recipe["epochs"] and recipe["seed"] == "42"
    assert re.search(r"CPU threads?, \w+, \d+\.\d minutes$", recipe["machine"])
    assert recipe["learning rate"] == "0.002, of the backbones 0.002" and recipe["preset"] == "`demo`"
    assert "mirrored with probability 0.5" in recipe["augmentation"] and "transformers 5" in recipe["software"]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_rows_and_modalities_of_the_test_rows_are_shown(kind, trained):
    report = json.loads((trained(kind) / "metrics.json").read_text())["test"]
    _, _, groups, *ablations, _ = tables(render_card(trained(kind)).text)
    titles = {"labels": report["by_label_count"]}
    if kind != "image":
        titles["words of the caption"] = report["by_caption_length"]
    expected = [
        [
            f"{title}: {group['group']}",
            str(group["rows"]),
            "–" if group["f1"] is None else f"{group['f1']:.3f}",
            f"{group['f1_samples']:.3f}",
        ]
        for title, found in titles.items()
        for group in found
    ]
    assert groups == [["rows with", "rows", "F1, micro", "F1, samples"], *expected]
    assert ("ablations" in report) == bool(ablations) == (kind == "both")
    if ablations:
        names = ["pictures only", "captions only", "shuffled captions"]
        rows = dict(zip(names, report["ablations"].values(), strict=True))
        expected = [[name, f"{row['f1']:.3f}", f"{row['f1_macro']:.3f}"] for name, row in rows.items()]
        assert ablations[0][2:] == expected and ablations[0][1][0] == "as they are"


def test_warnings_are_among_the_limits(edited):
    def change(metrics):
        metrics["test"]["warnings"] = ["Never predicted, though rows have them: a_b (3)."]

    assert "- On the test rows: Never predicted, though rows have them: a\\_b (3).\n" in limits(
        render_card(edited(metrics=change))
    )


def test_records_of_older_versions_still_make_a_card(edited):
    def change(metrics):
        for report in (metrics["validation"], metrics["test"]):
            for name in ("intervals", "by_label_count", "by_caption_length", "ablations", "warnings"):
                report.pop(name, None)
            for at in ("at_0.5", "fitted"):
                del report[at]["ece"]

    card = render_card(edited(metrics=change))
    averages, _, _ = tables(card.text)
    assert len(averages) == len(FIGURE_NAMES) and "95%" not in card.text and "calibration" not in card.text
    assert "so such rows are untested" in limits(card) and not GAPS.search(card.text) and "\n\n\n" not in card.text


def test_minutes_of_the_last_part_are_not_those_of_a_run_that_was_resumed(edited):
    assert "minutes" not in render_card(edited(training=lambda training: training.update(resumed=True))).text


def test_without_test_rows_the_validation_rows_are_reported_and_the_card_says_so(edited):
    card = render_card(edited(metrics=lambda metrics: metrics.pop("test")))
    assert {result.dataset_split for result in card.data.eval_results} == {"validation"}
    assert "Each label, on the validation rows" in card.text and "Expect less on new rows" in limits(card)


@pytest.mark.parametrize(
    "name", ["a|b", "*star*", "_x_", "<b>", "$5$", "`code`", "[link](url)", "two\nlines", "a\\|b"]
)
def test_names_of_labels_break_no_table(name, edited):
    def rename(metrics):
        for split in ("validation", "test"):
            metrics[split]["per_label"][0]["label"] = name

    card = render_card(edited(metrics=rename))
    row = tables(card.text)[1][1]
    assert len(row) == 8
    # what Markdown makes of it: every mark of its own is escaped
    assert re.sub(r"\\(.)", r"\1", row[0]) == " ".join(name.split())
    assert not re.search(r"(?<!\\)(?:\\\\)*[*_<>|$`\[\]]", row[0].replace(r"\\", ""))


@pytest.mark.parametrize("kind", KINDS)
def test_card_has_no_gaps(kind, trained):
    text = render_card(trained(kind)).text
    assert not GAPS.search(text)
    assert "\n\n\n" not in text and text.endswith("```\n")
    assert ("Fusion" in text) == (kind == "both")
    assert [f"![{title}]({file})" in text for file, title in PLOTS.items()] == [True] * len(PLOTS)
    config = json.loads((trained(kind) / "config.json").read_text())
    assert f"Any subset of {len(config['id2label'])} labels" in text


def test_plots_that_are_not_there_are_not_shown(edited):
    folder = edited()
    (folder / "training.png").unlink()
    assert "training.png" not in render_card(folder).text and "f1_by_label.png" in render_card(folder).text


@pytest.mark.parametrize("kind", KINDS)
def test_three_ways_of_use_that_run(kind, trained, tmp_path, monkeypatch, capsys):
    found = snippets(render_card(trained(kind)))
    assert len(found) == 3
    Image.new("RGB", (50, 40), "red").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    for code in found:
        assert PLACEHOLDER in code
        # where the name stands, a folder may too
        exec(compile(code.replace(PLACEHOLDER, str(trained(kind))), "README.md", "exec"), {})
    by_transformers, by_us, by_hand = capsys.readouterr().out.strip().split("\n")[-3:]
    assert by_transformers == by_us
    labels = [row["label"] for row in ast.literal_eval(by_us)]
    assert labels and sorted(labels) == sorted(ast.literal_eval(by_hand))
    assert ("image=" in found[1]) == (kind != "text") and ("text=" in found[1]) == (kind != "image")


def test_limits_are_those_of_the_figures(edited):
    def change(metrics):
        labels = metrics["test"]["per_label"]
        for row in labels:
            row.update(support=20, f1=0.9)
        labels[0].update(support=0, f1=0.0)
        labels[1].update(support=9)
        labels[2].update(f1=0.49)
        labels[3].update(support=40)

    folder = edited(metrics=change)
    names = [row["label"] for row in json.loads((folder / "metrics.json").read_text())["test"]["per_label"]]
    said = limits(render_card(folder))
    assert f"No test row has {names[0]}:" in said
    assert re.search(rf"Fewer than 10 of the \d+ test rows have {names[1]}:", said)
    assert f"F1 is below 0.5 for {names[2]}." in said
    assert f"{names[3]} is on {40 / 6:.1%}" in said and f"{names[0]} on 0.0%" in said
    assert "all training rows had both; what it gives is in the table above" in said
    assert "It is no use on others" in said


def test_rows_without_a_picture_and_pictures_that_cannot_be_read_are_told(edited):
    def change(training):
        training["missing"]["train"] = {"picture": 1234, "caption": 5}
        training["bad_images"] = [["train.csv:3", "not a picture of a known kind"]]

    folder = edited(config=lambda config: config.update(learned_missing=True), training=change)
    said = limits(render_card(folder))
    assert "1,234 of the 48 training rows had no picture, 5 no caption; a learned vector stands in" in said
    assert "1 pictures could not be read" in said


def test_what_is_on_the_hub_is_linked(edited):
    backbones = ["timm/densenet121.tv_in1k", "huawei-noah/TinyBERT_General_4L_312D"]
    data = {"data": ["user/rows", "my test.csv"], "datasets": ["user/rows"]}
    card = render_card(edited(training=lambda training: training.update(base_models=backbones, **data)))
    assert card.data.base_model == backbones and card.data.datasets == ["user/rows"]
    assert {(r.dataset_type, r.dataset_name) for r in card.data.eval_results} == {
        ("user/rows", "user/rows + my test.csv")
    }
    assert card.data.get("language") is None and "biases of the data that `timm/densenet121.tv_in1k`" in limits(card)


def test_name_of_local_data_becomes_one_that_the_hub_takes(edited):
    card = render_card(edited(training=lambda training: training.update(data=["mes données (2).csv"])))
    assert {r.dataset_type for r in card.data.eval_results} == {"mes-donn-es-2-.csv"}
    assert "trained on mes données (2).csv" in card.text


@pytest.mark.parametrize(
    "kind, changes, cited, not_cited",
    [
        ("both", {}, {"huang2017densenet", "devlin2019bert", "vaswani2017attention", "wightman2019timm"}, {"he2016"}),
        ("image", {"image_backbone": "resnet18"}, {"he2016resnet"}, {"huang", "devlin", "vaswani"}),
        (
            "text",
            {"text_backbone": "huawei-noah/TinyBERT_General_4L_312D"},
            {"jiao2020tinybert"},
            {"wightman", "turc"},
        ),
        ("text", {"text_backbone": "prajjwal1/bert-tiny"}, {"turc2019wellread", "devlin2019bert"}, {"jiao", "huang"}),
        ("both", {"fusion": "concat"}, {"lipton2014thresholding", "wolf2020transformers"}, {"vaswani", "sechidis"}),
    ],
)
def test_only_methods_that_are_used_are_cited(kind, changes, cited, not_cited, edited):
    text = render_card(edited(kind, config=lambda config: config.update(changes))).text
    citations = text.split("```bibtex")[1].split("```")[0]
    entries = re.findall(r"^@\w+\{(\w[\w-]*),$", citations, re.M)
    assert cited <= set(entries) and not [key for key in entries for name in not_cited if key.startswith(name)]
    assert "\n\n\n" not in citations and citations.count("{") == citations.count("}")
    assert "image-text-multi-label" not in entries


def test_poster_and_stratification_are_cited_where_they_were_used(edited):
    def change(training):
        training.update(preset="warmerdbert", splits="validation by iterative stratification, seed 0")

    text = render_card(edited(training=change)).text
    assert "@misc{image-text-multi-label," in text and "@inproceedings{sechidis2011stratification," in text


def test_card_is_written_again_over_the_old_one(edited):
    folder = edited(training=lambda training: training.update(license="cc-by-4.0"))
    assert write_card(folder) == folder / "README.md"
    assert ModelCard.load(folder / "README.md").data.license == "cc-by-4.0"


@pytest.mark.parametrize("kind", KINDS)
def test_card_of_a_model_that_came_without_records(kind, tmp_path, monkeypatch):
    """As from a training loop of one's own: it says what the configuration does, and that nothing was measured."""
    folder = write_folder(tmp_path / "model", kind, threshold=0.4, unfrozen_image_stages=None if kind == "text" else 2)
    card = ModelCard.load(write_card(folder))
    assert set(card.data.to_dict()) == {"library_name", "license", "pipeline_tag", "tags"}
    assert card.data.license == "unknown" and card.data.eval_results is None
    (labels,) = tables(card.text)
    assert labels[1:] == [["person", "0.400"], ["traffic light", "0.400"], ["dog", "0.400"]]
    assert ("Its last 2 stages were trained" in card.text) == (kind != "text")
    assert "No figures came with it" in limits(card) and len(snippets(card)) == 3
    assert "lipton" not in card.text and "How it was trained" not in card.text and "png" not in card.text
    assert not GAPS.search(card.text) and "\n\n\n" not in card.text
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        card.validate()


def test_card_of_figures_without_the_story_of_the_training(edited):
    folder = edited()
    (folder / "training.json").unlink()
    card = render_card(folder)
    assert {result.dataset_name for result in card.data.eval_results} == {"unnamed rows"}
    assert len(tables(card.text)) == 4 and "lipton2014" in card.text and not GAPS.search(card.text)


def test_no_card_without_a_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        render_card(tmp_path)


def test_card_of_the_systems_is_that_of_the_presets():
    render = runpy.run_path(str(ROOT / "model_cards" / "systems.py"))["render"]
    assert (ROOT / "model_cards" / "systems.md").read_text(encoding="utf-8") == render()


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
        assert "hf_mmclf/card_template.md" in files.namelist()
    with tarfile.open(source) as files:
        assert any(name.endswith("src/hf_mmclf/card_template.md") for name in files.getnames())
