"""A model hub on loopback, as far as huggingface_hub's client speaks to one, with faults to order.

It keeps commits in memory and answers what the real client asks in order to create a repository and a branch, to send
one commit (preupload, LFS batch and upload, NDJSON commit) and to download it again (tree, resolve with the headers
that the client wants). It has no xet, no web pages, no limits. What it cannot show is what the real hub does otherwise.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "kdconsoleUniqueTestToken" + "0123456789"
"""The only token that it accepts, and a text that stands nowhere else."""
LFS_BYTES = 4096
"""From this size on a file goes through LFS."""
Files = dict[str, bytes]


@dataclass
class Repo:
    """A repository: its branches, and every commit's whole tree."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        text = f"{len(self.commits)} {sorted((name, _sha256(data)) for name, data in files.items())}"
        made = hashlib.sha1(text.encode()).hexdigest()
        self.commits[made] = files
        self.branches[branch] = made
        return made

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class HubRig:
    """The hub as a test sees it."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers of everything that was asked."""
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    """A status in place of an answer, by method and a pattern of the path."""
    echo: str = ""
    """Said with every such status."""
    flipped: set[str] = field(default_factory=set)
    """Files of which one byte is another when they are downloaded."""
    dropped: set[str] = field(default_factory=set)
    """Files that a commit loses."""
    cut: dict[tuple[str, str], int] = field(default_factory=dict)
    """How often the connection is closed half way, by method and a pattern of the path."""
    on_request: Callable[[str, str], object] = lambda method, path: None
    """Called with method and path before anything is answered; may wait."""
    on_commit: Callable[[Repo], object] = lambda repo: None
    """Called before a commit is made."""

    def files(self, name: str, revision: str = "main") -> Files:
        """What a repository holds."""
        repo = self.repos[name]
        return repo.commits[repo.branches[revision]]

    def made(self, name: str, files: Files, private: bool = False) -> Repo:
        """Makes a repository as it stands on the hub already."""
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return repo

    def asked(self, method: str, pattern: str) -> int:
        """How many such requests came."""
        return sum(m == method and re.search(pattern, path) is not None for m, path, _ in self.requests)

    def environ(self) -> dict[str, str]:
        """For a client: this hub, without xet, and without looking anywhere else."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _pointer(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(data)}\nsize {len(data)}\n".encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    rig: HubRig

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.rig.requests.append((self.command, self.path, dict(self.headers)))
        self.rig.on_request(self.command, path)
        for key, left in self.rig.cut.items():
            if left and self._matches(key):
                self.rig.cut[key] = left - 1
                return self._hang_up()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked()
        status = next((status for key, status in self.rig.answers.items() if self._matches(key)), None)
        if status is not None:
            return self._json({"error": f"ordered {status} {self.rig.echo}"}, status)
        upload = path.startswith("/lfs/")
        if not upload and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid credentials in Authorization header"}, 401)
        for method, pattern, answer in _ROUTES:
            if method == self.command or (method == "GET" and self.command == "HEAD"):
                found = re.fullmatch(pattern, path)
                if found:
                    return answer(self, body, *found.groups())
        return self._json({"error": f"no such route: {self.command} {path}"}, 404)

    def _matches(self, key: tuple[str, str]) -> bool:
        return key[0] == self.command and re.search(key[1], self.path) is not None

    def _hang_up(self) -> None:
        if self.command == "PUT":
            self.rfile.read(min(1024, int(self.headers.get("Content-Length") or 0)))
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nhalf")
        self.close_connection = True

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _repo(self, name: str) -> Repo | None:
        repo = self.rig.repos.get(name)
        if repo is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return repo

    # What the client asks

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.rig.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.rig.url}/{name}"}, 409)
        self.rig.made(name, {}, asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json({"url": f"{self.rig.url}/{name}", "id": name, "name": name})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        if repo is not None:
            if branch in repo.branches:
                return self._json({"error": "Reference already exists"}, 409)
            repo.branches[branch] = repo.branches["main"]
            return self._json({})
        return None

    def _yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        ok = content.startswith("---\n") and "\nlicense: " in content
        self._json({"errors": [] if ok else [{"message": "no license"}], "warnings": []}, 200 if ok else 400)

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.at(revision or "main")
        if commit is None:
            return self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        return self._json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.at(revision)
        if commit is None:
            return self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        return self._json([_row(path, data) for path, data in sorted(repo.commits[commit].items())])

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        there = repo.commits[repo.at(revision) or ""]
        rows = []
        for file in json.loads(body)["files"]:
            data = there.get(file["path"])
            big = file["size"] >= LFS_BYTES
            oid = None if data is None else _sha256(data) if big else _blob_id(data)
            mode = "lfs" if big else "regular"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": rows})

    def _batch(self, body: bytes, name: str) -> None:
        rows: list[dict[str, Any]] = []
        for each in json.loads(body)["objects"]:
            row = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.rig.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.rig.url}/lfs/{each['oid']}", "header": {}},
                    "verify": {"href": f"{self.rig.url}/verify/{each['oid']}", "header": {}},
                }
            rows.append(row)
        self._json({"transfer": "basic", "objects": rows})

    def _put(self, body: bytes, oid: str) -> None:
        if _sha256(body) != oid:
            return self._json({"error": "other bytes"}, 400)
        self.rig.objects[oid] = body
        return self._send(b"")

    def _verify(self, body: bytes, oid: str) -> None:
        self._json({}, 200 if oid in self.rig.objects else 404)

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        rows = [json.loads(line) for line in body.splitlines()]
        self.rig.on_commit(repo)
        files = dict(repo.commits[repo.branches[revision]])
        parent = rows[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[revision]:
            return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.rig.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(revision, {path: data for path, data in files.items() if path not in self.rig.dropped})
        url = f"{self.rig.url}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return None
        commit = repo.at(revision)
        data = None if commit is None else repo.commits[commit].get(path)
        if data is None or commit is None:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        row = _row(path, data)
        etag = row["lfs"]["oid"] if "lfs" in row else row["oid"]
        if path in self.rig.flipped:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return self._send(data, ETag=f'"{etag}"', X_Repo_Commit=commit, Accept_Ranges="bytes")


def _row(path: str, data: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if len(data) >= LFS_BYTES:
        pointer = _pointer(data)
        row |= {"oid": _blob_id(pointer)}
        row["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": len(pointer)}
    return row


_NAME = "([^/]+/[^/]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._yaml),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", _Handler._branch),
    ("GET", f"/api/models/{_NAME}/revision/(.+)", _Handler._info),
    ("GET", f"/api/models/{_NAME}", _Handler._info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)/?", _Handler._tree),
    ("POST", f"/api/models/{_NAME}/preupload/(.+)", _Handler._preupload),
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler._put),
    ("POST", "/verify/([0-9a-f]{64})", _Handler._verify),
    ("POST", f"/api/models/{_NAME}/commit/(.+)", _Handler._commit),
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed hangs up, which is not this server's business."""


@contextlib.contextmanager
def running_hub() -> Iterator[HubRig]:
    """A hub, until the block ends."""
    rig = HubRig()
    handler = type("Handler", (_Handler,), {"rig": rig})
    with _Server(("127.0.0.1", 0), handler) as server:
        rig.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield rig
        finally:
            server.shutdown()
            thread.join()


def holds_token(root: Any) -> list[str]:
    """The files below a directory in which the token stands, by name, content or plain base64."""
    marks = (TOKEN.encode(), base64.b64encode(TOKEN.encode()))
    found = []
    for path in sorted(root.rglob("*")):
        if TOKEN in path.name or (path.is_file() and any(mark in path.read_bytes() for mark in marks)):
            found.append(str(PurePosixPath(path)))
    return found
