"""How fast, compared with the loop that people write by hand (`baseline.py`) and with the bare model.

    python benchmarks/speed.py WHAT [--rounds 3] [--steps N] [--preset NAME] [--rows N] [--bf16]

WHAT is one of

    training    JPEG to optimizer step, against the baseline and against the same step on tensors in memory
    frozen      the same with two frozen backbones (densitybert), first epoch
    cached      ten epochs of densitybert with the feature cache, its computation included, against ten of the baseline
    processes   a step of two processes, against one process with the same global batch
    loading     training rows per second and core, against the baseline's
    evaluation  `Predictor.scores` from files, against the bare forward pass
    pipeline    `pipeline` on a list of files, against the bare forward pass
    memory      peak memory of a training process, against the baseline's, also with activation checkpointing
    growth      rows per second with a table of 10,000 rows, against one of 1,000
    startup     a table of 1,000,000 rows is read, checked, encoded and split: seconds and memory
    all         each of these in a process of its own

The runs that are compared take turns, --rounds times. The ratio is the median over the rounds, with the smallest and
largest. The bare model is the fastest one in eager mode: channels-last, tensors in memory, fused AdamW. --bf16 trains
ours and the bare model (not the baseline) in autocast bfloat16, which is faster on CPUs with instructions for it
(avx512_bf16, amx_bf16). See `workload.py` for what runs.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import baseline
import torch
from workload import BATCH, Workload, image_rows

from hf_mmclf.data.arguments import DataArguments
from hf_mmclf.data.prepare import prepare_data
from hf_mmclf.evaluation.report import format_table

CACHED = 2_000  # rows of the table whose features are cached


def take_turns(rounds: int, **runs: Callable[[], float]) -> dict[str, list[float]]:
    """Measure each run in each round."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in [*runs.items()] * rounds:
        figures[name].append(run())
        print(f"  {name}: {figures[name][-1]:.2f}", file=sys.stderr)
    return figures


def compare(figures: dict[str, list[float]], one: str, other: str, unit: str, target: str) -> dict[str, Any]:
    """Return a table row: the medians of two runs, and their ratio over the rounds."""
    ratios = [a / b for a, b in zip(figures[one], figures[other], strict=True)]
    line = {"compared": f"{one} : {other}".replace("_", " "), "unit": unit}
    line |= {"first": statistics.median(figures[one]), "second": statistics.median(figures[other])}
    return line | {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "target": target}


def training(options: argparse.Namespace, preset: str = "warmerdbert", target: str = ">= 2.2") -> list[dict]:
    work = Workload(options.preset or preset, options.steps or 20, *options.precision)
    figures = take_turns(options.rounds, ours=work.ours, baseline=work.baseline, bare_step=work.bare_step)
    return [
        compare(figures, "ours", "baseline", "rows/s", target),
        compare(figures, "ours", "bare_step", "rows/s", ">= 0.85"),
    ]


def cached(options: argparse.Namespace) -> list[dict]:
    epochs = ["--max_steps", "-1", "--num_train_epochs", "10"]
    work = Workload(options.preset or "densitybert", options.steps or 20, *epochs, *options.precision, rows=CACHED)
    runs = {f"{views}_views": partial(work.cached, views) for views in (1, work.args.cached_views)}
    figures = take_turns(options.rounds, **runs, baseline=work.baseline)
    return [compare(figures, run, "baseline", "rows/s", ">= 20") for run in runs]


def loading(options: argparse.Namespace) -> list[dict]:
    work = Workload(options.preset or "warmerdbert", options.steps or 20, "--dataloader_num_workers", "0")
    torch.set_num_threads(1)

    def rate(loader: Iterable[dict[str, torch.Tensor]]) -> float:
        batches = iter(loader)
        next(batches)
        began = time.process_time()  # CPU time, for rows per second of one core
        rows = sum(len(batch["labels"]) for batch in itertools.islice(batches, work.steps))
        return rows / (time.process_time() - began)

    by_hand = baseline.loader(work.by_hand, BATCH, workers=0)
    runs = {"ours": partial(rate, work.trainer().get_train_dataloader()), "baseline": partial(rate, by_hand)}
    return [compare(take_turns(options.rounds, **runs), "ours", "baseline", "rows/s and core", ">= 2.3")]


