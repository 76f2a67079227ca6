import csv
import dataclasses
import json
import signal
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training_runs import TINY, TWO_PROCESSES, launch, table_flags, write_table
from timm.loss import DistributionBalancedLoss
from transformers import AutoModel, TrainerCallback

from hf_mmclf import (
    DataArguments,
    MMClfForImageTextClassification,
    Predictor,
    parse_arguments,
    train,
)
from hf_mmclf.data.prepare import PreparedData
from hf_mmclf.evaluation.thresholds import best_threshold
from hf_mmclf.hub.plots import PLOTS
from hf_mmclf.presets import config_from_preset
from hf_mmclf.training import inputs
from hf_mmclf.training import record as records
from hf_mmclf.training import train as training
from hf_mmclf.training.trainer import MMClfTrainer


def run(table: Path, output: Path, *flags: str) -> Path:
    return train(*parse_arguments([*table_flags(table), "--output_dir", str(output), *flags]))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "model"
    flags = [
        "--num_train_epochs",
        "6",
        "--label_thresholds",
        "--save_predictions",
        "--per_device_train_batch_size",
        "8",
    ]
    return run(table, output, *flags)


def open_finished(folder: Path, table: Path) -> tuple[Predictor, PreparedData]:
    columns = dict(image_column="file", text_column="words", label_column="tags")
    finished = Predictor.load(folder)
    return finished, finished.prepare(DataArguments(str(table), image_dir=str(table.parent / "pictures"), **columns))


def evaluate(folder: Path, table: Path, split: str) -> dict:
    finished, prepared = open_finished(folder, table)
    return finished.evaluate(finished.choose_split(prepared, split)[1], prepared.folder)


def test_output_folder_is_whole_and_holds_no_pickle(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    assert {
        "metrics.json",
        "training.json",
        "splits.csv",
        "predictions-validation.csv",
        "predictions-test.csv",
        "README.md",
        *PLOTS,
    } <= names
    assert "checkpoints" not in names and not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]


def test_metrics_are_those_of_the_reloaded_folder(finished, table):
    recorded = json.loads((finished / "metrics.json").read_text())
    for split in ("validation", "test"):
        again = evaluate(finished, table, split)
        assert again["rows"] == recorded[split]["rows"] > 0
        for at in ("at_0.5", "fitted"):
            ece = again[at].pop("ece"), recorded[split][at].pop("ece")
            assert ece[0] == pytest.approx(ece[1], abs=1e-6)  # of the scores themselves, which batches round
            assert again[at] == pytest.approx(recorded[split][at], abs=1e-9)
        for name in ("intervals", "by_label_count", "by_caption_length", "warnings"):
            assert again[name] == recorded[split][name]
    # the costly part is done for the last split alone
    assert again["ablations"] == recorded["test"]["ablations"] and "ablations" not in recorded["validation"]


def test_ablations_show_which_modality_counts_and_can_be_left_out(finished, table, tmp_path, capsys):
    """Colours are seen, animals are read: without captions only the former can be right."""
    figures = json.loads((finished / "metrics.json").read_text())["test"]
    found = {name: values["f1"] for name, values in figures["ablations"].items()}
    assert list(found) == ["image_only", "text_only", "shuffled_captions"]
    assert max(found.values()) < figures["fitted"]["f1"]
    folder = run(table, tmp_path / "m", "--max_steps", "1", "--no_ablations", "--test_fraction", "0")
    assert "ablations" not in json.loads((folder / "metrics.json").read_text())["validation"]
    said = capsys.readouterr().out
    assert "Validation rows:" in said and "images only" not in said
    without_test = run(table, tmp_path / "n", "--max_steps", "1", "--test_fraction", "0")
    assert "ablations" in json.loads((without_test / "metrics.json").read_text())["validation"]


