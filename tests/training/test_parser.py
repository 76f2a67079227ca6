import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_mmclf import PRESETS, AugmentationArguments, parse_arguments
from hf_mmclf.inference.predictor import machine_defaults
from hf_mmclf.training.parser import CLASSES, CommandParser

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


@pytest.fixture
def write_yaml(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def error_of(argv, capsys):
    """The message of an exit, without the usage before it."""
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv, prog="train")
    assert caught.value.code == 2
    usage, _, message = capsys.readouterr().err.partition("train: error: ")
    assert usage.startswith("usage: train [--config FILE]") and message.count("\n") == 1
    return message.strip()


def value_of(name, arguments):
    return next(getattr(part, name) for part in arguments if hasattr(part, name))


@pytest.mark.parametrize(
    "text, flags, expected",
    [
        (None, [], 5e-5),  # of TrainingArguments; the demo's recipe is taken away below
        (None, ["--preset", "demo"], 2e-3),
        ("learning_rate: 1e-4", ["--preset", "demo"], 1e-4),  # YAML reads 1e-4 as text
        ("learning_rate: 0.5\npreset: demo", [], 0.5),
        ("learning_rate: 1e-4", ["--preset", "demo", "--learning_rate", "3"], 3.0),
        ("learning_rate: 1e-4", ["--preset", "demo", "--learning-rate=3"], 3.0),
    ],
)
def test_each_source_wins_over_those_before_it(text, flags, expected, write_yaml, monkeypatch):
    if text is None and not flags:
        bare = {"demo": dataclasses.replace(PRESETS["demo"], recipe={})}
        monkeypatch.setattr("hf_mmclf.presets.PRESETS", bare)
    config = ["--config", write_yaml(text)] if text else []
    assert value_of("learning_rate", parse_arguments([*flags, *config])) == expected


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_files_of_settings_hold(file):
    arguments = parse_arguments(["--config", str(file)])
    for name, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        found = value_of(name, arguments)
        assert found == (float(value) if isinstance(found, float) else value), name


def test_the_competitions_file_says_all_that_the_preset_would():
    said = yaml.safe_load((CONFIGS / "competition.yaml").read_text(encoding="utf-8"))
    assert set(PRESETS[said["preset"]].recipe) <= set(said)
    assert {field.name for field in dataclasses.fields(AugmentationArguments)} <= set(said)


