import csv
import dataclasses
import doctest
import json
import os
import socket
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.training_runs import TINY, TWO_PROCESSES, launch, table_flags, write_table
from timm.loss import DistributionBalancedLoss
from transformers import AutoModel, set_seed

from hf_mmclf import (
    DataArguments,
    MMClfForImageTextClassification,
    Predictor,
    parse_arguments,
    train,
)
from hf_mmclf.data.prepare import PreparedData, prepare_data
from hf_mmclf.data.streaming import StreamCollator
from hf_mmclf.evaluation.thresholds import best_threshold
from hf_mmclf.hub.plots import PLOTS
from hf_mmclf.presets import config_from_preset
from hf_mmclf.training import inputs as training_inputs
from hf_mmclf.training import record as records
from hf_mmclf.training import train as training
from hf_mmclf.training.checkpoints import claim_output
from hf_mmclf.training.trainer import MMClfTrainer


def run(table: Path, output: Path, *flags: str) -> Path:
    return train(*parse_arguments([*table_flags(table), "--output_dir", str(output), *flags]))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "model"
    flags = ["--num_train_epochs", "4", "--label_thresholds", "--save_predictions", "--learning_rate", "4e-3"]
    return run(table, output, *flags, "--per_device_train_batch_size", "8")


def open_finished(folder: Path, table: Path) -> tuple[Predictor, PreparedData]:
    columns = dict(image_column="file", text_column="words", label_column="tags")
    finished = Predictor.load(folder)
    return finished, finished.prepare(DataArguments(str(table), image_dir=str(table.parent / "pictures"), **columns))


def evaluate(folder: Path, table: Path, split: str) -> dict:
    finished, prepared = open_finished(folder, table)
    return finished.evaluate(finished.choose_split(prepared, split)[1], prepared.folder)


def test_example(capsys):
    tests = [test for test in doctest.DocTestFinder().find(training) if test.examples]
    with capsys.disabled():
        assert tests and not any(doctest.DocTestRunner().run(test).failed for test in tests)


def test_output_folder_is_complete_and_holds_no_pickle(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json"} <= names
    assert {"metrics.json", "training.json", "splits.csv", "README.md", *PLOTS} <= names
    assert {"predictions-validation.csv", "predictions-test.csv"} <= names
    assert "checkpoints" not in names and not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]


def test_metrics_are_those_of_the_reloaded_folder(finished, table):
    recorded = json.loads((finished / "metrics.json").read_text())
    for split in ("validation", "test"):
        again = evaluate(finished, table, split)
        assert again["rows"] == recorded[split]["rows"] > 0
        for at in ("at_0.5", "fitted"):
            ece = again[at].pop("ece"), recorded[split][at].pop("ece")
            assert ece[0] == pytest.approx(
                ece[1], abs=1e-6
            )  # it uses the scores, which depend on the batch by rounding
            assert again[at] == pytest.approx(recorded[split][at], abs=1e-9)
        for name in ("intervals", "by_label_count", "by_caption_length", "warnings"):
            assert again[name] == recorded[split][name]
    # ablations are computed for the last split only
    assert again["ablations"] == recorded["test"]["ablations"] and "ablations" not in recorded["validation"]


def test_ablations_show_which_modality_counts(finished, table, tmp_path, capsys):
    """Images show colours and texts name animals, so without one of them no row can be right."""
    figures = json.loads((finished / "metrics.json").read_text())["test"]
    found = {name: values["f1"] for name, values in figures["ablations"].items()}
    assert list(found) == ["image_only", "text_only", "shuffled_captions"]
    assert max(found.values()) < figures["fitted"]["f1"]
    without_test = run(table, tmp_path / "n", "--max_steps", "1", "--test_fraction", "0")
    assert "ablations" in json.loads((without_test / "metrics.json").read_text())["validation"]
    assert "Validation rows:" in capsys.readouterr().out


def test_it_learns_and_automodel_loads_it_with_labels_and_thresholds(finished):
    model = AutoModel.from_pretrained(finished)
    recorded = json.loads((finished / "metrics.json").read_text())
    assert isinstance(model, MMClfForImageTextClassification)
    assert list(model.config.id2label.values()) == ["blue", "cat", "dog", "green", "red"]
    assert model.config.threshold == recorded["threshold"]
    assert set(model.config.label_thresholds) == {"blue", "cat", "dog", "green", "red"}
    assert recorded["validation"]["fitted"]["f1"] > 0.75


def test_reports_of_a_run_in_half_precision_are_those_of_its_users(table, tmp_path):
    output = run(table, tmp_path / "half", "--bf16", "true", "--use_cpu", "true", "--max_steps", "2")
    recorded = json.loads((output / "metrics.json").read_text())
    assert json.loads((output / "training.json").read_text())["recipe"]["precision"] == "bf16"
    assert evaluate(output, table, "test")["fitted"] == pytest.approx(recorded["test"]["fitted"], abs=1e-6)


