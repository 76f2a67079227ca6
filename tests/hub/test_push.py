import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from support.hub_server import HubHandler, HubServer, card_errors
from support.tiny_folder import CAPTIONS, write_folder, write_table
from transformers import AutoConfig

from hf_mmclf.hub.push import PLACEHOLDER, push_to_hub
from hf_mmclf.inference.folders import save_model
from hf_mmclf.inference.predictor import Predictor
from hf_mmclf.model import modeling_mmclf

NAME = "user/toys"
CARD = f"""---
license: mit
pipeline_tag: image-classification
library_name: transformers
datasets: [user/photos]
base_model: [timm/densenet121.tv_in1k, google/bert_uncased_L-2_H-128_A-2]
model-index:
- name: {PLACEHOLDER}
  results:
  - task: {{type: image-classification}}
    dataset: {{type: user/photos, name: Photos}}
    metrics: [{{type: f1, value: 0.8}}]
---

# Toys

`AutoModel.from_pretrained("{PLACEHOLDER}")`
"""
SENT = {
    *(
        "README.md",
        "handler.py",
        "requirements.txt",
        "config.json",
        "model.safetensors",
        "f1_by_label.png",
        "metrics.json",
        "splits.csv",
        "onnx/model.onnx",
    ),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *(file.name for file in Path(modeling_mmclf.__file__).parent.glob("*_mmclf.py")),
}
KEPT = ["checkpoints/model.safetensors", "onnx/cache.pkl", "predictions-test.csv", "pytorch_model.bin", "train.log"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    finished = Predictor.load(write_folder(tmp_path_factory.mktemp("tiny"), threshold=0.3))
    folder = tmp_path_factory.mktemp("model")
    save_model(finished.model, finished.processor, folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    (folder / "metrics.json").write_text("{}", encoding="utf-8")
    (folder / "splits.csv").write_text("split,row\n", encoding="utf-8")
    (folder / "f1_by_label.png").write_bytes(b"\x89PNG\0")
    for path in ["onnx/model.onnx", *KEPT]:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"\0" + path.encode() * 50)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """An output folder with files that must not be sent."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def push(hub, folder):
    def push(**options):
        return push_to_hub(folder, **{"repo_id": NAME, "token": hub.token, "endpoint": hub.endpoint, **options})

    return push


@pytest.fixture
def impatient(monkeypatch):
    """Skip the waits of the client, which retries a broken connection for up to 23 seconds."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def local_files(folder):
    files = {path: (folder / path).read_bytes() for path in SENT}
    return {**files, "README.md": files["README.md"].replace(PLACEHOLDER.encode(), NAME.encode())}


def uploads(hub):
    """The number of uploads of each large file."""
    return Counter(
        request.path.split("?")[0] for request in hub.requests if request.method == "PUT" and request.status
    )


def set_threshold(folder, threshold):
    config = AutoConfig.from_pretrained(folder)
    config.threshold = threshold
    config.save_pretrained(folder)


def test_one_commit_with_the_model_and_nothing_else(hub, folder, push, capsys):
    url = push()
    repo = hub.model(NAME)
    commit, first = repo.history()
    assert commit.title == "Upload model" and set(first.tree) == {".gitattributes"}
    files = repo.files()
    del files[".gitattributes"]
    assert files == local_files(folder) and set(files) == SENT
    assert f'# Toys\n\n`AutoModel.from_pretrained("{NAME}")`' in files["README.md"].decode()
    assert (folder / "README.md").read_text(encoding="utf-8") == CARD
    assert url == f"{hub.endpoint}/{NAME}/commit/{commit.sha}"
    said = capsys.readouterr()
    (notice,) = re.findall("^Not sent: (.*)$", said.err, re.M)
    assert set(notice.split(", ")) == {"checkpoints/", *KEPT[1:]}
    assert said.out == f"{url}\n"
    assert [ref.name for ref in HfApi(endpoint=hub.endpoint).list_repo_refs(NAME).branches] == ["main"]


def test_large_files_go_to_the_storage_without_the_token(hub, push):
    push()
    assert uploads(hub).total() == 3  # weights, ONNX, plot
    assert {request.token for request in hub.requests} == {hub.token, None}
    assert all((request.token is None) == (request.method == "PUT") for request in hub.requests)


def test_private(hub, push):
    push(private=True, message="For us")
    stranger, owner = HfApi(endpoint=hub.endpoint, token=False), HfApi(endpoint=hub.endpoint, token=hub.token)
    with pytest.raises(RepositoryNotFoundError):
        stranger.model_info(NAME)
    assert owner.model_info(NAME).private and owner.list_repo_commits(NAME)[0].title == "For us"
    push()
    assert owner.model_info(NAME).private
    push(repo_id="team/toys", private=False)
    assert stranger.model_info("team/toys").private is False


@pytest.mark.parametrize("private, state", [(True, "public"), (False, "private")])
def test_visibility_that_contradicts_private_is_an_error(private, state, hub, push):
    """`create_repo(private=True)` would leave a public repository public, without a message."""
    HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(NAME, private=not private)
    with pytest.raises(
        ValueError, match=f"{NAME} is {state} and nothing was sent; change it to .* at .*/settings first"
    ):
        push(private=private)
    assert len(hub.model(NAME).commits) == 1


def test_revision_and_tag(hub, folder, push):
    push(tag="v1")
    repo = hub.model(NAME)
    set_threshold(folder, 0.6)
    (folder / "f1_by_label.png").unlink()
    push(revision="precise", tag="v2")
    push(revision="precise")
    thresholds = {name: json.loads(repo.files(name)["config.json"])["threshold"] for name in ("main", "precise")}
    assert thresholds == {"main": 0.3, "precise": 0.6}
    assert repo.tags == {"v1": repo.branches["main"], "v2": repo.branches["precise"]}
    assert set(repo.files("precise")) == {".gitattributes", *SENT} - {"f1_by_label.png"}
    assert len(list(repo.history("precise"))) == 2  # on the initial commit, not on that of main
    set_threshold(folder, 0.7)
    push(revision="precise")
    assert json.loads(repo.files("v2")["config.json"])["threshold"] == 0.6


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tag="v1"), "has a tag 'v1' already and nothing was sent; choose another one"),
        (dict(revision="v1"), "'v1' is a tag of user/toys, and tags do not move; choose another name"),
    ],
)
def test_tags_do_not_move(options, message, hub, folder, push):
    push(tag="v1")
    set_threshold(folder, 0.6)
    with pytest.raises(ValueError, match=message):
        push(**options)
    assert len(hub.model(NAME).commits) == 2 and uploads(hub).total() == 3


