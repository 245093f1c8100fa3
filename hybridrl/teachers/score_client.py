"""A client of one server that scores sequences: an OpenAI-compatible vLLM server.

A sequence is sent as the prompt of a completion of one token, with `prompt_logprobs=K`: the server
reports the log-prob of each token of the prompt, and those of its own K most likely tokens at that
position. Both are of the model's distribution at temperature 1, whatever the parameters of sampling
are. The form of the answer is that of vLLM 0.32.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from hybridrl.core.errors import ServerError
from hybridrl.core.plain_text import described, plain
from hybridrl.settings.servers import ServedConfig
from hybridrl.teachers.reported import ReportedScores

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses after which the same request may succeed."""
PAUSE = wait_random_exponential(multiplier=0.5, max=15.0)
"""The pause between two attempts: random, at most 0.5 s at first and at most 15 s later."""
CLAMPED = -9999.0
"""The number that vLLM's server writes for a log-prob of -inf, which JSON cannot represent."""

MESSAGE = 300  # longest error message of a server, in characters


class TransientError(Exception):
    """A failure after which the same request may succeed."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedScores(ReportedScores):
    """The log-probs that a server reports about one sequence."""

    nbytes: int  # of the answer as JSON


class ServedModel(NamedTuple):
    """An entry of the list of a server's models."""

    name: str
    max_tokens: int | None  # of a sequence; None: the server does not report it


class ScoreClient:
    """Requests to one server. Use as an asynchronous context manager.

    Example:
        async with ScoreClient("teachers.big.url", "http://host:8000/v1", None, served) as client:
            (scores,) = await client.score("big", [[1, 5, 6]], 0)

    Args:
        setting: the setting that contains the address, for error messages.
        url: with or without /v1 at its end.
        api_key: None: the server needs none.
        served: concurrency and timeouts.
        sleep: waits for the given seconds between two attempts.
    """

    def __init__(
        self,
        setting: str,
        url: str,
        api_key: str | None,
        served: ServedConfig,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = f"{setting}={url}"
        self.root = url.rstrip("/").removesuffix("/v1")
        self.served = served
        self.sleep = sleep
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=None,  # httpx limits each read; a limit on the whole request is set around it
            limits=httpx.Limits(max_connections=served.concurrency),
        )
        self.places = asyncio.Semaphore(served.concurrency)

    async def __aenter__(self) -> "ScoreClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    # -- requests ----------------------------------------------------------------------------------

    async def models(self) -> list[ServedModel]:
        """The models that the server has.

        Raises:
            ServerError: as `request`.
        """
        _, answer = await self.request("GET", "/v1/models", None)
        try:
            return [ServedModel(str(m["id"]), m.get("max_model_len")) for m in answer["data"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise self._unreadable("/v1/models", error) from error

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of the tokens.

        Raises:
            ServerError: as `request`.
        """
        body = {"model": model, "tokens": list(token_ids)}
        _, answer = await self.request("POST", "/detokenize", body)
        try:
            return str(answer["prompt"])
        except (KeyError, TypeError) as error:
            raise self._unreadable("/detokenize", error) from error

    async def score(
        self, model: str, sequences: Sequence[Sequence[int]], top: int
    ) -> list[ServedScores]:
        """The log-probs of sequences of token ids, served.concurrency of them at once.

        Args:
            model: its name on the server.
            top: K, the number of most likely tokens to report at each position.

        Raises:
            ServerError: as `request`, for the first sequence that fails; the others are cancelled.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score(model, ids, top)) for ids in sequences]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def _score(self, model: str, sequence: Sequence[int], top: int) -> ServedScores:
        ids = [int(token) for token in sequence]
        body = {
            "model": model,
            "prompt": ids,
            "max_tokens": 1,  # vLLM generates at least one
            "temperature": 0.0,
            "prompt_logprobs": top,
        }
        async with self.places:
            nbytes, answer = await self.request("POST", "/v1/completions", body)
        try:
            return read_scores(answer, ids, top, nbytes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._unreadable("/v1/completions", error) from error

    async def request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Any]:
        """(size in bytes, value) of an answer in JSON; a request that fails is repeated.

        The last attempt begins at most served.retry_s after the first, and each attempt lasts at
        most served.request_s.

        Raises:
            ServerError: the server refuses the request, or no attempt succeeded in that time.
        """
        attempts = AsyncRetrying(
            sleep=self.sleep,
            retry=retry_if_exception_type(TransientError),
            wait=pause,
            stop=stop_before_delay(self.served.retry_s),
            reraise=True,
        )
        try:
            return await attempts(self._attempt, method, path, body)
        except TransientError as error:
            number = attempts.statistics["attempt_number"]
            raise ServerError(
                f"{self.name}: did not answer {path} in {number} attempts within "
                f"served.retry_s={self.served.retry_s:g}; the last one: {error}"
            ) from error

    async def _attempt(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Any]:
        try:
            async with asyncio.timeout(self.served.request_s):
                answer = await self.http.request(method, self.root + path, json=body)
        except TimeoutError as error:
            limit = f"served.request_s={self.served.request_s:g}"
            raise TransientError(f"no answer within {limit}") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise TransientError(described(error)) from error
        if answer.status_code in TRANSIENT:
            raise TransientError(reported(answer), retry_after(answer))
        if answer.status_code != httpx.codes.OK:
            raise ServerError(f"{self.name}: answers {path} with {reported(answer)}")
        try:
            return len(answer.content), json.loads(answer.content)
        except (ValueError, RecursionError) as error:
            raise TransientError("its answer is not JSON") from error

    def _unreadable(self, path: str, error: Exception) -> ServerError:
        return ServerError(
            f"{self.name}: its answer to {path} does not have the form of vLLM's "
            f"({described(error)})"
        )


def pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: a growing random time, or longer if the server demands it."""
    failure = state.outcome.exception() if state.outcome is not None else None
    demanded = failure.retry_after_s if isinstance(failure, TransientError) else 0.0
    return max(PAUSE(state), demanded)


def retry_after(answer: httpx.Response) -> float:
    """The seconds in the header Retry-After; 0 if it is missing or contains a date."""
    text = answer.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0


def reported(answer: httpx.Response) -> str:
    """A clause about an answer that reports an error.

    Example: "HTTP 404 (The model `big` does not exist.)"
    """
    try:
        value = json.loads(answer.content)
        error = value["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, RecursionError, KeyError, TypeError):
        message = answer.text or answer.reason_phrase
    return f"HTTP {answer.status_code} ({plain(str(message), MESSAGE)})"


def read_scores(answer: Any, ids: Sequence[int], top: int, nbytes: int) -> ServedScores:
    """The log-probs in the answer to a request for `prompt_logprobs`.

    Entry t of the answer is {id: {"logprob": ..., "rank": ...}} for the K most likely tokens and
    token t, so it has K + 1 items if token t is not among the K. The first entry is null.

    Args:
        ids: the sequence, T tokens.
        top: K.
        nbytes: size of the answer.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the answer has another form, or a
            log-prob of -inf.
    """
    (choice,) = answer["choices"]
    entries = choice["prompt_logprobs"]
    if entries is None:
        raise ValueError("it reports no prompt_logprobs")
    if len(entries) != len(ids):
        raise ValueError(f"it has log-probs of {len(entries)} tokens, but {len(ids)} were sent")
    logprobs = np.zeros(len(ids), np.float32)
    top_ids = np.tile(np.arange(top, dtype=np.int32), (len(ids), 1))
    top_logprobs = np.zeros((len(ids), top), np.float32)
    for t in range(1, len(ids)):
        of_id = {int(token): float(part["logprob"]) for token, part in entries[t].items()}
        if min(of_id.values()) <= CLAMPED:
            raise ValueError("it gives a token a probability of 0, whose log-prob is infinite")
        logprobs[t] = of_id[ids[t]]
        if len(of_id) == top + 1:
            del of_id[ids[t]]
        if len(of_id) != top:
            raise ValueError(
                f"it has {len(entries[t])} log-probs of a token, not {top} or one more"
            )
        ranked = sorted(of_id.items(), key=lambda item: -item[1])
        top_ids[t] = [token for token, _ in ranked]
        top_logprobs[t] = [logprob for _, logprob in ranked]
    return ServedScores(
        logprobs=logprobs, top_ids=top_ids, top_logprobs=top_logprobs, nbytes=nbytes
    )