def processes(options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = image_rows(Path(scratch))
        table = Path(scratch) / "table.parquet"
        rows = (options.steps or 20) * BATCH * 5 // 4
        source.select([row % len(source) for row in range(rows)]).to_parquet(table)
        run = partial(launched, options.preset or "warmerdbert", table, folder)
        figures = take_turns(options.rounds, two_processes=partial(run, 2), one_process=partial(run, 1))
    return [compare(figures, "two_processes", "one_process", "rows/s", "-")]


def launched(preset: str, table: Path, folder: Path, count: int) -> float:
    """Rows per second of an epoch in `count` processes, which share the batch and the cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    with tempfile.TemporaryDirectory() as scratch:
        # --multi_gpu makes accelerate use torchrun; --cpu starts one process, even with a larger --num_processes
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu" if count > 1 else "--cpu"]
        command += ["--num_processes", str(count), "--num_machines", "1"]
        command += ["--num_cpu_threads_per_process", str(threads)]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_mmclf.cli", "train"]
        command += ["--data", str(table), "--image_dir", str(folder), "--preset", preset, "--from_scratch"]
        command += ["--num_train_epochs", "1", "--per_device_train_batch_size", str(BATCH // count), "--use_cpu"]
        command += ["true", "--test_fraction", "0", "--disable_tqdm", "true", "--output_dir", f"{scratch}/output"]
        command += ["--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        history = json.loads(Path(scratch, "output", "training.json").read_text())["history"]
    return next(entry["train_samples_per_second"] for entry in history if "train_samples_per_second" in entry)


def against_bare_forward(options: argparse.Namespace, run: str, target: str) -> list[dict]:
    work = Workload(options.preset or "warmerdbert", options.steps or 20)
    figures = take_turns(options.rounds, **{run: getattr(work, run)}, bare_forward=work.bare_forward)
    return [compare(figures, run, "bare_forward", "rows/s", target)]


def memory(options: argparse.Namespace) -> list[dict]:
    measure = partial(in_child, peak_of_training, options.preset or "warmerdbert", options.steps or 5)
    runs = {"ours": partial(measure, "ours"), "baseline": partial(measure, "baseline")}
    checkpointing = partial(measure, "ours", "--activation_checkpointing", "true")
    try:
        checkpointing()
        runs["checkpointing"] = checkpointing
    except ValueError as error:
        print(f"  no activation checkpointing: {error}", file=sys.stderr)
    figures = take_turns(options.rounds, **runs)
    targets = {"ours": "<= 1.0", "checkpointing": "<= 0.7"}
    return [compare(figures, one, "baseline", "MiB", targets[one]) for one in targets if one in figures]


def peak_of_training(preset: str, steps: int, run: str, *flags: str) -> float:
    """Measure the peak memory in MiB of a process that trains in one of the ways of [`Workload`]."""
    work = Workload(preset, steps, *flags)
    if run == "baseline":
        work.plain_model, work.model = baseline.frozen_by_hand(work.model), None  # a single model, as in ours
    getattr(work, run)()
    return peak_memory()


def growth(options: argparse.Namespace) -> list[dict]:
    preset, steps = options.preset or "demo", options.steps or 10_000 // BATCH
    few, many = (Workload(preset, steps, rows=rows) for rows in (1_000, 10_000))
    figures = take_turns(options.rounds, ten_thousand=many.ours, one_thousand=few.ours)
    return [compare(figures, "ten_thousand", "one_thousand", "rows/s", ">= 1.0")]


def startup(options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as scratch:
        table = write_large_table(Path(scratch), options.rows)
        runs = [in_child(start, table) for _ in range(options.rounds)]
    lines = []
    for figures, unit, target in zip(zip(*runs, strict=True), ("s", "MiB more"), ("<= 30", "<= 1024"), strict=True):
        line = {"rows": options.rows, "unit": unit, "median": statistics.median(figures)}
        lines.append(line | {"min": min(figures), "max": max(figures), "target": target})
    return lines


def write_large_table(folder: Path, rows: int) -> Path:
    """Write rows with different image names: folders that link to one, with 1,000 links to a single file."""
    source, drawn = image_rows(folder)
    texts, draw = source["text"][:], random.Random(0)
    real = folder / "0"
    real.mkdir()
    shutil.copy(drawn / source["image"][0], real / "0.jpg")
    for number in range(1, 1_000):
        (real / f"{number}.jpg").hardlink_to(real / "0.jpg")
    for number in range(1, -(-rows // 1_000)):
        (folder / str(number)).symlink_to(real, target_is_directory=True)
    with (folder / "all.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", "Labels", "Caption"])
        for row in range(rows):
            labels = draw.sample(range(18), draw.randint(1, 3))
            image = f"{row // 1_000}/{row % 1_000}.jpg"
            writer.writerow([image, " ".join(map(str, labels)), texts[row % len(texts)]])
    return folder / "all.csv"


def start(table: Path) -> tuple[float, float]:
    """Measure the seconds and the additional MiB until training could begin."""
    before, began = peak_memory(), time.perf_counter()
    prepare_data(DataArguments(data=str(table)))
    return time.perf_counter() - began, peak_memory() - before


def in_child(function: Callable, *args: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux)."""
    # ru_maxrss of a child starts at the memory of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "training": training,
    "frozen": partial(training, preset="densitybert", target=">= 2.5"),
    "cached": cached,
    "processes": processes,
    "loading": loading,
    "evaluation": partial(against_bare_forward, run="scores", target=">= 0.85"),
    "pipeline": partial(against_bare_forward, run="pipeline", target=">= 0.8"),
    "memory": memory,
    "growth": growth,
    "startup": startup,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*BENCHMARKS, "all"], help="What to measure.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each (default: %(default)s).")
    parser.add_argument("--steps", type=int, help="Measured steps of each run (default: 20; memory 5, growth 625).")
    parser.add_argument("--preset", help="Default: warmerdbert; frozen: densitybert; growth: demo.")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="Rows of the table of startup (default: %(default)s)."
    )
    parser.add_argument("--bf16", action="store_true", help="Train ours in bfloat16 (training, frozen, cached).")
    options = parser.parse_args()
    options.precision = ["--bf16", "true", "--use_cpu", "true"] if options.bf16 else []
    if options.what == "all":
        rest = [argument for argument in sys.argv[1:] if argument != "all"]
        for what in BENCHMARKS:
            subprocess.run([sys.executable, __file__, what, *rest], check=True)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Trainer would take an accelerator where there is one
    print(f"\n{options.what}\n{format_table(BENCHMARKS[options.what](options))}")


if __name__ == "__main__":
    main()