def test_it_learns_and_automodel_loads_it_with_labels_and_thresholds(finished):
    model = AutoModel.from_pretrained(finished)
    recorded = json.loads((finished / "metrics.json").read_text())
    assert isinstance(model, MMClfForImageTextClassification)
    assert list(model.config.id2label.values()) == ["blue", "cat", "dog", "green", "red"]
    assert model.config.threshold == recorded["threshold"]
    assert set(model.config.label_thresholds) == {"blue", "cat", "dog", "green", "red"}
    assert recorded["validation"]["fitted"]["f1"] > 0.8


def test_reports_of_a_run_in_half_precision_are_those_of_its_users(table, tmp_path):
    output = run(table, tmp_path / "half", "--bf16", "true", "--use_cpu", "true", "--max_steps", "4")
    recorded = json.loads((output / "metrics.json").read_text())
    assert json.loads((output / "training.json").read_text())["recipe"]["precision"] == "bf16"
    assert evaluate(output, table, "test")["fitted"] == pytest.approx(recorded["test"]["fitted"], abs=1e-6)


def missing_thresholds_of(output, table, objective, beta):
    """Of the validation rows that lack nothing, once their pictures or captions are taken away."""
    finished, prepared = open_finished(output, table)
    rows = finished.choose_split(prepared, "validation")[1].filter(lambda row: row["image"] and row["text"])
    found = {}
    for column in ("image", "text"):
        rest = rows.map(lambda row, column=column: {column: None}, load_from_cache_file=False)
        scores = finished.scores(rest, prepared.folder)
        found[column] = best_threshold(scores, np.array(rows["labels"]), objective, beta=beta)
    return found


def test_losses_thresholds_and_calibration_by_flags(table, tmp_path, monkeypatch):
    calls, forward = [], DistributionBalancedLoss.forward
    monkeypatch.setattr(DistributionBalancedLoss, "forward", lambda *args: calls.append(args) or forward(*args))
    flags = ["--loss", "distribution_balanced", "--positive_weight_power", "0.5", "--label_smoothing_factor", "0.1"]
    flags += ["--calibrate", "--label_thresholds", "--threshold_objective", "samples", "--threshold_shrinkage", "-1"]
    flags += ["--fusion", "label_queries", "--modality_dropout", "0.3", "--drop_words", "0.2", "--threshold_beta", "2"]
    output = run(table, tmp_path / "model", *flags, "--num_train_epochs", "2")
    recorded = json.loads((output / "metrics.json").read_text())
    record = json.loads((output / "training.json").read_text())
    assert evaluate(output, table, "test")["fitted"] == pytest.approx(recorded["test"]["fitted"], abs=1e-6)
    assert record["recipe"]["loss"] == "distribution_balanced" and 0.05 < record["temperature"] < 20
    card = (output / "README.md").read_text()
    assert "distribution\\_balanced" in card and "| label smoothing | 0.1" in " ".join(card.split())
    model = Predictor.load(output).model
    assert model.config.modality_dropout == 0.3 and model.missing_image.vector is not None
    assert missing_thresholds_of(output, table, "samples", 2) == pytest.approx(model.config.missing_thresholds)
    assert recorded["missing_thresholds"] == model.config.missing_thresholds
    assert len(calls) > record["history"][-1]["step"] > 0


