"""The folder of a run and its checkpoints: claimed by one run, resumed from the newest whole checkpoint."""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import SoftFileLock, Timeout
from transformers.utils import logging

from ..data.splits import row_digests
from ..inference.folders import check_file
from .arguments import Arguments, MMClfTrainingArguments
from .inputs import TrainingInputs

logger = logging.get_logger(__name__)
CHECKPOINTS, LOCK, RUN, STATE = "checkpoints", "lock", "run.json", "trainer_state.json"

# Settings that a run keeps when it is resumed. The others, such as logging and saving, may change.
SETTINGS = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "n_gpu"),
    *("learning_rate", "backbone_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm"),
    *("bf16", "fp16", "dataloader_drop_last", "loss", "positive_weight_power", "positive_weight_cap"),
    *("label_smoothing_factor", "metric_for_best_model", "greater_is_better", "cache_features", "cached_views"),
    "neftune_noise_alpha",
)
# Files of a checkpoint: a pattern, because FSDP has names of its own, and how many of them there must be.
PARTS = {
    STATE: (STATE, 1),
    "config.json": ("config.json", 0),
    "model.safetensors": ("*model[._-]*", 1),  # not modeling_mmclf.py
    "optimizer.pt": ("optimizer*", 1),
    "scheduler.pt": ("scheduler.pt", 1),
    "scaler.pt": ("scaler.pt", 0),
}
LENGTH = ("num_train_epochs", "max_steps")  # may change too, which changes the learning rates


class Start(NamedTuple):
    """
    Where a run starts.

    Args:
        output (`Path`): The output folder.
        checkpoint (`str`, *optional*): The checkpoint to resume from. Without one, the run starts at its first step.
        resumed (`bool`): Whether the run must be the one that was interrupted.
        finished (`bool`): Whether there is nothing left to do.
    """

    output: Path
    checkpoint: str | None = None
    resumed: bool = False
    finished: bool = False


@contextmanager
def claim_output(preset: str, args: MMClfTrainingArguments) -> Iterator[Start]:
    """
    Claim the output folder for one run. `args.output_dir` becomes the folder of the checkpoints.

    The first process looks and locks, and the others get what it found. Folders that are empty at the end are removed.

    Args:
        preset (`str`): Name of the new folder in outputs/ if no output folder is given.
        args ([`MMClfTrainingArguments`]): The output folder and what to resume.

    Yields:
        [`Start`]: Where the run starts.

    Raises:
        `FileExistsError`: If the folder is not empty, or if another run uses it.
        `FileNotFoundError`: If there is nothing to resume.
        `ValueError`: If checkpoints are damaged.
    """
    with ExitStack() as stack:
        found: list[Start | Exception | None] = [None]
        if args.process_index == 0:
            try:
                found = [_claim(stack, preset, args)]
            except (OSError, ValueError) as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        args.output_dir = str(found[0].output / CHECKPOINTS)
        yield found[0]


def _claim(stack: ExitStack, preset: str, args: MMClfTrainingArguments) -> Start:
    """Choose, lock and check the output folder. Leaving the stack unlocks it."""
    given = None if args.resume_from_checkpoint in (None, "false", "False", False) else args.resume_from_checkpoint
    newest = str(given).lower() == "true"
    if args.output_dir == "trainer_output":  # transformers' default: nobody chose a folder
        if given:
            raise ValueError("--resume_from_checkpoint needs the --output_dir of the run to resume")
        if not Path("outputs").exists():
            stack.callback(_remove_if_empty, Path("outputs"))
        output = _new_folder(preset)
    else:
        output = Path(args.output_dir)
    checkpoints = output / CHECKPOINTS
    if newest and (output / "config.json").is_file():
        logger.warning(
            f"The run in {output} has finished, and its model is there. Nothing is trained. To train on from a "
            "checkpoint that was kept, name it by --resume_from_checkpoint"
        )
        return Start(output, resumed=True, finished=True)
    if newest and not checkpoints.is_dir():
        raise FileNotFoundError(f"no run to resume in {output}: it has no folder {CHECKPOINTS}")
    _lock(stack, checkpoints)
    if newest:
        return Start(output, _newest_whole(checkpoints), resumed=True)
    if given:
        _check_named(Path(given))
        return Start(output, given, resumed=True)
    if _is_used(output):
        raise FileExistsError(
            f"{output} is not empty; give another --output_dir, or --resume_from_checkpoint true to resume there"
        )
    return Start(output)


