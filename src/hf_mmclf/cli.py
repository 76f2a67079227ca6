"""The command `hf-mmclf`: one function a command, thin over the package's public names."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Flags of DataArguments that serve training alone; the help of the other commands leaves them out.
OF_TRAINING = ("validation_data", "test_data", "validation_fraction", "test_fraction", "split_seed")
OF_TRAINING += ("label_names_file", "streaming", "shuffle_buffer", "validation_rows")
FOLDER = dict(help="Output folder of a training run.")


@dataclasses.dataclass
class PredictorArguments:
    """
    Which rows are used, and how many at once.

    Args:
        split (`str`, *optional*):
            Split of the source or, if it has none, of the training run. Default: the last one there is.
        batch_size (`int`, *optional*, defaults to 64): Rows in one forward pass of one process.
    """

    _argument_group_name = "rows"

    split: Literal["train", "validation", "test"] | None = None
    batch_size: int = 64


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run one command. Wrong input ends it with an error message of one line.

    Args:
        argv (`Sequence[str]`, *optional*): The command and its arguments. Defaults to those of the process.

    Raises:
        `SystemExit`: after a help text or an error message.
    """
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    functions = (_train, _evaluate, _compare, _predict, _push, _export, _presets, _cache)
    commands = {function.__name__[1:]: function for function in functions}
    if name in ("-h", "--help"):
        print("usage: hf-mmclf COMMAND [arguments]\n\nImage and text multi-label classification.\n")
        for command, function in commands.items():
            print(f"  {command:10} {inspect.getdoc(function).splitlines()[0]}")
        print("\n`hf-mmclf COMMAND --help` describes a command, `hf-mmclf --version` prints the version.")
    elif name == "--version":
        print(f"hf-mmclf {version('hf_mmclf')}")
    elif name not in commands:
        sys.exit(f"hf-mmclf: unknown command {name!r}; expected one of {', '.join(commands)}")
    else:
        try:
            commands[name](argv)
        except (ValueError, OSError, ImportError, StrictDataclassError) as error:
            # An error of a worker process contains its traceback, an error of a configuration the name of the check.
            message = re.sub(r"^(Caught|Class validation) .*\n\s*\w*Error: ", "", str(error), flags=re.DOTALL)
            sys.exit(f"hf-mmclf {name}: error: {' '.join(message.split())}")


def _parse(function: Callable, argv: Sequence[str], arguments: Mapping[str, dict], reads_rows: bool = True) -> tuple:
    """Parse `arguments` of the command that `function` runs and, if it reads rows, those of two dataclasses."""
    from . import DataArguments
    from .training.parser import CommandParser

    parser = CommandParser(
        (PredictorArguments, DataArguments) if reads_rows else (),
        hidden=OF_TRAINING,
        prog=f"hf-mmclf {function.__name__[1:]}",
        description=inspect.getdoc(function),
    )
    for name, options in arguments.items():
        parser.add_argument(name, **options)
    if reads_rows:
        folders = [name.upper() for name in arguments if not name.startswith("-")]
        parser.usage = f"%(prog)s {' '.join(folders)} [--argument value ...]"
    return parser.parse(argv)


def _train(argv: Sequence[str]) -> None:
    """Train a model."""
    from . import parse_arguments, train

    train(*parse_arguments(argv, prog="hf-mmclf train"))


def _evaluate(argv: Sequence[str]) -> None:
    """Print F1 and more of a model on labelled rows, at 0.5 and at its own thresholds.

    The rows are the test rows if the source has splits or training split it, else the validation rows, else all rows.
    """
    no_ablations = "Leave out the figures without texts, without images and with shuffled texts: three more passes."
    arguments = {
        "folder": FOLDER,
        "--output": dict(default="metrics.json", help="File for the figures (.json)."),
        "--no_ablations": dict(action="store_true", help=no_ablations),
    }
    options, data, own = _parse(_evaluate, argv, arguments)
    from . import Predictor
    from .evaluation.report import report_text
    from .inference.predictions import check_suffix, write_json

    check_suffix(own.output, (".json",))
    if Path(own.output).resolve() == Path(own.folder, "metrics.json").resolve():
        raise FileExistsError(f"{own.output} holds the figures of the training run; give another --output")
    predictor = Predictor.load(own.folder)
    name, rows, folder = _rows(predictor, data, options.split)
    figures = {name: predictor.evaluate(rows, folder, options.batch_size, not own.no_ablations)}
    if _is_main_process():
        print(report_text(figures, own.output))
        write_json(own.output, figures)
        print(f"\nAll figures: {own.output}")


def _compare(argv: Sequence[str]) -> None:
    """Compare F1 of two models on the same labelled rows, each at its own thresholds.

    Of the difference, the table shows a 95% interval by the paired bootstrap, the share of resamples in which B is not
    better, and a two-sided p value. The rows are those that evaluate takes for both models.
    """
    output = "File for the figures and for all rows that only one model has right (.json)."
    options, data, own = _parse(_compare, argv, {"a": FOLDER, "b": FOLDER, "--output": dict(help=output)})
    from . import Predictor, compare
    from .inference.comparison import comparison_text
    from .inference.predictions import check_suffix, write_json

    if own.output:
        check_suffix(own.output, (".json",))
    comparison = compare(Predictor.load(own.a), Predictor.load(own.b), data, options.split, options.batch_size)
    _warn_of_bad_images(comparison["bad_images"], data)
    if _is_main_process():
        print(comparison_text(comparison))
        if own.output:
            write_json(own.output, comparison)
            print(f"\nAll figures and rows: {own.output}")


