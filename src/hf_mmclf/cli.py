"""The command `hf-mmclf`: train, evaluate, compare, predict, push, export, presets, cache."""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import StrictDataclassError

if TYPE_CHECKING:
    from datasets import Dataset

    from .data.prepare import DataArguments

USAGE = """usage: hf-mmclf COMMAND [arguments]

Several labels for every picture with a caption.

  train      train a model                      hf-mmclf train --data table.csv --image_dir pictures
  evaluate   F1 and more on labelled rows       hf-mmclf evaluate FOLDER --data table.csv
  compare    which of two models is better      hf-mmclf compare A B --data table.csv
  predict    labels for pictures and captions   hf-mmclf predict FOLDER --images a.jpg --texts "a dog"
  push       a finished model to the Hub        hf-mmclf push FOLDER user/name
  export     a finished model as ONNX           hf-mmclf export FOLDER --onnx
  presets    the systems that can be trained    hf-mmclf presets
  cache      features kept from training runs   hf-mmclf cache --clear

`hf-mmclf COMMAND --help` tells all about one of them, `hf-mmclf --version` which version this is.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; errors in what a person gave are one line, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "evaluate": _evaluate, "compare": _compare, "predict": _predict, "push": _push}
    commands |= {"export": _export, "presets": _presets, "cache": _cache}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] == "--version":
        print(f"hf-mmclf {version('hf_mmclf')}")
        return
    if argv[0] not in commands:
        sys.exit(f"hf-mmclf: unknown command {argv[0]!r}; expected one of {', '.join(commands)}")
    try:
        commands[argv[0]](argv[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        # what a worker process raises has its traceback in the message, and a configuration the name of its check
        message = re.sub(r"^(Caught|Class validation) .*\n\s*\w*Error: ", "", str(error), flags=re.DOTALL)
        sys.exit(f"hf-mmclf {argv[0]}: error: {' '.join(message.split())}")


def _train(argv: Sequence[str]) -> None:
    from . import parse_arguments, train

    train(*parse_arguments(argv, prog="hf-mmclf train"))


@dataclasses.dataclass
class FinishedArguments:
    """What `evaluate`, `compare`, `predict` and `export` share."""

    split: Literal["train", "validation", "test"] | None = dataclasses.field(
        default=None, metadata={"help": "Which rows: those of the source's split, or of training's if it has none."}
    )
    batch_size: int = dataclasses.field(default=64, metadata={"help": "Rows in one forward pass of one process."})


def _parse_finished(
    command: str,
    description: str,
    argv: Sequence[str],
    add: Callable[[argparse.ArgumentParser], None],
    folders: Sequence[str] = ("folder",),
) -> tuple[FinishedArguments, Any, argparse.Namespace]:
    from transformers import HfArgumentParser

    from . import DataArguments
    from .training.arguments import reject_unknown, shorten_help

    parser = HfArgumentParser(
        (FinishedArguments, DataArguments),
        prog=f"hf-mmclf {command}",
        usage=f"%(prog)s {' '.join(map(str.upper, folders))} [--argument value ...]",
        description=description,
        allow_abbrev=False,
    )
    for name in folders:
        parser.add_argument(name, help="Output folder of a training run.")
    add(parser)
    of_training = ("validation_data", "test_data", "validation_fraction", "test_fraction", "split_seed")
    shorten_help(parser, (*of_training, "label_names_file"))
    *parsed, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    reject_unknown(parser, rest)
    return tuple(parsed)


def _evaluate(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", default="metrics.json", help="File for the figures.")
        parser.add_argument(
            "--no_ablations",
            action="store_true",
            help="Leave out what is left without captions, without pictures, and with captions of other rows: three "
            "more passes over the rows.",
        )

    about = (
        "F1 and more of a finished model on labelled rows, at 0.5 and at the model's own thresholds: on the test rows "
        "if the source has splits or training split it, else on validation rows, else on all."
    )
    options, data, own = _parse_finished("evaluate", about, argv, add)
    from .evaluation.report import report_text
    from .inference.predictions import atomic_file, check_suffix
    from .inference.predictor import Predictor

    check_suffix(own.output, (".json",))
    if Path(own.output).resolve() == Path(own.folder, "metrics.json").resolve():
        raise FileExistsError(f"{own.output} holds the figures of the training run; give another --output")
    finished = Predictor.load(own.folder)
    prepared = finished.prepare(data)
    _print_bad_images(prepared.bad_images, data)
    name, rows = finished.choose_split(prepared, options.split, held_out=True)
    figures = finished.evaluate(rows, prepared.folder, options.batch_size, not own.no_ablations)
    if not _is_main_process():
        return
    print(report_text({name: figures}))
    with atomic_file(own.output) as file:
        json.dump({name: figures}, file, indent=2, ensure_ascii=False)
    print(f"\nAll figures: {own.output}")


def _compare(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", help="File for the figures and for all rows that only one has right (.json).")

    about = (
        "F1 of two finished models on the same labelled rows, each at its own thresholds; of the difference a 95% "
        "interval by the paired bootstrap, the share of resamples in which B is not better, and a two-sided p value. "
        "The rows are those that evaluate takes for both."
    )
    options, data, own = _parse_finished("compare", about, argv, add, ("a", "b"))
    from . import Predictor, compare
    from .inference.comparison import comparison_text
    from .inference.predictions import atomic_file, check_suffix

    if own.output:
        check_suffix(own.output, (".json",))
    models = [Predictor.load(folder) for folder in (own.a, own.b)]
    comparison = compare(*models, data, options.split, options.batch_size)
    _print_bad_images(comparison["bad_images"], data)
    if not _is_main_process():
        return
    print(comparison_text(comparison))
    if own.output:
        with atomic_file(own.output) as file:
            json.dump(comparison, file, indent=2, ensure_ascii=False)
        print(f"\nAll figures and rows: {own.output}")


def _predict(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", nargs="+", help="Picture files, instead of --data.")
        parser.add_argument("--texts", nargs="+", help="Captions, one for each picture, or on their own.")
        parser.add_argument(
            "--output", help=".csv: ImageID,Labels as in the competition; .jsonl: with scores. Default: to the screen."
        )

    about = (
        "Labels for pictures and captions, by the model's own thresholds: of all rows of a table, of the test rows if "
        "the source has splits."
    )
    options, data, own = _parse_finished("predict", about, argv, add)
    from .inference.predictions import PREDICTION_SUFFIXES, check_suffix, prediction_lines, write_predictions
    from .inference.predictor import Predictor

    given = own.images or own.texts
    if bool(given) == bool(data.data):
        raise ValueError("expected either --data (a table) or --images and --texts")
    if own.output:
        check_suffix(own.output, PREDICTION_SUFFIXES)
    sources = {"train": _rows_of(own.images, own.texts, Path(data.image_dir or "."))} if given else None
    finished = Predictor.load(own.folder)
    prepared = finished.prepare(data, with_labels=False, sources=sources)
    _print_bad_images(prepared.bad_images, data)
    name, rows = finished.choose_split(prepared, options.split)
    scores = finished.scores(rows, prepared.folder, options.batch_size)
    if not _is_main_process():
        return
    if own.output:
        write_predictions(own.output, rows, scores, finished.model.config)
        print(f"{len(rows):,} rows of {name}: {own.output}")
    else:
        print("\n".join(prediction_lines(rows, scores, finished.model.config)))


def _push(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-mmclf push",
        description="Puts a finished model on the Hub, as one commit. After a dropped connection the same command "
        "goes on. The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="Output folder of a training run.")
    parser.add_argument("repo_id", metavar="user/name", help="Repository; it is made if it is not there.")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_const", const=True, help="Only you and your organisation see it.")
    seen.add_argument("--public", action="store_const", const=False, dest="private", help="All see it.")
    parser.add_argument("--revision", help="Branch to push to (default: main).")
    parser.add_argument("--tag", help="A name for this commit, to load it by.")
    parser.add_argument("--message", help="What the commit is about (default: Upload model).")
    from . import push_to_hub

    push_to_hub(**vars(parser.parse_args(argv)))


def _export(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--onnx", action="store_true", required=True, help="The form to export to.")
        parser.add_argument("--int8", action="store_true", help="Also quantised, with a report of what it costs.")
        parser.add_argument("--output", help="Folder to write to (default: FOLDER/onnx).")

    about = (
        "A finished model as one ONNX file that holds all a prediction takes, and a script that runs it with "
        "onnxruntime, numpy and Pillow alone. It is compared with the model on the rows of --data, else on rows of "
        "the embedded data set."
    )
    options, data, own = _parse_finished("export", about, argv, add)
    from . import Predictor, export_onnx

    finished = Predictor.load(own.folder)
    rows, folder = None, None
    if data.data:
        prepared = finished.prepare(data)
        _print_bad_images(prepared.bad_images, data)
        (_, rows), folder = finished.choose_split(prepared, options.split, held_out=True), prepared.folder
    export_onnx(finished, own.output, own.int8, rows, folder)
    print(f"\nOutput folder: {own.output or Path(own.folder, 'onnx')}")


def _is_main_process() -> bool:
    """Whether this process speaks and writes; `accelerate launch` starts several, and all have all the scores."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available()).is_main_process


