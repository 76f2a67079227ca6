"""Pushing an output folder to the Hub: one commit with the model, and nothing of its training."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers.utils import logging

from ..inference.folders import atomic_folder, save_model
from ..inference.predictor import Predictor
from ..model.modeling_mmclf import MMClfForImageTextClassification
from ..model.processing_mmclf import MMClfProcessor
from .card import PLACEHOLDER, write_card
from .plots import PLOTS

logger = logging.get_logger(__name__)

# The files of an output folder that are sent, as patterns of their paths. Nothing else is sent, and none is a pickle.
PUBLISHED = (
    *("README.md", "config.json", "model*.safetensors", "model*.safetensors.index.json", "*_mmclf.py"),
    *("handler.py", "requirements.txt"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "metrics.json", "training.json", "splits.csv", *PLOTS),
    *("onnx/*.onnx", "onnx/*.onnx.data", "onnx/*.json", "onnx/*.txt", "onnx/*.py", "onnx/*.md"),
)


def save_for_hub(model: MMClfForImageTextClassification, processor: MMClfProcessor, folder: str | Path) -> None:
    """
    Write a folder that `AutoModel`, `AutoProcessor` and `pipeline` load, with this package installed or, with
    `trust_remote_code=True`, without it. Every training run ends with the same step.

    Args:
        model ([`MMClfForImageTextClassification`]): The model, with labels and thresholds in its `config`.
        processor ([`MMClfProcessor`]): The processor, with an image processor and a tokenizer where the model needs
            them.
        folder (`str` or `Path`): The folder. Other files in it stay: a card is written only if there is none, and
            it shows `metrics.json`, `training.json` and plots that are there.

    Raises:
        `ValueError`: If the processor lacks a part, or has a part that the model does not use.
        `FileExistsError`: If the folder has files of a model with other modalities, or an ONNX export.
    """
    config = model.config
    for name, needed in {"image_processor": config.has_image, "tokenizer": config.has_text}.items():
        if (getattr(processor, name) is not None) != needed:
            state, wanted = ("no", "needs one") if needed else ("a", "has no use for it")
            raise ValueError(f"the processor has {state} {name}, and the model {wanted}")
    unfit = [] if config.has_image else ["preprocessor_config.json"]
    unfit += [] if config.has_text else ["tokenizer.json", "tokenizer_config.json"]
    if found := [name for name in (*unfit, "onnx") if Path(folder, name).exists()]:
        raise FileExistsError(f"{folder} has {', '.join(found)} of another model; remove it, or give another folder")
    with atomic_folder(folder) as stage:
        save_model(model, processor, stage)
        if not Path(folder, "README.md").exists():
            for name in ("metrics.json", "training.json", *PLOTS):  # the card shows them
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
    Push an output folder to the Hub as one commit: weights, code, preprocessing, card, plots and figures.

    The files are sent first and the commit is made last, so that a repository does not show half a model. There is
    one exception: with Xet storage, huggingface_hub splits the commit of more than 20 files in two if the Hub rejects
    it six times in a row. After a broken connection the same call continues: files that have arrived are not sent
    again. The same commit deletes
    files of an earlier model that this one does not have; other files, such as a licence, stay. In the card,
    `your-name/your-model` becomes `repo_id`.

    Args:
        folder (`str` or `Path`): The output folder of a training run. It is not changed.
        repo_id (`str`): The repository, as user/name or organisation/name. It is created if it does not exist.
        private (`bool`, *optional*): Whether the repository must be private (`True`) or public (`False`). By default
            an existing repository stays as it is, and a new one gets the default of its owner on the Hub.
        revision (`str`, *optional*, defaults to `"main"`): The branch. A new branch holds only this commit.
        tag (`str`, *optional*): A new tag for the commit.
        message (`str`, *optional*, defaults to `"Upload model"`): The message of the commit.
        token (`str`, *optional*): The token. Defaults to that of `HF_TOKEN` or `hf auth login`.
        endpoint (`str`, *optional*): The address of the Hub. Defaults to `HF_ENDPOINT` or https://huggingface.co. A
            Hub without Xet storage needs `HF_HUB_DISABLE_XET=1`.

    Returns:
        `str`: The address of the commit, or of the last commit if nothing has changed.

    Raises:
        `FileNotFoundError`: If the folder has no trained model.
        `ValueError`: If the name or the folder cannot be pushed, if the repository is private or public against
            `private`, if the tag exists, or if the Hub rejects the metadata of the card.
        `PermissionError`: If there is no token, or the token does not allow writing.
        `ConnectionError`: If the Hub cannot be reached, or the connection breaks.
        `OSError`: If another commit was made at the same time. It is left as it is.
    """
    folder, branch = Path(folder), revision or "main"
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} is no repository; expected user/name or organisation/name")
    validate_repo_id(repo_id)
    files = _published_files(folder)
    api = HfApi(endpoint=endpoint, token=token)
    account = _writing_account(api)
    with tempfile.TemporaryDirectory() as stage, _explained(api, repo_id, account):
        _link_files(folder, files, Path(stage), repo_id)
        head = _ready_branch(api, repo_id, private, branch, tag)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=stage,
            allow_patterns=list(PUBLISHED),
            delete_patterns=list(PUBLISHED),
            commit_message=message or "Upload model",
            revision=branch,
            parent_commit=head,  # else files of a commit made at the same time would be lost
        )
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    print(commit.commit_url)
    return commit.commit_url


