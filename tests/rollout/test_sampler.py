"""The sampler: the requests that reach the engine, their order, and the results, aborts and
errors.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import pytest

from hybridrl.core.errors import DataError
from hybridrl.rollout.rollouter import Rollouter, Sample, SingleTurn
from hybridrl.rollout.sampler import Sampler, sample_seed
from hybridrl.rollout.teacher_turn import TeacherTurn
from hybridrl.settings.choices import Source
from hybridrl.teachers.context import Context, EndTokens
from hybridrl.types import (
    ChunkHeader,
    FinishReason,
    GenerateOrder,
    Prompt,
    RolloutBatch,
    Trajectory,
)
from tests.support.scripted_engine import END, LONGEST_PROMPT, ScriptedEngine, TwoTurns


def counted(token_ids: list[int]) -> list[int]:
    """A response whose length, including the end token, is the last token of the prompt."""
    return [9] * (token_ids[-1] - 1) + [END]


def prompt(uid: str, *ids: int) -> Prompt:
    return Prompt(uid=uid, input_ids=ids, text="", columns={})


def order(wave: str = "w", chunk: int = 0, num_chunks: int = 1, **changes) -> GenerateOrder:
    values = {"group_size": 2, "temperature": 1.0, "max_new_tokens": 10, "seed": 5} | changes
    return GenerateOrder(wave=wave, chunk=chunk, num_chunks=num_chunks, **values)


def sampler(rollouter: Rollouter, rule: Callable = counted) -> tuple[Sampler, ScriptedEngine]:
    engine = ScriptedEngine(rule)
    return Sampler(engine, rollouter, Source.student), engine


def test_an_engine_stops_at_the_chosen_end_token_too():
    made = Sampler(ScriptedEngine(counted), SingleTurn(), Source.student, (23,))
    asyncio.run(made.generate(order(), [prompt("a", 1, 3)]))
    assert [request.params.stop_token_ids for request in made.engine.requests] == [[23], [23]]


def test_a_teacher_writes_after_its_own_prompt_in_the_students_tokens():
    """The teacher ends its response with token 2, for which the student uses token 23. It may write
    as many tokens as the student, although its prompt is longer.
    """
    context = Context(teacher="main", ends=EndTokens(student=23, teacher=END))
    made, engine = sampler(TeacherTurn(context))
    given = replace(prompt("a", 1, 3), teacher_prompts={"main": (24, 1, 5, 6, 4)})
    support = order(support=1, group_size=1, max_new_tokens=4)
    _, batch = asyncio.run(made.generate(support, [given, prompt("b", 1, 2)]))
    assert [request.token_ids for request in engine.requests] == [[24, 1, 5, 6, 4], [1, 2]]
    assert [request.params.max_tokens for request in engine.requests] == [4, 4]
    assert batch.input_ids.tolist() == [1, 3, 9, 9, 9, 23, 1, 2, 9, 23]
    assert batch.prompt_lengths == (2, 2)
    assert batch.finish_reasons == (FinishReason.stop,) * 2
    assert batch.rollout_logprobs[2:6].tolist() == pytest.approx([-0.9, -0.9, -0.9, -0.2])


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollouter", [SingleTurn(), TwoTurns((30, 3))])
def test_every_first_request_of_a_wave_is_added_in_order_before_the_engines_first_step(rollouter):
    made, engine = sampler(rollouter)
    chunks = [(prompt("a", 1, 3), prompt("b", 1, 2)), (prompt("c", 1, 2),)]

    async def run() -> None:
        await asyncio.gather(
            *(made.generate(order(chunk=c, num_chunks=2), chunks[c]) for c in (1, 0))
        )

    asyncio.run(run())
    first = [f"add w/{uid}/{k}/0" for uid in "abc" for k in (0, 1)]
    assert engine.events[:7] == [*first, "step"]
    assert [request.arrival_time for request in engine.requests[:6]] == [0, 1, 2, 3, 4, 5]


def test_a_wave_that_arrives_at_a_busy_engine_is_added_between_two_of_its_steps():
    made, engine = sampler(SingleTurn())

    async def run() -> None:
        busy = asyncio.create_task(made.generate(order("busy"), [prompt("z", 1, 9)]))
        for _ in range(5):
            await asyncio.sleep(0)
        await made.generate(order(), [prompt("a", 1, 3), prompt("b", 1, 2)])
        await busy

    asyncio.run(run())
    start = engine.events.index("add w/a/0/0")
    assert 0 < engine.events.index("step") < start
    assert engine.events[start : start + 4] == [f"add w/{u}/{k}/0" for u in "ab" for k in (0, 1)]


def test_a_request_carries_what_the_order_says():
    made, engine = sampler(SingleTurn())
    made.version = 4
    asked = order(temperature=0.5, support=3, priority=-1, group_size=1)
    asyncio.run(made.generate(asked, [prompt("a", 1, 2)]))
    (request,) = engine.requests
    assert (request.token_ids, request.salt, request.priority) == ([1, 2], "v4/w", -1)
    params = request.params
    assert (params.temperature, params.max_tokens, params.logprobs) == (0.5, 10, 3)
    assert params.seed == sample_seed(5, "a", 0)


def test_greedy_sampling_has_no_seed():
    made, engine = sampler(SingleTurn())
    asyncio.run(made.generate(order(temperature=0.0, group_size=1), [prompt("a", 1, 2)]))
    assert engine.requests[0].params.seed is None


def test_the_seed_of_a_turn_derives_from_run_prompt_sample_and_turn():
    assert sample_seed(5, "a", 1) == sample_seed(5, "a", 1, turn=0) == 1329800560981709547
    seeds = [
        sample_seed(seed, uid, index, turn)
        for seed in (5, 6)
        for uid in ("a", "a/1", "a/1:1")
        for index in (0, 1)
        for turn in (0, 1, 2)
    ]
    assert len(set(seeds)) == 36 and all(0 <= seed < 2**63 for seed in seeds)


def test_each_turn_is_sampled_with_its_own_seed():
    made, engine = sampler(TwoTurns((30, 3)))
    asyncio.run(made.generate(order(group_size=1), [prompt("a", 1, 2)]))
    assert [request.name for request in engine.requests] == ["w/a/0/0", "w/a/0/1"]
    assert [r.params.seed for r in engine.requests] == [sample_seed(5, "a", 0, t) for t in (0, 1)]
    assert engine.requests[1].token_ids == [1, 2, 9, END, 30, 3]


# -- the limit -------------------------------------------------------------------------------------


def test_the_turns_and_observations_of_a_response_share_its_limit():
    made, engine = sampler(TwoTurns((30, 9)))
    batch = asyncio.run(made.generate(order(group_size=1), [prompt("a", 1, 4)]))[1]
    assert [request.params.max_tokens for request in engine.requests] == [10, 4], "4 and 2 are used"
    row = batch.trajectory(0)
    assert row.response_ids.tolist() == [9, 9, 9, END, 30, 9, 9, 9, 9, 9]
    assert row.finish_reason is FinishReason.length


def test_a_response_without_room_for_another_turn_ends_there():
    made, engine = sampler(TwoTurns((30, 31, 9)))
    batch = asyncio.run(made.generate(order(max_new_tokens=5), [prompt("a", 1, 3)]))[1]
    assert len(engine.requests) == 2, "no second turn is asked for"
    row = batch.trajectory(0)
    assert row.response_ids.tolist() == [9, 9, END, 30, 31] and len(row.support_ids) == 3
    assert row.finish_reason is FinishReason.length


# -- aborts ----------------------------------------------------------------------------------------


def aborted_after(
    made: Sampler, when: Callable[[], bool], groups: list[str] | None, prompts: list[Prompt]
) -> tuple[RolloutBatch, int]:
    """Sample, and abort the groups as soon as `when` returns True; returns the batch and the number
    of aborted requests.
    """

    async def run() -> tuple[RolloutBatch, int]:
        work = asyncio.create_task(made.generate(order(), prompts))
        while not when():
            await asyncio.sleep(0)
        stopped = made.abort(groups)
        return (await work)[1], stopped

    return asyncio.run(run())


@pytest.mark.parametrize("turn", [0, 1])
def test_an_abort_ends_the_responses_of_its_groups_in_any_turn_and_no_other(turn: int):
    made, engine = sampler(TwoTurns((30, 3)))
    batch, stopped = aborted_after(
        made,
        lambda: f"add w/a/1/{turn}" in engine.events,
        ["w/a"],
        [prompt("a", 1, 2), prompt("b", 1, 2)],
    )
    assert stopped == 2
    assert [e for e in engine.events if e.startswith("abort")] == [
        f"abort w/a/{k}/{turn}" for k in (0, 1)
    ]
    assert batch.response_lengths.tolist() == [0, 0, 5, 5]
    reasons = [FinishReason.aborted] * 2 + [FinishReason.stop] * 2
    assert list(batch.finish_reasons) == reasons


def test_an_abort_of_everything_counts_each_response_once():
    made, engine = sampler(SingleTurn())
    prompts = [prompt("a", 1, 9), prompt("b", 1, 9)]

    async def run() -> tuple[int, int, RolloutBatch]:
        work = asyncio.create_task(made.generate(order(), prompts))
        while "step" not in engine.events:
            await asyncio.sleep(0)
        return made.abort(["w/b"]), made.abort(), (await work)[1]

    one, all_others, batch = asyncio.run(run())
    assert (one, all_others) == (2, 2) and not batch.response_lengths.any()
    assert made.abort() == 0, "nothing is left to stop"


def test_an_abort_also_ends_responses_that_have_not_begun():
    made, engine = sampler(SingleTurn())
    batch, stopped = aborted_after(made, lambda: bool(made._trajectories), None, [prompt("a", 1)])
    assert stopped == 2 and engine.events == []
    assert set(batch.finish_reasons) == {FinishReason.aborted}


def test_an_abort_interrupts_a_rollouter_that_waits_for_something_else():
    closed: list[str] = []
    waiting: list[str] = []

    class Stuck:
        async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
            await sample(prompt.input_ids)
            waiting.append(prompt.uid)
            try:
                await asyncio.Event().wait()
            finally:
                closed.append(prompt.uid)
            raise AssertionError

    made, _ = sampler(Stuck())
    batch, stopped = aborted_after(made, lambda: len(waiting) == 2, None, [prompt("a", 1, 2)])
    assert stopped == 2 and closed == ["a", "a"]
    assert set(batch.finish_reasons) == {FinishReason.aborted}


# -- errors ----------------------------------------------------------------------------------------


def test_a_chunk_with_a_prompt_that_the_engine_refuses_fails_alone():
    made, _ = sampler(SingleTurn())
    long = prompt("long", *[2] * (LONGEST_PROMPT + 1))
    chunks = [(prompt("a", 1, 3),), (long, prompt("b", 1, 2))]

    async def run() -> list:
        calls = [made.generate(order(chunk=c, num_chunks=2), chunks[c]) for c in (1, 0)]
        return await asyncio.gather(*calls, return_exceptions=True)

    refused, (_, batch) = asyncio.run(run())
    assert isinstance(refused, DataError)
    assert str(refused) == f"prompt long: the prompt has {LONGEST_PROMPT + 1} tokens"
    assert batch.response_lengths.tolist() == [3, 3]


def raised_by(work: Coroutine) -> BaseException:
    async def run() -> BaseException:
        (error,) = await asyncio.gather(work, return_exceptions=True)
        return error

    return asyncio.run(run())


def test_an_error_of_the_engine_ends_every_response_that_waits_for_it():
    made, engine = sampler(SingleTurn(), lambda ids: 1 // 0)
    error = raised_by(made.generate(order(), [prompt("a", 1, 3), prompt("b", 1, 3)]))
    assert isinstance(error, ZeroDivisionError)
    assert engine.events.count("step") == 1


def test_an_error_of_a_rollouter_ends_its_chunk():
    class Broken:
        async def run(self, prompt: Prompt, sample: Sample) -> Trajectory:
            raise KeyError("tool")

    assert isinstance(raised_by(sampler(Broken())[0].generate(order(), [prompt("a", 1)])), KeyError)


@pytest.mark.parametrize("later", range(12))
def test_a_wave_that_comes_again_is_sampled_whatever_the_moment_at_which_the_first_one_ends(
    later: int,
):
    """This happens after a command was interrupted: the requests of its responses are still running
    and have the same names.
    """

    async def run() -> RolloutBatch:
        made, _ = sampler(SingleTurn())
        first = asyncio.create_task(made.generate(order(group_size=1), [prompt("a", 1, 3)]))
        for _ in range(later):
            await asyncio.sleep(0)
        _, batch = await asyncio.wait_for(
            made.generate(order(group_size=1), [prompt("a", 1, 3)]), timeout=5
        )
        first.cancel()
        return batch

    assert asyncio.run(run()).input_ids.tolist() == [1, 3, 9, 9, END]


def test_the_chunk_that_an_earlier_job_left_waiting_is_not_sampled_with_the_next_jobs_wave():
    """When the first job ends, chunk 0 of two is waiting for chunk 1. The next job has a wave of
    the same name, whose chunk 0 has the prompt b; the old chunk 0 must not be sampled with the new
    chunk 1.
    """
    made, engine = sampler(SingleTurn())

    async def run() -> list[tuple[ChunkHeader, RolloutBatch]]:
        of_wave = order(num_chunks=2, group_size=1)
        left = asyncio.create_task(made.generate(of_wave, [prompt("a", 1, 3)]))
        await asyncio.sleep(0)
        made.begin_job()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(left, timeout=5)
        last = asyncio.create_task(made.generate(replace(of_wave, chunk=1), [prompt("c", 1, 2)]))
        await asyncio.sleep(0)
        assert engine.requests == []
        first = made.generate(of_wave, [prompt("b", 1, 3)])
        return await asyncio.wait_for(asyncio.gather(first, last), timeout=5)

    batches = [batch for _, batch in asyncio.run(run())]
    assert [request.name for request in engine.requests] == ["w/b/0/0", "w/c/0/0"]
    assert [b.input_ids.tolist() for b in batches] == [[1, 3, 9, 9, END], [1, 2, 9, END]]