def test_logs_of_tensorboard_stay(table, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    output = run(table, tmp_path / "m", "--report_to", "tensorboard", "--max_steps", "2", "--no_ablations")
    [events] = (output / "logs").iterdir()
    assert events.name.startswith("events.") and b"eval/f1" in events.read_bytes()
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ and not (output / "checkpoints").exists()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    output = run(table, tmp_path / "n", "--report_to", "tensorboard", "--max_steps", "2", "--no_ablations")
    assert list((tmp_path / "elsewhere").iterdir()) and not (output / "logs").exists()
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "elsewhere")


def missing_thresholds_of(output, table, objective, beta):
    """Fit thresholds on the validation rows with both modalities, after removing one of them."""
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
    output = run(table, tmp_path / "model", *flags, "--max_steps", "3", "--no_ablations")
    recorded = json.loads((output / "metrics.json").read_text())
    record = json.loads((output / "training.json").read_text())
    assert evaluate(output, table, "test")["fitted"] == pytest.approx(recorded["test"]["fitted"], abs=1e-6)
    assert record["recipe"]["loss"] == "distribution_balanced" and 0.05 < record["temperature"] < 20
    assert (record["recipe"]["positive_weights"], record["recipe"]["label_smoothing"]) == ([0.5, 10.0], 0.1)
    assert (output / "README.md").is_file()
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
    flags += ["--image_column", "file", "--text_column", "words", "--label_columns", *labels, "--max_steps", "2"]
    with pytest.raises(ValueError, match="indicators.csv:12: column 'blue' is ''; expected 0 or 1, or -1"):
        train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "none")]))
    flags += ["--empty_is_unknown", "--no_ablations", "--positive_weight_power", "0.5"]
    output = train(*parse_arguments([*flags, "--output_dir", str(tmp_path / "model")]))
    report = json.loads((output / "metrics.json").read_text())["test"]
    held_out = {line["row"] for line in csv.DictReader((output / "splits.csv").open()) if line["split"] == "test"}
    known = [
        cell
        for number, row in enumerate(csv.DictReader(path.open()), 2)
        for cell in [row[label] for label in labels]
        if f"indicators.csv:{number}" in held_out and cell == "1"
    ]
    assert sum(label["support"] for label in report["per_label"]) == len(known)
    assert "ablations" not in report


def test_unknown_labels_are_neither_positives_nor_negatives():
    labels = [[1, 0, -1], [1, -1, -1], [0, 1, -1], [0, 0, 1], [0, -1, 0]]
    args = parse_arguments(["--positive_weight_power", "1", "--positive_weight_cap", "100"])[3]
    criterion = training._criterion(args, Dataset.from_dict({"labels": labels}))
    assert criterion.positive_weights.tolist() == [3 / 2, 2 / 1, 1 / 1]


def test_test_labels_choose_nothing(finished, table, monkeypatch):
    """The threshold is the best one for the validation scores."""
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
    assert recipe["batch_size"] == 8 and recipe["learning_rate"] == 4e-3 and recipe["precision"] == "fp32"
    assert (recipe["optimizer"], recipe["schedule"]) == ("adamw_torch_fused", "cosine")
    assert (recipe["image_size"], recipe["max_tokens"], recipe["augmentation"]["flip"]) == (32, 64, 0.5)
    best = max((entry for entry in history if "eval_f1" in entry), key=lambda entry: entry["eval_f1"])
    assert said["best_checkpoint"] == {"by": "f1", "score": best["eval_f1"], "epoch": best["epoch"]}
    assert len([entry for entry in history if "loss" in entry]) >= 12  # a twentieth of 24 steps is two steps
    assert said["speed"]["rows_per_second"] > 0 and said["speed"]["split"] == "test"
    assert "CPU thread" in said["speed"]["machine"] and set(said["versions"]) >= {"python", "torch", "hf_mmclf"}


def test_no_file_tells_where_or_by_whom_it_was_made(finished, table):
    private = [str(table.parent), str(finished.parent), str(Path.home()), tempfile.gettempdir()]
    for file in finished.iterdir():
        content = file.read_bytes()
        assert not [text for text in private if text.encode() in content], file.name
    machine = json.loads((finished / "training.json").read_text())["speed"]["machine"]
    assert socket.gethostname() not in machine


