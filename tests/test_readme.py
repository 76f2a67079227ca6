import re
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_mmclf import cli, parse_arguments
from hf_mmclf.export import onnx_predict
from hf_mmclf.presets import PRESETS, config_from_preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = {
    row.split("`")[1]: [cell.strip() for cell in row.strip("|").split("|")]
    for row in re.findall(r"^\| `.*", README, re.M)
}


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.poster])
def test_table_of_systems_says_what_the_presets_are(name):
    config, poster = config_from_preset(name), PRESETS[name].poster
    _, image, text, fusion, unfrozen, width, parameters, megabytes, threshold, f1 = ROWS[name]
    assert (image != "–", text != "–") == (config.has_image, config.has_text)
    assert image in ("–", (config.image_backbone or "").removesuffix(".tv_in1k"))
    assert (int(parameters.replace(",", "")), float(megabytes)) == (poster.parameters, poster.megabytes)
    assert (float(threshold), float(f1)) == (config.threshold, poster.f1_validation)
    if config.has_image and config.has_text:
        assert fusion == config.fusion + (" + norm" if config.fusion_norm else "")
        assert unfrozen == f"{config.unfrozen_image_stages} / {config.unfrozen_text_layers}"
        assert int(width) == config.width


def test_every_flag_it_names_exists(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help_all"])
    known = capsys.readouterr().out
    for command in ("evaluate", "compare", "predict", "push", "export", "cache"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known += capsys.readouterr().out
    scripts = Path(onnx_predict.__file__), *(ROOT / "examples").glob("*.py")
    known += "".join(script.read_text(encoding="utf-8") for script in scripts)
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    assert not [flag for flag in re.findall(r"--[a-z_0-9]+", README) if flag not in known and flag not in launcher]


def test_every_file_and_target_it_names_exists():
    for file in re.findall(r"(?:examples|benchmarks)/[\w./]+\w", README):
        assert (ROOT / file).exists(), file
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