def test_the_next_model_replaces_the_last(hub, folder, push):
    push()
    repo, api = hub.model(NAME), HfApi(endpoint=hub.endpoint, token=hub.token)
    api.upload_file(path_or_fileobj=b"MIT", path_in_repo="LICENSE", repo_id=NAME)
    for path in ("f1_by_label.png", "onnx/model.onnx", "splits.csv"):
        (folder / path).unlink()
    set_threshold(folder, 0.6)
    push()
    removed = {"f1_by_label.png", "onnx/model.onnx", "splits.csv"}
    assert set(repo.files()) == {".gitattributes", "LICENSE", *SENT} - removed
    assert len(list(repo.history())) == 4
    assert set(uploads(hub).values()) == {1} and uploads(hub).total() == 3


def test_nothing_new_makes_no_commit(hub, push):
    assert push() == push()
    assert len(hub.model(NAME).commits) == 2


@pytest.mark.parametrize("revision", [None, "precise"])
def test_a_broken_upload_shows_no_file_and_can_be_continued(revision, hub, folder, push, impatient):
    if revision:
        push()
        (folder / "model.safetensors").write_bytes(other_weights(folder))
        (folder / "onnx/model.onnx").write_bytes(b"\0other")
    before = uploads(hub)
    hub.cut(after=1)
    with pytest.raises(ConnectionError, match="the connection broke .*; repeat the push to continue where it stopped"):
        push(revision=revision)
    branch = revision or "main"
    assert (uploads(hub) - before).total() == 1
    assert set(hub.model(NAME).files(branch)) == {".gitattributes"}
    with pytest.raises(EntryNotFoundError):
        HfApi(endpoint=hub.endpoint).hf_hub_download(NAME, "config.json", revision=branch, cache_dir=folder / "cache")
    hub.mend()
    push(revision=revision)
    assert {path: hub.model(NAME).files(branch)[path] for path in SENT} == local_files(folder)
    assert set(uploads(hub).values()) == {1}
    assert len(list(hub.model(NAME).history(branch))) == 2


def other_weights(folder):
    """Weights of the same shape."""
    finished = Predictor.load(folder)
    with torch.no_grad():
        finished.model.classifier.bias.add_(1)
    finished.model.save_pretrained(folder / "other")
    content = (folder / "other" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "other")
    return content


def test_a_connection_that_breaks_at_the_commit(hub, folder, push):
    hub.cut("POST /api/models/user/toys/commit/")
    with pytest.raises(ConnectionError, match="the commit in user/toys comes after all files"):
        push(tag="v1")
    assert len(hub.model(NAME).commits) == 1
    hub.cut("POST /api/models/user/toys/tag/")
    with pytest.raises(ConnectionError):
        push(tag="v1")
    hub.mend()
    push(tag="v1")
    repo = hub.model(NAME)
    assert len(repo.commits) == 2 and repo.tags == {"v1": repo.branches["main"]}
    assert set(uploads(hub).values()) == {1}