def test_unknown_labels_train_and_evaluate(table, tmp_path):
    """Columns of 0, 1 and -1; empty cells too, where they are said to be unknown."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = ["blue", "cat", "dog", "green", "red"]
    path = tmp_path / "indicators.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "words", *labels])
        for number, row in enumerate(rows):
            cells = [str(int(label in row["tags"].split("|"))) for label in labels]
            cells[number % 5] = ["-1", "", cells[number % 5]][number % 3]
            writer.writerow([row["file"], row["words"], *cells])
    flags = ["--data", str(path), "--image_dir", str(table.parent / "pictures"), "--preset", "demo", *TINY]
    flags += ["--image_column", "file", "--text_column", "words", "--label_columns", *labels, "--max_steps", "4"]
    with pytest.raises(ValueError, match="indicators.csv:12: column 'blue' is ''; expected 0 or 1, or -1"):
        train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "none")]))
    output = train(*parse_arguments([*flags, "--empty_is_unknown", "--output_dir", str(tmp_path / "model")]))
    report = json.loads((output / "metrics.json").read_text())["test"]
    held_out = {line["row"] for line in csv.DictReader((output / "splits.csv").open()) if line["split"] == "test"}
    known = [
        cell
        for number, row in enumerate(csv.DictReader(path.open()), 2)
        for cell in [row[label] for label in labels]
        if f"indicators.csv:{number}" in held_out and cell == "1"
    ]
    assert sum(label["support"] for label in report["per_label"]) == len(known)


def test_test_labels_choose_nothing(finished, table, monkeypatch):
    """The threshold is the best of the validation scores; the function that fits it sees no others."""
    model = Predictor.load(finished)
    flags = parse_arguments(table_flags(table))[1]
    prepared = model.prepare(flags)
    rows = model.choose_split(prepared, "validation")[1]
    expected = best_threshold(model.scores(rows, prepared.folder), np.array(rows["labels"]))
    assert model.model.config.threshold == pytest.approx(expected, abs=1e-6)


def test_training_json_says_what_everything_started_from(finished):
    text = (finished / "training.json").read_text()
    said = json.loads(text)
    assert said["image_backbone"] == said["text_backbone"] == "scratch"
    assert "trained on" in said["tokenizer"] and "stratification" in said["splits"] and "seed 0" in said["splits"]
    assert str(finished.parent) not in text


def test_training_json_says_how_it_was_trained(finished):
    said = json.loads((finished / "training.json").read_text())
    model = AutoModel.from_pretrained(finished)
    assert said["parameters"]["total"] == said["parameters"]["trained"] == model.num_parameters()
    assert said["parameters"]["image_model"] == sum(p.numel() for p in model.image_model.parameters())
    assert said["megabytes"] == (finished / "model.safetensors").stat().st_size / 2**20
    assert (said["data"], said["datasets"], said["license"]) == (["table.csv"], [], "unknown")
    assert said["rows"] == {"train": 48, "validation": 6, "test": 6}
    assert said["missing"]["train"] == {"image": 0, "text": 0}
    recipe, history = said["recipe"], said["history"]
    assert recipe["batch_size"] == 8 and recipe["learning_rate"] == 2e-3 and recipe["precision"] == "fp32"
    assert (recipe["optimizer"], recipe["schedule"]) == ("adamw_torch_fused", "cosine")
    assert (recipe["image_size"], recipe["max_tokens"], recipe["augmentation"]["flip"]) == (32, 64, 0.5)
    best = max((entry for entry in history if "eval_f1" in entry), key=lambda entry: entry["eval_f1"])
    assert said["best_checkpoint"] == {"by": "f1", "score": best["eval_f1"], "epoch": best["epoch"]}
    assert len([entry for entry in history if "loss" in entry]) >= 18  # each twentieth of 36 steps
    assert said["speed"]["rows_per_second"] > 0 and said["speed"]["split"] == "test"
    assert "CPU thread" in said["speed"]["machine"] and set(said["versions"]) >= {"python", "torch", "hf_mmclf"}


def test_no_file_tells_where_or_by_whom_it_was_made(finished, table):
    private = [str(table.parent), str(finished.parent), str(Path.home()), tempfile.gettempdir()]
    for file in finished.iterdir():
        content = file.read_bytes()
        assert not [text for text in private if text.encode() in content], file.name
    machine = json.loads((finished / "training.json").read_text())["speed"]["machine"]
    assert socket.gethostname() not in machine


def test_reasons_of_bad_images_hold_no_path(table, tmp_path, monkeypatch):
    def prepare(*args):
        prepared = training_prepare(*args)
        reason = "[Errno 13] Permission denied: '/home/somebody/3.png'"
        return dataclasses.replace(
            prepared, bad_images=[("table.csv:4", reason), ("table.csv:5", "the file is empty")]
        )

    training_prepare = inputs.prepare_data
    monkeypatch.setattr(inputs, "prepare_data", prepare)
    said = json.loads((run(table, tmp_path / "m", "--max_steps", "1") / "training.json").read_text())
    assert said["bad_images"] == [
        ["table.csv:4", "[Errno 13] Permission denied"],
        ["table.csv:5", "the file is empty"],
    ]


def test_learning_rates_by_part_and_no_decay_on_vectors():
    model = MMClfForImageTextClassification(config_from_preset("demo", unfrozen_image_stages=1, num_labels=3))
    flags = ["--learning_rate", "1e-3", "--backbone_learning_rate", "1e-4", "--weight_decay", "0.1"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    args = parse_arguments(flags)[3]
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in MMClfTrainer(model, args).create_optimizer().param_groups
        for parameter in group["params"]
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(settings) == {id(parameter) for parameter in trained.values()}
    assert len(trained) < len(list(model.parameters()))
    for name, parameter in trained.items():
        in_backbone = name.startswith(("image_model", "text_model"))
        assert settings[id(parameter)] == (1e-4 if in_backbone else 1e-3, 0.1 if parameter.ndim > 1 else 0.0), name


def test_a_used_output_folder_is_refused_and_a_default_one_is_new(table, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty.*--resume_from_checkpoint"):
        run(table, tmp_path / "used")
    monkeypatch.chdir(tmp_path)
    Path("outputs/demo").mkdir(parents=True)
    arguments = parse_arguments([])
    assert training._claim_output(arguments[0], arguments[3])[0] == Path("outputs/demo-2")


def test_a_start_that_failed_does_not_block_the_next(table, tmp_path):
    output = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="no such file"):
        flags = ["--from_scratch", "false", "--image_weights", str(tmp_path / "none.pth"), "--text_backbone", "none"]
        run(table, output, *flags)
    assert (run(table, output, "--max_steps", "1") / "config.json").exists()


def test_word_pieces_of_our_own_do_not_fit_pretrained_text_weights(table, tmp_path):
    with pytest.raises(ValueError, match="--tokenizer train.*--from_scratch"):
        run(table, tmp_path / "m", "--from_scratch", "false", "--tokenizer", "train")


def test_nothing_to_resume_is_an_error(table, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(table, tmp_path / "new", "--resume_from_checkpoint", "true")


def test_failure_while_writing_leaves_no_folder_that_loads(table, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records, "write_predictions", fail)
    with pytest.raises(OSError, match="disk full"):
        run(table, tmp_path / "model", "--max_steps", "1", "--save_predictions")
    assert not (tmp_path / "model" / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        Predictor.load(tmp_path / "model")


def test_rows_without_a_picture_or_caption_get_learned_stand_ins(tmp_path, capsys):
    table = write_table(tmp_path / "table", captions=False, pictures=False)
    rows = [
        row for row in csv.reader(table.open()) if row[0] or row[1]
    ]  # rows without both are an error, not this test
    csv.writer(table.open("w", newline="")).writerows(rows)
    folder = run(table, tmp_path / "model", "--max_steps", "2")
    model = AutoModel.from_pretrained(folder)
    assert model.config.learned_missing
    assert "without an image" in capsys.readouterr().err
    finished, prepared = open_finished(folder, table)
    held_out = finished.choose_split(prepared, "validation")[1]
    whole = held_out.filter(lambda row: row["image"] is not None and row["text"] is not None)
    assert 0 < len(whole) < len(held_out)
    fitted = best_threshold(finished.scores(whole, prepared.folder), np.array(whole["labels"]))
    assert model.config.threshold == pytest.approx(fitted, abs=1e-6)
    assert missing_thresholds_of(folder, table, "micro", 1) == pytest.approx(model.config.missing_thresholds)
    assert model.missing_text.vector.abs().sum() > 0


def test_a_last_batch_of_one_row_trains_with_batchnorm(tmp_path):
    table = write_table(tmp_path / "table", rows=45)
    flags = ["--fusion", "concat", "--projection_norm", "--test_fraction", "0", "--num_train_epochs", "1"]
    folder = run(table, tmp_path / "m", *flags, "--per_device_train_batch_size", "4")
    record = json.loads((folder / "training.json").read_text())
    assert record["rows"]["train"] % 4 == 1
    assert np.isfinite(json.loads((folder / "metrics.json").read_text())["validation"]["fitted"]["f1"])


def test_early_stopping_stops(table, tmp_path):
    folder = run(
        table, tmp_path / "m", "--early_stopping_patience", "1", "--num_train_epochs", "9", "--learning_rate", "0"
    )
    assert json.loads((folder / "training.json").read_text())["epochs"] < 9


def test_backbones_start_from_local_weights_and_say_so(table, tmp_path, capsys):
    config = config_from_preset("demo")
    weights = MMClfForImageTextClassification(config).image_model.state_dict()
    torch.save(weights, tmp_path / "backbone.pth")
    arguments = parse_arguments([*table_flags(table), "--output_dir", str(tmp_path / "m"), "--max_steps", "1"])
    arguments[0].from_scratch, arguments[0].image_weights = False, str(tmp_path / "backbone.pth")
    arguments[0].text_backbone, arguments[0].unfrozen_image_stages = "none", 0
    folder = train(*arguments)
    assert "image backbone: pretrained, backbone.pth" in capsys.readouterr().err
    loaded = AutoModel.from_pretrained(folder).image_model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())  # frozen: as they came


def test_text_only_needs_no_picture_files(table, tmp_path):
    flags = ["--preset", "demo-text", "--image_dir", str(tmp_path), "--max_steps", "1"]
    assert AutoModel.from_pretrained(run(table, tmp_path / "m", *flags)).config.has_image is False


# --multi_gpu is accelerate's way to torchrun; its --cpu starts one process, whatever --num_processes says
@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path):
    table = write_table(tmp_path / "table", rows=75)  # neither split divides by two processes
    flags = [*table_flags(table), "--output_dir", str(tmp_path / "m"), "--num_train_epochs", "2", "--use_cpu"]
    process = launch(*flags, options=TWO_PROCESSES)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("Output folder:") == 1
    assert json.loads((tmp_path / "m" / "training.json").read_text())["processes"] == 2
    recorded = json.loads((tmp_path / "m" / "metrics.json").read_text())
    for split in ("validation", "test"):
        alone = evaluate(tmp_path / "m", table, split)
        assert alone["rows"] == recorded[split]["rows"]
        assert alone["fitted"].pop("ece") == pytest.approx(recorded[split]["fitted"].pop("ece"), abs=1e-6)
        assert alone["fitted"] == pytest.approx(recorded[split]["fitted"], abs=1e-9)
        assert alone["intervals"] == recorded[split]["intervals"]
    assert alone["ablations"] == recorded["test"]["ablations"]


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(table, tmp_path):
    output = tmp_path / "m"
    flags = [*table_flags(table), "--output_dir", str(output), "--save_strategy", "steps", "--eval_strategy", "steps"]
    flags += ["--save_steps", "4", "--eval_steps", "4", "--max_steps", "40", "--logging_steps", "1"]
    process = launch(*flags)
    deadline = time.monotonic() + 240
    while not list((output / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(FileNotFoundError, match="not finished"):
        Predictor.load(output)

    class Steps(TrainerCallback):
        first = None

        def on_step_begin(self, args, state, control, **kwargs):
            Steps.first = Steps.first or state.global_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "EarlyStoppingCallback", lambda *_: Steps())
        train(*parse_arguments([*flags, "--resume_from_checkpoint", "true"]))
    assert Steps.first >= 4
    history = json.loads((output / "training.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 41))
    assert (output / "config.json").exists()
