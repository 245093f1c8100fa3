"""Answers to many prompts by the engines of a run, and their rewards."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import WorkerError
from hybridrl.data.route import takes
from hybridrl.runtime.calls import Pending, settle, watch_nothing
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.types import FinishReason, Prompt, Rewards, RolloutBatch

RESULTS_SHARE = 1 / 32
"""The share of the pending answers that one wait waits for. Each wait examines all of them, so
waiting for single answers would take quadratic time.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A prompt with its K responses.

    Example: two responses, the second one cut at rollout.max_new_tokens=4: responses ("3*8", "3*3*3
    ="), finish_reasons (stop, length), lengths (4, 4), rewards {"correct": (1.0, 0.0)}.
    """

    prompt: Prompt
    responses: tuple[str, ...]  # [K] without special tokens
    finish_reasons: tuple[FinishReason, ...]  # [K]
    lengths: tuple[int, ...]  # [K] tokens that the model wrote, its end token included
    # The [K] values of each reward function that was called and whose route takes the prompt, by
    # its name; NaN where it failed; empty: there is no function
    rewards: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Prompts that one engine samples together, without any others at the same time."""

    number: int
    prompts: tuple[Prompt, ...]
    wanted: frozenset[str]
    """The uids whose answers are wanted. The others are sampled too, since a response could change
    in its last bits if other requests shared the engine's forward passes.
    """

    @property
    def name(self) -> str:
        return f"wave-{self.number}"


def waves_of(prompts: Sequence[Prompt], size: int, done: frozenset[str]) -> list[Wave]:
    """Divide prompts into waves, and return those in which an answer is still wanted.

    Example: prompts a to e in waves of two, of which a, b and c are done: waves 1 (c and d, d is
    wanted) and 2 (e).

    Args:
        size: the number of prompts in each wave except the last.
        done: uids of the prompts that already have an answer.
    """
    waves = []
    for number, start in enumerate(range(0, len(prompts), size)):
        part = tuple(prompts[start : start + size])
        wanted = frozenset(prompt.uid for prompt in part) - done
        if wanted:
            waves.append(Wave(number=number, prompts=part, wanted=wanted))
    return waves


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How the responses are sampled."""

    samples: int  # K
    temperature: float  # 0: greedy
    seed: int


@dataclass(slots=True, kw_only=True)
class Unfinished:
    """An answer under way: its prompt is being sampled, then its responses are being rewarded."""

    wave: Wave
    engine: int
    chunk: Chunk
    rewards: Pending | None = None  # -> Rewards; None: the engine is still sampling

    @property
    def call(self) -> Pending:
        """The pending call: the reward call if it has started, otherwise the sampling."""
        return self.chunk.header if self.rewards is None else self.rewards

    @property
    def prompt(self) -> Prompt:
        [prompt] = self.chunk.prompts
        return prompt


class Answering:
    """Lets the engines answer prompts, wave by wave.

    consumes waves / produces answers as they finish, and calls to the reward workers / waits for a
    share of the pending answers / unblocked by these answers, and by the failure of a worker: the
    worker is replaced, and the whole wave of a failed engine is sampled again.

    Args:
        rewards: the workers that judge the responses; None: they are not judged.
        tokenizer: decodes the responses.
        only: the reward function that is called; None: all of them.
        check: called every WATCH_S while waiting; an exception from it ends the wait.
    """

    def __init__(
        self,
        rollout: RolloutGroup,
        rewards: RewardGroup | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        only: str | None = None,
        check: Callable[[], None] = watch_nothing,
    ) -> None:
        self.rollout = rollout
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.only = only
        self.check = check

    def answers(self, waves: Sequence[Wave], decoding: Decoding) -> Iterator[list[Answer]]:
        """Yield the answers, in lists of those that finished at about the same time.

        Raises:
            DataError: an engine refused a prompt.
            FleetExhausted: workers failed more often than cluster.max_restarts allows.
        """
        waiting = deque(waves)
        under_way: list[Unfinished] = []
        while waiting or under_way:
            sampling = {unfinished.engine for unfinished in under_way if not unfinished.rewards}
            for engine in self.rollout.serving(self.check):
                if waiting and engine not in sampling:
                    under_way += self._started(engine, waiting.popleft(), decoding)
            finished, under_way, failed = self._wait(under_way)
            waiting.extendleft(reversed(failed))
            if finished:
                yield finished

    def _started(self, engine: int, wave: Wave, decoding: Decoding) -> list[Unfinished]:
        chunks = self.rollout.generate_on(
            engine,
            wave.prompts,
            # The seed tells two sets apart, so that none reuses prefixes that another one computed.
            wave=f"{wave.name}-{decoding.seed}",
            group_size=decoding.samples,
            temperature=decoding.temperature,
            seed=decoding.seed,
        )
        return [Unfinished(wave=wave, engine=engine, chunk=chunk) for chunk in chunks]

    def _wait(
        self, under_way: Sequence[Unfinished]
    ) -> tuple[list[Answer], list[Unfinished], list[Wave]]:
        """Wait for some of the answers under way.

        Returns:
            The finished answers, the unfinished ones, and the waves of failed engines, in which
            only the failed answers are wanted.
        """
        count = max(int(RESULTS_SHARE * len(under_way)), 1)
        results, failures = settle([u.call for u in under_way], self._watch, count)
        for error in failures:
            self._replace(error)
        finished: list[Answer] = []
        remaining: list[Unfinished] = []
        failed: dict[int, tuple[Wave, set[str]]] = {}  # by the number of the wave
        for unfinished, result in zip(under_way, results, strict=True):
            wave = unfinished.wave
            uid = unfinished.prompt.uid
            if result is None:
                remaining.append(unfinished)
            elif isinstance(result, WorkerError) and not unfinished.rewards:
                failed.setdefault(wave.number, (wave, set()))[1].add(uid)
            elif uid not in wave.wanted:
                continue
            elif isinstance(result, Rewards) or self.rewards is None:
                finished.append(self._answer(unfinished, result))
            else:  # it was sampled just now, or its reward worker failed
                unfinished.rewards = self._judged(self.rewards, unfinished.chunk)
                remaining.append(unfinished)
        again = [
            Wave(number=wave.number, prompts=wave.prompts, wanted=wave.wanted & uids)
            for wave, uids in failed.values()
        ]
        return finished, remaining, [wave for wave in again if wave.wanted]

    def _watch(self) -> Pending | None:
        self.check()
        return self.rollout.silent()

    def _replace(self, error: WorkerError) -> None:
        """Replace the worker that failed."""
        if self.rewards is not None and error.worker in self.rewards.group.names:
            self.rewards.lose(error, self.check)
        else:
            self.rollout.lose(error)

    def _judged(self, rewards: RewardGroup, chunk: Chunk) -> Pending:
        weights = [function.weight for function in rewards.settings.reward.functions.values()]
        return rewards.score_one(chunk, weights, self.only)

    def _answer(self, unfinished: Unfinished, result: object) -> Answer:
        batch: RolloutBatch = unfinished.chunk.batch.result()
        responses = [batch.trajectory(i).response_ids.tolist() for i in range(batch.num_sequences)]
        rewards = {}
        if isinstance(result, Rewards):
            assert self.rewards is not None, "it gave the result"
            functions = self.rewards.settings.reward.functions
            rewards = rewards_by_name(result, functions, unfinished.prompt)
        return Answer(
            prompt=unfinished.prompt,
            responses=tuple(
                str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses
            ),
            finish_reasons=batch.finish_reasons,
            lengths=tuple(batch.response_lengths.tolist()),
            rewards=rewards,
        )


def rewards_by_name(
    rewards: Rewards, functions: Mapping[str, RewardFunctionConfig], prompt: Prompt
) -> dict[str, tuple[float, ...]]:
    """[K] values of the responses to one prompt, by each function whose route takes it."""
    parts = zip(rewards.part_names, rewards.parts.tolist(), strict=True)
    return {
        name: tuple(values)
        for name, values in parts
        if takes(functions[name].route, prompt.columns)
    }
