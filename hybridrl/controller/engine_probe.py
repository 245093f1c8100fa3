"""Do the engines run the learner's weights? An acknowledged digest says what they received, this
says what they compute with.
"""

from collections.abc import Sequence

from hybridrl.core.errors import WeightSyncError
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.workers import Workers
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

PROMPTS = 8
TOKENS = 4
"""Of each response: 32 tokens in all, whose mean gap in bf16 stays near that of a whole batch."""


class EngineProbe:
    """After a sync every engine samples a few tokens, and the learner says what log-probs it gives
    them.

    consumes the same few prompts / produces one gap an engine / waits for the engines, and for the
    learner when asked for the answer.
    """

    def __init__(self, settings: RunSettings, workers: Workers, prompts: Sequence[Prompt]) -> None:
        self.settings, self.workers, self.prompts = settings, workers, list(prompts[:PROMPTS])
        self.engines: list[str] = []
        self.asked: list[
            Pending
        ] = []  # of each learner rank: -> [float], one for each of `engines`

    def ask(self) -> None:
        """Returns when the engines have sampled, so that no response shares a batch with the probe;
        the learner goes on meanwhile.
        """
        algorithm, rollout = self.settings.algorithm, self.settings.rollout
        tokens = min(TOKENS, rollout.max_new_tokens)
        chunks = self.workers.rollout.probe(
            self.prompts, num_tokens=tokens, temperature=algorithm.temperature
        )
        self.engines = list(chunks)
        self.asked = self.workers.learner.logprob_gaps(list(chunks.values()))

    def check(self) -> float:
        """The largest mean gap of an engine in nats a token.

        Raises:
            WeightSyncError: one is above rollout.max_logprob_gap; names the engine.
        """
        limit, (gaps, *_) = self.settings.rollout.max_logprob_gap, gather(self.asked)
        for engine, gap in zip(self.engines, gaps, strict=True):
            if not gap <= limit:
                raise WeightSyncError(
                    f"{engine} and the learner differ by {gap:.3g} nats per token on the same few "
                    f"tokens, rollout.max_logprob_gap is {limit:g}; the engine does not run the "
                    "learner's weights, or not in the learner's precision"
                )
        return max(gaps, default=0.0)