def _new_folder(preset: str) -> Path:
    """Make the first of outputs/PRESET, outputs/PRESET-2, ... that does not exist. No other run gets the same one."""
    for number in itertools.count(1):
        folder = Path("outputs") / (preset if number == 1 else f"{preset}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _lock(stack: ExitStack, checkpoints: Path) -> None:
    """Lock a folder of checkpoints until the stack is left. The lock of a dead process of this machine is taken."""
    for folder in reversed((checkpoints, *checkpoints.parents)):
        if folder in (checkpoints, checkpoints.parent) or not folder.exists():
            stack.callback(_remove_if_empty, folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    file = checkpoints / LOCK
    owner = _owner(file)
    try:
        stack.enter_context(SoftFileLock(file, timeout=0))
    except Timeout:
        raise FileExistsError(
            f"{checkpoints.parent} is in use by another run ({_owner(file)}); give another --output_dir, or wait. If "
            f"that run has ended, delete {file}"
        ) from None
    if owner:
        logger.warning(f"The last run in {checkpoints.parent} was killed ({owner}); its lock is taken over")


def _owner(lock: Path) -> str | None:
    """Return the process that a lock names."""
    with suppress(OSError, ValueError):
        process, host, *_ = lock.read_text(encoding="utf-8").split()
        return f"process {process} on {host}"


def _is_used(output: Path) -> bool:
    """Return whether a folder holds a model, a checkpoint or anything else but traces of a failed start."""
    return any(entry.name != CHECKPOINTS for entry in output.iterdir()) or bool(_sorted(output / CHECKPOINTS))


# Checkpoints


def _sorted(checkpoints: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest one first."""
    found = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def damage(checkpoint: Path) -> str | None:
    """
    Find out why a run cannot be resumed from a checkpoint.

    Every file that resuming reads is opened. `Trainer` writes `trainer_state.json` last, but does not wait for the
    random states of other processes.

    Args:
        checkpoint (`Path`): The folder of the checkpoint.

    Returns:
        `str`, *optional*: The name of a file and the reason, or `None` if the checkpoint is whole.
    """
    processes = (_read_run(checkpoint.parent) or {}).get("world_size", 1)
    for name, (pattern, count) in {**PARTS, "rng_state.pth": ("rng_state*.pth", processes)}.items():
        files = sorted(checkpoint.glob(pattern))
        if len(files) < count:
            return f"{name}: {f'{len(files)} of {count} files' if count > 1 else 'no such file'}"
        for file in files:
            try:
                check_file(file)
            except ValueError as error:
                return str(error)
    return None


def _newest_whole(checkpoints: Path) -> str | None:
    """Return the newest whole checkpoint, or `None` if the run was interrupted before it had saved one."""
    damaged = {}
    for checkpoint in _sorted(checkpoints):
        reason = damage(checkpoint)
        if reason is None:
            for name, why in damaged.items():
                logger.warning(f"{name} is not whole ({why}) and is passed over")
            _check_best(checkpoint)
            logger.warning(f"Resuming from {checkpoint}")
            return str(checkpoint)
        damaged[checkpoint.name] = reason
    shown = "; ".join(f"{name} ({why})" for name, why in damaged.items())
    if any(not why.startswith(STATE) for why in damaged.values()):  # it was saved, and damaged later
        raise ValueError(f"no checkpoint in {checkpoints} is whole: {shown}. Another --output_dir starts anew")
    unfinished = f" but unfinished ones: {shown}" if shown else ""
    logger.warning(f"No checkpoint is in {checkpoints}{unfinished}; the run starts from its beginning")
    return None


def _check_named(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint to resume from: {checkpoint}")
    if reason := damage(checkpoint):
        raise ValueError(
            f"{checkpoint} is not whole ({reason}); name another checkpoint, or --resume_from_checkpoint true takes "
            "the newest whole one"
        )
    _check_best(checkpoint)


def _check_best(checkpoint: Path) -> None:
    """Raise `ValueError` if the best weights so far, which the end of training loads, are damaged."""
    best = json.loads((checkpoint / STATE).read_text(encoding="utf-8")).get("best_model_checkpoint")
    for file in Path(best).glob("*.safetensors") if best else ():
        try:
            check_file(file)
        except ValueError as error:
            raise ValueError(
                f"{error}; it belongs to {best}, the best checkpoint so far. Delete that folder to resume without it"
            ) from error


# What is resumed


def fingerprint(arguments: Arguments, inputs: TrainingInputs) -> dict[str, Any]:
    """
    Describe rows and settings of a run, so that a resumed run can be compared with it.

    Args:
        arguments (`tuple`): The arguments of the run, as `parse_arguments` returns them.
        inputs ([`TrainingInputs`]): The rows, the model and the preprocessing.

    Returns:
        `dict[str, Any]`: JSON values by name. Long ones are digests.
    """
    _, data_args, augmentation, args = arguments
    processor, config = inputs.preprocessing.processor, inputs.model.config
    splits = {"train": inputs.train_rows, **inputs.prepared.splits}  # of a stream, its first rows
    values = {
        **{f"{name} rows": f"{len(rows):,}, digest {_digest_of_rows(rows, inputs)}" for name, rows in splits.items()},
        "splits": inputs.prepared.split_source,
        "stream": [data_args.data, data_args.shuffle_buffer] if inputs.stream else None,
        "labels": inputs.prepared.labels.ids,
        **{name: getattr(args, name) for name in (*SETTINGS, *LENGTH)},
        **dataclasses.asdict(augmentation),
        **config.to_dict(),
        "image_processor": processor.image_processor and processor.image_processor.to_dict(),
        "max_tokens": processor.tokenizer and processor.tokenizer.model_max_length,
        "vocabulary": processor.tokenizer and _digest([json.dumps(processor.tokenizer.get_vocab(), sort_keys=True)]),
    }
    for name in ("_name_or_path", "transformers_version"):
        values.pop(name, None)
    return json.loads(json.dumps(values, default=str))


def begin_run(args: MMClfTrainingArguments, start: Start, values: Mapping[str, Any]) -> None:
    """
    Compare a resumed run with the interrupted one, and write `run.json` to the folder of checkpoints.

    Args:
        args ([`MMClfTrainingArguments`]): The folder of checkpoints.
        start ([`Start`]): Where the run starts.
        values (`Mapping[str, Any]`): The [`fingerprint`] of this run.

    Raises:
        `ValueError`: If rows or settings differ. The message names them.
    """
    folder = Path(args.output_dir)
    if start.resumed:
        _compare(Path(start.checkpoint).parent if start.checkpoint else folder, values)
    args.distributed_state.wait_for_everyone()  # all processes have compared
    if args.process_index == 0:
        if not start.resumed:
            remove_traces(folder)
        part = folder / f"{RUN}.part"
        part.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        part.replace(folder / RUN)
    args.distributed_state.wait_for_everyone()


def _compare(folder: Path, values: Mapping[str, Any]) -> None:
    before = _read_run(folder)
    if before is None:
        logger.warning(f"{folder / RUN} is missing or damaged: nothing shows whether rows and settings are the same")
        return
    changed = {name: (before.get(name), value) for name, value in values.items() if before.get(name) != value}
    shown = {name: "{} was {!s:.100} and is {!s:.100}".format(name, *pair) for name, pair in changed.items()}
    refused = [text for name, text in shown.items() if name not in LENGTH]
    if refused:
        raise ValueError(
            f"the run in {folder.parent} cannot be resumed with other rows or settings: {'; '.join(refused)}. Give "
            "those of that run, or another --output_dir to start anew"
        )
    for text in shown.values():
        logger.warning(f"{text}: from here on, learning rates are those of a run of the new length")


def _read_run(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / RUN).read_text(encoding="utf-8")))


def _digest_of_rows(rows: Dataset, inputs: TrainingInputs) -> str:
    """Return a digest of images, texts and labels, in their order."""
    labels = rows["labels"][:] if "labels" in rows.column_names else [None] * len(rows)
    contents = row_digests(rows, inputs.prepared.folder, inputs.model.config.has_image)
    return _digest(f"{content} {known}" for content, known in zip(contents, labels, strict=True))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def remove_traces(checkpoints: Path) -> None:
    """Remove the files of a run from its folder of checkpoints, but not its lock and not files of others."""
    for pattern in ("checkpoint-*", "finished", RUN):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
