"""The client of a teacher's server, tested with a server that gives scripted answers."""

import asyncio
from collections.abc import Callable

import pytest

from hybridrl.core.errors import ServerError
from hybridrl.settings.servers import ServedConfig
from hybridrl.teachers.score_client import ScoreClient, ServedScores
from tests.support.scoring_server import (
    DROP,
    HANG,
    ScoringServer,
    prompt_logprobs,
    scoring_server,
)

KEY = "sk-0123456789abcdef"
SEQUENCE = [1, 5, 2]


def score(
    server: ScoringServer,
    sequences: list[list[int]],
    top: int = 0,
    pauses: list[float] | None = None,
    **served: float,
) -> list[ServedScores]:
    """The scores that the client gets from a server. Pauses before retries are recorded in `pauses`
    instead of being waited for.
    """

    async def record(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    async def run() -> list[ServedScores]:
        config = ServedConfig(**served)
        async with ScoreClient("teachers.big.url", server.url, KEY, config, sleep=record) as client:
            return await client.score("big", sequences, top)

    return asyncio.run(run())


def test_a_sequence_gets_the_log_probs_of_its_tokens_and_of_the_most_likely_ones():
    with scoring_server() as server:
        drawn, top = score(server, [SEQUENCE], 0), score(server, [SEQUENCE], 3)
    assert drawn[0].logprobs.tolist() == pytest.approx([0, -5.1, -2.2])
    assert drawn[0].top_ids.shape == (3, 0)
    # Token 2 is one of the three most likely tokens, token 5 is not.
    assert top[0].logprobs.tolist() == pytest.approx([0, -5.1, -2.2])
    assert top[0].top_ids.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert top[0].top_logprobs[1].tolist() == pytest.approx([-0.1, -1.1, -2.1])
    assert top[0].nbytes > drawn[0].nbytes > 0
    expected = {"model": "big", "prompt": SEQUENCE, "max_tokens": 1, "temperature": 0.0}
    assert server.bodies == [expected | {"prompt_logprobs": k} for k in (0, 3)]
    assert server.keys == {f"Bearer {KEY}"}


def test_a_failure_that_may_pass_is_followed_by_a_pause_and_another_attempt():
    failures = [(503, {"error": {"message": "loading"}}), (429, b"slow down"), (500, b"")]
    pauses: list[float] = []
    with scoring_server([*failures, (200, b'{"cut'), DROP]) as server:
        (answer,) = score(server, [SEQUENCE], pauses=pauses)
    assert answer.logprobs.tolist() == pytest.approx([0, -5.1, -2.2])
    statuses = [event.split()[-1] for event in server.events]
    assert statuses == ["503", "429", "500", "200", "0", "200"]
    # The second pause is that of the header Retry-After; the others are random.
    assert pauses[1] == 7
    assert all(0 <= pause <= limit for pause, limit in zip(pauses, (0.5, 7, 2, 4, 8), strict=True))


def test_a_request_without_an_answer_is_sent_again_after_its_timeout():
    with scoring_server([HANG]) as server:
        (answer,) = score(server, [SEQUENCE], request_s=0.5)
    assert answer.logprobs.tolist() == pytest.approx([0, -5.1, -2.2])
    assert len(server.bodies) >= 2


def test_a_server_that_stays_away_ends_in_an_error_with_its_address_and_the_last_failure():
    with scoring_server([(503, {"error": "busy"})] * 9) as server:
        with pytest.raises(ServerError) as caught:
            score(server, [SEQUENCE], retry_s=0)
        address = server.url
    assert str(caught.value) == (
        f"teachers.big.url={address}: did not answer /v1/completions in 1 attempts within "
        "served.retry_s=0; the last one: HTTP 503 (busy)"
    )
    with pytest.raises(ServerError, match=r"the last one: ConnectError: "):
        score(server, [SEQUENCE], retry_s=0)  # its port is closed now


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_request_that_is_refused_is_sent_once(status: int):
    refusal = (status, {"error": {"message": f"because\n{status}"}})
    with scoring_server([refusal]) as server, pytest.raises(ServerError) as caught:
        score(server, [SEQUENCE])
    assert f"answers /v1/completions with HTTP {status} (because\\n{status})" in str(caught.value)
    assert len(server.bodies) == 1 and KEY not in str(caught.value)


def answer(entries: object) -> Callable[[dict], tuple[int, dict]]:
    return lambda body: (200, {"choices": [{"prompt_logprobs": entries}]})


@pytest.mark.parametrize(
    ("scripted", "message"),
    [
        ((200, {"choices": []}), "not enough values to unpack"),
        ((200, ["a"]), "TypeError"),
        (answer(None), "it reports no prompt_logprobs"),
        (answer([None]), "it has log-probs of 1 tokens, but 3 were sent"),
        (answer(prompt_logprobs([1, 5, 3], 0)), "KeyError: 2"),
        (answer(prompt_logprobs(SEQUENCE, 3)), "it has 4 log-probs of a token, not 0 or one more"),
        (answer([None, {"5": {"logprob": "x"}}, {}]), "could not convert string to float"),
        (answer([None, {"5": {"logprob": float("nan")}}, {"2": {"logprob": -1}}]), "not finite"),
        (answer([None, {"5": {"logprob": -9999.0}}, {"2": {"logprob": -1}}]), "a probability of 0"),
        (answer([None, {"5": {"logprob": 0.5}}, {"2": {"logprob": -1}}]), "a log-prob above 0"),
    ],
)
def test_an_answer_of_another_form_is_refused_with_the_difference(scripted, message: str):
    with scoring_server([scripted]) as server, pytest.raises(ServerError) as caught:
        score(server, [SEQUENCE])
    assert "does not have the form of vLLM's" in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.bodies) == 1


def test_no_more_requests_than_allowed_are_under_way_at_once():
    sequences = [[1, 5 + i] for i in range(12)]
    with scoring_server() as server:
        answers = score(server, sequences, concurrency=3)
    assert [a.logprobs[1] for a in answers] == pytest.approx([-(5.1 + i) for i in range(12)])
    assert 1 <= server.most_at_once <= 3


def test_the_first_sequence_that_is_refused_cancels_the_others():
    script = [(400, {"error": "too long"}), *[HANG] * 3]
    with scoring_server(script) as server, pytest.raises(ServerError, match="too long"):
        score(server, [SEQUENCE] * 4)
    assert len(server.bodies) <= 4
