import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_mmclf import parse_arguments, train

NOTEBOOK = Path(__file__).parents[2] / "examples" / "inference.ipynb"
# connections fail in the kernel: what needs the network does not go unnoticed
OFFLINE = """
import socket

def refuse(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"no network here: {address}")
    return connect(self, address)

connect, socket.socket.connect = socket.socket.connect, refuse
"""


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory):
    """A folder of a model of the embedded data set that has learned hardly anything."""
    flags = ["--preset", "demo", "--demo_rows", "60", "--max_steps", "1"]
    return train(*parse_arguments([*flags, "--output_dir", str(tmp_path_factory.mktemp("model"))]))


def test_it_is_short_and_bare(notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) < 12
    assert all(cell.id for cell in notebook.cells)
    for cell in notebook.cells:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|usr)/|[A-Z]:\\", cell.source)
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_runs_from_top_to_bottom(notebook, demo_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCLF_MODEL", str(demo_model))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    shown = {name: [kind for output in found for kind in output.get("data", {})] for name, found in outputs.items()}
    assert "wants kite" in str(outputs["load"]) and "in truth: ['ball', 'boat', 'gift']" in str(outputs["one"])
    assert "image/png" in shown["one"]
    assert "text/html" in shown["table"] and "text/html" in shown["threshold"]
    assert shown["why"].count("image/png") == 2