def test_an_error_of_the_hub(hub, push, monkeypatch):
    monkeypatch.setattr(HubHandler, "commit", None)  # status 500
    with pytest.raises(ConnectionError, match=r"the Hub has failed \(500: .*; repeat the push"):
        push()


def test_a_commit_made_at_the_same_time_is_kept(hub, push, monkeypatch):
    api, list_files = HfApi(endpoint=hub.endpoint, token=hub.token), HfApi.list_repo_files

    def list_and_lose_the_race(*args, **options):
        files = list_files(*args, **options)
        api.create_commit(NAME, [CommitOperationAdd("f1_by_label.png", b"of another")], commit_message="Faster")
        return files

    monkeypatch.setattr(HfApi, "list_repo_files", list_and_lose_the_race)
    with pytest.raises(
        OSError, match=f"{NAME} has changed during the push and was left as it is; check it, then repeat the push"
    ):
        push()
    assert hub.model(NAME).files()["f1_by_label.png"] == b"of another"


class TestToken:
    ADVICE = "create a write token at http://.*/settings/tokens, then run `hf auth login` or set HF_TOKEN$"

    def fails(self, push, **options):
        with pytest.raises(PermissionError) as caught:
            push(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing(self, hub, push):
        assert re.match(f"no token for {hub.endpoint}; {self.ADVICE}", self.fails(push, token=None))
        assert hub.requests == []

    @pytest.mark.parametrize("token", ["hf_wrong", None])
    def test_wrong(self, token, hub, push, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        message = self.fails(push, token=token)
        assert re.match(rf"{hub.endpoint} rejects the token \(Invalid user token.*\); {self.ADVICE}", message)
        assert "HF_TOKEN environment variable" in message
        assert hub.repos == {}

    def test_read_only(self, hub, push):
        message = self.fails(push, token=hub.read_token)
        assert re.match(f"the token 'my read token' of user is read-only; {self.ADVICE}", message)
        assert hub.repos == {}

    def test_from_the_environment(self, hub, push, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", hub.token)
        push(token=None)
        assert hub.model(NAME).files()

    @pytest.mark.parametrize("name", ["club/toys", "stranger/toys", "USER/toys"])
    def test_a_namespace_of_others(self, name, hub, push):
        message = self.fails(push, repo_id=name)
        assert message.startswith(f"user cannot write to {name} with this token; check the name before the slash")
        assert f'the rights to create a model under the namespace "{name.split("/")[0]}"' in message
        assert hub.repos == {}

    @pytest.mark.parametrize("there", [False, True])
    def test_fine_grained_without_the_right(self, there, hub, push):
        if there:
            HfApi(endpoint=hub.endpoint, token=hub.token).create_repo(NAME)
        message = self.fails(push, token=hub.fine_token)
        assert message.startswith(f"user cannot write to {NAME} with this token")
        assert not there or set(hub.model(NAME).files()) == {".gitattributes"}


@pytest.mark.parametrize(
    "name", ["toys", "a/b/c", "user/", "user/to ys", "user/to--ys", "user/.toys", "user/toys.git"]
)
def test_invalid_names(name, hub, push):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        push(repo_id=name)
    assert hub.requests == []


class TestFoldersThatAreNotFit:
    @pytest.fixture(autouse=True)
    def nothing_is_sent(self, hub):
        yield
        assert hub.requests == []

    @pytest.mark.parametrize("gone", ["README.md", "configuration_mmclf.py", "modeling_mmclf.py", "pipeline_mmclf.py"])
    def test_a_file_is_missing(self, gone, folder, push):
        (folder / gone).unlink()
        with pytest.raises(ValueError, match=f"model lacks {gone}; `hf_mmclf.save_for_hub` writes all that is needed"):
            push()

    def test_a_folder_without_code(self, folder, push):
        shutil.rmtree(folder)
        for file in write_folder(folder).glob("*.py"):
            file.unlink()
        with pytest.raises(ValueError, match="lacks README.md, modeling_mmclf.py"):
            push()

    def test_unfinished(self, folder, push):
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"no config.json\); its training has not finished"):
            push()

    def test_weights_cut_short(self, folder, push):
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-8])
        with pytest.raises(ValueError, match="model: model.safetensors cannot be read: .*; copy or download"):
            push()

    def test_weights_in_a_pickle(self, folder, push):
        torch.save(Predictor.load(folder).model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="lacks model.safetensors"):
            push()


