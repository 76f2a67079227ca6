"""
A Hub on the loopback: the part of the HTTP API of the Hub with which `huggingface_hub` pushes and loads models.

Model repositories (`namespace/name`) have a history. A commit is atomic and holds a whole tree, so each revision
(branch, tag or sha) loads its own files. There are two servers, as for the Hub: the Hub itself knows tokens; large
files are in a storage with its own origin, which takes signed URLs and refuses tokens.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token).create_repo("user/model")
        subprocess.run(command, env=hub.environment(tmp_path))  # a process for which this is the Hub

There is one account, `user`, which may write to the organisation `team` and only read in `club`. It has three tokens:
`token` (role write), `read_token` and `fine_token` (fine-grained, without the right to write). `requests` lists the
requests, and `cut` breaks connections in the middle of a request.

Uploads need a client without Xet (`HF_HUB_DISABLE_XET=1`, which `environment` sets). Cards are judged more strictly
than by the Hub, which only warns of an unknown `pipeline_tag`.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "user"
ORGANISATIONS = {"team": "write", "club": "read"}
REGULAR_LIMIT = 10_000_000  # bytes; what is larger goes through LFS
LFS_SUFFIXES = """7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl
pt pth rar safetensors tar tflite tgz wasm xz zip zst"""
# the tasks are those of huggingface.js (packages/tasks), the licences those of the Hub's documentation
TASKS = """any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
image-feature-extraction image-segmentation image-text-to-text image-to-3d image-to-image image-to-text image-to-video
keypoint-detection mask-generation multiple-choice object-detection other question-answering reinforcement-learning
robotics sentence-similarity summarization table-question-answering table-to-text tabular-classification
tabular-regression tabular-to-text text-classification text-generation text-ranking text-retrieval text-to-3d
text-to-audio text-to-image text-to-speech text-to-video text2text-generation time-series-forecasting
token-classification translation unconditional-image-generation video-classification video-text-to-text
visual-document-retrieval visual-question-answering voice-activity-detection zero-shot-classification
zero-shot-image-classification zero-shot-object-detection"""
LICENCES = """afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0
cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl
gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib"""


@dataclass(frozen=True)
class Blob:
    """The content of a file, in git itself or, with `lfs`, behind a pointer."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return text.format(self.sha256, len(self.content)).encode()

    @cached_property
    def oid(self) -> str:
        return git_hash("blob", self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def lfs_entry(self) -> dict[str, Any]:
        if not self.lfs:
            return {}
        oids = {"oid": self.sha256, "sha256": self.sha256}  # the first in lists of files, the second in model info
        return {"lfs": {**oids, "size": len(self.content), "pointerSize": len(self.pointer)}}


@dataclass(frozen=True)
class Commit:
    parent: str | None
    title: str
    message: str
    tree: Mapping[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def sha(self) -> str:
        oids = {path: blob.oid for path, blob in sorted(self.tree.items())}
        return git_hash("commit", json.dumps([self.parent, self.title, self.message, self.date, oids]).encode())


def git_hash(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """`objects` are the large files that have arrived, committed or not, by their sha256."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def commit(self, branch: str, title: str, message: str, tree: Mapping[str, Blob]) -> Commit:
        commit = Commit(self.branches.get(branch), title, message, tree)
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit

    def at(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or a sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """Commits, the last one first."""
        commit = self.at(revision)
        yield commit
        while commit.parent:
            commit = self.commits[commit.parent]
            yield commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return {path: blob.content for path, blob in self.at(revision).tree.items()}


def read_card(content: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none; `ValueError` if they are not keys and values in YAML."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML in README.md: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError("Invalid YAML in README.md: expected keys and values")
    return metadata


def card_errors(card: Mapping[str, Any]) -> list[str]:
    """What speaks against the metadata of a model card."""

    def values(*keys: str) -> Iterator[tuple[str, Any]]:
        for key in keys:
            value = card.get(key, [])
            yield from ((key, item) for item in (value if isinstance(value, list) else [value]))

    def is_text(value: Any, pattern: str = "(?s).+") -> bool:
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None

    texts = ("tags", "metrics", "library_name", "license_name", "license_link")
    index = card.get("model-index", [])
    return [
        *(f'"{key}" must be text, not {value!r}' for key, value in values(*texts) if not is_text(value)),
        *(f'"license" must be one of {LICENCES}' for _, value in values("license") if value not in LICENCES.split()),
        *(f'"pipeline_tag" must be one of {TASKS}' for _, v in values("pipeline_tag") if v not in TASKS.split()),
        *(
            f'"{key}" with value {json.dumps(value)} is not valid. Use an id from https://hf.co.'
            for key, value in values("base_model", "datasets")
            if not is_text(value, r"([\w.-]+/)?[\w.-]+")
        ),
        *(
            f'"language" must be a code such as "en", not {value!r}'
            for _, value in values("language")
            if not is_text(value, "[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")
        ),
        *(f'"{name}" is required in "model-index"' for name in missing_results(index, is_text)),
    ]


def missing_results(index: Any, is_text: Callable[[Any], bool]) -> Iterator[str]:
    """What the structure of evaluation results lacks, as paths."""
    for i, model in enumerate(index):
        if not is_text(model.get("name")):
            yield f"[{i}].name"
        if not model.get("results"):
            yield f"[{i}].results"
        for j, result in enumerate(model.get("results") or []):
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                if not is_text((result.get(part) or {}).get(key)):
                    yield f"[{i}].results[{j}].{part}.{key}"
            if not result.get("metrics"):
                yield f"[{i}].results[{j}].metrics"
            for k, metric in enumerate(result.get("metrics") or []):
                if not is_text(metric.get("type")):
                    yield f"[{i}].results[{j}].metrics[{k}].type"
                if metric.get("value") is None:
                    yield f"[{i}].results[{j}].metrics[{k}].value"


class HubError(Exception):
    """An answer that is an error; `code` is one of the Hub's own, such as RepoNotFound."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        text = " ".join(message.split()).encode("ascii", "replace").decode()  # all that a header can hold
        self.headers = {"X-Error-Message": text, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Request:
    """What was asked: method, path with its query, token, and the status of the answer (`None`: connection cut)."""

    method: str
    path: str
    token: str | None
    status: int | None


@dataclass
class Answer:
    body: Any = b""  # bytes, or something for JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, calls the method that `routes` has for its path, and answers with what that returns."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes: list[tuple[str, str, str]]  # HTTP methods, regular expression for the path, name of the Python method

    def handle_request(self) -> None:
        self.hub: HubServer = self.server.hub
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.query = parse_qs(urlsplit(self.path).query)
        if self.hub.is_cut(f"{self.command} {self.path}"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.record(None)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.body = self.read_body()
        with self.hub.lock:
            answer = self.find_answer()
        self.record(answer.status)
        is_json = not isinstance(answer.body, bytes)
        content = json.dumps(answer.body).encode() if is_json else answer.body
        kind = "application/json" if is_json else "application/octet-stream"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **answer.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, *_: Any) -> None:
        pass

    def record(self, status: int | None) -> None:
        self.hub.requests.append(Request(self.command, self.path, self.token, status))

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def find_answer(self) -> Answer:
        path = urlsplit(self.path).path
        try:
            for methods, pattern, name in self.routes:
                if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                    return getattr(self, name)(*(unquote(group or "") for group in match.groups()))
            raise HubError(404, f"This server has no {self.command} {path}")
        except HubError as error:
            return Answer({"error": str(error)}, error.status, error.headers)
        except Exception:  # what a test would else only see as a broken connection
            return Answer({"error": traceback.format_exc()}, 500)


class StorageHandler(Handler):
    """Where large files lie: whoever has a signed URL may read or write one."""

    routes = [
        ("PUT", "/models/(.+)/([0-9a-f]{64})", "put"),
        ("GET HEAD", "/models/(.+)/([0-9a-f]{64})", "get"),
    ]

    def objects(self, name: str) -> dict[str, bytes]:
        if self.token:
            raise HubError(400, "Only one auth mechanism allowed: signature or token")
        if self.query.get("signature") != [self.hub.sign(self.command, urlsplit(self.path).path)]:
            raise HubError(403, "SignatureDoesNotMatch")
        return self.hub.repos[name].objects

    def put(self, name: str, oid: str) -> Answer:
        objects = self.objects(name)
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "XAmzContentSHA256Mismatch")
        objects[oid] = self.body
        return Answer()

    def get(self, name: str, oid: str) -> Answer:
        return Answer(self.objects(name)[oid], headers={"ETag": f'"{oid}"'})


REPO = r"([\w.-]+/[\w.-]+)"
API = f"/api/models/{REPO}"


class HubHandler(Handler):
    routes = [
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate"),
        ("POST", "/api/repos/create", "create"),
        ("GET", f"{API}(?:/revision/([^/]+))?", "info"),
        ("GET", f"{API}/refs", "refs"),
        ("GET", f"{API}/commits/([^/]+)", "commits"),
        ("GET", f"{API}/tree/([^/]+)(?:/(.+))?", "tree"),
        ("POST", f"{API}/preupload/([^/]+)", "preupload"),
        ("POST", f"{API}/commit/([^/]+)", "commit"),
        ("POST", f"{API}/branch/([^/]+)", "create_branch"),
        ("POST", f"{API}/tag/([^/]+)", "create_tag"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
    ]

    def role(self) -> str | None:
        """The role of the token, `None` without one; a token that nobody has is an error wherever it is sent."""
        if self.token is not None and self.token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(self.token)

    def may_write(self, namespace: str) -> bool:
        return self.role() == "write" and {USER: "write", **ORGANISATIONS}.get(namespace) == "write"

    def repo(self, name: str) -> Repository:
        """A repository to read from; one that may not be seen is as if it were not there."""
        repo, role = self.hub.repos.get(name), self.role()
        if repo is None or (repo.private and (role is None or repo.namespace not in (USER, *ORGANISATIONS))):
            raise HubError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def own_repo(self, name: str) -> Repository:
        """A repository to write to."""
        repo = self.repo(name)
        if not self.may_write(repo.namespace):
            raise HubError(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def whoami(self) -> Answer:
        if (role := self.role()) is None:
            raise HubError(401, "Invalid username or password.")
        token: dict[str, Any] = {"displayName": f"my {role} token", "role": role}
        if role == "fineGrained":
            scope = {"entity": {"type": "user", "name": USER}, "permissions": ["repo.content.read"]}
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": [scope]}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in ORGANISATIONS.items()]
        auth = {"type": "access_token", "accessToken": token}
        return Answer({"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": orgs, "auth": auth})

    def create(self) -> Answer:
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or USER
        if not self.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo = Repository(f"{namespace}/{wanted['name']}", private=wanted.get("visibility") == "private")
        answer = {"url": f"{self.hub.endpoint}/{repo.id}", "name": repo.id}
        if repo.id in self.hub.repos:
            return Answer({"error": "You already created this model repo", **answer}, 409)
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES.split())
        repo.commit("main", "initial commit", "", {".gitattributes": Blob(attributes.encode())})
        self.hub.repos[repo.id] = repo
        return Answer(answer)

    def info(self, name: str, revision: str) -> Answer:
        repo = self.repo(name)
        commit = repo.at(revision or "main")
        card = read_card(commit.tree["README.md"].content.decode()) if "README.md" in commit.tree else {}
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        return Answer(
            {
                **{key: card[key] for key in ("pipeline_tag", "library_name", "model-index") if key in card},
                **{"_id": "1", "id": name, "modelId": name, "author": repo.namespace, "sha": commit.sha},
                **{"createdAt": list(repo.history())[-1].date, "lastModified": commit.date, "private": repo.private},
                **{"downloads": 0, "likes": 0, "disabled": False, "gated": False, "tags": card.get("tags", [])},
                **{"cardData": card, "siblings": siblings},
            }
        )

    def refs(self, name: str) -> Answer:
        repo = self.repo(name)

        def listed(refs: dict[str, str], folder: str) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": sha} for ref, sha in refs.items()]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        return Answer({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, name: str, revision: str) -> Answer:
        return Answer(
            [
                {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": USER}]}
                for c in self.repo(name).history(revision)
            ]
        )

    def create_branch(self, name: str, branch: str) -> Answer:
        repo = self.own_repo(name)
        self.check_new(repo.branches, branch)
        repo.branches[branch] = repo.at(json.loads(self.body).get("startingPoint", "main")).sha
        return Answer()

    def create_tag(self, name: str, revision: str) -> Answer:
        repo, tag = self.own_repo(name), json.loads(self.body)["tag"]
        self.check_new(repo.tags, tag)
        repo.tags[tag] = repo.at(revision).sha
        return Answer()

    def check_new(self, refs: Mapping[str, str], name: str) -> None:
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        if not re.fullmatch(r"(?!refs/)\w[\w./+-]*", name) or ".." in name or name.endswith((".", "/", ".lock")):
            raise HubError(400, f"Invalid reference: {name}")

    def entries(self, tree: Mapping[str, Blob]) -> dict[str, dict[str, Any]]:
        """All files and folders of a tree, by path."""
        found = {}
        for path, blob in sorted(tree.items()):
            for folder in list(PurePosixPath(path).parents)[:-1]:
                oid = git_hash("tree", "".join(b.oid for p, b in tree.items() if p.startswith(f"{folder}/")).encode())
                found[str(folder)] = {"type": "directory", "oid": oid, "size": 0, "path": str(folder)}
            size = len(blob.content)
            found[path] = {"type": "file", "oid": blob.oid, "size": size, "path": path, **blob.lfs_entry}
        return found

    def tree(self, name: str, revision: str, folder: str) -> Answer:
        entries = self.entries(self.repo(name).at(revision).tree)
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        prefix = f"{folder}/" if folder else ""
        below = [entry for path, entry in entries.items() if path.startswith(prefix)]
        if self.query.get("recursive", ["false"])[0].lower() == "false":
            below = [entry for entry in below if "/" not in entry["path"].removeprefix(prefix)]
        return Answer(below)

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        repo = self.repo(name)
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        blob = commit.tree[path]
        headers["ETag"] = f'"{blob.etag}"'
        if not blob.lfs:
            return Answer(blob.content, headers=headers)
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": headers["ETag"]}
        return Answer(b"", 302, {**headers, "Location": self.hub.signed_url("GET", repo, blob.sha256)})

    def judge(self, content: str) -> list[str]:
        try:
            return card_errors(read_card(content))
        except ValueError as error:
            return [str(error)]

    def validate(self) -> Answer:
        asked = json.loads(self.body)
        errors = self.judge(asked["content"])
        has_metadata = bool(errors or read_card(asked["content"]))
        warnings = [] if has_metadata else ["empty or missing yaml metadata in repo card"]
        texts = {"errors": errors, "warnings": warnings}
        answer = {key: [{"message": text} for text in values] for key, values in texts.items()}
        return Answer(answer, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> Answer:
        tree = self.own_repo(name).at(revision).tree
        attributes = tree[".gitattributes"].content.decode() if ".gitattributes" in tree else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        files = []
        for file in json.loads(self.body)["files"]:
            path, base = file["path"], file["path"].split("/")[-1]
            is_binary = b"\0" in base64.b64decode(file["sample"]) or file["size"] > REGULAR_LIMIT
            is_large = is_binary or any(fnmatch.fnmatchcase(base, pattern) for pattern in patterns)
            there = {"oid": tree[path].etag} if path in tree else {}
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        return Answer({"files": files})

    def lfs_batch(self, name: str) -> Answer:
        repo, objects = self.own_repo(name), []
        verify = {"href": f"{self.hub.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
        for wanted in json.loads(self.body)["objects"]:
            oid = wanted["oid"]
            upload = {"upload": {"href": self.hub.signed_url("PUT", repo, oid)}, "verify": verify}
            actions = {} if oid in repo.objects else {"actions": upload}
            objects.append({"oid": oid, "size": wanted["size"], **actions})
        return Answer({"transfer": "basic", "objects": objects})

    def lfs_verify(self, name: str) -> Answer:
        repo, asked = self.own_repo(name), json.loads(self.body)
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"LFS object not found: {asked['oid']}")
        return Answer({})

    def commit(self, name: str, branch: str) -> Answer:
        repo = self.own_repo(name)
        head = repo.at(branch)
        if branch not in repo.branches:
            raise HubError(400, f"{branch} is not a branch")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            self.apply(operation["key"], operation["value"], tree, repo)
        if "README.md" in tree and (errors := self.judge(tree["README.md"].content.decode())):
            raise HubError(400, f"Invalid metadata in README.md: {errors}")
        commit = repo.commit(branch, header["value"]["summary"], header["value"]["description"], tree)
        url = f"{self.hub.endpoint}/{repo.id}/commit/{commit.sha}"
        return Answer({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, key: str, value: dict[str, Any], tree: dict[str, Blob], repo: Repository) -> None:
        """One line of a commit, to the tree that it shall have."""
        path = value["path"]
        if key == "file":
            tree[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise HubError(400, f"{path}: its LFS pointer points to a file that does not exist")
            tree[path] = Blob(repo.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if tree.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        else:
            raise HubError(400, f"Unknown operation {key}")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: "HubServer", handler: type[Handler]):
        super().__init__(("127.0.0.1", 0), handler)
        self.hub, self.url = hub, f"http://127.0.0.1:{self.server_port}"


class HubServer:
    """The Hub and its storage, running between `__enter__` and `__exit__`; see the top of this file."""

    token, read_token, fine_token = "hf_write", "hf_read", "hf_fine"

    def __init__(self):
        self.tokens = {self.token: "write", self.read_token: "read", self.fine_token: "fineGrained"}
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._cut: tuple[str, int] | None = None
        self._key = secrets.token_hex()
        self._servers = [Server(self, HubHandler), Server(self, StorageHandler)]
        self.endpoint = self._servers[0].url

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def model(self, name: str) -> Repository:
        """The repository of a model; `KeyError` for none."""
        return self.repos[name]

    def add_model(self, name: str, folder: Path) -> Repository:
        """A public model of anybody's with the files of a folder."""
        repo = Repository(name, private=False)
        large = tuple(f".{suffix}" for suffix in LFS_SUFFIXES.split())
        tree = {file.name: Blob(file.read_bytes(), file.name.endswith(large)) for file in folder.iterdir()}
        repo.objects = {blob.sha256: blob.content for blob in tree.values() if blob.lfs}
        repo.commit("main", "Add files", "", tree)
        self.repos[name] = repo
        return repo

    def environment(self, home: Path, token: str | None = token) -> dict[str, str]:
        """The environment of a process for which this is the Hub, and `home` the place of caches and logins."""
        ours = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
        inherited = {name: value for name, value in os.environ.items() if not ours.match(name)}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**inherited, **own, "HF_HUB_DISABLE_TELEMETRY": "1", **({"HF_TOKEN": token} if token else {})}

    def cut(self, what: str = "PUT /models/", after: int = 0) -> None:
        """
        From now on, breaks the connection in the middle of requests, once `after` such requests have gone through.

        `what` is a regular expression for the start of "METHOD /path"; by default, uploads of large files to models.
        """
        self._cut = (what, after)

    def mend(self) -> None:
        """Breaks no connection any more."""
        self._cut = None

    def is_cut(self, request: str) -> bool:
        with self.lock:
            if self._cut is None or not re.match(self._cut[0], request):
                return False
            what, left = self._cut
            self._cut = (what, max(left - 1, 0))
            return left == 0

    def sign(self, method: str, path: str) -> str:
        verb = "PUT" if method == "PUT" else "GET"
        return hashlib.sha256(f"{self._key} {verb} {path}".encode()).hexdigest()

    def signed_url(self, method: str, repo: Repository, oid: str) -> str:
        path = f"/models/{repo.id}/{oid}"
        return f"{self._servers[1].url}{path}?signature={self.sign(method, path)}"
