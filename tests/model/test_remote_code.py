"""The files that are pushed as code: the rules they keep, and that they work where this package is not."""

import ast
import base64
import getpass
import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors import safe_open
from support.tiny_folder import CAPTIONS, write_folder, write_table

import hf_mmclf
from hf_mmclf.inference.folders import save_model
from hf_mmclf.inference.predictor import Predictor

SOURCES = sorted(Path(hf_mmclf.__file__).with_name("model").glob("*_mmclf.py"))
PEOPLE_HAVE = {"torch", "torchvision", "timm", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors"}
OPTIONAL = {"torchcodec"}
KINDS = ["both", "image", "text"]


def test_these_files_are_pushed():
    names = ["backbones", "configuration", "fusion", "image_processing", "modeling", "pipeline", "pretrained"]
    names += ["processing"]
    assert [file.stem for file in SOURCES] == [f"{name}_mmclf" for name in names]


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.stem)
def test_rules_of_pushed_files(file):
    """What transformers' loader of remote code can follow; see its `dynamic_module_utils`."""
    code = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = {node.module.split(".")[0]}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.col_offset == 0 and node.module and "." not in node.module
            assert file.with_name(f"{node.module}.py") in SOURCES
            continue
        else:
            continue
        optional = OPTIONAL if node.col_offset else set()  # inside a `try`, which the loader leaves out
        assert modules <= PEOPLE_HAVE | optional | sys.stdlib_module_names
    # the loader reads relative imports with this pattern, also in docstrings
    found = re.findall(r"^\s*(?:from|import)\s+\.(\S*)", code, flags=re.MULTILINE)
    assert all(f"{name}.py" in {source.name for source in SOURCES} for name in found)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A folder of packages that has transformers, timm, torch, torchvision and what these require, and no more."""
    folder = tmp_path_factory.mktemp("packages")
    wanted, seen = ["transformers", "timm", "torch", "torchvision"], set()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        link(found, folder)
        for line in found.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
    return folder


def link(found: Distribution, folder: Path) -> None:
    for top in {file.parts[0] for file in found.files if ".." not in file.parts}:
        source = Path(found.locate_file(top))
        if source.exists() and not (folder / top).exists():
            (folder / top).symlink_to(source)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of each kind as training leaves them, and what they say about a batch."""
    folders, expected = {}, {}
    table = tmp_path_factory.mktemp("table")
    write_table(table)
    rows = {"image": [str(table / f"{row}.jpg") for row in range(3)], "text": CAPTIONS[:3]}
    for kind in KINDS:
        finished = Predictor.load(write_folder(tmp_path_factory.mktemp(kind), kind, threshold=0.3))
        folders[kind] = tmp_path_factory.mktemp(f"saved-{kind}")
        save_model(finished.model, finished.processor, folders[kind])
        expected[kind] = outputs(kind, folders[kind], rows, trust_remote_code=False)
    return folders, expected, rows


CHILD = """
import json, sys
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline
import torch

def outputs(kind, folder, rows, **trust):
    rows = {name: column for name, column in rows.items() if kind in ("both", name)}
    model = AutoModel.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    with torch.no_grad():
        logits = model(**processor(images=rows.get("image"), text=rows.get("text"))).logits
    task = {"image": "image-classification", "text": "text-classification"}.get(kind)  # of transformers
    stock = pipeline(task, model=str(folder), **trust)(rows[kind][0], top_k=3) if task else []
    return {
        "logits": logits.tolist(),
        "stock": [row["score"] for row in stock],
        "labels": pipe(folder, **trust)(**rows, batch_size=2),
        "thresholds": model.config.thresholds,
        "config": type(AutoConfig.from_pretrained(folder, **trust)).__name__,
    }
"""
namespace = {"pipe": hf_mmclf.pipeline}
exec(CHILD, namespace)
outputs = namespace["outputs"]
RUN = """
def pipe(folder, **trust):
    return pipeline("image-text-classification", model=folder, **trust)

try:
    import hf_mmclf
except ModuleNotFoundError:
    folders, rows = json.load(sys.stdin)
    results = {kind: outputs(kind, folder, rows, trust_remote_code=True) for kind, folder in folders.items()}
    print(json.dumps(results))
else:
    sys.exit("this environment has hf_mmclf")
"""


