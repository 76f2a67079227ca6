"""Image cells of a table: names of files, or bytes. They are found, opened, and checked before training."""

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from tqdm.auto import tqdm

from ..model.image_processing_mmclf import read_image


def open_image(
    cell: str | Mapping[str, Any],
    folder: Path,
    where: str,
    short_edge: int | None = None,
    max_pixels: float | None = None,
) -> torch.Tensor:
    """
    Open the image of a cell by [`read_image`].

    Args:
        cell (`str` or `Mapping`): A file name, or a mapping with `bytes` or `path`.
        folder (`Path`): The folder to which file names are relative.
        where (`str`): The name of the row, for errors.
        short_edge (`int`, *optional*): A number of pixels of the short edge that is enough. Defaults to the full size.
        max_pixels (`float`, *optional*): The largest number of pixels. By default there is no limit, because
            [`check_sizes`] has checked the rows.

    Returns:
        `torch.Tensor`: An upright RGB image, uint8 of shape `(3, height, width)`.

    Raises:
        `ValueError`: If the image cannot be read. The message names the row.
    """
    name = cell if isinstance(cell, str) else cell.get("path")
    try:
        return read_image(_file(cell, folder), short_edge, max_pixels)
    except ValueError as error:
        raise ValueError(
            f"{where}: cannot read the image {name or 'in the table'}: {error}. --bad_images skip leaves such rows "
            "out, --bad_images missing keeps them without an image"
        ) from error


def _file(cell: str | Mapping[str, Any], folder: Path) -> Path | BytesIO:
    if isinstance(cell, str) or cell.get("bytes") is None:
        return folder / (cell if isinstance(cell, str) else cell["path"])
    return BytesIO(cell["bytes"])


def image_paths(data: Dataset) -> list[str | bool | None]:
    """
    Find the image of each row without reading its bytes, which may need more memory than there is.

    Returns:
        `list`: The path of an image, `True` if its bytes are in the table, `None` if the image is missing.
    """
    paths = []
    for batch in data.select_columns(["image"]).with_format("arrow").iter(1000):
        cells = batch["image"]
        if pa.types.is_struct(cells.type):
            inside = pc.is_valid(pc.struct_field(cells, "bytes")).to_pylist()
            named = pc.struct_field(cells, "path").to_pylist()
            paths += [here or path or None for here, path in zip(inside, named, strict=True)]
        else:
            paths += cells.to_pylist()
    return paths


def image_groups(data: Dataset, folder: Path) -> list[Any]:
    """Return a key of each row's image: its full path, a digest of its bytes, or the row number if it is missing."""
    start = os.path.abspath(folder)

    def digest(row: int) -> bytes:
        return hashlib.blake2b(data[row]["image"]["bytes"], digest_size=16).digest()

    return [
        digest(row) if path is True else row if path is None else os.path.normpath(os.path.join(start, path))
        for row, path in enumerate(image_paths(data))
    ]


def check_paths(data: Dataset, folder: Path) -> None:
    """
    Check that image files exist.

    Raises:
        `ValueError`: If a cell is a URL.
        `FileNotFoundError`: If files do not exist. The message counts them.
    """
    start, missing = str(folder), []
    for row, path in enumerate(image_paths(data)):
        if isinstance(path, str) and not os.path.isfile(os.path.join(start, path)):  # pathlib takes twice the time
            if re.match(r"\w+://", path):
                raise ValueError(
                    f"{data['where'][row]}: the image {path!r} is a URL, and a table names files; download the "
                    "images, and give their names and, by --image_dir, their folder"
                )
            missing.append((row, path))
    if missing:
        shown = "; ".join(f"{data['where'][row]}: {path!r}{_near(folder, path)}" for row, path in missing[:5])
        shown += "; ..." if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{len(missing):,} of {len(data):,} images are not in {start!r} ({shown}). Give the folder by "
            "--image_dir; leave the cell empty if a row has no image"
        )


def _near(folder: Path, path: str) -> str:
    """Name the file that was likely meant: without blanks, with slashes, or without the folder in the name."""
    slashed = path.strip().replace("\\", "/")
    meant = [name for name in (path.strip(), slashed, slashed.split("/")[-1]) if (folder / name).is_file()]
    return f", but {meant[0]!r} is" if meant else ""