def _predict(argv: Sequence[str]) -> None:
    """Predict labels for images and texts, at the model's own thresholds.

    The rows are all rows of a table, or the test rows if the source has splits.
    """
    output = "File: .csv for ImageID,Labels as in the competition, .jsonl for labels and scores. Default: print them."
    arguments = {
        "folder": FOLDER,
        "--images": dict(nargs="+", help="Image files, in place of --data."),
        "--texts": dict(nargs="+", help="Texts: one for each image, or texts without images."),
        "--output": dict(help=output),
    }
    options, data, own = _parse(_predict, argv, arguments)
    from . import Predictor
    from .inference import predictions

    given = own.images or own.texts
    if bool(given) == bool(data.data):
        raise ValueError("expected either --data (a table) or --images and --texts")
    if own.output:
        predictions.check_suffix(own.output, predictions.PREDICTION_SUFFIXES)
    source = predictions.rows_of(own.images, own.texts, data.image_dir or ".") if given else None
    predictor = Predictor.load(own.folder)
    name, rows, folder = _rows(predictor, data, options.split, source, labelled=False)
    scores = predictor.scores(rows, folder, options.batch_size)
    if _is_main_process():
        if own.output:
            predictions.write_predictions(own.output, rows, scores, predictor.model.config)
            print(f"{len(rows):,} rows of {name}: {own.output}")
        else:
            print("\n".join(predictions.prediction_lines(rows, scores, predictor.model.config)))


def _push(argv: Sequence[str]) -> None:
    """Upload a model to the Hub as one commit.

    After a broken connection, run the same command again to continue. The token is that of `hf auth login` or of the
    environment variable HF_TOKEN.
    """
    arguments = {
        "folder": FOLDER,
        "repo_id": dict(metavar="user/name", help="Repository; it is created if it does not exist."),
        "--private": dict(action="store_true", help="Only you and your organisation see the repository."),
        "--public": dict(action="store_true", help="Everyone sees the repository."),
        "--revision": dict(help="Branch to push to (default: main)."),
        "--tag": dict(help="Name of the commit, to load it by."),
        "--message": dict(help="Message of the commit (default: Upload model)."),
    }
    (own,) = _parse(_push, argv, arguments, reads_rows=False)
    from . import push_to_hub

    options = vars(own)
    private, public = options.pop("private"), options.pop("public")
    if private and public:
        raise ValueError("--public is not allowed with --private")
    push_to_hub(**options, private=private if private or public else None)


def _export(argv: Sequence[str]) -> None:
    """Write a model as one ONNX file, with a script that runs it without this package.

    The file holds everything that a prediction needs. It is compared with the model on the rows of --data, or else on
    rows of the embedded data set.
    """
    arguments = {
        "folder": FOLDER,
        "--onnx": dict(action="store_true", required=True, help="Write ONNX; there is no other format."),
        "--int8": dict(action="store_true", help="Write a quantized model too, and report what it costs."),
        "--output": dict(help="Folder to write to (default: FOLDER/onnx)."),
    }
    options, data, own = _parse(_export, argv, arguments)
    from . import Predictor, export_onnx

    predictor = Predictor.load(own.folder)
    rows, folder = _rows(predictor, data, options.split)[1:] if data.data else (None, None)
    export_onnx(predictor, own.output, own.int8, rows, folder)
    print(f"\nOutput folder: {own.output or Path(own.folder, 'onnx')}")


def _presets(argv: Sequence[str]) -> None:
    """Print the systems that can be trained, with the poster's figures."""
    arguments = {"--markdown": dict(action="store_true", help="Print the table in Markdown.")}
    (own,) = _parse(_presets, argv, arguments, reads_rows=False)
    from .presets import presets_table

    print(presets_table(own.markdown))


def _cache(argv: Sequence[str]) -> None:
    """Print the feature caches of training runs, the last used one at the end, or remove them."""
    arguments = {
        "--feature_cache_dir": dict(type=Path, help="Folder of the caches (default: beside those of the Hub)."),
        "--clear": dict(action="store_true", help="Remove the caches."),
    }
    (own,) = _parse(_cache, argv, arguments, reads_rows=False)
    from .training.feature_cache import caches_table

    print(caches_table(own.feature_cache_dir, own.clear))


def _rows(predictor: Any, data: Any, split: str | None, source: Any = None, labelled: bool = True) -> tuple:
    """Return the name of a split, its rows, and the folder of their images. Labelled rows are held-out ones."""
    prepared = predictor.prepare(data, with_labels=labelled, sources=source and {"train": source})
    _warn_of_bad_images(prepared.bad_images, data)
    return *predictor.choose_split(prepared, split, held_out=labelled), prepared.folder


def _warn_of_bad_images(bad_images: Sequence[tuple[str, str]], data: Any) -> None:
    fate = "left out" if data.bad_images == "skip" else "taken as missing"
    for where, reason in bad_images:
        logger.warning(f"Image {fate}: {where}: {reason}")


def _is_main_process() -> bool:
    """Return whether this process prints and writes; `accelerate launch` starts several, and all have the scores."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available()).is_main_process


if __name__ == "__main__":
    main()
