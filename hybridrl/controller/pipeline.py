"""The queue of waves of responses under way, one wave for each of the next steps. Its length is how
far sampling runs ahead of learning.
"""

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybridrl.controller.coefficients import Coefficients
from hybridrl.controller.sampling import PendingChunk, Sampling
from hybridrl.core.errors import HybridRLError
from hybridrl.data.mixture import PromptMixture
from hybridrl.data.prompts import PromptSource
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

STORE_SHARE = 0.5
"""The part of the object store that rollouts and scores of the steps ahead may fill, unless
pipeline.max_inflight_bytes is set.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """The chunks of one step, under way or done, with the calls that judge them."""

    step: int
    drawn: list[PendingChunk]

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for d in self.drawn for prompt in d.chunk.prompts]


class Pipeline:
    """A queue of waves, in the order of their steps.

    consumes prompts / produces waves / waits for nothing / bounded by pipeline.ahead, and in bytes
    by pipeline.max_inflight_bytes. A wave for step k is drawn when the engines serve version
    k - pipeline.ahead or newer, so the length of the queue bounds how old a token can be. With
    ahead=0 a wave is drawn when its step takes it.
    """

    def __init__(
        self,
        settings: RunSettings,
        sampling: Sampling,
        prompts: PromptSource | PromptMixture,
        coefficients: Coefficients,
        *,
        store_bytes: float,
    ) -> None:
        """
        Args:
            store_bytes: size of the object store, in bytes.
        """
        self.settings = settings
        self.sampling = sampling
        self.prompts = prompts
        self.coefficients = coefficients
        self.limit = settings.pipeline.max_inflight_bytes or STORE_SHARE * store_bytes
        self.waves: deque[Wave] = deque()
        self.current: list[Wave] = []  # taken by the present step, and not trained on yet
        self.skipped: list[Prompt] = []  # of the batches that were skipped since the last step
        self.wave_bytes = 0
        """Size in the object store of a wave of the last step; 0: no step is done yet."""
        self.oversampled = math.ceil(
            round(settings.train.prompts_per_step * (1 + settings.rollout.oversample), 6)
        )

    def take(self, step: int) -> Wave:
        """The wave of `step`, after drawing as far ahead as the bounds allow."""
        while not self.waves or (
            self._next(step) <= min(step + self.settings.pipeline.ahead, self._last_step())
            and self._fits()
        ):
            self.waves.append(self.draw(self._next(step)))
        self.current = [self.waves.popleft()]
        return self.current[0]

    def redraw(self, step: int) -> Wave:
        """One more wave for the present step."""
        self.current.append(self.draw(step, again=len(self.current)))
        return self.current[-1]

    def settle(self, returning: Sequence[Prompt]) -> None:
        """Record that the current waves were trained on, except for prompts to be drawn again."""
        self.current = []
        self.skipped = []
        self.prompts.put_back(returning)

    def skip(self, returning: Sequence[Prompt]) -> None:
        """Record that nothing was learned from the current waves. Their prompts count as in flight
        until a step succeeds, so that no checkpoint loses them; `returning` is drawn again.
        """
        again = {prompt.uid for prompt in returning}
        self.skipped += [
            prompt for wave in self.current for prompt in wave.prompts if prompt.uid not in again
        ]
        self.current = []
        self.prompts.put_back(returning)

    def draw(self, step: int, again: int = 0) -> Wave:
        """Start a wave for `step`.

        Args:
            again: number of earlier waves of the same step.

        Raises:
            Preempted: a stop signal came while no engine served.
            HybridRLError: no engine can be had. In both cases the prompts are put back.
        """
        prompts = self.prompts.next_batch(self.oversampled)
        try:
            drawn = self.sampling.draw(
                prompts,
                step=step,
                wave=f"train-{step}" + (f".{again}" if again else ""),
                seed=wave_seed(self.settings.run.seed, "train", step),
                reward_weights=self.coefficients.rewards(step),
            )
        except HybridRLError:
            self.prompts.put_back(prompts)
            raise
        return Wave(step=step, drawn=drawn)

    @property
    def num_sampled(self) -> int:
        """Prompts of the current waves, including the cancelled ones."""
        return sum(len(wave.prompts) for wave in self.current)

    def in_flight(self) -> list[Prompt]:
        """Prompts that were drawn and not trained on yet."""
        return [
            *self.skipped,
            *(prompt for wave in (*self.current, *self.waves) for prompt in wave.prompts),
        ]

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint. Prompts in flight are saved as prompts to draw again, since
        responses are not saved.
        """
        return {"prompts": self.prompts.state_dict(self.in_flight()), "wave_bytes": self.wave_bytes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint.

        Raises:
            DataError: the state belongs to other prompts.
        """
        self.prompts.load_state_dict(state["prompts"])
        self.wave_bytes = state["wave_bytes"]

    @property
    def in_flight_bytes(self) -> int:
        """Estimated bytes in the object store of the waves of later steps, each as large as a wave
        of the last step.
        """
        return len(self.waves) * self.wave_bytes

    def _next(self, step: int) -> int:
        return self.waves[-1].step + 1 if self.waves else step

    def _last_step(self) -> int:
        return self.settings.train.steps - 1

    def _fits(self) -> bool:
        """Whether one more wave fits. Before the first step is done the size of a wave is unknown,
        and none is drawn ahead.
        """
        return bool(self.wave_bytes) and self.in_flight_bytes + self.wave_bytes <= self.limit


def wave_seed(run_seed: int, kind: str, step: int) -> int:
    """The 48-bit seed of one rollout wave. It depends only on the arguments, so that checkpoints
    hold no state of a random generator for it.
    """
    digest = hashlib.sha256(f"{run_seed}/{kind}/{step}".encode()).digest()
    return int.from_bytes(digest[:6], "little")
