import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_mmclf import cli, parse_arguments
from hf_mmclf.export import onnx_predict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_flag_it_names_exists(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help_all"])
    known = capsys.readouterr().out
    for command in ("evaluate", "compare", "predict", "push", "export", "presets", "cache"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    scripts = Path(onnx_predict.__file__), *(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")
    known += "".join(script.read_text(encoding="utf-8") for script in scripts)
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert not [flag for flag in re.findall(r"--[a-z_0-9]+", README) if flag not in known and flag not in launcher]


def test_every_file_and_target_it_names_exists():
    for file in re.findall(r"(?:examples|benchmarks)/[\w./]+\w", README):
        assert (ROOT / file).exists(), file
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
