"""A small Hub on localhost for tests: what huggingface_hub, diffusers and datasets ask of the real one to push and to pull.

Repositories of models and data sets with branches and commits, LFS objects, and private repositories that only the holder of
the token sees. No package on PyPI offers a Hub that takes uploads. Content lies in a folder, the rest in memory.
"""

import base64
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

import yaml

TOKEN, USER = "hf_localhost", "tester"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin")  # the real Hub's .gitattributes say so of these and more
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"


@dataclass
class File:
    """A file in a commit: `oid` is the git object's, `sha256` the content's, which is its name on disk."""

    sha256: str
    oid: str
    size: int
    is_lfs: bool


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        listing = json.dumps([len(self.commits), sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class HubServer:
    """The server; use it as a context manager.

    Args:
        root: an empty folder.

    Attributes:
        url: for HF_ENDPOINT.
        repos: by kind and name, such as `("models", "tester/brains")`.
        requests: what was asked, as "METHOD path".
        break_at: a regular expression; on requests it matches the connection is cut without an answer.
    """

    def __init__(self, root: Path):
        self.root, self.lock = root, threading.Lock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[str] = []
        self.break_at: str | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process for which this is the Hub and `home` an empty cache."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "HUGGING"))}
        hub = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
        }
        return {**kept, **hub, "OMP_NUM_THREADS": "1", **({"HF_TOKEN": token} if token else {})}

    def use_in_this_process(self, monkeypatch, home: Path, token: str | None = TOKEN) -> None:
        """The same for this process, which has read its environment when it imported huggingface_hub."""
        from huggingface_hub import constants, hf_api

        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)

    def store(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / sha256).write_bytes(content)
        return sha256

    def read(self, kind: str, name: str, path: str, revision: str = "main") -> bytes:
        """The content of a file."""
        repo = self.repos[kind, name]
        return (self.root / repo.commits[repo.branches[revision]][path].sha256).read_bytes()


class HubError(Exception):
    """An answer that is no success: status, and the code by which huggingface_hub picks its exception."""

    def __init__(self, status: int, code: str, message: str = ""):
        super().__init__(message or code)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # -- plumbing

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
        if self.hub.break_at and re.search(self.hub.break_at, f"{self.command} {url.path}"):
            self.close_connection = True
            return
        try:
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    with self.hub.lock:
                        action(self, **{name: unquote(part) for name, part in match.groupdict().items() if part})
                    return
            raise HubError(404, "NoSuchRoute", f"{self.command} {url.path} is not served")
        except HubError as error:
            self.answer(
                {"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

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
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def find(self, kind: str, repo: str) -> Repo:
        found = self.hub.repos.get((kind, repo))
        if found is None or (found.private and not self.is_owner):
            raise HubError(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
        return found

    def find_files(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        found = self.find(kind, repo)
        sha = found.branches.get(revision, revision)
        if sha not in found.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, found.commits[sha]

    # -- the account and its repositories

    def whoami(self) -> None:
        self.check_write()
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repo(self) -> None:
        self.check_write()
        asked = json.loads(self.body)
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer({"error": "You already created this repo", "url": url}, 409)
        repo = self.hub.repos[kind, name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {})
        self.answer({"url": url, "name": name, "id": name})

    def repo_info(self, kind: str, repo: str, revision: str = "main") -> None:
        sha, files = self.find_files(kind, repo, revision)
        info = {"_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": self.hub.repos[kind, repo].private}
        self.answer(
            {**info, "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": path} for path in files]}
        )

    def refs(self, kind: str, repo: str) -> None:
        branches = self.find(kind, repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.answer({"branches": listed, "tags": [], "converts": []})

    def branch(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        branches = self.find(kind, repo).branches
        if self.command == "DELETE":
            del branches[revision]
        elif revision in branches:
            raise HubError(409, "BranchExists", "Reference already exists")
        else:
            start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
            branches[revision] = branches.get(start, start)
        self.answer({})

    # -- uploads

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            header = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            errors = [] if isinstance(header, dict) else ["metadata must be an object"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        listed = [{"message": message} for message in errors]
        self.answer({"errors": listed, "warnings": []}, 400 if errors else 200)

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        present = self.find_files(kind, repo, revision)[1]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = present[path].oid if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, repo: str, kind: str = "models") -> None:
        self.check_write()
        self.find(kind.rstrip("/"), repo)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            known = (self.hub.root / item["oid"]).is_file()
            objects.append({**item, "authenticated": True, **({} if known else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "BadObject", "the content is not what its name says")
        self.hub.store(self.body)
        self.answer({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        self.check_write()
        files = dict(self.find_files(kind, repo, revision)[1])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                files[value["path"]] = File(self.hub.store(content), oid, len(content), is_lfs=False)
            elif key == "lfsFile":
                if not (self.hub.root / value["oid"]).is_file():
                    raise HubError(400, "LfsMissing", f"{value['path']} was not uploaded")
                size = (self.hub.root / value["oid"]).stat().st_size
                files[value["path"]] = File(value["oid"], value["oid"][:40], size, is_lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise HubError(400, "BadOperation", key)
        sha = self.hub.repos[kind, repo].commit(revision, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    # -- downloads

    def describe(self, path: str, file: File) -> dict[str, Any]:
        lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.is_lfs else {}
        return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **lfs}

    def tree(self, kind: str, repo: str, revision: str, path: str = "") -> None:
        files = self.find_files(kind, repo, revision)[1]
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        folders = {str(parent) for name in inside for parent in Path(name).parents} - {".", path}
        if self.query.get("recursive", "false").lower() != "true":
            folders = {name for name in folders if "/" not in name.removeprefix(prefix)}
            inside = {name: file for name, file in inside.items() if "/" not in name.removeprefix(prefix)}
        listed = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        self.answer(listed + [self.describe(name, file) for name, file in sorted(inside.items())])

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        files = self.find_files(kind, repo, revision)[1]
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(self.body)["paths"]
        else:
            asked = parse_qs(self.body.decode()).get("paths", [])
        self.answer([self.describe(path, files[path]) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> None:
        sha, files = self.find_files(kind.rstrip("/"), repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        file = files[path]
        etag = file.sha256 if file.is_lfs else file.oid
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.size)}
        content, status = (self.hub.root / file.sha256).read_bytes(), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.answer(content, status, headers)


ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", Handler.repo_info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("POST DELETE", rf"{API}/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/(?P<kind>datasets/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<sha256>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Handler.tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET HEAD", rf"/(?P<kind>datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
