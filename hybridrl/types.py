"""The types of all values that pass between processes.

Batches are packed numpy columns plus offsets: one buffer per column goes through the object store
without a copy. Arrays that come out of the store are read-only, so no value here is changed in
place.

Alignment: a per-token column has one entry per entry of `input_ids`. Entry t is about token t given
the tokens before it. Prompt tokens are masked (`response_mask` False) and their entries are 0.

    sequence      P0   P1   P2 | A0    A1    EOS
    response_mask 0    0    0  | 1     1     1
    logprobs      0    0    0  | -.1   -.7   -.2      log p(A0 | P0 P1 P2), ...

The response is everything after the prompt. Between two turns of the model it can hold observations
(O0, O1: what a tool or an environment answered). They are masked like the prompt and are part of
the response only as text: rewards read them, nothing is learned from them.

    sequence      P0   P1   P2 | A0    EOS   O0   O1   A1    EOS
    response_mask 0    0    0  | 1     1     0    0    1     1
    logprobs      0    0    0  | -.1   -.2   0    0    -.7   -.3

In names and comments R counts the response tokens that are not masked.

The order in which values are made: data -> Prompt -> rollout -> RolloutBatch -> scorer ->
TokenScores, reward -> Rewards; the learner joins the three. The controller receives only headers,
Rewards (scalars per sequence) and references to the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hybridrl.settings.choices import Source

Float = NDArray[np.float32]
Int = NDArray[np.int64]
Bool = NDArray[np.bool_]


NO_VERSION = 2**31 - 1
"""Stands for "no version": larger than any real one, so that a minimum ignores it."""


class FinishReason(StrEnum):
    """Why a response ended."""

    stop = "stop"  # the model emitted the end token
    length = "length"  # cut at rollout.max_new_tokens; counted in rollout/truncated_frac
    aborted = "aborted"  # the engine stopped it on request; never trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, tokenized. data -> rollout.

    Example: Prompt(uid="train-000007", input_ids=(1, 15, 9), text="3 7=21:", columns={"numbers":
    [3, 7], "target": 21})
    """

    uid: str  # unique in its source; seeds and ledgers are keyed by it
    input_ids: tuple[int, ...]
    text: str  # what was tokenized (after the chat template, if any)
    columns: dict[str, Any]  # what reward functions and routes may read, JSON-serialisable
    # Token ids of the data's responses, end token included: none, one to imitate, or (chosen,
    # rejected).
    responses: tuple[tuple[int, ...], ...] = ()
    question: str = ""  # the conversation as a person reads it, without the template's tokens
    answer: str | None = None  # the reference answer; None: the data has none
    # Token ids that teachers with their own chat template read instead of input_ids, by teacher
    teacher_prompts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def most_tokens(self) -> int:
        """The number of tokens in the longest form of the prompt that the student or a teacher
        reads.
        """
        return max(len(self.input_ids), *map(len, self.teacher_prompts.values()), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt with one response. rollouter -> RolloutBatch, whose method `trajectory` returns
    trajectories as views of the packed columns.

    Example: the prompt (1, 5), the completion (7, 2), the observation (9,), the completion (8, 2):
    prompt_length 2, input_ids [1, 5, 7, 2, 9, 8, 2], response_mask [0, 0, 1, 1, 0, 1, 1].
    """

    uid: str  # of the prompt
    prompt_length: int  # input_ids[prompt_length:] is the response
    input_ids: NDArray[np.int32]  # [T] prompt then response
    response_mask: Bool  # [T] True where the model wrote the token
    rollout_logprobs: Float  # [T] from the sampler
    policy_versions: NDArray[np.int32]  # [T] weight version that sampled the token
    support_ids: NDArray[np.int32]  # [R, K] as in RolloutBatch
    finish_reason: FinishReason

    @property
    def prompt_ids(self) -> NDArray[np.int32]:  # [T_prompt]
        return self.input_ids[: self.prompt_length]

    @property
    def response_ids(self) -> NDArray[np.int32]:  # [T - T_prompt], observations included
        return self.input_ids[self.prompt_length :]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """Whole prompt groups as packed columns. rollout -> object store -> scorer, reward, learner.

    G groups of K siblings each make N = G*K sequences with T tokens in all. Sequence i belongs to
    group i // K.

    Example: two prompts, K=2: uids ("a", "b"), offsets [0, 5, 11, 16, 20], input_ids [20].
    """

    uids: tuple[str, ...]  # [G]
    columns: tuple[dict[str, Any], ...]  # [G] as in Prompt
    prompt_texts: tuple[str, ...]  # [G]
    prompt_lengths: tuple[int, ...]  # [G] in tokens; the rest of a sequence is its response
    teacher_prompts: tuple[dict[str, tuple[int, ...]], ...]  # [G] as in Prompt
    group_size: int  # K
    offsets: Int  # [N+1] sequence i is input_ids[offsets[i]:offsets[i+1]]
    input_ids: NDArray[np.int32]  # [T]
    response_mask: Bool  # [T] True where the model wrote the token
    rollout_logprobs: Float  # [T]
    policy_versions: NDArray[np.int32]  # [T]
    finish_reasons: tuple[FinishReason, ...]  # [N]
    source: Source  # who wrote the responses; for Source.data, rollout_logprobs are 0
    # [R, K] the sampler's most likely tokens at each response token; K=0 unless requested
    support_ids: NDArray[np.int32]

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def response_lengths(self) -> Int:  # [N] tokens that the model wrote, so without observations
        return np.add.reduceat(self.response_mask.astype(np.int64), self.offsets[:-1])

    def trajectory(self, i: int) -> Trajectory:
        """Sequence i, 0 <= i < N; its arrays are views of this batch."""
        start = int(self.offsets[i])
        end = int(self.offsets[i + 1])
        mask = self.response_mask[start:end]
        first_row = np.count_nonzero(self.response_mask[:start])
        return Trajectory(
            uid=self.uids[i // self.group_size],
            prompt_length=self.prompt_lengths[i // self.group_size],
            input_ids=self.input_ids[start:end],
            response_mask=mask,
            rollout_logprobs=self.rollout_logprobs[start:end],
            policy_versions=self.policy_versions[start:end],
            support_ids=self.support_ids[first_row : first_row + np.count_nonzero(mask)],
            finish_reason=self.finish_reasons[i],
        )

    @staticmethod
    def pack(
        prompts: Sequence[Prompt],
        group_size: int,
        trajectories: Sequence[Trajectory],
        source: Source = Source.student,
    ) -> "RolloutBatch":
        """Join trajectories, K per prompt in prompt order, into columns."""
        assert len(trajectories) == len(prompts) * group_size, (
            len(trajectories),
            len(prompts),
            group_size,
        )
        for i, trajectory in enumerate(trajectories):
            prompt = prompts[i // group_size]
            assert trajectory.prompt_length == len(prompt.input_ids), (prompt.uid, i)
        lengths = [len(t.input_ids) for t in trajectories]
        return RolloutBatch(
            uids=tuple(p.uid for p in prompts),
            columns=tuple(p.columns for p in prompts),
            prompt_texts=tuple(p.text for p in prompts),
            prompt_lengths=tuple(len(p.input_ids) for p in prompts),
            teacher_prompts=tuple(p.teacher_prompts for p in prompts),
            group_size=group_size,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            input_ids=np.concatenate([t.input_ids for t in trajectories]).astype(np.int32),
            response_mask=np.concatenate([t.response_mask for t in trajectories]).astype(np.bool_),
            rollout_logprobs=np.concatenate([t.rollout_logprobs for t in trajectories]).astype(
                np.float32
            ),
            policy_versions=np.concatenate([t.policy_versions for t in trajectories]).astype(
                np.int32
            ),
            finish_reasons=tuple(t.finish_reason for t in trajectories),
            source=source,
            support_ids=np.concatenate([t.support_ids for t in trajectories]).astype(np.int32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What one teacher computed about a RolloutBatch. scorer -> object store -> learner.

    `rows` has one row for each response token. A row is the teacher's last hidden state before the
    token (the learner computes the distribution from it with the teacher's lm_head, so that V
    floats a token need not be sent), or the teacher's log-probs over the vocabulary, or over
    `support_ids`. The width of `rows` is 0 if only the drawn token's log-prob is needed.
    """

    teacher: str
    # [T] log q(token t | tokens before); 0 outside of responses and if the objective does not need
    # it
    logprobs: Float
    rows: NDArray[np.uint16] | NDArray[np.float32]  # [R, W] in batch order; uint16 is bf16 bits
    support_ids: NDArray[np.int32]  # [R, K] tokens of `rows`; K=0 unless rows are over a support


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The throughput and peak memory of a worker since its last report. worker -> controller,
    inside a header or LearnerStats.

    Example: Work(tokens=512, busy_s=2.0, peak_bytes={"learn": 2_100_000_000})
    """

    tokens: int  # response tokens that were processed; for a scorer, all tokens of the sequences
    busy_s: float  # by the worker's clock
    peak_bytes: dict[str, int]  # peak memory by phase; empty: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Statistics of a vLLM engine over its steps since the last report. engine, scorer ->
    controller, inside a header.

    kv_use and waiting are read after each step, when finished requests have left the KV cache.
    """

    kv_use: float = 0.0  # largest share of the KV cache's blocks that were in use, 0 to 1
    running: int = 0  # most requests in a step, including those that finished in it
    waiting: int = 0  # most requests that waited after a step
    preemptions: int = 0  # how often a request lost its place in the KV cache and was restarted
    prefix_queries: int = 0  # prompt tokens that were looked up in the prefix cache
    prefix_hits: int = 0  # how many of these were found


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreHeader:
    """The sizes and time of one TokenScores. scorer -> controller."""

    teacher: str
    nbytes: dict[str, int]  # size of the scores in the object store, by the objective's signal
    score_s: float  # duration of the call, by the scorer's clock
    engine: EngineStats | None = None  # None: no vLLM engine computed the scores
    work: Work | None = None  # None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Scalars per sequence. reward -> object store -> learner, controller.

    A failed call has `errors` True; `reward.on_error` sets its reward, which is never an unreported
    0.
    """

    uids: tuple[str, ...]  # [G]
    values: Float  # [N] weighted sum over the reward functions
    part_names: tuple[str, ...]  # [P]
    parts: Float  # [P, N] each function's own value; NaN where it failed or does not apply
    errors: Bool  # [N] some function failed or timed out
    keep: Bool  # [N] False: on_error=drop_group excludes the sequence's whole group from training
    # [N] zlib-compressed size of the text divided by its size; NaN where there is no text
    compressed: Float
    # [N] share of the token 4-grams that occurred earlier in the response; NaN below 4 tokens
    repeated: Float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader:
    """The part of a RolloutBatch that the controller receives: scalars per sequence, never tokens.
    rollout -> controller.
    """

    uids: tuple[str, ...]  # [G]
    source: Source
    group_size: int  # K
    num_tokens: Int  # [N] prompt + response
    response_lengths: Int  # [N] tokens that the model wrote
    truncated: Bool  # [N]
    aborted: Bool  # [N] no response: its whole group is never trained on
    # [N] oldest weight version that sampled a token of the response; NO_VERSION without tokens
    oldest_version: Int
    newest_version: Int  # [N] newest such version; -1 without tokens
    mean_policy_version: float  # over response tokens; -1 without any
    nbytes: int  # of the batch in the object store
    # [N] seconds from the order's arrival to the response's end, by the engine's clock; 0 for data
    finish_s: Float
    engine: EngineStats | None = None  # None: the responses come from the data
    work: Work | None = None  # None: the responses come from the data


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """Whole groups with their scores and rewards, joined by a learner rank.

    All fields are about the same N sequences in the same order.
    """

    rollout: RolloutBatch
    scores: tuple[TokenScores, ...]  # one per teacher, in the order of UpdatePlan.teacher_weights
    rewards: Rewards
    # [R] the learner's own log p(y_t), and the output of its value head before y_t, both with the
    # weights at the start of the update; None unless the objective needs one of them
    learner_logprobs: Float | None = None
    learner_values: Float | None = None
    # [R] the learner's log p(y_t) before the batch's first update; None: not needed, or there is no
    # update
    old_logprobs: Float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOrder:
    """How to sample one chunk of a wave. controller -> rollout.

    An engine starts decoding when all `num_chunks` chunks of its wave have arrived, and takes them
    in order. So arrival times do not decide which requests share a forward pass, and every bit of
    the result is reproducible.
    """

    wave: str  # e.g. "train-12", "eval-20"
    chunk: int  # 0 ... num_chunks-1, within this engine's part of the wave
    num_chunks: int
    group_size: int  # K samples for each prompt
    temperature: float  # 0: greedy
    max_new_tokens: int  # of a whole response, including its observations
    seed: int  # of the wave; a completion's is derived from it and the uid, sample and turn
    support: int = 0  # number of most likely tokens to report with each response token
    priority: int = 0  # an engine schedules the requests with the lowest number first


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """The layout of a packed weight buffer. learner -> engine, with a reference to the buffer."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # torch dtype names, e.g. "bfloat16"
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]  # in bytes; tied weights have the same offset
    nbytes: int
    digest: str  # XXH3-128 of the buffer, hex
    version: int  # of the weights: the number of batches that they were trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatePlan:
    """How the learner updates on one mini-batch of a batch. All counts are over the mini-batch's
    groups on all ranks. controller -> every learner rank.
    """

    step: int  # of the batch
    num_tokens: int  # response tokens: the normaliser
    num_sequences: int
    num_groups: int
    num_micro_batches: int  # the same on every rank, else ZeRO stages 2 and 3 hang
    lr: float
    teacher_weights: tuple[float, ...]  # w_i at this step
    # The column values of the prompts that each teacher scores; empty: all.
    teacher_routes: tuple[dict[str, Any], ...]
    reward_weight: float  # lambda at this step
    diagnose: bool = False  # also compute the expensive diagnostics


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The mini-batches of one batch and the order of the updates on them. controller -> every
    learner rank.

    Example: train.updates_per_batch=2 and train.epochs_per_batch=2 give two mini-batches and four
    updates, e.g. order (0, 1, 1, 0).
    """

    mini_batches: tuple[UpdatePlan, ...]
    order: tuple[int, ...]  # the index of each update's mini-batch
    token_samples: int = 0  # number of TokenSamples that the first rank returns

    @property
    def step(self) -> int:
        return self.mini_batches[0].step

    @property
    def num_tokens(self) -> int:
        """Response tokens of the batch."""
        return sum(plan.num_tokens for plan in self.mini_batches)

    @staticmethod
    def one_update(plan: UpdatePlan) -> "BatchPlan":
        """A batch that is a single mini-batch."""
        return BatchPlan(mini_batches=(plan,), order=(0,))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSample:
    """A response that a step learned from, with the log-ratio of student and teacher at each token.
    learner -> controller, which receives only a few -> samples/tokens_NNNNNN.jsonl, report.

    Example: tokens ("7", "*3"), log_ratios (0.5, -1.0): the student made "7" e^0.5 times as likely
    as the teacher does, and "*3" e^-1 times.
    """

    step: int  # number of the step, counted from 1
    uid: str  # of the prompt
    prompt: str
    teacher: str
    tokens: tuple[str, ...]  # [r] the text of each response token
    log_ratios: tuple[float, ...]  # [r] log pi - log q in nats; pi is the student that sampled it
    reward: float  # NaN: the reward call failed


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStats:
    """The measurements of a batch's updates, computed over all ranks. learner -> controller.

    `metrics` is only reported; the controller's decisions depend on the other fields.
    """

    # Mean |log p - log mu| in nats in the first update, over the tokens that the student sampled
    # with the weights that this step updates; None: there is no such token.
    logprob_gap: float | None
    token_kl: float | None  # nats, mean over tokens; None: no teacher was compared over its rows
    sparse_norm: float  # of the gradient of rewards and costs at the logits
    metrics: dict[str, float]  # keyed as in the step's row; absent: not measured
    learn_s: float  # duration of the updates, by the rank's clock
    optimizer_steps: int  # steps that the optimizer has taken since the run began
    # One sentence for each update that was left out because its gradient was not finite.
    left_out: tuple[str, ...] = ()
    unlearned: tuple[int, ...] = ()  # indices of the mini-batches whose updates were all left out
    token_samples: tuple[TokenSample, ...] = ()  # as many as BatchPlan asks; on the first rank only
    work: tuple[Work, ...] = ()  # one of each rank; empty for held-out data


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """The size and digest of a checkpoint's file, from its writer. learner, scorer -> controller,
    which compares them with the file on disk.
    """

    name: str
    bytes: int
    sha256: str  # hex


Files: TypeAlias = Callable[[], Sequence[SavedFile]]
"""A function that waits until a writer's files are written and synced to disk and returns them. It
raises CheckpointError if a file cannot be written.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response as text, from an evaluation or from training. controller ->
    samples/step_NNNNNN.jsonl, tables of trackers, report.
    """

    step: int
    uid: str
    prompt: str
    response: str
    reward: float  # NaN when the reward call failed, and without a reward function
    finish_reason: FinishReason
    question: str = ""  # as Prompt.question; empty in files of earlier versions
    answer: str | None = None  # as Prompt.answer
    # Each reward function's own value by its name; NaN where it failed or does not apply
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a tracker receives when a run starts. controller -> tracking."""

    run_dir: str
    name: str
    total_steps: int
    first_step: int  # number of steps that are already done: 0, or the checkpoint's step
    config: dict[str, Any]  # resolved, without secrets


def per_token_bytes(value: object) -> int:
    """The size of the arrays in `value` if it is a RolloutBatch or TokenScores, which the
    controller must never fetch; 0 for any other value.
    """
    if isinstance(value, RolloutBatch | TokenScores):
        return sum(
            a.nbytes for f in fields(value) if isinstance(a := getattr(value, f.name), np.ndarray)
        )
    return 0
