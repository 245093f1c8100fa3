"""A server that gives scripted answers in the form of vLLM's server, and records the requests."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any

Answer = tuple[int, Any]
"""The HTTP status and the body, which is bytes or a value that is sent as JSON."""
HANG = (0, "nothing until the end")
DROP = (0, "nothing: the connection is closed")


def prompt_logprobs(ids: Sequence[int], top: int) -> list[dict | None]:
    """The log-probs of a prompt in vLLM's form: token y at position t has the log-prob -(y + t /
    10), and the `top` most likely tokens are 0, 1, 2, ...
    """
    entries: list[dict | None] = [None]
    for t, token in enumerate(ids[1:], 1):
        tokens = [token, *range(top)]
        entries.append({str(y): {"logprob": -(y + t / 10), "rank": y + 1} for y in tokens})
    return entries


def scores(body: dict) -> Answer:
    entries = prompt_logprobs(body["prompt"], body["prompt_logprobs"])
    return 200, {"choices": [{"prompt_logprobs": entries}]}


class ScoringServer:
    """The answers of the server and a record of its requests. Each request for scores gets the next
    entry of `script`, and after its end the answer of `scores`.

    Args:
        script: answers, or functions that return an answer for the body of a request.
        texts: returns the answer to /detokenize for token ids.
        max_model_len: the length that the server reports for its model.
    """

    def __init__(
        self,
        script: Sequence[Answer | Callable[[dict], Answer]] = (),
        texts: Callable[[list[int]], str] = str,
        max_model_len: int = 512,
    ) -> None:
        self.script = list(script)
        self.texts = texts
        self.models = [{"id": "big", "max_model_len": max_model_len}]
        self.events: list[str] = []  # method, path and status of each request, as it is answered
        self.bodies: list[dict] = []  # bodies of the requests for scores
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self.release = Event()  # ends the requests that hang
        self.url = ""
        self._lock = Lock()
        self._at_once = 0

    def answer(self, method: str, path: str, body: dict) -> Answer:
        if path == "/v1/models":
            return 200, {"data": self.models}
        if path == "/detokenize":
            return 200, {"prompt": self.texts(body["tokens"])}
        with self._lock:
            self.bodies.append(body)
            scripted = self.script.pop(0) if self.script else scores
        answer = scripted(body) if callable(scripted) else scripted
        if answer == HANG:
            self.release.wait(30)
        return answer

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        yield
        with self._lock:
            self._at_once -= 1


class QuietServer(ThreadingHTTPServer):
    """A server that prints nothing when a client closes its connection."""

    def handle_error(self, *_: object) -> None: ...


@contextmanager
def scoring_server(*args: Any, **kwargs: Any) -> Iterator[ScoringServer]:
    """Run a server at a free port of this machine until the end of the `with` block; its address is
    `url`.
    """
    script = ScoringServer(*args, **kwargs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply("GET", {})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.reply("POST", json.loads(self.rfile.read(length)))

        def reply(self, method: str, body: dict) -> None:
            script.keys.add(self.headers["Authorization"])
            with script.counted():
                status, value = script.answer(method, self.path, body)
            script.events.append(f"{method} {self.path} {status}")
            if status == 0:
                return
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "7")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Prints nothing."""

    server = QuietServer(("127.0.0.1", 0), Handler)
    script.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield script
    finally:
        script.release.set()
        server.shutdown()
        server.server_close()
        thread.join(30)
