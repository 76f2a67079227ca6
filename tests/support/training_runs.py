"""Small tables and training runs on them, in this process or under accelerate's launcher."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
TINY = ["--image_size", "32", "--vocab_size", "80", "--dataloader_num_workers", "0"]
TINY += ["--dataloader_persistent_workers", "false", "--disable_tqdm", "true"]


def write_table(folder: Path, rows: int = 60, complete: bool = True) -> Path:
    """
    Write a table and its images: the image shows the colour label, the text names the animal label.

    Unless it is `complete`, each third row has no text, each fourth has no image, and rows without both are left out.
    """
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    table = folder / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "words", "tags"])
        for row in range(rows):
            colour, animal = rng.choice(list(COLOURS)), rng.choice(["cat", "dog"])
            # All images differ: equal scores would be ranked by rounding errors, which depend on the batch.
            shade = np.clip(COLOURS[colour] + rng.integers(-35, 36, 3), 0, 255).tolist()
            Image.new("RGB", (40, 30), tuple(shade)).save(folder / "pictures" / f"{row}.png")
            text = f"a small {animal} sits there" if complete or row % 3 else ""
            if complete or row % 12:
                writer.writerow([f"{row}.png" if complete or row % 4 else "", text, f"{colour}|{animal}"])
    return table


def table_flags(table: Path) -> list[str]:
    flags = ["--data", str(table), "--image_dir", str(table.parent / "pictures"), "--preset", "demo"]
    return [*flags, "--image_column", "file", "--text_column", "words", "--label_column", "tags", *TINY]


TWO_PROCESSES = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
TWO_PROCESSES += ["--dynamo_backend", "no"]


def launch(*flags: str, options: list[str] = ()) -> subprocess.Popen:
    """Start examples/train.py by itself or, with `options`, under accelerate's launcher."""
    launcher = ["-m", "accelerate.commands.launch", *options] if options else []
    command = [sys.executable, *launcher, str(ROOT / "examples" / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