@pytest.mark.parametrize(
    "line, name, expected",
    [
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("bf16: false", "bf16", False),
        ("label_thresholds: yes", "label_thresholds", True),
        ("learned_missing: true", "learned_missing", True),
        ("label_columns: [cat, dog]", "label_columns", ["cat", "dog"]),
        ("label_columns: cat", "label_columns", ["cat"]),
        ("early_stopping_patience: null", "early_stopping_patience", None),  # the recipe's is 5
        ("unfrozen_text_layers: -1", "unfrozen_text_layers", -1),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("data: 2024", "data", "2024"),
        ("label_delimiter: '-'", "label_delimiter", "-"),
    ],
)
def test_yaml_values_arrive_in_their_type(line, name, expected, write_yaml):
    value = value_of(name, parse_arguments(["--preset", "demo", "--config", write_yaml(line)]))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "unknown argument 'learning_rat'; did you mean 'learning_rate'?"),
        ("learning-rate: 1", "unknown argument 'learning-rate'; did you mean 'learning_rate'?"),
        ("1: 2", "unknown argument 1"),
        ("config: other.yaml", "unknown argument 'config'"),
        ("- learning_rate", "expected lines such as 'learning_rate: 1e-4', got list"),
        ("", "expected lines such as 'learning_rate: 1e-4', got NoneType"),
        ("a: [", "not YAML: while parsing"),
        ("seed: soon", "argument --seed: invalid int value: 'soon'"),
        ("seed: 1.5", "argument --seed: invalid int value: '1.5'"),
        ("bad_images: ignore", "argument --bad_images/--bad-images: invalid choice: 'ignore' (choose from"),
        ("preset: [demo]", "unknown preset '[\"demo\"]'; did you mean demo"),
    ],
)
def test_what_yaml_gets_wrong_is_said(text, message, write_yaml, capsys):
    path = write_yaml(text)
    error = error_of(["--config", path], capsys)
    assert message in error
    assert path in error or message.startswith(("argument", "unknown preset"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["--config"], "argument --config: expected one argument"),
        (["--learnin_rate", "1"], "unknown argument '--learnin_rate'; did you mean '--learning_rate'?"),
        (["--learnin-rate=1"], "unknown argument '--learnin-rate'; did you mean '--learning_rate'?"),
        (["--xyzzy"], "unknown argument '--xyzzy'; --help lists them"),
        (["--learning"], "unknown argument '--learning'"),  # no abbreviations
        (["stray"], "unknown argument 'stray'"),
        (["--preset", "warmdbrt"], "unknown preset 'warmdbrt'; did you mean warmdbert"),
        (["--fusion", "crossed"], "(choose from 'self', 'cross_text', 'cross_image', 'concat', 'label_queries')"),
        (["--image_tokens", "all"], "(choose from 'pooled', 'spatial', 'stages', 'mean_max')"),
        (["--bad_images", "ignore"], "(choose from 'error', 'skip', 'missing')"),
        (["--lr_scheduler_type", "cosin"], "'linear', 'cosine'"),
        (["--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["--image_backbone", "resnet81"], "timm has no architecture 'resnet81'; did you mean 'resnet18'?"),
        (["--remove_unused_columns", "true"], "remove_unused_columns must be off"),
        (["--metric_for_best_model", "f2"], "metric_for_best_model is 'f2'; expected one of f1, "),
        (["--eval_strategy", "steps"], "save and eval strategy to match"),
        (["--eval_steps", "5"], "--eval_steps has no effect, because --eval_strategy is epoch"),
        (["--save_steps=5"], "--save_steps has no effect, because no strategy reads it"),
        (
            ["--eval_strategy", "steps", "--eval_steps=5", "--save_strategy=best", "--save-steps", "7"],
            "--save_steps has no effect, because no strategy reads it",
        ),
        (
            ["--logging_strategy", "epoch", "--logging_steps", "0.1"],
            "--logging_steps has no effect, because --logging_strategy is epoch",
        ),
        (["--license", "My own"], "license is 'My own'; expected an identifier of the Hub such as mit"),
        (["--license", "Apache-2.0"], "such as mit, apache-2.0"),
        (["--push_to_hub"], "after training run: hf-mmclf push OUTPUT user/name"),
        (
            ["--push_to_hub", "--output_dir", "out/a", "--hub_model_id", "someone/model"],
            "after training run: hf-mmclf push out/a someone/model",
        ),
    ],
)
def test_wrong_flags_are_answered_with_valid_ones(argv, message, capsys):
    assert message.replace("'", "") in error_of(argv, capsys).replace("'", "")  # Python 3.14 quotes no choices


@pytest.mark.parametrize(
    "flags, text, expected",
    [
        ([], None, "demo"),
        (["--data", "rows.csv"], None, "warmerdbert"),
        ([], "data: rows.csv", "warmerdbert"),
        (["--data", "rows.csv", "--preset", "rest"], "preset: tinybert", "rest"),
        (["--data", "rows.csv"], "preset: tinybert", "tinybert"),
    ],
)
def test_preset_when_none_is_named(flags, text, expected, write_yaml):
    config = ["--config", write_yaml(text)] if text else []
    model, _, _, training = parse_arguments([*flags, *config])
    assert model.preset == expected
    assert training.num_train_epochs == PRESETS[expected].recipe["num_train_epochs"]


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_name_real_arguments(name):
    fields = {field.name for part in CLASSES for field in dataclasses.fields(part)}
    assert set(PRESETS[name].recipe) <= fields
    arguments = parse_arguments(["--preset", name])
    for key, value in PRESETS[name].recipe.items():
        assert value_of(key, arguments) == value


@pytest.mark.parametrize("processes, expected", [("1", 3), ("2", 1), ("4", 1)])
def test_workers_are_shared_among_the_processes_of_the_machine(processes, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert machine_defaults()["dataloader_num_workers"] == expected


@pytest.mark.parametrize("available", [True, False])
def test_bf16_where_the_machine_has_it(available, monkeypatch):
    monkeypatch.setattr("hf_mmclf.inference.predictor.is_torch_bf16_gpu_available", lambda: available)
    assert machine_defaults()["bf16"] is available


@pytest.mark.parametrize("available", [True, False])
def test_batches_for_an_accelerator_are_copied_while_it_computes(available, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: available)
    args = parse_arguments(["--bf16", "false"])[-1]
    assert args.dataloader_pin_memory is available
    assert args.accelerator_config.non_blocking is available
    own = parse_arguments(["--bf16", "false", "--accelerator_config", '{"non_blocking": false}'])[-1]
    assert own.accelerator_config.non_blocking is False


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], 0.05),  # a share of the run, so that short ones have a curve too
        (["--logging_steps", "7"], 7),
        (["--eval_strategy", "steps", "--save_strategy", "steps"], 0.05),
    ],
)
def test_the_training_loss_is_logged_often_and_evaluation_goes_with_saving(flags, expected):
    training = parse_arguments(flags)[-1]
    assert training.logging_steps == expected
    if flags[:1] == ["--eval_strategy"]:
        assert training.eval_steps == training.save_steps == 500
        assert parse_arguments([*flags, "--eval_steps", "250"])[-1].eval_steps == 250


