"""A small Hub on localhost for tests: what huggingface_hub, diffusers and datasets ask of the real one to push and to pull.

Repositories of models and data sets with branches and commits, and private ones that only the holder of the token sees. Every
file is an LFS object, in memory. No package on PyPI offers a Hub that takes uploads.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_localhost"


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # content by path, by commit
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(b"%d" % len(self.commits)).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        url: for HF_ENDPOINT.
        repos: by kind and name, such as `("models", "tester/brains")`.
        objects: uploaded LFS objects by SHA-256.
        requests: what was asked, as "METHOD path".
        break_at: a regular expression; the connection of a request that matches is cut without an answer.
    """

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.break_at: str | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process for which this is the Hub and `home` an empty cache, not logged in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "HUGGING"))}
        return {**kept, "HF_HUB_DISABLE_XET": "1", "HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def use_in_this_process(self, monkeypatch, home: Path) -> None:
        """The same for this process, logged in. It has read its environment when it imported huggingface_hub."""
        from huggingface_hub import constants, hf_api

        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path to content of all files on a branch."""
        repo = self.repos[kind, name]
        return repo.commits[repo.branches[revision]]


class HubError(Exception):
    """An answer that is no success: status, and the code by which huggingface_hub picks its exception."""


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query, request = parse_qs(url.query), f"{self.command} {url.path}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(request)
        if self.hub.break_at and re.search(self.hub.break_at, request):
            self.close_connection = True
            return
        try:
            for pattern, action in ROUTES:
                if match := re.fullmatch(pattern, request):
                    parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                    return action(self, **parts)
            raise HubError(404, "NoSuchRoute")
        except HubError as error:
            status, code = error.args
            self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_write(self) -> None:
        if not self.is_owner:
            raise HubError(401, "Unauthorized")

    def find(self, kind: str, repo: str, revision: str = "main") -> tuple[Repo, str, dict[str, bytes]]:
        """A repository, and of the revision its commit and its files."""
        found = self.hub.repos.get((kind.rstrip("/"), repo))
        if found is None or (found.private and not self.is_owner):
            raise HubError(404 if self.is_owner else 401, "RepoNotFound")
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise HubError(404, "RevisionNotFound")
        return found, sha, found.commits[sha]

    # -- repositories

    def create_repo(self) -> None:
        self.check_write()
        asked = json.loads(self.body)
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        repo = self.hub.repos[kind, name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {})
        self.answer({"url": url, "name": name, "id": name})

    def repo_info(self, kind: str, repo: str, revision: str = "main") -> None:
        found, sha, files = self.find(kind, repo, revision)
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": found.private}
        siblings = [{"rfilename": path} for path in files]
        self.answer({**info, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def create_branch(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        found, sha, _ = self.find(kind, repo)
        if revision in found.branches:
            raise HubError(409, "BranchExists")
        found.branches[revision] = sha
        self.answer({})

    # -- uploads

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        self.find(kind, repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.answer({"files": [{"path": path, "uploadMode": "lfs", "shouldIgnore": False} for path in paths]})

    def lfs_batch(self, repo: str, kind: str = "models") -> None:
        self.check_write()
        self.find(kind, repo)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == sha256
        self.hub.objects[sha256] = self.body
        self.answer({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        found, _, files = self.find(kind, repo, revision)
        files = dict(files)
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            if item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # -- downloads

    def tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        prefix = f"{path}/" if path else ""
        files = {
            name: content for name, content in self.find(kind, repo, revision)[2].items() if name.startswith(prefix)
        }
        folders = {str(parent) for name in files for parent in Path(name).parents} - {".", path}
        listed = [{"type": "directory", "path": folder, "size": 0, "oid": "0" * 40} for folder in folders]
        for name, content in files.items():
            oid, size = hashlib.sha256(content).hexdigest(), len(content)
            lfs = {"oid": oid, "size": size, "pointerSize": 130}
            listed.append({"type": "file", "path": name, "size": size, "oid": oid[:40], "lfs": lfs})
        if self.query.get("recursive") != ["true"]:
            listed = [entry for entry in listed if "/" not in entry["path"].removeprefix(prefix)]
        self.answer(sorted(listed, key=lambda entry: entry["path"]))

    def resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        _, sha, files = self.find(kind, repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound")
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(files[path]))}
        self.answer(files[path], headers=headers)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create_repo),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {API}(/revision/{REVISION})?", Handler.repo_info),
    (rf"POST {API}/branch/{REVISION}", Handler.create_branch),
    (rf"POST {API}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /(?P<kind>datasets/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<sha256>[0-9a-f]{64})", Handler.lfs_put),
    (rf"POST {API}/commit/{REVISION}", Handler.commit),
    (rf"GET {API}/tree/{REVISION}(/(?P<path>.+))?", Handler.tree),
    (rf"(GET|HEAD) /(?P<kind>datasets/)?{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
