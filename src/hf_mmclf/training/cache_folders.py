"""The folders of feature caches: where they are, what each holds, and how they are removed."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.utils import convert_bytes
from huggingface_hub.constants import HF_HOME

from ..evaluation.report import format_table

ABOUT = "about.json"


def default_folder() -> Path:
    """Return the default folder of the caches: `hf_mmclf/features` in `HF_HOME`."""
    return Path(HF_HOME) / "hf_mmclf" / "features"


def folder_size(folder: Path) -> int:
    """Return the number of bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def cache_entries(folder: Path | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """
    Return the caches in a folder and what `about.json` says of each, the most recently used one last.

    A cache whose `about.json` is missing or damaged has an empty dictionary.
    """
    folder = folder or default_folder()
    found = {file.parent for pattern in (ABOUT, "*.arrow") for file in folder.glob(f"*/{pattern}")}
    return [(cache, _read_about(cache / ABOUT)) for cache in sorted(found, key=_last_used)]


def _read_about(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def _last_used(cache: Path) -> float:
    file = cache / ABOUT
    return (file if file.exists() else cache).stat().st_mtime


def caches_table(folder: Path | None = None, clear: bool = False) -> str:
    """
    Describe the feature caches in a folder as a table, and remove them on request.

    Args:
        folder (`Path`, *optional*): The folder. Defaults to [`default_folder`].
        clear (`bool`, *optional*, defaults to `False`): Whether to remove the caches.
    """
    folder, rows, total = folder or default_folder(), [], 0
    for cache, about in cache_entries(folder):
        size, used = folder_size(cache), time.localtime(_last_used(cache))
        total += size
        backbones = {part: about.get(f"{part}_backbone", f"damaged {ABOUT}") for part in ("image", "text")}
        row = {"cache": cache.name, **{f"{part} backbone": name for part, name in backbones.items()}}
        rows.append(row | {"size": convert_bytes(size), "last used": time.strftime("%Y-%m-%d %H:%M", used)})
        if clear:
            shutil.rmtree(cache)
    if not rows:
        return f"No feature cache in {folder}"
    return f"{format_table(rows)}\n\n{convert_bytes(total)} {'removed from' if clear else 'in'} {folder}"
