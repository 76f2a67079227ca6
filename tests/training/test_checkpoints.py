import json
import multiprocessing
import os
import shutil
import time
from multiprocessing import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from support.training_runs import TWO_PROCESSES, launch, table_flags, write_table

from hf_mmclf import parse_arguments, train
from hf_mmclf.training.arguments import MMClfTrainingArguments
from hf_mmclf.training.checkpoints import claim_output, damage
from hf_mmclf.training.trainer import MMClfTrainer

STEPS = ["--save_strategy", "steps", "--eval_strategy", "steps", "--save_steps", "1", "--eval_steps", "1"]
STEPS += ["--max_steps", "3", "--no_ablations", "--preset", "demo-text", "--use_cpu"]
RESUMED = ("--resume_from_checkpoint", "true")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def interrupted(table, tmp_path_factory) -> Path:
    """A run that was interrupted after its second step."""
    output = tmp_path_factory.mktemp("runs") / "m"
    training_step = MMClfTrainer.training_step

    def interrupt(self, *args):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return training_step(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MMClfTrainer, "training_step", interrupt)
        run(table, output)
    return output


@pytest.fixture
def output(interrupted, tmp_path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "m")


def run(table: Path, output: Path, *flags: str) -> Path:
    return train(*parse_arguments([*table_flags(table), "--output_dir", str(output), *STEPS, *flags]))


def claim(output: Path, *flags: str):
    return claim_output("demo", parse_arguments(["--output_dir", str(output), *flags])[3])


def assert_refused(kind: type, message: str, output: Path, *flags: str) -> None:
    with pytest.raises(kind, match=message), claim(output, *flags):
        pass


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(name, output, capsys):
    newest, older = output / "checkpoints" / "checkpoint-2", output / "checkpoints" / "checkpoint-1"
    assert damage(newest) is None
    truncate(newest / name)
    with claim(output, *RESUMED) as start:
        assert start.checkpoint == str(older) and start.resumed
    said = capsys.readouterr().err
    assert f"checkpoint-2 is not whole ({name} cannot be read: " in said and "passed over" in said
    assert_refused(ValueError, rf"checkpoint-2 is not whole \({name}", output, RESUMED[0], str(newest))


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_missing_file_makes_a_checkpoint_no_longer_whole(name, output):
    checkpoint = output / "checkpoints" / "checkpoint-2"
    (checkpoint / name).unlink()
    assert damage(checkpoint) == f"{name}: no such file"


def test_the_random_states_of_all_processes_belong_to_a_checkpoint(output):
    checkpoint, run_file = output / "checkpoints" / "checkpoint-2", output / "checkpoints" / "run.json"
    run_file.write_text(json.dumps({**json.loads(run_file.read_text()), "world_size": 2}))
    assert damage(checkpoint) == "rng_state.pth: 1 of 2 files"


def test_without_a_whole_checkpoint_nothing_is_resumed(output):
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        truncate(checkpoint / "optimizer.pt")
    message = r"is whole: checkpoint-2 \(optimizer.pt.*checkpoint-1 \(optimizer.pt.*--output_dir starts anew"
    assert_refused(ValueError, message, output, *RESUMED)


def test_a_run_that_was_killed_in_its_first_save_starts_from_its_beginning(output, capsys):
    for checkpoint in (output / "checkpoints").glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    with claim(output, *RESUMED) as start:
        assert start == (output, None, True, False)
    assert "the run starts from its beginning" in capsys.readouterr().err


def test_damaged_best_weights_are_an_error_now_and_not_after_training(output):
    older, newest = (output / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "best_model_checkpoint": str(older)}))
    truncate(older / "model.safetensors")
    message = "model.safetensors cannot be read.*checkpoint-1, the best checkpoint so far"
    assert_refused(ValueError, message, output, *RESUMED)


