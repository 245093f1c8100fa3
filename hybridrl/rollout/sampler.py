"""Turns orders into trajectories: runs a rollouter for each response on one vLLM engine."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from hybridrl.core.errors import DataError
from hybridrl.rollout.header import chunk_header
from hybridrl.rollout.rollouter import (
    Completion,
    Rollouter,
    aborted_trajectory,
    cut_response,
)
from hybridrl.rollout.vllm_internals import (
    has_launched,
    pause_scheduling,
    read_completion,
    refusals,
    resume_scheduling,
)
from hybridrl.rollout.waves import Waves
from hybridrl.settings.choices import Source
from hybridrl.types import (
    ChunkHeader,
    FinishReason,
    GenerateOrder,
    Prompt,
    RolloutBatch,
    Trajectory,
)

PARTS = ("weights", "kv_cache")
"""The parts of an engine on its GPU, by vLLM's names."""

if TYPE_CHECKING:
    from vllm import LLMEngine, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput


FROM_DISK = -1
"""The version of the weights before the first update."""


class Sampler:
    """Samples the responses of an engine.

    All methods run on one event loop, which has two kinds of tasks.

    One task per trajectory runs the rollouter. It adds requests to the engine, waits for their
    outputs, and is cancelled by `abort`.

    One task, `_decode`, steps the engine inline and yields to the event loop between steps. It
    consumes the requests, produces their outputs, waits while the engine is paused, and runs while
    the engine has unfinished requests.

    Args:
        engine: no other object adds requests to it.
        source: who writes the responses, which the batches record.
        stop_token_ids: tokens that end a completion, in addition to those of the model's settings.
        adapter: the adapter that every request names; None: the engine has no adapter.
    """

    def __init__(
        self,
        engine: "LLMEngine",
        rollouter: Rollouter,
        source: Source,
        stop_token_ids: Sequence[int] = (),
        adapter: "LoRARequest | None" = None,
    ) -> None:
        self.engine = engine
        self.adapter = adapter
        self.rollouter = rollouter
        self.source = source
        self.stop_token_ids = tuple(stop_token_ids)
        self.version = FROM_DISK  # of the engine's weights
        self._waves: Waves[list[asyncio.Task[Trajectory]]] = Waves(self._start_chunk)
        self._trajectories: dict[str, asyncio.Task[Trajectory]] = {}  # "wave/uid/sample"
        self._requests: dict[str, asyncio.Future[CompletionOutput]] = {}  # "wave/uid/sample/turn"
        self._arrivals = count()
        self._decoding: asyncio.Task[None] | None = None
        self._busy_s = 0.0  # in steps of the engine, since the last take_busy
        self._updating = False  # from pause to resume
        self.asleep: set[str] = set()  # of PARTS
        self._resumed = asyncio.Event()  # not set while the engine is paused or asleep
        self._resumed.set()

    async def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        """Make K responses to each prompt, K = order.group_size.

        Raises:
            DataError: the engine refused a prompt.
        """
        started = time.monotonic()
        tasks = await self._waves.arrive(order, prompts)
        ends = await asyncio.gather(*map(end_of, tasks))
        of_task = [prompt for prompt in prompts for _ in range(order.group_size)]
        trajectories = [
            aborted_trajectory(prompt, order.support) if task.cancelled() else task.result()
            for prompt, task in zip(of_task, tasks, strict=True)
        ]
        batch = RolloutBatch.pack(prompts, order.group_size, trajectories, self.source)
        return chunk_header(batch, [end - started for end in ends]), batch

    def abort(self, groups: Sequence[str] | None = None) -> int:
        """Stop responses. The calls of `generate` that wait for them get trajectories without a
        response, marked as aborted.

        Args:
            groups: "wave/uid" of each prompt group to stop; None: all.

        Returns:
            The number of responses that were stopped.
        """
        chosen = None if groups is None else set(groups)
        names = {
            name
            for name in self._trajectories
            if chosen is None or name.rpartition("/")[0] in chosen
        }
        self.engine.abort_request(
            [
                request
                for request, output in self._requests.items()
                if request.rpartition("/")[0] in names and not output.done()
            ]
        )
        return sum(self._trajectories.pop(name).cancel() for name in names)

    def take_busy(self) -> float:
        """The seconds that the engine's steps have taken since the last call."""
        taken = self._busy_s
        self._busy_s = 0.0
        return taken

    def begin_job(self) -> None:
        """Drop what is left of an earlier job: chunks that wait for others, responses under way,
        cached prefixes and the count of arrivals.
        """
        self._waves.drop()
        self.abort()
        self._arrivals = count()
        self.resume(FROM_DISK)

    def pause(self) -> None:
        """Stop sampling, and wait until the device has nothing left to do. Responses under way stay
        as they are.

        On GPUs vLLM schedules asynchronously: it launches a batch before it collects the previous
        one. Launched batches are collected here, because a batch gets the version of the weights
        when it is collected, and because the weights must not change while it is computed.
        """
        self._updating = True
        self._stop()

    def resume(self, version: int) -> None:
        """Continue sampling with weights of this version; cached prefixes of older weights are
        dropped. An engine that is asleep continues once it is awake.
        """
        self.engine.reset_prefix_cache()
        self.engine.set_weight_version(str(version))
        self.version = version
        self._updating = False
        self._go_on()

    def sleep(self) -> None:
        """Move the weights to host memory and drop the KV cache with its cached prefixes.

        Raises:
            RuntimeError: a response is under way, whose keys and values would be lost.
        """
        if self.engine.has_unfinished_requests():
            raise RuntimeError("a response is under way, so the engine cannot sleep")
        if self.asleep == set(PARTS):
            return
        self._stop()
        self.engine.sleep(level=1, mode="keep")
        self.asleep = set(PARTS)

    def wake_up(self, parts: Sequence[str]) -> None:
        """Bring parts of a sleeping engine back to the GPU. It samples again once all parts are
        back and no update of the weights is under way.

        Args:
            parts: some of PARTS; those that are awake stay as they are.
        """
        waking = [part for part in parts if part in self.asleep]
        if waking:
            self.engine.wake_up(waking)
            self.asleep -= set(waking)
            self._go_on()

    def _stop(self) -> None:
        self._resumed.clear()
        pause_scheduling(self.engine)
        while has_launched(self.engine):
            self._step()
        self.engine.collective_rpc("synchronize_device")

    def _go_on(self) -> None:
        if self._updating or self.asleep:
            return
        resume_scheduling(self.engine)
        self._resumed.set()

    # -- trajectories ------------------------------------------------------------------------------

    def _start_chunk(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> list[asyncio.Task[Trajectory]]:
        return [self._start(order, p, k) for p in prompts for k in range(order.group_size)]

    def _start(self, order: GenerateOrder, prompt: Prompt, index: int) -> asyncio.Task[Trajectory]:
        """Create the task that makes one response. Tasks begin in the order in which they were
        created, and each adds its first request before it waits.
        """
        name = f"{order.wave}/{prompt.uid}/{index}"
        turns = count()
        prompt_length: int | None = None  # in tokens that the model reads

        async def sample(token_ids: Sequence[int]) -> Completion:
            nonlocal prompt_length
            if prompt_length is None:
                prompt_length = len(token_ids)
            room = order.max_new_tokens - (len(token_ids) - prompt_length)
            return await self._complete(order, prompt, index, next(turns), token_ids, room)

        async def respond() -> Trajectory:
            trajectory = await self.rollouter.run(prompt, sample)
            return cut_response(trajectory, order.max_new_tokens)

        def remove(task: asyncio.Task[Trajectory]) -> None:
            if self._trajectories.get(name) is task:
                del self._trajectories[name]

        task = asyncio.create_task(respond())
        self._trajectories[name] = task
        task.add_done_callback(remove)
        return task

    async def _complete(
        self,
        order: GenerateOrder,
        prompt: Prompt,
        index: int,
        turn: int,
        token_ids: Sequence[int],
        room: int,
    ) -> Completion:
        """Sample one completion. Its seed depends on neither engine nor batch.

        Args:
            room: the number of tokens that may be added to the response.

        Raises:
            DataError: the engine refused the request.
        """
        if room < 1:
            return no_room(order.support)
        request = f"{order.wave}/{prompt.uid}/{index}/{turn}"
        seed = sample_seed(order.seed, prompt.uid, index, turn)
        try:
            params = sampling_params(order, room, seed, self.stop_token_ids)
            output = self._add(request, token_ids, params, order)
        except refusals() as error:
            raise DataError(f"prompt {prompt.uid}: {error}") from error
        try:
            return read_completion(await output, order.support)
        finally:
            # A later request may have the name of one that was aborted.
            if self._requests.get(request) is output:
                del self._requests[request]

    # -- the engine --------------------------------------------------------------------------------

    def _add(
        self,
        request: str,
        token_ids: Sequence[int],
        params: "SamplingParams",
        order: GenerateOrder,
    ) -> "asyncio.Future[CompletionOutput]":
        """Add a request to the engine; the result of the future is its output.

        Raises:
            Exception: one of vllm_internals.refusals(): the engine refuses the request.
        """
        from vllm import TokensPrompt

        # The salt prevents the reuse of prefixes that were computed by older weights or for another
        # wave: a resumed run would not have these prefixes, and its numbers could differ.
        tokens = TokensPrompt(
            prompt_token_ids=[int(token) for token in token_ids],
            cache_salt=f"v{self.version}/{order.wave}",
        )
        # Among requests of equal priority the earliest is first. The arrival is a count and not a
        # time, since a clock may be set back.
        self.engine.add_request(
            request,
            tokens,
            params,
            arrival_time=float(next(self._arrivals)),
            lora_request=self.adapter,
            priority=order.priority,
        )
        output = asyncio.get_running_loop().create_future()
        self._requests[request] = output
        if self._decoding is None or self._decoding.done():
            # The task begins after the other tasks of the wave, which were all created before it.
            self._decoding = asyncio.create_task(self._decode())
        return output

    async def _decode(self) -> None:
        """Step the engine until it has no unfinished request."""
        await self._resumed.wait()
        while self.engine.has_unfinished_requests():
            self._step()
            await asyncio.sleep(0)
            await self._resumed.wait()

    def _step(self) -> None:
        """Take one step of the engine, and set the results of the requests that finish in it."""
        started = time.perf_counter()
        try:
            for finished in self.engine.step():
                output = self._requests.get(finished.request_id)
                if output is not None and not output.done():
                    output.set_result(finished.outputs[0])
        except Exception as error:  # every waiting trajectory must end with this error
            for output in self._requests.values():
                if not output.done():
                    output.set_exception(error)
            raise
        finally:
            self._busy_s += time.perf_counter() - started


async def end_of(task: asyncio.Task[Trajectory]) -> float:
    """Wait until a trajectory is finished or aborted, and return time.monotonic() at that moment.

    Raises:
        Exception: any that the task raised.
    """
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return time.monotonic()


def sampling_params(
    order: GenerateOrder, max_tokens: int, seed: int, stop_token_ids: Sequence[int] = ()
) -> "SamplingParams":
    """vLLM's parameters of one request; greedy decoding has no seed.

    Args:
        stop_token_ids: tokens that end the completion; vLLM adds those of the model's own settings.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=order.temperature,
        max_tokens=max_tokens,
        stop_token_ids=list(stop_token_ids),
        seed=None if order.temperature == 0 else seed,
        logprobs=order.support,  # the number of tokens in addition to the drawn one
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def sample_seed(seed: int, uid: str, index: int, turn: int = 0) -> int:
    """The 63-bit seed of a completion, which is the same on any engine and in any batch.

    Args:
        seed: seed of the run and wave.
        uid: uid of the prompt.
        index: index of the sample.
    """
    key = f"{seed}/{uid}/{index}" if turn == 0 else f"{seed}/{uid}/{index}:{turn}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def no_room(support: int) -> Completion:
    """The empty completion of a response that has reached its limit."""
    return Completion(
        token_ids=(),
        logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
        support_ids=np.zeros((0, support), np.int32),
        finish_reason=FinishReason.length,
    )
