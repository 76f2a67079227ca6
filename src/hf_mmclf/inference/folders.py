"""How the folder of a model is written, whole or not at all, and how its files are checked."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open

from ..model import handler
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.pipeline_mmclf import TASK, ImageTextClassificationPipeline
from ..model.processing_mmclf import MMClfProcessor
from .quiet import no_progress_bars

# Packages that a folder needs where this package is not installed.
PACKAGES = ("torch", "torchvision", "timm", "transformers", "pillow")


@contextmanager
def atomic_folder(output: str | Path, stage: str | Path | None = None) -> Iterator[Path]:
    """
    Give a temporary folder to write to, then move its files to `output`, config.json last.

    A folder does not load without config.json, so a half-written one never looks complete.

    Args:
        output (`str` or `Path`): The folder that gets the files. Other files in it stay.
        stage (`str` or `Path`, *optional*):
            The temporary folder, on the same disk as `output`; emptied first and removed at the end. Defaults to a
            folder inside `output`.
    """
    output = Path(output)
    stage = output / ".unfinished" if stage is None else Path(stage)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        follow_umask(stage)
        (output / "config.json").unlink(missing_ok=True)
        for file in sorted(stage.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(output / file.name)
    finally:
        shutil.rmtree(stage)


def follow_umask(folder: str | Path) -> None:
    """Give the files of a folder the permissions that the folder has; safetensors hides its files from others."""
    for file in Path(folder).iterdir():
        if file.is_file():
            with suppress(PermissionError):  # of a file system without permissions
                file.chmod(Path(folder).stat().st_mode & 0o666)


def check_file(file: Path) -> None:
    """
    Open a file of weights or settings, so that one that a full disk or a killed process left is found.

    Args:
        file (`Path`): A .safetensors file, a file of `torch.save`, or a .json file. Others are not opened.

    Raises:
        `ValueError`: If the file is damaged or missing. The message begins with its name.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):  # the header, and the length that it announces
                pass
        elif file.suffix == ".json":
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                raise ValueError("expected a JSON object")
        elif file.suffix in (".bin", ".pt", ".pth"):
            with ZipFile(file) as archive:
                if member := archive.testzip():
                    raise ValueError(f"bad checksum of {member}")
    except (OSError, ValueError, BadZipFile, SafetensorError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error


def save_model(model: MMClfForImageTextClassification, processor: MMClfProcessor, folder: str | Path) -> None:
    """
    Save weights (safetensors), configuration, image processor and tokenizer, with the code that loads them.

    `handler.py` and `requirements.txt` serve the folder as an Inference Endpoint of the Hub. The tokenizer gets the
    length limit of the text backbone, so nothing that loads the folder has to set it.

    Args:
        model ([`MMClfForImageTextClassification`]): The model, with labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): The model's processor.
        folder (`str` or `Path`): The folder to write to.
    """
    # Only a pipeline writes the name of its task and its class to config.json. It also sets the length limit.
    pipe = ImageTextClassificationPipeline(model=model, processor=processor, task=TASK, device=model.device)
    with no_progress_bars():
        pipe.save_pretrained(folder)
    shutil.copyfile(handler.__file__, Path(folder, "handler.py"))
    Path(folder, "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")


def _requirements() -> list[str]:
    """Return `PACKAGES` with the versions that this package asks for, which it knows if it is installed."""
    try:
        return [line for line in requires("hf_mmclf") if re.split(r"\W", line)[0] in PACKAGES]
    except PackageNotFoundError:  # its source lies in the path
        return list(PACKAGES)
