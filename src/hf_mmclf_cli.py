"""The command `hf-mmclf`: it answers `--help`, `--version` and wrong arguments before anything heavy is imported.

This module is outside of the package `hf_mmclf`, whose import takes seconds because it imports torch and registers its
classes with transformers. It has the commands and their own arguments. The flags that commands take from dataclasses
are read from the source of these classes. The functions of the commands are in `hf_mmclf.cli`.
"""

import argparse
import ast
import difflib
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

COLUMN = 24  # where the texts of the help begin

# Flags of DataArguments that serve training alone; the help of the other commands leaves them out.
OF_TRAINING = ("validation_data", "test_data", "validation_fraction", "test_fraction", "split_seed")
OF_TRAINING += ("label_names_file", "streaming", "shuffle_buffer", "validation_rows")
FOLDER = dict(help="Output folder of a training run.")
OVERWRITE = dict(action="store_true", help="Let --output replace a file.")


class Command(NamedTuple):
    """
    A command.

    Args:
        description (`str`): The help; its first sentence is shown in the list of commands.
        arguments (`Mapping[str, dict]`): Its own arguments, as `add_argument` of argparse takes them.
        classes (`tuple[str, ...]`): Dataclasses whose fields are flags of the command, of `SOURCES`.
        epilog (`str`): The end of the help.
    """

    description: str
    arguments: Mapping[str, dict]
    classes: tuple[str, ...] = ("PredictorArguments", "DataArguments")
    epilog: str = ""


COMMANDS = {
    "train": Command(
        "Train a model. Without arguments it trains on the embedded data set.",
        {
            "--config": dict(metavar="FILE", help="YAML file with any of these arguments. Flags override it."),
            "--help_all": dict(action="store_true", help="Show all arguments and exit."),
        },
        ("ModelArguments", "DataArguments", "AugmentationArguments", "MMClfTrainingArguments"),
        "A preset's recipe and the machine replace some defaults; `hf-mmclf train --help --preset NAME` shows those "
        "that hold. All arguments of transformers.TrainingArguments are accepted too; --help_all lists them.",
    ),
    "evaluate": Command(
        "Print F1 and more of a model on labelled rows, at 0.5 and at its own thresholds. The rows are the test rows "
        "if the source has splits or training split it, else the validation rows, else all rows.",
        {
            "folder": FOLDER,
            "--output": dict(default="metrics.json", help="File for the figures (.json)."),
            "--overwrite": OVERWRITE,
            "--no_ablations": dict(
                action="store_true",
                help="Leave out the figures without texts, without images and with shuffled texts: three more passes.",
            ),
        },
    ),
    "compare": Command(
        "Compare F1 of two models on the same labelled rows, each at its own thresholds. Of the difference, the table "
        "shows a 95% interval by the paired bootstrap, the share of resamples in which B is not better, and a "
        "two-sided p value. The rows are those that evaluate takes for both models.",
        {
            "a": FOLDER,
            "b": FOLDER,
            "--output": dict(help="File for the figures and for all rows that only one model has right (.json)."),
            "--overwrite": OVERWRITE,
        },
    ),
    "predict": Command(
        "Predict labels for images and texts, at the model's own thresholds. The rows are all rows of a table, or the "
        "test rows if the source has splits.",
        {
            "folder": FOLDER,
            "--images": dict(nargs="+", help="Image files, in place of --data."),
            "--texts": dict(nargs="+", help="Texts: one for each image, or texts without images."),
            "--output": dict(
                help="File: .csv for ImageID,Labels as in the competition, .jsonl for labels and scores. Default: "
                "print them."
            ),
            "--overwrite": OVERWRITE,
        },
    ),
    "embed": Command(
        "Write the fused vector of each row, for search, duplicates and choosing rows to label. The rows are those of "
        "predict, in their order.",
        {
            "folder": FOLDER,
            "--output": dict(default="vectors.npy", help="File for the vectors, (rows, size) in float32 (.npy)."),
            "--overwrite": OVERWRITE,
        },
    ),
    "gallery": Command(
        "Write one HTML page with the figures of each label, its most confident mistakes with image and text, labels "
        "that look wrong, and confused labels. The page needs no network. The rows are those of evaluate.",
        {
            "folder": FOLDER,
            "--output": dict(default="gallery.html", help="File for the page (.html)."),
            "--overwrite": OVERWRITE,
        },
    ),
    "push": Command(
        "Upload a model to the Hub as one commit. After a broken connection, run the same command again to continue. "
        "The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
        {
            "folder": FOLDER,
            "repo_id": dict(metavar="user/name", help="Repository; it is created if it does not exist."),
            "--private": dict(action="store_true", help="Only you and your organisation see the repository."),
            "--public": dict(action="store_true", help="Everyone sees the repository."),
            "--revision": dict(help="Branch to push to (default: main)."),
            "--tag": dict(help="Name of the commit, to load it by."),
            "--message": dict(help="Message of the commit (default: Upload model)."),
        },
        (),
    ),
    "export": Command(
        "Write a model as one ONNX file, with a script that runs it without this package. The file holds everything "
        "that a prediction needs. It is compared with the model on the rows of --data, or else on rows of the "
        "embedded data set.",
        {
            "folder": FOLDER,
            "--onnx": dict(action="store_true", required=True, help="Write ONNX; there is no other format."),
            "--int8": dict(action="store_true", help="Write a quantized model too, and report what it costs."),
            "--output": dict(help="Folder to write to (default: FOLDER/onnx)."),
            "--overwrite": dict(action="store_true", help="Let it replace files in that folder."),
        },
    ),
    "presets": Command(
        "Print the systems that can be trained, with the poster's figures.",
        {"--markdown": dict(action="store_true", help="Print the whole table, in Markdown.")},
        (),
    ),
    "cache": Command(
        "Print the feature caches of training runs, the last used one at the end, or remove them.",
        {
            "--feature_cache_dir": dict(type=Path, help="Folder of the caches (default: beside those of the Hub)."),
            "--clear": dict(action="store_true", help="Remove the caches."),
        },
        (),
    ),
}

