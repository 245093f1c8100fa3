"""A local stand-in for the Hugging Face hub, for the requests with which huggingface_hub uploads a
folder.

It implements whoami, the information about a repository, its creation and its list of files, the
check of a card's front matter, preupload, the LFS batch, uploads, and the commit. It stores blobs
by their sha256, and the files after each commit.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LocalHub:
    """The state of the hub, and the requests that it received."""

    role: str = "write"  # the role of the token
    owners: tuple[str, ...] = ("me",)  # namespaces in which the token may create repositories
    private: dict[str, bool] = field(default_factory=dict)  # visibility of repositories by name
    licences: dict[str, str] = field(default_factory=dict)  # licences of base models by name
    requests: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)  # uploaded blobs by sha256
    files: dict[str, bytes] = field(default_factory=dict)  # of the only repository, by path
    messages: list[str] = field(default_factory=list)  # the messages of commits
    removed: list[str] = field(default_factory=list)  # the paths of deleted files
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """The status and the JSON body of the answer to a request."""
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if token != "Bearer hf_good0123456789":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": self._batch(json.loads(body))}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/main)?", path):
            return self._repository(found[1], found[2], body)
        return 404, {"error": f"no such request: {method} {path}"}

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = f"{body['organization']}/{body['name']}"
        if body["organization"] not in self.owners:
            return 403, {
                "error": "You don't have the rights to create a model under this namespace"
            }
        self.private[name] = body.get("visibility") == "private"
        return 200, {"url": f"{self.endpoint}/{name}"}

    def _batch(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**item, "actions": {"upload": {"href": f"{self.endpoint}/blob/{item['oid']}"}}}
            for item in body["objects"]
        ]

    def _repository(self, name: str, action: str | None, body: bytes) -> tuple[int, Any]:
        if name in self.licences:
            return 200, {"id": name, "cardData": {"license": self.licences[name]}}
        if name not in self.private:
            return 404, {"error": "Repository not found"}
        if action is None:
            return 200, {"id": name, "private": self.private[name]}
        if action == "tree":
            found = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in self.files]
            return 200, found
        if action == "preupload":
            return 200, {"files": [upload_mode(f["path"]) for f in json.loads(body)["files"]]}
        self._commit([json.loads(line) for line in body.splitlines()])
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    self.messages.append(value["summary"])
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    blob = self.blobs[value["oid"]]
                    assert hashlib.sha256(blob).hexdigest() == value["oid"]
                    self.files[value["path"]] = blob
                case "deletedFile":
                    self.removed.append(value["path"])
                    del self.files[value["path"]]


def upload_mode(path: str) -> dict[str, Any]:
    """The preupload answer for a file: stored as LFS, or inside the commit."""
    large = path.endswith((".safetensors", ".png"))
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


@contextmanager
def running(hub: LocalHub) -> Iterator[LocalHub]:
    """Serve the hub by HTTP at hub.endpoint until the end of the `with` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = self._body()
            hub.requests.append(f"{self.command} {path}")
            status, answer = hub.answer(
                self.command, path, body, self.headers.get("Authorization", "")
            )
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if "error" in answer:
                self.send_header("X-Error-Message", answer["error"])
            if status == 404 and path.startswith("/api/models/"):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET
        do_PUT = do_GET

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *parts: object) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
