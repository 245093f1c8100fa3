"""A check that the engines compute with the learner's weights.

The digest that an engine acknowledges only shows which bytes it received.
"""

from collections.abc import Sequence

from hybridrl.core.errors import WeightSyncError
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.workers import Workers
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

PROMPTS = 8
TOKENS = 4
"""Tokens of each response. The mean gap of the 32 tokens in bf16 is close to that of a batch."""


class EngineProbe:
    """After a sync, lets every engine sample a few tokens and the learner compute its own log-probs
    of them.

    consumes always the same first prompts of the data / produces one gap per engine / `start` waits
    for the engines, `check` for the learner.
    """

    def __init__(self, settings: RunSettings, workers: Workers, prompts: Sequence[Prompt]) -> None:
        self.settings = settings
        self.workers = workers
        self.prompts = list(prompts[:PROMPTS])
        self.engines: list[str] = []
        self.gaps: list[Pending] = []  # per learner rank, as LearnerGroup.logprob_gaps

    def start(self) -> None:
        """Let every engine sample the tokens, and start the learner's forward pass over them.

        Returns when the engines have sampled, so that no response shares a batch with the probe;
        the learner may still be working.
        """
        chunks = self.workers.rollout.probe(
            self.prompts,
            num_tokens=min(TOKENS, self.settings.rollout.response_limit),
            temperature=self.settings.algorithm.temperature,
        )
        self.engines = list(chunks)
        self.gaps = self.workers.learner.logprob_gaps(list(chunks.values()))

    def check(self) -> float:
        """Wait for the learner's log-probs.

        Returns:
            The largest mean gap of an engine, in nats a token; 0 if no probe has started.

        Raises:
            WeightSyncError: a gap is above rollout.max_logprob_gap, or NaN; the message names the
                engine.
        """
        limit = self.settings.rollout.max_logprob_gap
        per_rank: list[list[float]] = gather(self.gaps)
        gaps = [per_rank[i % len(per_rank)][i // len(per_rank)] for i in range(len(self.engines))]
        for engine, gap in zip(self.engines, gaps, strict=True):
            if not gap <= limit:  # true of NaN too
                raise WeightSyncError(
                    f"{engine} and the learner differ by {gap:.3g} nats per token on the same few "
                    f"tokens, rollout.max_logprob_gap is {limit:g}; the engine does not run the "
                    "learner's weights, or not in the learner's precision"
                )
        return max(gaps, default=0.0)
