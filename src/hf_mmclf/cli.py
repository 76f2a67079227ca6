"""The command `hf-mmclf`: train, evaluate, predict, presets."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USAGE = """usage: hf-mmclf COMMAND [arguments]

Several labels for every picture with a caption.

  train      train a model                      hf-mmclf train --data table.csv --image_dir pictures
  evaluate   F1 and more on labelled rows       hf-mmclf evaluate FOLDER --data table.csv
  predict    labels for pictures and captions   hf-mmclf predict FOLDER --images a.jpg --texts "a dog"
  presets    the systems that can be trained    hf-mmclf presets

`hf-mmclf COMMAND --help` tells all about one of them.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; errors in what a person gave are one line, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "evaluate": _evaluate, "predict": _predict, "presets": _presets}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] not in commands:
        sys.exit(f"hf-mmclf: unknown command {argv[0]!r}; expected one of {', '.join(commands)}")
    try:
        commands[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        sys.exit(f"hf-mmclf {argv[0]}: error: {error}")


def _train(argv: Sequence[str]) -> None:
    from . import parse_arguments, train

    train(*parse_arguments(argv, prog="hf-mmclf train"))


@dataclasses.dataclass
class FinishedArguments:
    """What `evaluate` and `predict` share."""

    split: str | None = dataclasses.field(
        default=None,
        metadata={"help": "train, validation or test: of the source, or as training split it. Default: test, if any."},
    )
    batch_size: int = dataclasses.field(default=64, metadata={"help": "Rows in one forward pass."})


def _parse_finished(
    command: str, description: str, argv: Sequence[str], add: Callable[[argparse.ArgumentParser], None]
) -> tuple[FinishedArguments, Any, argparse.Namespace]:
    from transformers import HfArgumentParser

    from . import DataArguments
    from .arguments import shorten_help

    parser = HfArgumentParser(
        (FinishedArguments, DataArguments),
        prog=f"hf-mmclf {command}",
        usage="%(prog)s FOLDER [--argument value ...]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="Output folder of a training run.")
    add(parser)
    of_training = ("validation_data", "test_data", "validation_fraction", "test_fraction", "split_seed")
    shorten_help(parser, (*of_training, "label_names_file"))
    *parsed, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if rest:
        near = difflib.get_close_matches(rest[0], [o for a in parser._actions for o in a.option_strings], n=1)
        parser.error(f"unknown argument {rest[0]!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    return tuple(parsed)


def _evaluate(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", default="metrics.json", help="Where the figures go (default: %(default)s).")

    about = "F1 and more of a finished model on labelled rows, at 0.5 and at the model's own thresholds."
    options, data, own = _parse_finished("evaluate", about, argv, add)
    from .evaluation import report_table
    from .finished import FinishedModel

    finished = FinishedModel.load(own.folder)
    prepared = finished.prepare(data)
    name, rows = finished.choose_split(prepared, options.split)
    figures = finished.evaluate(rows, prepared.folder, options.batch_size)
    print(report_table({name: figures}))
    path = Path(own.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: figures}, indent=2, ensure_ascii=False), encoding="utf-8")
    print(f"\nAll figures: {path}")


def _predict(argv: Sequence[str]) -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", nargs="+", help="Picture files, instead of --data.")
        parser.add_argument("--texts", nargs="+", help="Captions, one for each picture, or on their own.")
        parser.add_argument(
            "--output", help=".csv: ImageID,Labels as in the competition; .jsonl: with scores. Default: to the screen."
        )

    about = "Labels for pictures and captions, by the model's own thresholds."
    options, data, own = _parse_finished("predict", about, argv, add)
    from .evaluation import PREDICTION_SUFFIXES, prediction_lines, write_predictions
    from .finished import FinishedModel

    given = own.images or own.texts
    if bool(given) == bool(data.data):
        raise ValueError("expected either --data (a table) or --images and --texts")
    if own.output and Path(own.output).suffix not in PREDICTION_SUFFIXES:
        raise ValueError(f"--output {own.output}: expected a name that ends in {' or '.join(PREDICTION_SUFFIXES)}")
    finished = FinishedModel.load(own.folder)
    sources = {"train": _rows_of(own.images, own.texts)} if given else None
    prepared = finished.prepare(data, with_labels=False, sources=sources)
    name, rows = finished.choose_split(prepared, options.split)
    scores = finished.scores(rows, prepared.folder, options.batch_size)
    for where, reason in prepared.bad_images:
        print(f"Picture {'left out' if data.bad_images == 'skip' else 'taken as absent'}: {where}: {reason}")
    if own.output:
        write_predictions(own.output, rows, scores, finished.model.config)
        print(f"{len(rows):,} rows of {name}: {own.output}")
    else:
        print("\n".join(prediction_lines(rows, scores, finished.model.config)))


def _rows_of(images: list[str] | None, texts: list[str] | None):
    from datasets import Dataset

    if images and texts and len(images) != len(texts):
        raise ValueError(f"{len(images)} pictures, but {len(texts)} captions; expected one caption for each picture")
    count = len(images or texts)
    where = [f"row {row}" for row in range(1, count + 1)]
    return Dataset.from_dict({"image": images or [None] * count, "text": texts or [None] * count, "where": where})


def _presets(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="hf-mmclf presets", description="The systems as a table; F1, threshold and MB are the poster's."
    )
    parser.parse_args(argv)
    print(presets_table())


def presets_table() -> str:
    """The presets as plain text: architecture and, for the poster's eighteen, what it reports of them."""
    from .metrics import metrics_table
    from .presets import PRESETS, Poster, config_from_preset

    rows = []
    for name, preset in PRESETS.items():
        config, poster = config_from_preset(name), preset.poster
        both = config.has_image and config.has_text
        unfrozen = (config.unfrozen_image_stages, config.unfrozen_text_layers)
        row = {
            "preset": name,
            "image backbone": (config.image_backbone or "-").removesuffix(".tv_in1k"),
            "text backbone": (config.text_backbone or "own").split("/")[-1] if config.has_text else "-",
            "fusion": config.fusion + (" + norm" if config.fusion_norm else "") if both else "-",
            "unfrozen": "all" if unfrozen == (None, None) else "{} / {}".format(*unfrozen),
            "width": config.width if both else None,
        }
        for field in dataclasses.fields(Poster):
            row[field.name.replace("_", " ")] = getattr(poster, field.name) if poster else None
        rows.append(row)
    return metrics_table(rows)


if __name__ == "__main__":
    main()