def test_a_card_that_the_hub_refuses(hub, folder, push):
    (folder / "README.md").write_text(CARD.replace("license: mit", "license: beerware"), encoding="utf-8")
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        push()
    assert set(hub.model(NAME).files()) == {".gitattributes"} and uploads(hub) == {}


def test_unreachable_hub(push, monkeypatch):
    with HubServer() as gone:
        pass
    with pytest.raises(ConnectionError, match=f"{gone.endpoint} cannot be reached"):
        push(endpoint=gone.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="offline mode is enabled. To disable it"):
        push()


EXAMPLE = """
import runpy, sys
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PULL = """
import json, sys
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoModel, AutoProcessor
import hf_mmclf

name, images, text = json.load(sys.stdin)
model, processor = AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)
with torch.no_grad():
    logits = model(**processor(images=images, text=text)).logits
precise = AutoModel.from_pretrained(name, revision="precise")
found = {"logits": logits.tolist(), "labels": hf_mmclf.pipeline(name)(text=text), "snapshot": snapshot_download(name)}
found["thresholds"] = [model.config.threshold, precise.config.threshold]
if not constants.HF_HUB_OFFLINE:
    card = ModelCard.load(name)
    card.validate()
    found["metrics"] = [result.metric_value for result in card.data.eval_results]
print(json.dumps(found))
"""


def run(code, arguments, given, environment):
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.run(command, input=given, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    return child.stdout.splitlines()


@pytest.mark.slow
def test_push_and_pull_and_the_example(hub, folder, push, tmp_path):
    """Two processes for which this is the Hub: one runs the example and pulls, the other pulls offline."""
    push(private=True)
    write_table(tmp_path)
    rows = [str(tmp_path / f"{row}.jpg") for row in range(3)], CAPTIONS[:3]
    finished = Predictor.load(folder)
    with torch.no_grad():
        logits = finished.model(**finished.processor(*rows)).logits
    example = str(Path(__file__).parents[2] / "examples" / "push_to_hub.py")
    arguments = [example, str(folder), NAME, "--threshold", "0.8", "--revision", "precise"]
    environment = hub.environment(tmp_path / "home")
    given = json.dumps([NAME, *rows])
    lines = run(EXAMPLE + PULL, arguments, given, environment)

    repo, pulled = hub.model(NAME), json.loads(lines[-1])
    torch.testing.assert_close(torch.tensor(pulled["logits"]), logits, rtol=0, atol=1e-6)
    assert pulled["metrics"] == [0.8] and pulled["thresholds"] == [0.3, 0.8]
    snapshot = Path(pulled["snapshot"])
    assert {path: (snapshot / path).read_bytes() for path in SENT} == local_files(folder)
    assert all(request.token is None for request in hub.requests if request.path.startswith("/models/"))

    assert lines[-2].endswith(repo.branches["precise"])
    ours, theirs = (json.loads(repo.files(name)["config.json"]) for name in ("main", "precise"))
    assert theirs == {**ours, "threshold": 0.8}
    card = ModelCard(repo.files("precise")["README.md"].decode())
    assert card.text.lstrip().startswith("> Threshold 0.8 for all labels. The figures below are for the fitted 0.3.")
    assert local_files(folder) == {path: repo.files()[path] for path in SENT}

    asked = len(hub.requests)
    offline = json.loads(run(PULL, [], given, {**environment, "HF_HUB_OFFLINE": "1"})[-1])
    assert {**pulled, **offline} == pulled
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    "metadata, error",
    [
        (dict(license="MIT"), '"license" must be one of'),
        (dict(pipeline_tag="image-text-classification"), '"pipeline_tag" must be one of'),
        (dict(base_model="/home/models/bert"), '"base_model" with value "/home/models/bert" is not valid'),
        (dict(datasets=["toys", "my own photos"]), '"datasets" with value "my own photos" is not valid'),
        (dict(language="English"), '"language" must be a code'),
        (dict(tags=["image", 3]), '"tags" must be text, not 3'),
        ({"model-index": [dict(results=[])]}, r'"\[0\].name" is required'),
        ({"model-index": [dict(name="a", results=[dict(metrics=[{}])])]}, r'"\[0\].results\[0\].dataset.name"'),
        (
            {"model-index": [dict(name="a", results=[dict(metrics=[{}])])]},
            r'"\[0\].results\[0\].metrics\[0\].value"',
        ),
    ],
)
def test_cards_that_the_stand_in_for_the_hub_refuses(metadata, error):
    assert any(re.match(error, found) for found in card_errors(metadata))
    assert card_errors({"license": "mit", "tags": ["a"], "language": "en", "base_model": "bert", "datasets": []}) == []