@pytest.fixture
def run(environment, tmp_path):
    """Runs code where this package, and the Hub, cannot be reached."""

    def run(code, given=""):
        env = dict(PYTHONPATH=str(environment), HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", PATH=os.environ["PATH"])
        command = [sys.executable, "-S", "-c", code]  # -S: no packages but those of PYTHONPATH
        return subprocess.run(command, input=given, env=env, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_without_this_package_the_outputs_are_the_same(saved, run):
    folders, expected, rows = saved
    child = run(CHILD + RUN, json.dumps([{kind: str(folder) for kind, folder in folders.items()}, rows]))
    assert child.returncode == 0, child.stderr[-3000:]
    for kind, result in json.loads(child.stdout.splitlines()[-1]).items():
        same = expected[kind]
        torch.testing.assert_close(torch.tensor(result["logits"]), torch.tensor(same["logits"]), rtol=0, atol=1e-5)
        scores = (
            torch.tensor(same["logits"])[0].sigmoid().sort(descending=True)[0] if kind != "both" else torch.empty(0)
        )
        torch.testing.assert_close(torch.tensor(result["stock"]), scores, rtol=0, atol=1e-5)
        assert any(len(labels) < 3 for labels in same["labels"])  # else thresholds could be lost
        names, wanted = ([[row["label"] for row in labels] for labels in of["labels"]] for of in (result, same))
        assert names == wanted
        assert result["thresholds"] == [0.3] * 3 and result["config"] == "MMClfConfig"


def test_without_trust_nothing_is_executed(saved, run):
    child = run(f"from transformers import AutoModel; AutoModel.from_pretrained({str(saved[0]['both'])!r})")
    assert child.returncode != 0 and "trust_remote_code" in child.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_has_no_pickle_and_nothing_of_this_machine(kind, saved):
    folder = saved[0][kind]
    words = [str(folder), str(Path.home()), os.uname().nodename, getpass.getuser()]
    private = re.compile("|".join(rf"\b{re.escape(word)}\b" if word.isalnum() else re.escape(word) for word in words))
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                content = json.dumps(weights.metadata()) + " ".join(weights.keys())
        else:
            assert file.suffix in {".json", ".py"} or file.name == "requirements.txt", file
            content = file.read_text(encoding="utf-8")
        assert not private.findall(content), file
    names = {file.name for file in folder.iterdir()}
    needed = {file.name for file in SOURCES} - ({"image_processing_mmclf.py"} if kind == "text" else set())
    assert needed | {"handler.py"} == {name for name in names if name.endswith(".py")}


SERVE = """
import json, runpy, sys
given = json.load(sys.stdin)
results = []
for folder, requests in given:
    handler = runpy.run_path(folder + "/handler.py")["EndpointHandler"](folder)
    for request in requests:
        try:
            results.append(handler(request))
        except ValueError as error:
            results.append(str(error))
assert "hf_mmclf" not in sys.modules
print(json.dumps(results))
"""


def test_an_endpoint_answers_without_this_package(saved, run):
    folders, _, rows = saved
    images = [base64.b64encode(Path(file).read_bytes()).decode() for file in rows["image"]]
    both = [{"image": image, "text": text} for image, text in zip(images, rows["text"], strict=True)]
    url = f"data:image/jpeg;base64,{images[0]}"
    known = [{"image": image, "text": text} for image, text in zip(rows["image"], rows["text"], strict=True)]
    requests = [  # folder, rows of the request, parameters, rows of the pipeline
        (folders["both"], both, {}, known),
        (folders["both"], both[0], {}, known[0]),
        (folders["both"], {"text": CAPTIONS[0]}, {"top_k": 2}, {"text": CAPTIONS[0]}),
        (folders["both"], {"image": url}, {"threshold": 0.1}, {"image": rows["image"][0]}),
        (folders["image"], [{"image": image} for image in images], {}, [{"image": file} for file in rows["image"]]),
        (folders["text"], {"text": CAPTIONS[1]}, {"return_all_scores": True}, {"text": CAPTIONS[1]}),
    ]
    wrong = [
        ({"inputs": {"image": "http://127.0.0.1/a.jpg"}}, "URLs and paths are not read"),
        ({"inputs": {"image": base64.b64encode(b"no image").decode()}}, "record 0: cannot read the image"),
        ({"inputs": {"image": 3}}, "expected an image file in base64"),
        ({"inputs": {"caption": "a dog"}}, "got the keys ['caption']"),
        ({"inputs": "a dog"}, "or a list of these"),
        ({"text": "a dog"}, "got the keys ['text']; expected inputs and parameters"),
        ({"inputs": both[0], "parameters": {"topk": 2}}, "got the parameters ['topk']"),
    ]
    sent = [(str(folder), [{"inputs": given, "parameters": options}]) for folder, given, options, _ in requests]
    sent.append((str(folders["both"]), [request for request, _ in wrong]))
    child = run(SERVE, json.dumps(sent))
    assert child.returncode == 0, child.stderr[-3000:]
    found = json.loads(child.stdout.splitlines()[-1])
    for (folder, _, options, same), answer in zip(requests, found, strict=False):
        expected = hf_mmclf.pipeline(folder)(same, **options)
        pairs = zip(answer, expected, strict=True) if isinstance(same, list) else [(answer, expected)]
        for labels, wanted in pairs:
            assert [label["label"] for label in labels] == [label["label"] for label in wanted]
            assert [label["score"] for label in labels] == pytest.approx([one["score"] for one in wanted], abs=1e-5)
    for (_, message), answer in zip(wrong, found[len(requests) :], strict=True):
        assert message in answer


def test_the_requirements_of_an_endpoint_are_those_of_this_package(saved):
    lines = (saved[0]["both"] / "requirements.txt").read_text().splitlines()
    names = {"torch", "torchvision", "timm", "transformers", "pillow"}
    assert {Requirement(line).name for line in lines} == names and set(lines) <= set(requires("hf_mmclf"))