def test_resuming_with_other_rows_or_settings_is_refused_and_names_them(output, table, tmp_path):
    with pytest.raises(ValueError) as caught:
        flags = ["--seed", "7", "--per_device_train_batch_size", "2", "--swap_words", "0.3", "--width", "16"]
        run(table, output, *RESUMED, *flags)
    for text in ("seed was 42 and is 7", "per_device_train_batch_size was ", "swap_words was", "width was"):
        assert text in str(caught.value)
    other = tmp_path / "other.csv"
    lines = table.read_text().splitlines()
    other.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    with pytest.raises(ValueError, match="train rows was 48, digest .*test rows was"):
        run(table, output, *RESUMED, "--data", str(other))
    with pytest.raises(ValueError, match="splits was .*seed 0 and is .*seed 5"):
        run(table, output, *RESUMED, "--split_seed", "5")
    assert not (output / "checkpoints" / "lock").exists()


def test_a_run_can_be_made_longer_and_says_that_it_has_finished(output, table, capsys):
    truncate(output / "checkpoints" / "checkpoint-2" / "optimizer.pt")
    run(table, output, *RESUMED, "--max_steps", "4", "--logging_steps", "1", "--keep_checkpoints")
    said = capsys.readouterr().err
    assert "max_steps was 3 and is 4: from here on" in said
    assert f"Resuming from {output}/checkpoints/checkpoint-1" in said
    record = json.loads((output / "training.json").read_text())
    assert record["resumed"] and record["history"][-1]["step"] == 4
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert run(table, output, *RESUMED) == output
    assert f"The run in {output} has finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_folder_has_one_run(tmp_path):
    output = tmp_path / "m"
    with claim(output):
        message = rf"in use by another run \(process {os.getpid()} on .*delete {output}/checkpoints/lock"
        assert_refused(FileExistsError, message, output)
        assert_refused(FileExistsError, message, output, *RESUMED)
    assert not output.exists()


def start(args: MMClfTrainingArguments, barrier: Barrier, said: Queue) -> None:
    """Claim a folder in a process of its own, and keep it until all processes have tried."""
    barrier.wait()
    try:
        with claim_output("demo", args) as claimed:
            said.put(str(claimed.output))
            barrier.wait()
    except FileExistsError:
        said.put("refused")
        barrier.wait()


@pytest.mark.parametrize(
    ("flags", "outcome"), [(["--output_dir", "m"], ["m", "refused"]), ([], ["outputs/demo", "outputs/demo-2"])]
)
def test_of_two_runs_at_once_one_is_refused_and_default_names_differ(flags, outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, context = parse_arguments(flags)[3], multiprocessing.get_context("fork")
    assert args.process_index == 0
    for _ in range(10):
        barrier, said = context.Barrier(2), context.Queue()
        runs = [context.Process(target=start, args=(args, barrier, said)) for _ in range(2)]
        for process in runs:
            process.start()
        assert sorted(said.get(timeout=60) for _ in runs) == outcome
        for process in runs:
            process.join()
        assert not list(tmp_path.rglob("checkpoints"))


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args, context = parse_arguments(["--output_dir", "m"])[3], multiprocessing.get_context("fork")
    barrier, said = context.Barrier(2), context.Queue()
    killed = context.Process(target=start, args=(args, barrier, said))
    killed.start()
    barrier.wait()
    assert said.get(timeout=60) == "m"
    killed.kill()
    killed.join()
    with claim(Path("m")) as claimed:
        assert claimed.checkpoint is None
    assert f"was killed (process {killed.pid} on" in capsys.readouterr().err
    assert not Path("m").exists()


@pytest.mark.slow
def test_the_processes_of_a_run_have_one_lock(tmp_path):
    table, output = write_table(tmp_path / "table"), tmp_path / "m"
    flags = [*table_flags(table), *STEPS, "--max_steps", "8", "--output_dir", str(output)]
    first = launch(*flags, options=TWO_PROCESSES)
    while not (output / "checkpoints" / "run.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    assert_refused(FileExistsError, "in use by another run", output)
    log, _ = first.communicate(timeout=300)
    assert first.returncode == 0, log
    again = launch(*flags, *RESUMED, options=TWO_PROCESSES)
    assert "has finished" in again.communicate(timeout=300)[0] and again.returncode == 0
