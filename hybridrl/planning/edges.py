"""The bytes of one step between workers, in the object store and on disk."""

from typing import NamedTuple

from hybridrl.objectives import make_objective
from hybridrl.planning.sizes import ScoredTeacher, ServedTeacher, Sizes
from hybridrl.planning.zero import WIDE
from hybridrl.settings.choices import OnStale

TOKEN_COLUMNS = 4 + 1 + 4 + 4
"""Bytes a token of a RolloutBatch: id, mask, the sampler's log-prob, weight version."""

ANSWER_BYTES = 70
"""Of a server's answer, for each log-prob, as JSON: {"5":{"logprob":-2.996648073196411,"rank":9,
"decoded_token":"1"}}. 65 to 75 were measured.
"""
REQUEST_BYTES = 7
"""Of a request to a server, for each token: its id and a separator."""


class Edge(NamedTuple):
    """What one step sends from one kind of worker to another."""

    source: str
    target: str
    what: str
    nbytes: int  # of one step, to all workers of the target together


def rollout_bytes(sizes: Sizes) -> int:
    """All responses of a step, as types.per_token_bytes counts them."""
    support = make_objective(sizes.settings).needs.sampler_support
    tokens = sizes.sequences * sizes.tokens
    responses = sizes.sequences * sizes.response
    return tokens * TOKEN_COLUMNS + responses * support * 4 + (sizes.sequences + sizes.chunks) * 8


def score_bytes(sizes: Sizes, teacher: ScoredTeacher | ServedTeacher) -> int:
    """All scores of one teacher about a step."""
    responses = sizes.sequences * sizes.response
    row = teacher.row_bytes(sizes.student.vocabulary)
    return sizes.sequences * sizes.tokens * WIDE + responses * row


def answer_bytes(sizes: Sizes, teacher: ServedTeacher) -> int:
    """All answers of a teacher's server about a step; it reports the tokens of the prompts too."""
    tokens = sizes.sequences * sizes.tokens
    return tokens * (1 + teacher.evidence.support) * ANSWER_BYTES


def weight_bytes(sizes: Sizes) -> int:
    """What an engine receives of the student, once: its weights, with adapters merged into them, or
    with lora.sync=adapter the adapters alone.
    """
    return sizes.sent * sizes.width


def edges(sizes: Sizes) -> list[Edge]:
    """What a step sends. Prompts, rewards and headers are left out: some bytes a sequence."""
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
    """The most that the object store holds: the step that is learned, with all waves that it may
    need, those ahead of it, and the weights where they travel by it.
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
    """One checkpoint: master weights and Adam's moments in float32, of all ranks together.

    Example: Qwen2.5-7B: 7.616e9 x 12 = 91.4 GB; of its adapters of rank 16, 40.4e6 x 12 = 0.5 GB.
    """
    return 3 * WIDE * sizes.trained


def disk_bytes(sizes: Sizes) -> int:
    """The checkpoints that are retained, the one that is being written, and the export."""
    checkpoint = sizes.settings.checkpoint
    count = checkpoint.keep + 1 + (checkpoint.best is not None)
    model = sizes.student.parameters * sizes.width
    return count * checkpoint_bytes(sizes) + (model if checkpoint.export else 0)
