"""Command lines built from dataclasses, and the arguments of a training run from flags and a YAML file.

A flag is documented once: in the `Args` section of its dataclass's docstring, from which the help is written.
"""

import argparse
import dataclasses
import json
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from hf_mmclf_cli import Documented, argument_entry, check_unknown, did_you_mean, documentation, entry, fill

from ..data.arguments import DataArguments, refuse_idle
from ..data.augmentation import AugmentationArguments
from ..inference.predictor import machine_defaults
from ..presets import PRESETS, get_preset
from .arguments import Arguments, MMClfTrainingArguments, ModelArguments
from .inputs import check_arguments

logger = logging.get_logger(__name__)

CLASSES = (ModelArguments, DataArguments, AugmentationArguments, MMClfTrainingArguments)


class CommandParser(HfArgumentParser):
    """
    Parser of one command, with a short help and errors that name the nearest flag.

    Args:
        dataclass_types (`Sequence[type]`, *optional*):
            Dataclasses whose fields are flags. The help shows each class as a group: its `_argument_group_name`, the
            summary of its docstring, and the text of each field from the docstring's `Args`.
        hidden (`Collection[str]`, *optional*):
            Fields that the help leaves out. Their flags work nevertheless.
        options (`Any`):
            Arguments of `argparse.ArgumentParser`, such as `prog`, `usage`, `description` and `epilog`.
    """

    def __init__(self, dataclass_types: Sequence[type] = (), hidden: Collection[str] = (), **options: Any):
        self.hidden, self.added = hidden, []
        super().__init__(dataclass_types, allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an argument that is no field of a dataclass; `parse` returns its value in the namespace."""
        self.added.append(super().add_argument(*names, **options))
        return self.added[-1]

    def fields(self) -> dict[str, dataclasses.Field]:
        """Return the fields of all dataclasses by name."""
        return {field.name: field for kind in self.dataclass_types for field in _fields(kind)}

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """
        Parse flags. A wrong flag or value ends the program with a message.

        Args:
            argv (`Sequence[str]`, *optional*): The flags. Defaults to those of the process.

        Returns:
            `tuple`: One instance of each dataclass, then a namespace with the arguments of `add_argument`.
        """
        namespace, unknown = self.parse_known_args(argv)
        known = [f"--{name}" for name in self.fields()]
        check_unknown(self, unknown, known + [name for action in self.added for name in action.option_strings])
        values, parsed = vars(namespace), []
        try:
            for kind in self.dataclass_types:
                parsed.append(kind(**{field.name: values.pop(field.name) for field in _fields(kind)}))
        except ValueError as error:
            self.error(" ".join(str(error).split()))
        return (*parsed, namespace)

    def format_help(self) -> str:
        """Return the help: usage, description, added arguments, then one group for each dataclass."""
        fields = self.fields()
        lines = [self.format_usage(), fill(self.description), "", "arguments:"]
        lines += [
            argument_entry(action, self.get_default(action.dest)) for action in self.added if action.dest not in fields
        ]
        for kind in self.dataclass_types:
            summary, documented = _documentation(kind)
            lines += ["", f"{getattr(kind, '_argument_group_name', 'more arguments')}:", fill(summary, 2), ""]
            for field in sorted(_fields(kind), key=lambda field: field.kw_only):  # inherited architecture last
                if field.name not in self.hidden:
                    text = documented[field.name].text if field.name in documented else field.metadata.get("help")
                    default = self.get_default(field.name)
                    default = getattr(default, "value", default)  # of an enumeration
                    lines.append(entry(f"--{field.name} {_value(field)}", text, default))
        return "\n".join([*lines, "", fill(self.epilog), ""])


def _fields(kind: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _value(field: dataclasses.Field) -> str:
    """Return what the help shows for the value of a flag."""
    if typing.get_origin(field.type) is typing.Literal:
        return f"{{{','.join(typing.get_args(field.type))}}}"
    if typing.get_origin(field.type) is list:
        return "VALUE ..."
    return {int: "N", float: "X", bool: "[BOOL]", bool | None: "[BOOL]"}.get(field.type, "VALUE")


def _documentation(kind: type) -> tuple[str, dict[str, Documented]]:
    return documentation(base.__doc__ or "" for base in reversed(kind.__mro__))


def parse_arguments(argv: Sequence[str] | None = None, prog: str | None = None) -> Arguments:
    """
    Parse the arguments of a training run.

    Four sources give values, and each overrides the ones before it: the defaults of the classes, the preset's recipe,
    the YAML file (`--config`), and the flags.

    Args:
        argv (`Sequence[str]`, *optional*): The flags. Defaults to those of the process.
        prog (`str`, *optional*): Name of the program in its help.

    Returns:
        `tuple`: [`ModelArguments`], [`DataArguments`], [`AugmentationArguments`] and [`MMClfTrainingArguments`].

    Raises:
        `SystemExit`: If a flag or a value does not exist, after a message that names the valid ones.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    parser = CommandParser(
        CLASSES,
        hidden=inherited - set(_documentation(MMClfTrainingArguments)[1]),
        prog=prog,
        usage="%(prog)s [--config FILE] [--argument value ...]",
        description="Train a multi-label classifier. Without arguments it trains on the embedded data set.",
        epilog="All arguments of transformers.TrainingArguments are accepted too; --help_all lists them.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these arguments. Flags override it.")
    parser.add_argument("--help_all", "--help-all", action="store_true", help="Show all arguments and exit.")
    # The defaults depend on these arguments, so they are read first.
    first = argparse.ArgumentParser(prog=prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "data", "init_from"):
        first.add_argument(f"--{name}")
    first.add_argument("--streaming", nargs="?", const=True, type=string_to_bool)
    first.add_argument("--help_all", "--help-all", action="store_true")
    try:
        config = first.parse_known_args(argv)[0].config
        values = _read_yaml(config, parser.fields()) if config else {}
        argv = [*_as_flags(values, parser.fields()), *argv]
        early, _ = first.parse_known_args(argv)
        preset, recipe = _recipe(early.preset, early.data, early.init_from)
        defaults = {**machine_defaults(), **recipe, "preset": preset}
        if early.streaming:
            defaults |= dict(eval_strategy="steps", save_strategy="steps", eval_steps=0.1, save_steps=0.1)
        parser.set_defaults(**defaults | {name: None for name, value in values.items() if value is None})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if early.help_all:
        parser.hidden = ()
        parser.print_help()
        parser.exit()
    *arguments, _ = parser.parse(argv)
    try:
        check_arguments(arguments[-1])
        given = {flag[2:].split("=")[0].replace("-", "_") for flag in argv if flag.startswith("--")}
        _check_steps(arguments[-1], given)
    except ValueError as error:
        parser.error(str(error))
    return tuple(arguments)


def _check_steps(args: MMClfTrainingArguments, given: set[str]) -> None:
    """Refuse numbers of steps that are given beside a strategy that does not count steps."""
    evaluates, saves = args.eval_strategy == "steps", args.save_strategy == "steps"
    rules = [
        (evaluates, ["eval_steps"], f"--eval_strategy is {args.eval_strategy.value}"),
        (saves or (evaluates and "eval_steps" not in given), ["save_steps"], "no strategy reads it"),
        (args.logging_strategy == "steps", ["logging_steps"], f"--logging_strategy is {args.logging_strategy.value}"),
    ]
    refuse_idle(given, rules)


def _recipe(preset: str | None, data: str | None, init_from: str | None) -> tuple[str, dict[str, Any]]:
    """Return a preset and its recipe: for a run that starts from a finished model, those of that model."""
    if init_from is None:
        preset = preset or ("warmerdbert" if data else "demo")
        return preset, dict(get_preset(preset).recipe)
    if preset is not None:
        raise ValueError("--init_from brings the preset of the finished model; leave out --preset")
    record = Path(init_from, "training.json")
    preset = json.loads(record.read_text(encoding="utf-8")).get("preset") if record.is_file() else None
    preset = preset if preset in PRESETS else "warmerdbert"
    logger.info(f"Recipe: that of the preset {preset}")
    own = {field.name for field in dataclasses.fields(ModelArguments)}
    return preset, {name: value for name, value in get_preset(preset).recipe.items() if name not in own}


def _read_yaml(path: str, known: Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected lines such as 'learning_rate: 1e-4', got {type(values).__name__}")
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown argument {name!r}{did_you_mean(str(name), known)}")
    return values


def _as_flags(values: Mapping[str, Any], known: Mapping[str, dataclasses.Field]) -> list[str]:
    """Return the values of a file as flags, which are converted and checked alike. `None` has no flag."""
    flags = []
    for name, value in values.items():
        if isinstance(value, list) and typing.get_origin(known[name].type) is list:
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, str | int | float):  # including bool
            flags.append(f"--{name}={value}")
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value)}")
    return flags
