"""A finished folder on the Hub: one commit with the model, and nothing of its training."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ..inference.predictor import Predictor, atomic_folder, save_model
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.processing_mmclf import MMClfProcessor
from .card import PLACEHOLDER, PLOTS

# What a finished folder holds, by sub-folder. Nothing else is sent, and no pickle is among it.
PUBLISHED = {
    "": (
        *("README.md", "config.json", "*.safetensors", "*.safetensors.index.json", "*_mmclf.py"),
        *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"),
        *("sentencepiece.bpe.model", "metrics.json", "training.json", "splits.csv", *PLOTS),
    ),
    "onnx": ("*.onnx", "*.onnx.data", "*.json", "*.txt", "*.py", "*.md"),
}


def save_for_hub(model: MMClfForImageTextClassification, processor: MMClfProcessor, folder: str | Path) -> None:
    """
    Writes a folder that `AutoModel`, `AutoProcessor` and `pipeline` load, where this package is installed and, with
    `trust_remote_code=True`, where it is not; the end of every training run does the same.

    Args:
        model ([`MMClfForImageTextClassification`]): With labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): With the parts that the model needs.
        folder (`str` or `Path`): What else is there stays, so that `metrics.json` or a card of one's own can be there
            already; a card is written where there is none.

    Raises:
        `ValueError`: a processor that lacks a part, or has one too many.
        `FileExistsError`: a folder with parts that would not fit: of a model with other modalities, or in ONNX.
    """
    from ..hub.card import PLOTS, write_card

    config = model.config
    parts = {"image_processor": config.has_image, "tokenizer": config.has_text}
    for name, needed in parts.items():
        if (getattr(processor, name) is not None) != needed:
            wanted = "needs one" if needed else "has no use for it"
            raise ValueError(f"the processor has {'no' if needed else 'a'} {name}, and the model {wanted}")
    unfit = [] if config.has_image else ["preprocessor_config.json"]
    unfit += [] if config.has_text else ["tokenizer.json", "tokenizer_config.json"]
    if found := [name for name in (*unfit, "onnx") if Path(folder, name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(found)} of another model; remove it, or give another folder")
    with atomic_folder(folder) as stage:
        save_model(model, processor, stage)
        if not Path(folder, "README.md").exists():
            for name in ("metrics.json", "training.json", *PLOTS):  # which the card shows
                if Path(folder, name).exists():
                    shutil.copyfile(Path(folder, name), stage / name)
            write_card(stage)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """
    Puts a finished folder on the Hub as one commit: weights, code, preprocessing, card, plots and figures.

    The commit comes last, so that a repository never shows half a model. When the connection breaks, the same call
    goes on: what has arrived is not sent again. Files of an earlier model that this one does not have are deleted in
    the same commit; others (a licence, say) stay. In the card, `your-name/your-model` becomes `repo_id`.

    Args:
        folder (`str` or `Path`): The output folder of a training run; it is not changed.
        repo_id (`str`): user/name or organisation/name; created if it is not there.
        private (`bool`, *optional*): Whether only you and your organisation see it; by default as it is or, if it is
            new, as the Hub does it for that account: public in most cases.
        revision (`str`, *optional*, defaults to `"main"`): The branch; a new one holds only this commit.
        tag (`str`, *optional*): A new name for the commit, to load it by.
        message (`str`, *optional*, defaults to `"Upload model"`): What the commit is about.
        token (`str`, *optional*): Defaults to that of `HF_TOKEN` or `hf auth login`.
        endpoint (`str`, *optional*): Address of the Hub; defaults to `HF_ENDPOINT` or https://huggingface.co. One that
            has no Xet storage needs `HF_HUB_DISABLE_XET=1`.

    Returns:
        `str`: Address of the commit; of the last one if nothing has changed.

    Raises:
        `FileNotFoundError`: no finished folder.
        `ValueError`: a name or a folder that cannot be pushed, or metadata in the card that the Hub refuses.
        `PermissionError`: no token, or one that may not write there.
        `ConnectionError`: the Hub cannot be reached, or the connection broke.
        `OSError`: another push came between, and was left as it is.
    """
    folder, branch = Path(folder), revision or "main"
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} names no repository; expected user/name or organisation/name")
    validate_repo_id(repo_id)
    files = _published_files(folder)
    card = files.pop("README.md").read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
    additions = [CommitOperationAdd("README.md", card.encode())]
    additions += [CommitOperationAdd(path, file) for path, file in files.items()]
    api = HfApi(endpoint=endpoint, token=token)
    account = _writing_account(api)
    with _explained(api, repo_id, account):
        head = _ready_branch(api, repo_id, private, branch, tag)
        there = api.list_repo_files(repo_id, revision=head)
        sent = {addition.path_in_repo for addition in additions}
        stale = [CommitOperationDelete(path) for path in there if _is_published(path) and path not in sent]
        commit = api.create_commit(
            repo_id,
            [*stale, *additions],
            commit_message=message or "Upload model",
            revision=branch,
            parent_commit=head,  # else a push that came between would lose its files
        )
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    print(commit.commit_url)
    return commit.commit_url


def _is_published(path: str) -> bool:
    parent, _, name = path.rpartition("/")
    return any(fnmatchcase(name, pattern) for pattern in PUBLISHED.get(parent, ()))


def _published_files(folder: Path) -> dict[str, Path]:
    """What is sent, by its path in the repository; says what is not. Raises if the folder is not fit to be pushed."""
    try:
        Predictor.load(folder)
    except SafetensorError as error:
        raise ValueError(f"{folder}: the weights cannot be read ({error}); was a copy interrupted?") from error
    entries = sorted(entry for part in PUBLISHED for entry in (folder / part).glob("*"))
    paths = {entry.relative_to(folder).as_posix(): entry for entry in entries if entry.is_file()}
    files = {path: entry for path, entry in paths.items() if _is_published(path)}
    lacks = [path for path in ("README.md", *_code_of(files)) if path not in files]
    if not any(path.endswith(".safetensors") for path in files):
        lacks.append("model.safetensors (weights in other forms are not published)")
    if lacks:
        raise ValueError(f"{folder} lacks {', '.join(lacks)}; `hf_mmclf.save_for_hub` writes all that is needed")
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir() and entry.name not in PUBLISHED]
    if left_out := [*folders, *(path for path in paths if path not in files)]:
        print(f"Not sent: {', '.join(left_out)}")
    return files


def _code_of(files: dict[str, Path]) -> list[str]:
    """The code that people without this package load, as the configurations name it."""
    classes = ["modeling_mmclf.MMClfForImageTextClassification"]
    for file in files.values():
        if file.name.endswith("config.json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            classes += [name for name in config.get("auto_map", {}).values() if isinstance(name, str)]
            classes += [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
    return list(dict.fromkeys(f"{name.split('.')[0]}.py" for name in classes))


def _writing_account(api: HfApi) -> str:
    """The account that the token belongs to; `PermissionError` if there is none or if it cannot write."""
    advice = f"make one that may write at {api.endpoint}/settings/tokens, then run `hf auth login` or set HF_TOKEN"
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"no token for {api.endpoint}; {advice}") from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PermissionError(f"{api.endpoint} does not know the token ({_one_line(error)}); {advice}") from error
    except httpx2.TransportError as error:
        raise ConnectionError(f"{api.endpoint} cannot be reached ({error})") from error
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"the token {token.get('displayName')!r} of {account['name']} may only read; {advice}")
    return account["name"]


def _ready_branch(api: HfApi, repo_id: str, private: bool | None, branch: str, tag: str | None) -> str:
    """Makes repository and branch where they are not there yet; returns the commit that the branch is at."""
    try:
        is_private = api.model_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    else:  # which create_repo(exist_ok=True) would leave as it is, without a word
        if private not in (None, is_private):
            state, wanted = ("private", "public") if is_private else ("public", "private")
            where = f"{api.endpoint}/{repo_id}/settings"
            raise ValueError(f"{repo_id} is {state} and nothing was sent; make it {wanted} at {where} first")
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name for ref in refs.tags}
    if tag in tags:
        raise ValueError(f"{repo_id} has a tag {tag!r} already and nothing was sent; choose another one")
    if branch in tags:
        raise ValueError(f"{branch!r} is a tag of {repo_id} and tags do not move; choose another name for the branch")
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        # at the very first commit, which holds no model: what main holds would look like the one that is on its way
        heads[branch] = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=branch, revision=heads[branch])
    return heads[branch]


@contextmanager
def _explained(api: HfApi, repo_id: str, account: str) -> Iterator[None]:
    """Says in one line what an error of the Hub means, and what to do."""
    interrupted = f"run the same again, it goes on where it stopped; {repo_id} shows nothing of it before all is there"
    try:
        yield
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, _one_line(error.server_message or error)
        if status == 403:
            check = "check the name before the slash, your role in that organisation, and what the token permits at"
            raise PermissionError(
                f"{account} may not write to {repo_id} with this token; {check} {api.endpoint}/settings/tokens "
                f"(the Hub says: {reason})"
            ) from error
        if status == 412:
            raise OSError(
                f"{repo_id} has changed meanwhile and was left alone; look, then run the same again"
            ) from error
        if status >= 500:
            raise ConnectionError(f"the Hub has a problem ({status}: {reason}); {interrupted}") from error
        raise
    except (httpx2.TransportError, ConnectionError, RuntimeError) as error:  # of HTTP, of Xet, and of LFS
        raise ConnectionError(
            f"the connection broke ({_one_line(error.__cause__ or error)}); {interrupted}"
        ) from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
