import ast
import logging
from importlib.resources import files

import pytest

import hf_mmclf


def test_type_checkers_see_every_lazy_name():
    """Parse the `TYPE_CHECKING` block, which is never executed."""
    tree = ast.parse(files(hf_mmclf).joinpath("__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {name.asname: (node.module, name.name) for node in block.body for name in node.names}
    assert imported == {name: (module, name) for name, module in hf_mmclf._LAZY.items()}
    assert files(hf_mmclf).joinpath("py.typed").is_file()


def test_every_public_name_can_be_imported():
    for name in hf_mmclf.__all__:
        assert getattr(hf_mmclf, name) is not None
    assert dir(hf_mmclf) == sorted(hf_mmclf.__all__)
    assert hf_mmclf.FinishedModel is hf_mmclf.Predictor
    with pytest.raises(AttributeError, match="has no attribute 'Predicter'"):
        hf_mmclf.Predicter  # noqa: B018


@pytest.mark.parametrize("rank, written", [(None, "read 3 rows\n"), ("0", "read 3 rows\n"), ("1", "")])
def test_notices_go_to_standard_error_of_the_main_process(rank, written, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    logging.getLogger("hf_mmclf.data").info("read %d rows", 3)
    assert capsys.readouterr() == ("", written)
