"""A part of a rollout wave, by reference."""

from dataclasses import dataclass

from hybridrl.runtime.calls import Pending
from hybridrl.types import GenerateOrder, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A part of a rollout wave: its header for the controller, its batch for the workers."""

    order: GenerateOrder
    prompts: tuple[Prompt, ...]
    header: Pending  # -> ChunkHeader
    batch: Pending  # -> RolloutBatch; only ever passed on by reference
