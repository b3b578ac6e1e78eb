"""A Hub on loopback: what huggingface_hub's client asks of a server to push, list and download a model.

Repositories are dictionaries of path to content. Faults are set by repository: an HTTP status to answer with, or
downloads that stop half way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png")  # kept by LFS, as on the Hub


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: [_sha1(b"initial")])

    @property
    def head(self) -> str:
        return self.commits[-1]


@dataclass
class Fault:
    """What a repository does wrong.

    Attributes:
        status: the status of every answer about requests that match.
        cut_after: bytes of a large file after which the connection closes.
        times: how often; -1 for always.
        requests: regular expression of "METHOD /path" that go wrong.
    """

    status: int | None = None
    cut_after: int | None = None
    times: int = -1
    requests: str = ".*"


class Hub:
    """The state of the server.

    Attributes:
        repositories: by "user/name".
        objects: LFS contents by SHA-256.
        faults: by "user/name".
        requests: "METHOD /path" and headers of every request so far.
        token: that every request must bear, or None.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.token: str | None = None
        self.url = ""

    @contextmanager
    def running(self, port: int = 0) -> Iterator[Hub]:
        """Serve on a port of loopback, by default a free one, within the block."""
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def fault(self, repo_id: str, request: str) -> Fault | None:
        """The fault that this request meets, counted."""
        fault = self.faults.get(repo_id)
        if fault is None or fault.times == 0 or not re.search(fault.requests, request):
            return None
        fault.times -= 1
        return fault

    # Answers: (status, JSON).

    def create(self, body: dict[str, Any]) -> tuple[int, Any]:
        repo_id = f"{body.get('organization') or 'someone'}/{body['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repositories:
            return 409, answer
        self.repositories[repo_id] = Repository()
        return 200, answer

    def info(self, repo_id: str) -> tuple[int, Any]:
        repository = self.repositories[repo_id]
        siblings = [{"rfilename": path} for path in repository.files]
        return 200, {"_id": "1", "id": repo_id, "sha": repository.head, "private": False, "siblings": siblings}

    def tree(self, repo_id: str) -> tuple[int, Any]:
        return 200, [
            {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            | ({"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 1}} if _is_large(path) else {})
            for path, content in self.repositories[repo_id].files.items()
        ]

    def preupload(self, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in body["files"]
            ]
        }

    def lfs_batch(self, repo_id: str, body: dict[str, Any]) -> tuple[int, Any]:
        objects = [
            entry | {"actions": {"upload": {"href": f"{self.url}/lfs/{repo_id}/{entry['oid']}"}}}
            for entry in body["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, body: bytes) -> tuple[int, Any]:
        repository = self.repositories[repo_id]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
        repository.commits.append(_sha1(body))
        return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{repository.head}", "commitOid": repository.head}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._serve(b"")

    do_GET = do_HEAD

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _serve(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append((request, {name.title(): value for name, value in self.headers.items()}))
        repo_id = _repo_id(path, body)
        fault = self.hub.fault(repo_id, request) if repo_id else None
        if fault and fault.status:
            return self._error(fault.status)
        if self.hub.token and not path.startswith("/lfs/") and self._token() != self.hub.token:
            return self._error(401, "RepoNotFound")  # as the Hub says of what one may not see
        if path == "/api/repos/create":
            return self._json(*self.hub.create(json.loads(body)))
        if path == "/api/validate-yaml":
            return self._json(200, {"errors": [], "warnings": []})
        if repo_id not in self.hub.repositories:
            return self._error(404, "RepoNotFound")
        if path.startswith("/lfs/"):
            self.hub.objects[path.rsplit("/", 1)[1]] = body
            return self._json(200, {})
        if "/resolve/" in path:
            return self._file(repo_id, path.split("/resolve/")[1].split("/", 1)[1], fault.cut_after if fault else None)
        return self._json(*self._api(repo_id, path, body))

    def _api(self, repo_id: str, path: str, body: bytes) -> tuple[int, Any]:
        if path.endswith("/info/lfs/objects/batch"):
            return self.hub.lfs_batch(repo_id, json.loads(body))
        kind = path.removeprefix(f"/api/models/{repo_id}").strip("/").split("/")[0]
        if kind == "preupload":
            return self.hub.preupload(json.loads(body))
        if kind == "commit":
            return self.hub.commit(repo_id, body)
        return self.hub.tree(repo_id) if kind == "tree" else self.hub.info(repo_id)

    def _file(self, repo_id: str, path: str, cut_after: int | None) -> None:
        repository = self.hub.repositories[repo_id]
        if path not in repository.files:
            return self._error(404, "EntryNotFound")
        content = repository.files[path]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", repository.head)
        self.send_header("ETag", f'"{_sha256(content) if _is_large(path) else _blob_id(content)}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut_after is not None and _is_large(path):
            self.wfile.write(content[start:cut_after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _json(self, status: int, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str | None = None) -> None:
        body = json.dumps({"error": f"the hub answers {status}"}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def log_message(self, *args: Any) -> None:
        pass


def _repo_id(path: str, body: bytes) -> str | None:
    """The repository that a request is about."""
    if path == "/api/repos/create":
        content = json.loads(body)
        return f"{content.get('organization') or 'someone'}/{content['name']}"
    found = re.match(r"/(?:api/models/|lfs/)?([^/]+/[^/]+?)(?:\.git)?(?:/|$)", path)
    return None if path.startswith("/api/validate") or found is None else found[1]


def _is_large(path: str) -> bool:
    return path.endswith(LARGE)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)