def test_no_workers_means_none_that_persist():
    training = parse_arguments(["--dataloader_num_workers", "0"])[-1]
    assert not training.dataloader_persistent_workers  # with which torch would refuse to load
    assert parse_arguments(["--dataloader_num_workers", "2"])[-1].dataloader_persistent_workers


def test_help_is_short_and_says_what_holds(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help", "--preset", "demo-text"], prog="train")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and len(text.splitlines()) < 300
    for name in (
        "output_dir",
        "learning_rate",
        "max_steps",
        "seed",
        "bf16",
        "preset",
        "data",
        "flip",
        "label_thresholds",
        "config",
    ):
        assert f"--{name} " in text or f"--{name}\n" in text or f"[{name.upper()}]" in text, name
    assert "--learning-rate" not in text and "--no_" not in text and "==SUPPRESS==" not in text
    assert "--adam_beta1" not in text and "--fsdp" not in text
    words = " ".join(text.split())
    assert "Largest vocabulary of a trained tokenizer. (default: 1000)" in words  # the preset's
    assert "in degrees. (default: 0.0)" in words
    assert "transformers.TrainingArguments are accepted too" in words


def test_hidden_arguments_work_all_the_same():
    training = parse_arguments(["--adam_beta1", "0.5", "--no_load_best_model_at_end", "--save-total-limit", "7"])[-1]
    assert (training.adam_beta1, training.load_best_model_at_end, training.save_total_limit) == (0.5, False, 7)


@pytest.mark.parametrize("flag", ["--help_all", "--help-all"])
def test_help_all_lists_everything(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments([flag])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    missing = [field.name for field in dataclasses.fields(TrainingArguments) if f"--{field.name}" not in text]
    assert not missing


@pytest.mark.parametrize("kind", CLASSES)
def test_every_own_flag_is_documented(kind):
    own = {
        name
        for base in kind.__mro__
        if base is not TrainingArguments
        for name in vars(base).get("__annotations__", {})
    }
    parser = CommandParser([kind], prog="x")
    texts = " ".join(parser.format_help().split())
    assert len(own) > 5
    for name in own:
        following = texts.partition(f" --{name} ")[2].split(" --")[0].split(" ", 1)
        assert len(following) == 2 and len(following[1].split()) > 2, name


def test_arguments_without_a_dataclass(capsys):
    parser = CommandParser(prog="x", usage="x FOLDER", description="Do something.")
    parser.add_argument("folder", help="The folder.")
    parser.add_argument("--large-batch", "--large_batch", type=int, default=3, metavar="N", help="How many.")
    (values,) = parser.parse(["here", "--large_batch", "4"])
    assert (values.folder, values.large_batch) == ("here", 4)
    lines = parser.format_help().splitlines()
    assert "  folder                The folder." in lines
    assert "  --large_batch N       How many. (default: 3)" in lines
    with pytest.raises(SystemExit):
        parser.parse(["here", "--large_bath", "4"])
    assert "did you mean '--large_batch'?" in capsys.readouterr().err
