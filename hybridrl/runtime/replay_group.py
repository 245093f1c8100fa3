"""The worker that hands out the data's own responses, in the place of an engine."""

from collections.abc import Sequence

from hybridrl.core.errors import WorkerError
from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.calls import Pending
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.replaceable import replaceable
from hybridrl.settings.run import RunSettings
from hybridrl.types import GenerateOrder, Prompt


class ReplayGroup:
    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        self.settings = settings
        kwargs = [{}] * len(slots)
        self.group = ActorGroup(
            "replay",
            "hybridrl.rollout.replay:Replay",
            slots,
            kwargs,
            **replaceable(settings, log_dir),
        )

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def generate(self, prompts: Sequence[Prompt], *, wave: str) -> list[Chunk]:
        """One chunk with all responses of each prompt."""
        order = GenerateOrder(
            wave=wave,
            chunk=0,
            num_chunks=1,
            group_size=len(prompts[0].responses),
            temperature=0.0,
            max_new_tokens=self.settings.rollout.max_new_tokens,
            seed=0,
        )
        header, batch = self.group.submit_pair(
            0, "generate", order, list(prompts), deadline_s=self.settings.deadlines.rollout_s
        )
        return [Chunk(order=order, prompts=tuple(prompts), header=header, batch=batch)]

    def again(self, chunk: Chunk) -> Chunk:
        """The same responses once more."""
        return self.generate(chunk.prompts, wave=chunk.order.wave)[0]

    def lose(self, lost: WorkerError) -> None:
        self.group.rebuild(lost, self.settings.deadlines.start_s)

    def rank(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """One call per chunk: -> Rewards, the data's own order."""
        return [
            self.group.submit(0, "rank", c.batch.ref, deadline_s=self.settings.deadlines.reward_s)
            for c in chunks
        ]