def _print_bad_images(bad_images: Sequence[tuple[str, str]], args: "DataArguments") -> None:
    if not _is_main_process():
        return
    for where, reason in bad_images:
        fate = "left out" if args.bad_images == "skip" else "taken as absent"
        print(f"Picture {fate}: {where}: {reason}", file=sys.stderr)


def _rows_of(images: list[str] | None, texts: list[str] | None, folder: Path) -> "Dataset":
    from datasets import Dataset

    if images and texts and len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures, but {len(texts)} captions; expected one caption for each picture")
    missing = [image for image in images or [] if not (folder / image).is_file()]
    if missing:
        raise FileNotFoundError(f"no such picture: {', '.join(missing)}")
    count = len(images or texts)
    where = [f"row {row}" for row in range(1, count + 1)]
    return Dataset.from_dict({"image": images or [None] * count, "text": texts or [None] * count, "where": where})


def _presets(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-mmclf presets",
        description="Print the presets as a table. Parameters, MB, threshold, F1 and epochs are those of the poster.",
        allow_abbrev=False,
    )
    parser.add_argument("--markdown", action="store_true", help="Print Markdown, as in the README.")
    own = parser.parse_args(argv)
    from .presets import presets_table

    print(presets_table(own.markdown))


def _cache(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-mmclf cache",
        description="The feature caches that `hf-mmclf train --cache_features` has filled, that used last at the end.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--feature_cache_dir", type=Path, help="Folder of the caches (default: beside those of the Hub)."
    )
    parser.add_argument("--clear", action="store_true", help="Remove them.")
    own = parser.parse_args(argv)
    import shutil
    import time

    from .evaluation.report import format_table
    from .training.feature_cache import cache_entries, default_folder, folder_size, in_words

    place = own.feature_cache_dir or default_folder()
    entries = cache_entries(place)
    if not entries:
        print(f"No feature cache in {place}")
        return
    rows, total = [], 0
    for folder, about in entries:
        total += (size := folder_size(folder))
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "about.json").stat().st_mtime))
        row = {
            "cache": folder.name,
            "image backbone": about["image_backbone"],
            "text backbone": about["text_backbone"],
        }
        rows.append(row | {"size": in_words(size), "last used": used})
    print(format_table(rows))
    if own.clear:
        for folder, _ in entries:
            shutil.rmtree(folder)
    print(f"\n{in_words(total)} {'removed from' if own.clear else 'in'} {place}")


if __name__ == "__main__":
    main()