# Where the source of each class is, and its name there. Only some fields of the configuration are flags.
SOURCES = {
    "PredictorArguments": ("hf_mmclf", "cli.py", "PredictorArguments"),
    "DataArguments": ("hf_mmclf", "data/arguments.py", "DataArguments"),
    "AugmentationArguments": ("hf_mmclf", "data/augmentation.py", "AugmentationArguments"),
    "ModelArguments": ("hf_mmclf", "training/arguments.py", "ModelArguments"),
    "ArchitectureArguments": ("hf_mmclf", "model/configuration_mmclf.py", "MMClfConfig"),
    "MMClfTrainingArguments": ("hf_mmclf", "training/arguments.py", "MMClfTrainingArguments"),
    "TrainingArguments": ("transformers", "training_args.py", "TrainingArguments"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run one command. Wrong input ends it with an error message of one line.

    Args:
        argv (`Sequence[str]`, *optional*): The command and its arguments. Defaults to those of the process.

    Raises:
        `SystemExit`: after a help text or an error message.
    """
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: hf-mmclf COMMAND [arguments]\n\nImage and text multi-label classification.\n")
        for command, (description, *_) in COMMANDS.items():
            print(f"  {command:10} {description.partition('. ')[0].rstrip('.')}.")
        print("\n`hf-mmclf COMMAND --help` describes a command, `hf-mmclf --version` prints the version.")
    elif name == "--version":
        print(f"hf-mmclf {version('hf_mmclf')}")
    elif name not in COMMANDS:
        sys.exit(f"hf-mmclf: unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    else:
        # this help shows the defaults of a preset, so it needs the presets
        if name != "train" or not {"-h", "--help"} & set(argv) or len(argv) == 1:
            UsageParser(name).check(argv)
        from hf_mmclf.cli import run

        run(name, argv)


class UsageParser(argparse.ArgumentParser):
    """
    Parser that checks the arguments of a command, or shows its help. It does not import the command's dataclasses.

    Args:
        name (`str`): A key of `COMMANDS`.
    """

    def __init__(self, name: str):
        self.command = COMMANDS[name]
        super().__init__(f"hf-mmclf {name}", self.usage_of(name), self.command.description, allow_abbrev=False)
        self.own = [self.add_argument(*spellings(flag), **given) for flag, given in self.command.arguments.items()]
        inherited = [flag for kind in self.command.classes for flag in flags_of(kind).values()]
        for flag in inherited:
            self.add_argument(*spellings(f"--{flag.name}"), **flag.options)
            if flag.value == "[BOOL]" and re.match(r"(field\(default=)?True\b", flag.default):
                self.add_argument(*spellings(f"--no_{flag.name}"), action="store_true")
        self.known = [name for action in self.own for name in action.option_strings]
        self.known += [f"--{flag.name}" for flag in inherited]

    @staticmethod
    def usage_of(name: str) -> str | None:
        """Return the usage of a command with many flags, in which they are not listed."""
        command = COMMANDS[name]
        folders = [argument.upper() for argument in command.arguments if not argument.startswith("-")]
        named = folders or ["[--config FILE]"]
        return f"%(prog)s {' '.join(named)} [--argument value ...]" if command.classes else None

    def check(self, argv: Sequence[str]) -> None:
        """End the program with a message if an argument is wrong."""
        check_unknown(self, self.parse_known_args(argv)[1], self.known)

    def format_help(self) -> str:
        """Return the help: usage, description, own arguments, then one group for each dataclass."""
        lines = [self.format_usage(), fill(self.description), "", "arguments:"]
        lines += [argument_entry(action) for action in self.own]
        hidden = () if "AugmentationArguments" in self.command.classes else OF_TRAINING
        for kind in self.command.classes:
            group, docstrings = class_help(kind)
            summary, texts = documentation(docstrings)
            lines += ["", f"{group}:", fill(summary, 2), ""]
            flags, own_first = flags_of(kind), documentation(docstrings[-1:])[1] | texts
            for name in [name for name in own_first if name in flags and name not in hidden]:
                # options of the architecture have the preset's value
                default = None if name in flags_of("ArchitectureArguments") else texts[name].default
                lines.append(entry(f"--{name} {flags[name].value}", texts[name].text, default))
        return "\n".join([*lines, "", fill(self.command.epilog), ""])


class Flag(NamedTuple):
    """A field of a dataclass as a flag: its name, its default as source, what its value is called, and its options."""

    name: str
    default: str
    value: str
    options: dict[str, Any]


@cache
def flags_of(kind: str) -> dict[str, Flag]:
    """Read the flags of a dataclass of `SOURCES` and of its bases, by name."""
    flags = {}
    for base in map(ast.unparse, _source(kind).bases):
        flags |= flags_of(base) if base in SOURCES else {}
    for node in _source(kind).body:
        if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
            name, default = ast.unparse(node.target), ast.unparse(node.value) if node.value else ""
            if kind != "ArchitectureArguments" or default.startswith("option("):
                flags[name] = Flag(name, default, *_options(ast.unparse(node.annotation)))
    return flags


def _options(annotation: str) -> tuple[str, dict[str, Any]]:
    """Return what the value of a field is called, and the options of its argument. What is in doubt is accepted."""
    kind = annotation.removesuffix(" | None")
    if kind.startswith("Literal[") and kind.endswith("]"):
        choices = ast.literal_eval(f"[{kind[8:-1]}]")
        return f"{{{','.join(choices)}}}", {"choices": choices}
    if kind.startswith("list[") and kind.endswith("]"):
        return "VALUE ...", {"nargs": "+"}
    simple = {"int": ("N", {"type": int}), "float": ("X", {"type": float}), "str": ("VALUE", {})}
    simple |= {"float | int": simple["float"], "bool": ("[BOOL]", {"nargs": "?"})}
    return simple.get(kind, ("VALUE", {"nargs": "*"}))


def class_help(kind: str) -> tuple[str, list[str]]:
    """Read the title of a dataclass in the help, and the docstrings of its bases in this package and its own."""
    node = _source(kind)
    bases = [base for base in map(ast.unparse, node.bases) if SOURCES.get(base, ("",))[0] == "hf_mmclf"]
    titles = [child.value for child in node.body if isinstance(child, ast.Assign)]
    docstrings = [ast.get_docstring(_source(base)) or "" for base in bases]
    title = ast.literal_eval(titles[0]) if titles else "more arguments"
    return title, [*docstrings, ast.get_docstring(node) or ""]


@cache
def _source(kind: str) -> ast.ClassDef:
    package, file, name = SOURCES[kind]
    text = (Path(find_spec(package).origin).parent / file).read_text(encoding="utf-8")
    return next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == name)


# Shared with the parser that builds the dataclasses (`hf_mmclf.training.parser`)


class Documented(NamedTuple):
    """What a docstring says of a field: its text, and its default where it has one."""

    text: str
    default: str | None


def documentation(docstrings: Iterable[str]) -> tuple[str, dict[str, Documented]]:
    """Read docstrings of a class and its bases, its own last: its summary, and what they say of each field."""
    summary, fields = "", {}
    for docstring in docstrings:
        text = re.sub(r"\[`|`\]|`", "", inspect.cleandoc(docstring))
        before, _, section = text.partition("\nArgs:\n")
        summary = " ".join(before.partition("\n\n")[0].split())
        section = re.split(r"\n(?=\S)", section)[0]  # the lines before the next section
        for lines in re.split(r"^ {4}(?=\S)", section, flags=re.MULTILINE)[1:]:
            head, _, words = " ".join(lines.split()).partition("): ")
            names, _, kind = head.partition(" (")
            default = kind.partition("defaults to ")[2].strip('"')
            found = Documented(words, None if default in ("", "False") else default)
            fields |= dict.fromkeys(names.split(", "), found)
    return summary, fields


def argument_entry(action: argparse.Action, default: Any = None) -> str:
    """Format an argument of a command; `default` replaces that of the action."""
    names = ", ".join(name for name in action.option_strings if "-" not in name.lstrip("-"))
    value = action.metavar or "VALUE" if action.option_strings and action.nargs != 0 else ""
    default = action.default if default is None else default
    return entry(f"{names or action.metavar or action.dest} {value}", action.help, default)


def entry(head: str, text: str | None, default: Any = None) -> str:
    """Format one line of the help, or more: a flag and its value, its text and its default."""
    shown = f" (default: {default})" if default not in (None, argparse.SUPPRESS) and default is not False else ""
    head, body = f"  {head.strip()}", fill(f"{text or ''}{shown}", COLUMN)
    return f"{head:{COLUMN}}{body[COLUMN:]}" if len(head) < COLUMN - 1 else f"{head}\n{body}"


def fill(text: str | None, indent: int = 0) -> str:
    """Break a text into lines that fit the terminal."""
    width = shutil.get_terminal_size().columns - 2
    options = dict(initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False)
    return textwrap.fill(text or "", width, **options)


def check_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str], known: Collection[str]) -> None:
    """End the program with the nearest flag if an argument is unknown."""
    if unknown:
        flag = unknown[0].partition("=")[0]
        parser.error(f"unknown argument {flag!r}{did_you_mean(flag, known) or '; --help lists them'}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the known name nearest to `name`, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def spellings(flag: str) -> list[str]:
    """Return a flag with underscores, then with hyphens; an argument without hyphens before it stays as it is."""
    return list(dict.fromkeys([flag, f"--{flag[2:].replace('_', '-')}"])) if flag.startswith("--") else [flag]
