"""The worker that returns the data's own responses in place of sampled ones."""

from collections.abc import Callable, Sequence

from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import Pending, watch_nothing
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.stateless_group import StatelessGroup
from hybridrl.settings.run import RunSettings
from hybridrl.types import GenerateOrder, Prompt


class ReplayGroup(StatelessGroup):
    """Gets the data's own responses as chunks, like those of an engine.

    consumes prompts with responses / produces chunks under way / waits for nothing.
    """

    worker = "hybridrl.rollout.replay:Replay"

    def __init__(self, settings: RunSettings, slots: Sequence[Slot], *, log_dir: str) -> None:
        arguments: list[dict[str, object]] = [{} for _ in slots]
        super().__init__(settings, slots, name="replay", arguments=arguments, log_dir=log_dir)

    def generate(self, prompts: Sequence[Prompt], *, wave: str) -> list[Chunk]:
        """One chunk with all responses of each prompt."""
        order = GenerateOrder(
            wave=wave,
            chunk=0,
            num_chunks=1,
            group_size=len(prompts[0].responses),
            temperature=0.0,
            max_new_tokens=self.settings.rollout.response_limit,
            seed=0,
        )
        header, batch = self.group.submit_pair(
            0, "generate", order, list(prompts), deadline_s=self.settings.deadlines.rollout_s
        )
        return [Chunk(order=order, prompts=tuple(prompts), header=header, batch=batch)]

    def again(self, chunk: Chunk, watch: Callable[[], None] = watch_nothing) -> Chunk:
        """Get the same responses again, without waiting."""
        return self.generate(chunk.prompts, wave=chunk.order.wave)[0]

    def rank(self, chunks: Sequence[Chunk]) -> list[Pending]:
        """Submit one call per chunk: -> Rewards, which rank the responses in the data's order."""
        limit = self.settings.deadlines.reward_s
        return [self.group.submit(0, "rank", chunk.batch.ref, deadline_s=limit) for chunk in chunks]
