"""The first look at the arguments of a command: what it says, and that it agrees with the parser that reads them."""

import json
import subprocess
import sys

import pytest

from hf_mmclf import DataArguments
from hf_mmclf.cli import PredictorArguments
from hf_mmclf.training.parser import CLASSES, CommandParser
from hf_mmclf_cli import COMMANDS, SOURCES, UsageParser, _options, flags_of

HEAVY = ("torch", "transformers", "numpy", "hf_mmclf")


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--version"], None, "hf-mmclf "),
        (["--help"], None, "  evaluate   Print F1 and more of a model on labelled rows"),
        (["trian"], "hf-mmclf: unknown command 'trian'", ""),
        (["train", "--help"], 0, "(default: 5e-5)"),
        (["train", "--learnin_rate", "1"], 2, "unknown argument '--learnin_rate'; did you mean '--learning_rate'?"),
        (["train", "--adam_epsilo", "1"], 2, "did you mean '--adam_epsilon'?"),
        (["train", "--learning-rate", "fast"], 2, "invalid float value: 'fast'"),
        (["train", "--fusion", "none"], 2, "invalid choice: 'none'"),
        (["evaluate"], 2, "the following arguments are required: folder"),
        (["evaluate", "--help"], 0, "--split {train,validation,test}"),
        (["predict", "x", "--batch_size", "many"], 2, "invalid int value: 'many'"),
        (["push", "--help"], 0, "user/name"),
    ],
)
def test_nothing_heavy_is_imported_before_the_arguments_are_right(argv, code, said):
    """One process for each line, because this one has imported everything."""
    script = f"""
import json, sys
from hf_mmclf_cli import main
code = None
try:
    main({argv})
except SystemExit as end:
    code = end.code
print(json.dumps([code, [name for name in {HEAVY} if name in sys.modules]]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found, imported = json.loads(result.stdout.splitlines()[-1])
    assert imported == []
    assert str(found).startswith(code) if isinstance(code, str) else found == code
    assert said in result.stdout + result.stderr


@pytest.mark.parametrize("command, classes", [("train", CLASSES), ("predict", (PredictorArguments, DataArguments))])
def test_the_flags_are_those_of_the_dataclasses(command, classes):
    """Every spelling that the parser of the dataclasses accepts, and no other."""
    known = set(CommandParser(classes, prog="x")._option_string_actions)
    own = {name for action in UsageParser(command).own for name in action.option_strings}
    assert set(UsageParser(command)._option_string_actions) - own == known


@pytest.mark.parametrize("kind", SOURCES)
def test_every_annotation_of_our_own_is_understood(kind):
    for flag in flags_of(kind).values():
        assert flag.options != {"nargs": "*"} or flag.name in flags_of("TrainingArguments"), flag.name


@pytest.mark.parametrize(
    "annotation, options",
    [
        ("int | None", {"type": int}),
        ("float | int", {"type": float}),
        ("bool | None", {"nargs": "?"}),
        ("list[str] | None", {"nargs": "+"}),
        ("Literal['a', 'b'] | None", {"choices": ["a", "b"]}),
        ("str | None | Literal[False]", {"nargs": "*"}),
        ("dict[str, Any] | str | None", {"nargs": "*"}),
    ],
)
def test_what_cannot_be_judged_is_accepted(annotation, options):
    assert _options(annotation)[1] == options


@pytest.mark.parametrize(
    "flags", [["--fp16"], ["--no_ablations"], ["--save-total-limit", "3"], ["--lr_scheduler_kwargs", "{}"]]
)
def test_flags_of_training_arguments_pass(flags):
    UsageParser("train").check(flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_screen_and_hides_what_serves_training_alone(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = UsageParser(command).format_help()
    assert max(map(len, text.splitlines())) <= 100
    assert ("--validation_fraction" in text) == (command == "train")
    assert "--adam_beta1" not in text and "==SUPPRESS==" not in text
