"""The launch files for accelerate, and the README's commands that use them."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

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