def check_sizes(data: Dataset, folder: Path, max_pixels: float) -> None:
    """
    Read the size of every image from the beginning of its file, before training, so that none fills the memory later.

    Args:
        data (`Dataset`): Columns `image` and `where`.
        folder (`Path`): The folder to which image names are relative.
        max_pixels (`float`): The largest number of pixels of an image.

    Raises:
        `ValueError`: If an image has more pixels. The message names its row.
    """

    def size(cell: Any) -> tuple[int, int]:
        try:
            with Image.open(_file(cell, folder)) as opened:
                return opened.size
        except Exception:  # an image that cannot be read is an error when it is read
            return 0, 0

    for row, (width, height) in enumerate(_each_image(data, size, "Checking sizes", (0, 0))):
        if width * height > max_pixels:
            raise ValueError(
                f"{data['where'][row]}: the image has {width} x {height} pixels, more than {max_pixels / 1e6:g} "
                "megapixels; --pixel_limit raises the limit, --bad_images skip leaves such rows out, --bad_images "
                "missing keeps them without an image"
            )


def _each_image(data: Dataset, function: Callable[[Any], Any], title: str, missing: Any = None) -> list[Any]:
    """Apply a function to the image cell of each row, by four threads, so that memory does not grow with the cores."""

    def apply(row: int) -> Any:
        place = places[row]  # reading a row takes longer than opening a file
        return missing if place is None else function(data[row]["image"] if place is True else place)

    places = image_paths(data)
    with ThreadPoolExecutor(4) as pool:
        return list(tqdm(pool.map(apply, range(len(data))), total=len(data), desc=title, delay=1))


def without_bad_images(
    data: Dataset, folder: Path, policy: str, max_pixels: float | None = None
) -> tuple[Dataset, list[tuple[str, str]]]:
    """
    Open every image once, before training, so that bad ones can be listed and workers meet none.

    Args:
        data (`Dataset`): Columns `image` and `where`.
        folder (`Path`): The folder to which image names are relative.
        policy (`str`): `"skip"` leaves rows with a bad image out, `"missing"` keeps them without the image.
        max_pixels (`float`, *optional*): The largest number of pixels of a good image.

    Returns:
        `tuple[Dataset, list[tuple[str, str]]]`: The rows, and the row and the reason for each bad image.

    Raises:
        `ValueError`: If no row is left.
    """

    def problem(cell: Any) -> str | None:
        try:
            open_image(cell, folder, "", max_pixels=max_pixels)
        except ValueError as error:
            return str(error.__cause__)
        return None

    problems = _each_image(data, problem, "Checking images")
    bad = [row for row, reason in enumerate(problems) if reason is not None]
    good = [row for row, reason in enumerate(problems) if reason is None]
    listed = [(data[row]["where"], problems[row]) for row in bad]
    if not bad:
        return data, []
    if policy == "skip":
        if not good:
            raise ValueError(f"no row is left: none of {len(data):,} images can be read ({': '.join(listed[0])}; ...)")
        return data.select(good), listed
    without = {**data.select(bad).to_dict(), "image": [None] * len(bad)}  # the other images are not copied
    both = concatenate_datasets([data.select(good), Dataset.from_dict(without, features=data.features)])
    return both.select(np.argsort([*good, *bad])), listed


def check_images(
    data: Dataset, folder: Path, policy: str, megapixels: float, is_streamed: bool = False
) -> tuple[Dataset, list[tuple[str, str]]]:
    """
    Check the images of rows before any of them is used.

    Args:
        data (`Dataset`): Columns `image` and `where`.
        folder (`Path`): The folder to which image names are relative.
        policy (`str`): `bad_images` of [`DataArguments`].
        megapixels (`float`): The largest number of megapixels of an image.
        is_streamed (`bool`, *optional*, defaults to `False`): Whether a file can vanish at any time.

    Returns:
        `tuple[Dataset, list[tuple[str, str]]]`: The rows that `policy` lets through, and the row and the reason for
        each bad image.

    Raises:
        `ValueError`: If an image is too large, is a URL or, where `policy` leaves rows out, no row is left.
        `FileNotFoundError`: If files do not exist.
    """
    if not megapixels > 0:
        raise ValueError(f"--pixel_limit is {megapixels}; expected megapixels, a number above 0")
    if not is_streamed or policy == "error":
        check_paths(data, folder)
    if policy != "error":
        return without_bad_images(data, folder, policy, megapixels * 1e6)
    check_sizes(data, folder, megapixels * 1e6)
    return data, []
