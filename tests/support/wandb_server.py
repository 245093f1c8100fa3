"""A local stand-in for the server of Weights & Biases, for the requests of a run that is tracked
online and of a saved view.

It accepts every run and every upload. Views are stored as they arrive.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.scoring_server import QuietServer

BUCKET = {
    "id": "r",
    "name": "r",
    "displayName": "r",
    "config": "{}",
    "historyLineCount": 0,
    "project": {"id": "p", "name": "hybridrl", "entity": {"id": "e", "name": "me"}},
}


@dataclass
class LocalWandb:
    """The state of the server and its answers.

    Attributes:
        views: the views by entity/project and internal name, each with displayName and spec.
        refusal: the message with which every view is refused; empty: views are accepted.
        asked_for_views: the number of requests that looked for a view.
        release: requests that look for a view wait until it is set, but at most 30 s.
    """

    views: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    refusal: str = ""
    asked_for_views: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self.release.set()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        place = f"{variables.get('entityName')}/{variables.get('projectName')}"
        if "allViews" in query:
            self.asked_for_views += 1
            self.release.wait(30)
            place = f"{variables['entityName']}/{variables['name']}"
            found = self.views.get((place, variables["viewName"]))
            nodes = [{"node": {"id": "v", **found}}] if found else []
            return {"data": {"project": {"allViews": {"edges": nodes}}}}
        if "upsertView" in query:
            if self.refusal:
                return {"errors": [{"message": self.refusal}]}
            name = variables["name"]
            self.views[place, name] = {key: variables[key] for key in ("displayName", "spec")}
            return {"data": {"upsertView": {"view": {"id": "v", "name": name}, "inserted": True}}}
        if "upsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/{n}"} for n in variables["files"]]
            made = {"runID": "r", "uploadHeaders": [], "files": files}
            return {"data": {"createRunFiles": made}}
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}"}
        return {"data": {"viewer": viewer, "serverInfo": None, "model": None}}


@contextmanager
def running(wandb: LocalWandb) -> Iterator[LocalWandb]:
    """Serve it by HTTP at wandb.url until the end of the `with` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer: dict[str, Any] = {}
            if self.path == "/graphql":
                request = json.loads(body)
                answer = wandb.answer(request["query"], request.get("variables") or {})
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_POST

        def log_message(self, *parts: object) -> None:
            """Nothing is printed."""

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        wandb.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield wandb
        finally:
            server.shutdown()
