"""The commands of `hf-mmclf`: one function a command, thin over the package's public names.

`hf_mmclf_cli` has their arguments and checks them before this package is imported.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from hf_mmclf_cli import COMMANDS, UsageParser, main, spellings

__all__ = ["main", "run"]
logger = logging.get_logger(__name__)


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


def run(name: str, argv: Sequence[str]) -> None:
    """
    Run one command whose arguments [`main`] has checked.

    Args:
        name (`str`): The command.
        argv (`Sequence[str]`): Its arguments.

    Raises:
        `SystemExit`: after an error message of one line.
    """
    functions = (_train, _evaluate, _compare, _predict, _embed, _gallery, _push, _export, _presets, _cache)
    commands = {function.__name__[1:]: function for function in functions}
    try:
        commands[name](argv)
    except KeyboardInterrupt:
        print(f"hf-mmclf {name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError, StrictDataclassError) as error:
        from .evaluation.report import printable

        # An error of a worker process contains its traceback, an error of a configuration the name of the check.
        message = re.sub(r"^(Caught|Class validation) .*\n\s*\w*Error: ", "", str(error), flags=re.DOTALL)
        message = f"not enough memory: {message}" if isinstance(error, MemoryError) else message
        sys.exit(f"hf-mmclf {name}: error: {printable(' '.join(message.split()))}")


def _parse(name: str, argv: Sequence[str]) -> tuple:
    """Parse the arguments of a command: its own and, if it reads rows, those of two dataclasses."""
    from . import DataArguments
    from .training.parser import CommandParser

    command = COMMANDS[name]
    classes = (PredictorArguments, DataArguments) if command.classes else ()
    parser = CommandParser(classes, prog=f"hf-mmclf {name}", usage=UsageParser.usage_of(name))
    for argument, options in command.arguments.items():
        parser.add_argument(*spellings(argument), **options)
    return parser.parse(argv)


def _train(argv: Sequence[str]) -> None:
    """Train a model."""
    from . import parse_arguments, train

    train(*parse_arguments(argv, prog="hf-mmclf train"))


def _evaluate(argv: Sequence[str]) -> None:
    """Print the figures of a model on labelled rows."""
    options, data, own = _parse("evaluate", argv)
    from . import Predictor
    from .evaluation.report import report_text
    from .inference.predictions import check_output, write_json

    check_output(own.output, (".json",), own.overwrite, _tables(data), [own.folder])
    predictor = Predictor.load(own.folder)
    name, rows, folder = _rows(predictor, data, options.split)
    figures = {name: predictor.evaluate(rows, folder, options.batch_size, not own.no_ablations)}
    if _is_main_process():
        print(report_text(figures, own.output))
        write_json(own.output, figures)
        print(f"\nAll figures: {own.output}")


def _compare(argv: Sequence[str]) -> None:
    """Compare two models on the same rows."""
    options, data, own = _parse("compare", argv)
    from . import Predictor, compare
    from .inference.comparison import comparison_text
    from .inference.predictions import check_output, write_json

    _check_overwrite(own)
    if own.output:
        check_output(own.output, (".json",), own.overwrite, _tables(data), [own.a, own.b])
    comparison = compare(Predictor.load(own.a), Predictor.load(own.b), data, options.split, options.batch_size)
    _warn_of_bad_images(comparison["bad_images"], data)
    if _is_main_process():
        print(comparison_text(comparison))
        if own.output:
            write_json(own.output, comparison)
            print(f"\nAll figures and rows: {own.output}")


def _predict(argv: Sequence[str]) -> None:
    """Print or write the labels of rows."""
    options, data, own = _parse("predict", argv)
    from . import Predictor
    from .data.arguments import changed_fields, refuse_idle
    from .inference import predictions

    given = own.images or own.texts
    if bool(given) == bool(data.data):
        raise ValueError("expected either --data (a table) or --images and --texts")
    refuse_idle(changed_fields(data), [(bool(given), ["validation_data", "test_data"], "predict reads --data alone")])
    _check_overwrite(own)
    if own.output:
        inputs = [*_tables(data), *(own.images or ())]
        predictions.check_output(own.output, predictions.PREDICTION_SUFFIXES, own.overwrite, inputs, [own.folder])
    source = predictions.rows_of(own.images, own.texts, data.image_dir or ".") if given else None
    predictor = Predictor.load(own.folder)
    config = predictor.model.config
    for flag, values, is_used in (("images", own.images, config.has_image), ("texts", own.texts, config.has_text)):
        if values and not is_used:
            raise ValueError(f"--{flag} is given, but the model has no {flag[:-1]} backbone; leave it out")
    name, rows, folder = _rows(predictor, data, options.split, source, labelled=False)
    scores = predictor.scores(rows, folder, options.batch_size)
    if _is_main_process():
        if own.output:
            predictions.write_predictions(own.output, rows, scores, predictor.model.config)
            print(f"{len(rows):,} rows of {name}: {own.output}")
        else:
            print("\n".join(predictions.prediction_lines(rows, scores, predictor.model.config)))


def _embed(argv: Sequence[str]) -> None:
    """Write the fused vectors of rows."""
    options, data, own = _parse("embed", argv)
    from . import Predictor
    from .data.arguments import changed_fields, refuse_idle
    from .inference.predictions import check_output, write_vectors

    if data.data is None:
        raise ValueError("expected --data, the table whose rows are embedded")
    given = changed_fields(data)
    refuse_idle(given, [(False, ["validation_data", "test_data"], "embed reads --data alone")])
    check_output(own.output, (".npy",), own.overwrite, _tables(data), [own.folder])
    predictor = Predictor.load(own.folder)
    name, rows, folder = _rows(predictor, data, options.split, labelled=False)
    vectors = predictor.embed(rows, folder, options.batch_size)
    if _is_main_process():
        write_vectors(own.output, vectors)
        print(f"{len(rows):,} rows of {name}, {vectors.shape[1]:,} numbers each: {own.output}")


def _gallery(argv: Sequence[str]) -> None:
    """Write the gallery of mistakes on labelled rows."""
    options, data, own = _parse("gallery", argv)
    from . import Predictor
    from .hub.gallery import render_gallery
    from .inference.predictions import atomic_file, check_output

    check_output(own.output, (".html",), own.overwrite, _tables(data), [own.folder])
    predictor = Predictor.load(own.folder)
    name, rows, folder = _rows(predictor, data, options.split)
    scores = predictor.scores(rows, folder, options.batch_size)
    if _is_main_process():
        page = render_gallery(predictor, rows, folder, scores)
        with atomic_file(own.output) as file:
            file.write(page)
        print(f"{len(rows):,} rows of {name}: {own.output}")


def _push(argv: Sequence[str]) -> None:
    """Upload a model to the Hub."""
    (own,) = _parse("push", argv)
    from . import push_to_hub

    options = vars(own)
    private, public = options.pop("private"), options.pop("public")
    if private and public:
        raise ValueError("--public is not allowed with --private")
    push_to_hub(**options, private=private if private or public else None)


def _export(argv: Sequence[str]) -> None:
    """Write a model as ONNX."""
    options, data, own = _parse("export", argv)
    from . import Predictor, export_onnx
    from .data.arguments import changed_fields, refuse_idle

    given = changed_fields(data) | changed_fields(options)
    refuse_idle(given, [(data.data is not None, sorted(given), "--data is not given")])
    predictor = Predictor.load(own.folder)
    rows, folder = _rows(predictor, data, options.split)[1:] if data.data else (None, None)
    export_onnx(predictor, own.output, own.int8, rows, folder, overwrite=own.overwrite)
    print(f"\nOutput folder: {own.output or Path(own.folder, 'onnx')}")


def _presets(argv: Sequence[str]) -> None:
    """Print the presets."""
    (own,) = _parse("presets", argv)
    from .presets import presets_table

    print(presets_table(own.markdown))


def _cache(argv: Sequence[str]) -> None:
    """Print or remove the feature caches."""
    (own,) = _parse("cache", argv)
    from .training.cache_folders import caches_table

    print(caches_table(own.feature_cache_dir, own.clear))


def _check_overwrite(own: Any) -> None:
    if own.overwrite and not own.output:
        raise ValueError("--overwrite has no effect, because --output is not given; leave it out")


def _tables(data: Any) -> list[str | None]:
    return [data.data, data.validation_data, data.test_data, data.label_names_file]


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