def test_a_used_output_folder_is_refused_and_a_default_one_is_new(table, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty.*--resume_from_checkpoint"):
        run(table, tmp_path / "used")
    monkeypatch.chdir(tmp_path)
    Path("outputs/demo").mkdir(parents=True)
    arguments = parse_arguments([])
    with claim_output("demo", arguments[3]) as start:
        assert start.output == Path("outputs/demo-2")
    assert not start.output.exists()


def test_nothing_is_written_before_all_checks_passed(table, tmp_path):
    output = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match="no such file"):
        flags = ["--from_scratch", "false", "--image_weights", str(tmp_path / "none.pth"), "--text_backbone", "none"]
        run(table, output, *flags)
    assert not output.exists()
    (output / "checkpoints" / "runs").mkdir(parents=True)  # a start that failed later leaves logs at most
    arguments = parse_arguments(["--output_dir", str(output)])
    with claim_output("demo", arguments[3]) as start:
        assert start == (output, None, False, False)


def test_a_trained_tokenizer_does_not_fit_pretrained_text_weights(table, tmp_path):
    with pytest.raises(ValueError, match="--tokenizer train.*--from_scratch"):
        run(table, tmp_path / "m", "--from_scratch", "false", "--tokenizer", "train")


def test_nothing_to_resume_is_an_error(table, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(table, tmp_path / "new", "--resume_from_checkpoint", "true")


def test_failure_while_writing_leaves_no_folder_that_loads(table, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records, "write_predictions", fail)
    with pytest.raises(OSError, match="disk full"):
        run(table, tmp_path / "model", "--max_steps", "1", "--save_predictions", "--no_ablations")
    assert not (tmp_path / "model" / "config.json").exists()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        Predictor.load(tmp_path / "model")


def test_rows_without_an_image_or_text(tmp_path, capsys, monkeypatch):
    def prepare(*args):
        reason = "[Errno 13] Permission denied: '/home/somebody/3.png'"
        bad_images = [("table.csv:4", reason), ("table.csv:5", "the file is empty")]
        return dataclasses.replace(prepare_data(*args), bad_images=bad_images)

    monkeypatch.setattr(training_inputs, "prepare_data", prepare)
    table = write_table(tmp_path / "table", complete=False)
    folder = run(table, tmp_path / "model", "--max_steps", "2")
    model = AutoModel.from_pretrained(folder)
    said = capsys.readouterr().err
    assert model.config.learned_missing and "rows without an image" in said and "2 images cannot be read" in said
    finished, prepared = open_finished(folder, table)
    held_out = finished.choose_split(prepared, "validation")[1]
    both = held_out.filter(lambda row: row["image"] is not None and row["text"] is not None)
    assert 0 < len(both) < len(held_out)
    fitted = best_threshold(finished.scores(both, prepared.folder), np.array(both["labels"]))
    assert model.config.threshold == pytest.approx(fitted, abs=1e-6)
    assert missing_thresholds_of(folder, table, "micro", 1) == pytest.approx(model.config.missing_thresholds)
    assert model.missing_text.vector.abs().sum() > 0
    record = json.loads((folder / "training.json").read_text())
    # no reason tells a path
    assert record["bad_images"] == [
        ["table.csv:4", "[Errno 13] Permission denied"],
        ["table.csv:5", "the file is empty"],
    ]
    train_rows = finished.choose_split(prepared, "train")[1]
    missing = {column: sum(cell is None for cell in train_rows[column]) for column in ("image", "text")}
    assert record["missing"]["train"] == missing and all(missing.values())


def test_early_stopping_stops(table, tmp_path):
    flags = ["--early_stopping_patience", "1", "--num_train_epochs", "9", "--learning_rate", "0", "--no_ablations"]
    folder = run(table, tmp_path / "m", *flags)
    assert json.loads((folder / "training.json").read_text())["epochs"] < 9


def test_backbones_start_from_local_weights(table, tmp_path, capsys):
    weights = MMClfForImageTextClassification(config_from_preset("demo")).image_model.state_dict()
    torch.save(weights, tmp_path / "backbone.pth")
    flags = ["--from_scratch", "false", "--image_weights", str(tmp_path / "backbone.pth"), "--text_backbone", "none"]
    arguments = parse_arguments([*table_flags(table), *flags])
    inputs = training_inputs.prepare_inputs(*arguments)
    assert "image backbone: pretrained, backbone.pth" in capsys.readouterr().err
    loaded = inputs.model.image_model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_a_text_model_needs_no_image_files(table, tmp_path):
    arguments = parse_arguments([*table_flags(table), "--preset", "demo-text", "--image_dir", str(tmp_path)])
    inputs = training_inputs.prepare_inputs(*arguments)
    batch = inputs.preprocessing.collator(inputs.preprocessing.dataset(inputs.train_rows).__getitems__([0, 1]))
    assert not inputs.model.config.has_image and inputs.model(**batch).logits.shape == (2, 5)


# --multi_gpu is accelerate's way to torchrun. Its --cpu starts one process for any --num_processes.
@pytest.mark.slow
def test_two_processes_report_what_one_does(tmp_path):
    table = write_table(tmp_path / "table", rows=75)  # neither split has an even number of rows
    flags = [*table_flags(table), "--output_dir", str(tmp_path / "m"), "--max_steps", "3", "--use_cpu"]
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


def test_an_interrupted_run_is_resumed(table, tmp_path, monkeypatch):
    output, steps, training_step = tmp_path / "m", [], MMClfTrainer.training_step
    flags = ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "2", "--eval_steps", "2"]
    flags += ["--max_steps", "6", "--logging_steps", "1", "--no_ablations"]

    def interrupted(self, *args):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(MMClfTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(table, output, *flags)
    with pytest.raises(FileNotFoundError, match="not finished"):
        Predictor.load(output)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint true"):
        run(table, output, *flags)
    run(table, output, *flags, "--resume_from_checkpoint", "true")
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    record = json.loads((output / "training.json").read_text())
    assert [entry["step"] for entry in record["history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert record["resumed"] and (output / "config.json").exists() and not (output / "checkpoints").exists()


@pytest.mark.parametrize("policy", ["error", "skip", "missing"])
def test_images_that_vanish_during_training_follow_bad_images(policy, tmp_path, monkeypatch, capsys):
    table, training_step = write_table(tmp_path / "table"), MMClfTrainer.training_step

    def vanish(self, *args):
        for dataset in (self.train_dataset, self.eval_dataset):
            (table.parent / "pictures" / dataset.with_format(None)[0]["image"]).unlink(missing_ok=True)
        return training_step(self, *args)

    monkeypatch.setattr(MMClfTrainer, "training_step", vanish)
    flags = ["--num_train_epochs", "2", "--no_ablations", "--bad_images", policy]
    if policy == "error":
        with pytest.raises(ValueError, match="cannot read the image .*--bad_images skip"):
            run(table, tmp_path / "m", *flags)
        return
    reports = json.loads((run(table, tmp_path / "m", *flags) / "metrics.json").read_text())
    said = capsys.readouterr().err
    fate = "left out" if policy == "skip" else "taken as missing"
    assert said.count(f"Image became unreadable and is {fate}: ") == 2
    assert ("1 of 6 validation rows are left out of the report" in said) == (policy == "skip")
    assert reports["validation"]["rows"] == (5 if policy == "skip" else 6)


def test_resuming_with_other_texts_for_a_trained_tokenizer_is_refused(tmp_path, monkeypatch):
    table, output, training_step = write_table(tmp_path / "table"), tmp_path / "m", MMClfTrainer.training_step
    flags = ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "1", "--eval_steps", "1"]

    def interrupted(self, *args):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return training_step(self, *args)

    monkeypatch.setattr(MMClfTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(table, output, *flags, "--max_steps", "3")
    table.write_text(table.read_text().replace("small", "tall"))
    with pytest.raises(ValueError, match="train rows was 48, digest .* and is 48, digest .*; vocabulary was"):
        run(table, output, *flags, "--max_steps", "3", "--resume_from_checkpoint", "true")


def test_a_resumed_stream_under_accumulation_skips_the_batches_that_were_used(table, tmp_path, monkeypatch):
    rows = [
        {"image": row["file"], "text": row["words"], "labels": row["tags"]} for row in csv.DictReader(table.open())
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "names.json").write_text(json.dumps({name: name for name in ("blue", "cat", "dog", "green", "red")}))
    flags = ["--preset", "demo", "--data", str(tmp_path / "rows.jsonl"), "--image_dir", str(table.parent / "pictures")]
    flags += ["--streaming", "--label_names_file", str(tmp_path / "names.json"), "--validation_rows", "4", *TINY]
    flags += ["--shuffle_buffer", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    flags += ["--max_steps", "4", "--save_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    flags += ["--save_total_limit", "9", "--output_dir", str(tmp_path / "checkpoints")]
    # Batches are prepared ahead, so random changes of images would not be the same after resuming.
    flags += ["--crop_scale", "0", "--flip", "0", "--swap_words", "0"]
    call, decoded = StreamCollator.__call__, []

    def count(self, rows):
        batch = call(self, rows)
        decoded[-1] += bool(batch)
        return batch

    monkeypatch.setattr(StreamCollator, "__call__", count)

    def fit(checkpoint=None):
        model_args, data_args, augmentation, args = parse_arguments(flags)
        set_seed(args.seed)
        inputs = training_inputs.prepare_inputs(model_args, data_args, augmentation, args)
        decoded.append(0)
        trainer = training._fit(inputs, augmentation, args, checkpoint)
        assert trainer.state.global_step == 4
        return inputs.model.state_dict()

    expected = fit()
    resumed = fit(str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert decoded[0] - decoded[1] == 2 * 2
