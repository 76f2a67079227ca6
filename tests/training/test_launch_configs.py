"""The launch files for accelerate, and the README's commands for them; two CPU processes stand in for machines."""

import json
import re
import socket
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from support.training_runs import launch, table_flags, write_table

from hf_mmclf import parse_arguments

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs" / "accelerate"
COMMANDS = re.findall(r"^accelerate launch (--config_file .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "name, kind, machines, processes",
    [
        ("one_gpu", "NO", 1, 1),
        ("eight_gpus", "MULTI_GPU", 1, 8),
        ("two_machines", "MULTI_GPU", 2, 16),
        ("fsdp", "FSDP", 1, 8),
    ],
)
def test_launch_file_loads_and_the_readme_has_its_command(name, kind, machines, processes, monkeypatch):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_machines, config.num_processes) == (kind, machines, processes)
    monkeypatch.chdir(ROOT)
    (command,) = [line for line in COMMANDS if f"/{name}.yaml" in line and "train.py" in line]
    parsed = launch_command_parser().parse_args(command.split())
    assert Path(parsed.config_file).samefile(CONFIGS / f"{name}.yaml") and Path(parsed.training_script).is_file()
    assert parse_arguments(parsed.training_script_args)[0].preset == "warmerdbert"
    assert (parsed.main_process_ip is None) == (machines == 1)


def test_every_launch_file_is_in_the_readme():
    assert all(any(f"/{file.name} " in line for line in COMMANDS) for file in CONFIGS.iterdir())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_machines_of_one_process_each_train_one_model(tmp_path):
    """The file's own rendezvous, with one CPU process in place of each machine's eight GPUs."""
    flags = [*table_flags(write_table(tmp_path / "table")), "--output_dir", str(tmp_path / "m"), "--use_cpu"]
    options = ["--config_file", str(CONFIGS / "two_machines.yaml"), "--num_processes", "2"]
    options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    machines = [launch(*flags, "--max_steps", "2", options=[*options, "--machine_rank", rank]) for rank in ("0", "1")]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert ["Output folder:" in output for output in outputs] == [True, False]
    assert json.loads((tmp_path / "m" / "training.json").read_text())["processes"] == 2