def _published_files(folder: Path) -> list[str]:
    """List the files to send, by their paths in the folder, and log the others. Raises if the folder is not fit."""
    Predictor.load(folder)
    entries = {entry.relative_to(folder).as_posix(): entry for part in ("*", "onnx/*") for entry in folder.glob(part)}
    files = sorted(path for path in filter_repo_objects(entries, allow_patterns=PUBLISHED) if entries[path].is_file())
    lacks = [path for path in ("README.md", *_code_of(folder, files)) if path not in files]
    if not any(path.endswith(".safetensors") for path in files):
        lacks.append("model.safetensors (weights in other forms are not published)")
    if lacks:
        raise ValueError(f"{folder} lacks {', '.join(lacks)}; `hf_mmclf.save_for_hub` writes all that is needed")
    left_out = sorted(entries.keys() - {*files, "onnx"})
    if left_out:
        logger.info(f"Not sent: {', '.join(f'{path}/' if entries[path].is_dir() else path for path in left_out)}")
    return files


def _code_of(folder: Path, files: Sequence[str]) -> list[str]:
    """List the files with code that the configurations refer to, for users without this package."""
    classes = ["modeling_mmclf.MMClfForImageTextClassification"]
    for path in files:
        if path.endswith("config.json"):
            config = json.loads((folder / path).read_text(encoding="utf-8"))
            classes += [name for name in config.get("auto_map", {}).values() if isinstance(name, str)]
            classes += [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
    return list(dict.fromkeys(f"{name.split('.')[0]}.py" for name in classes))


def _link_files(folder: Path, files: Sequence[str], stage: Path, repo_id: str) -> None:
    """Link the files into an empty folder, where the card gets the name of the repository."""
    (stage / "onnx").mkdir()
    for path in files:
        (stage / path).symlink_to((folder / path).resolve())
    card = stage / "README.md"
    text = card.read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
    card.unlink()  # removes the link only
    card.write_text(text, encoding="utf-8")


def _writing_account(api: HfApi) -> str:
    """Return the account of the token; raise `PermissionError` if there is no token or if it is read-only."""
    advice = f"create a write token at {api.endpoint}/settings/tokens, then run `hf auth login` or set HF_TOKEN"
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"no token for {api.endpoint}; {advice}") from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PermissionError(f"{api.endpoint} rejects the token ({_one_line(error)}); {advice}") from error
    except httpx2.TransportError as error:
        raise ConnectionError(f"{api.endpoint} cannot be reached ({error})") from error
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PermissionError(f"the token {token.get('displayName')!r} of {account['name']} is read-only; {advice}")
    return account["name"]


def _ready_branch(api: HfApi, repo_id: str, private: bool | None, branch: str, tag: str | None) -> str:
    """Create the repository and the branch if they do not exist, and return the commit at the head of the branch."""
    try:
        is_private = api.model_info(repo_id).private
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    else:  # create_repo(exist_ok=True) would ignore `private` for an existing repository
        if private not in (None, is_private):
            state, wanted = ("private", "public") if is_private else ("public", "private")
            where = f"{api.endpoint}/{repo_id}/settings"
            raise ValueError(f"{repo_id} is {state} and nothing was sent; change it to {wanted} at {where} first")
    refs = api.list_repo_refs(repo_id)
    tags = {ref.name for ref in refs.tags}
    if tag in tags:
        raise ValueError(f"{repo_id} has a tag {tag!r} already and nothing was sent; choose another one")
    if branch in tags:
        raise ValueError(f"{branch!r} is a tag of {repo_id}, and tags do not move; choose another name for the branch")
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        # start at the first commit, which holds no model: the model of main could be taken for the one on its way
        heads[branch] = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=branch, revision=heads[branch])
    return heads[branch]


@contextmanager
def _explained(api: HfApi, repo_id: str, account: str) -> Iterator[None]:
    """Turn errors of the Hub into one line that says what happened and what to do."""
    interrupted = f"repeat the push to continue where it stopped; the commit in {repo_id} comes after all files"
    try:
        yield
    except HfHubHTTPError as error:
        status, reason = error.response.status_code, _one_line(error.server_message or error)
        if status == 403:
            raise PermissionError(
                f"{account} cannot write to {repo_id} with this token; check the name before the slash, your role in "
                f"that organisation, and the permissions of the token at {api.endpoint}/settings/tokens (the Hub "
                f"says: {reason})"
            ) from error
        if status == 412:
            raise OSError(
                f"{repo_id} has changed during the push and was left as it is; check it, then repeat the push"
            ) from error
        if status >= 500:
            raise ConnectionError(f"the Hub has failed ({status}: {reason}); {interrupted}") from error
        raise
    except (httpx2.TransportError, ConnectionError, RuntimeError) as error:  # raised by HTTP, Xet and LFS
        raise ConnectionError(
            f"the connection broke ({_one_line(error.__cause__ or error)}); {interrupted}"
        ) from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
