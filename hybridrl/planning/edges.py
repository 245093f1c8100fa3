"""The bytes of one step between workers, in the object store and on disk."""

from typing import NamedTuple

from hybridrl.objectives import make_objective
from hybridrl.planning.sizes import ScoredTeacher, ServedTeacher, Sizes
from hybridrl.planning.zero import WIDE
from hybridrl.settings.choices import OnStale

TOKEN_COLUMNS = 4 + 1 + 4 + 4
"""Bytes of a token in a RolloutBatch: id, mask, the sampler's log-prob, weight version."""

ANSWER_BYTES = 70
"""Bytes of each log-prob in a server's answer, which is JSON; 65 to 75 were measured. Example:
{"5":{"logprob":-2.996648073196411,"rank":9,"decoded_token":"1"}}.
"""
REQUEST_BYTES = 7
"""Bytes of each token in a request to a server: its id and a separator."""


class Edge(NamedTuple):
    """A value that one step sends from one kind of worker to another."""

    source: str
    target: str
    what: str
    nbytes: int  # of one step, to all workers of the target together


def rollout_bytes(sizes: Sizes) -> int:
    """Bytes of all responses of a step, as types.per_token_bytes counts them."""
    support = make_objective(sizes.settings).needs.sampler_support
    tokens = sizes.sequences * sizes.tokens
    responses = sizes.sequences * sizes.response
    return tokens * TOKEN_COLUMNS + responses * support * 4 + (sizes.sequences + sizes.chunks) * 8


def score_bytes(sizes: Sizes, teacher: ScoredTeacher | ServedTeacher) -> int:
    """Bytes of all scores of one teacher in a step."""
    responses = sizes.sequences * sizes.response
    row = teacher.row_bytes(sizes.student.vocabulary)
    return sizes.sequences * sizes.tokens * WIDE + responses * row


def answer_bytes(sizes: Sizes, teacher: ServedTeacher) -> int:
    """Bytes of all answers of a teacher's server in a step; they include the prompts' tokens."""
    tokens = sizes.sequences * sizes.tokens
    return tokens * (1 + teacher.evidence.support) * ANSWER_BYTES


def weight_bytes(sizes: Sizes) -> int:
    """Bytes that one engine receives in a step: the student's weights, with adapters merged into
    them, or with lora.sync=adapter the adapters alone.
    """
    return sizes.sent * sizes.width


def edges(sizes: Sizes) -> list[Edge]:
    """What a step sends, without prompts, rewards and headers: these have few bytes."""
    rollouts = rollout_bytes(sizes)
    found = []
    for served in sizes.served:
        scorer = f"scorer-{served.name}"
        server = f"server of {served.name}"
        tokens = sizes.sequences * sizes.tokens
        found.append(Edge(scorer, server, "token ids as JSON", tokens * REQUEST_BYTES))
        found.append(Edge(server, scorer, "log-probs as JSON", answer_bytes(sizes, served)))
    for teacher in sizes.sending:
        scorer = f"scorer-{teacher.name}"
        found.append(Edge("rollout", scorer, "responses", rollouts))
        found.append(Edge(scorer, "learner", "scores", score_bytes(sizes, teacher)))
    found.append(Edge("rollout", "learner", "responses", rollouts))
    engines = sizes.settings.rollout.engines
    found.append(Edge("learner", "rollout", "weights", weight_bytes(sizes) * engines))
    return found


def store_bytes(sizes: Sizes, *, weights_travel: bool) -> int:
    """The most bytes that the object store holds: the step from which the learner learns, with all
    waves that it may need, the steps ahead of it, and the weights if they go through the store.
    """
    further = max(
        sizes.settings.algorithm.dynamic_sampling,
        int(sizes.settings.pipeline.on_stale is OnStale.drop),
    )
    wave = rollout_bytes(sizes) + sum(score_bytes(sizes, t) for t in sizes.sending)
    pipeline = sizes.settings.pipeline
    ahead = pipeline.ahead * wave
    if pipeline.max_inflight_bytes is not None:
        ahead = min(ahead, pipeline.max_inflight_bytes)
    return (1 + further) * wave + ahead + (weight_bytes(sizes) if weights_travel else 0)


def checkpoint_bytes(sizes: Sizes) -> int:
    """Bytes of a checkpoint: master weights and Adam's moments in float32, of all ranks together.

    Example: Qwen2.5-7B: 7.616e9 x 12 = 91.4 GB; of its adapters of rank 16, 40.4e6 x 12 = 0.5 GB.
    """
    return 3 * WIDE * sizes.trained


def disk_bytes(sizes: Sizes) -> int:
    """Bytes of the checkpoints that are retained, the one being written, and the export."""
    checkpoint = sizes.settings.checkpoint
    count = checkpoint.keep + 1 + (checkpoint.best is not None)
    model = sizes.student.parameters * sizes.width
    return count * checkpoint_bytes(sizes) + (model if checkpoint.export else 0)
