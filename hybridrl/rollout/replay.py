"""The worker that returns the data's own responses as rollouts, for SFT, distillation on data and
preference pairs.
"""

from collections.abc import Sequence

import numpy as np

from hybridrl.core.errors import DataError
from hybridrl.rollout.header import chunk_header
from hybridrl.settings.choices import Source
from hybridrl.types import (
    ChunkHeader,
    FinishReason,
    GenerateOrder,
    Prompt,
    Rewards,
    RolloutBatch,
    Trajectory,
)


class Replay:
    """A worker that answers rollout orders from Prompt.responses."""

    def ping(self) -> None:
        """Returns once the worker is built."""

    def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        """The K = order.group_size responses of each prompt, in the data's order.

        Raises:
            DataError: a prompt does not have K responses.
        """
        for prompt in prompts:
            if len(prompt.responses) != order.group_size:
                raise DataError(
                    f"{prompt.uid}: has {len(prompt.responses)} responses in the data, but must "
                    f"have {order.group_size}; correct the row"
                )
        trajectories = [
            trajectory_of(prompt, response) for prompt in prompts for response in prompt.responses
        ]
        batch = RolloutBatch.pack(prompts, order.group_size, trajectories, Source.data)
        return chunk_header(batch, [0.0] * batch.num_sequences), batch

    def rank(self, batch: RolloutBatch) -> Rewards:
        """Rewards that rank each prompt's responses in the data's order: 1 for the first, 0 for the
        last, evenly spaced.
        """
        k = batch.group_size
        values = np.tile(np.linspace(1.0, 0.0, k, dtype=np.float32), len(batch.uids))
        no_errors = np.zeros(batch.num_sequences, bool)
        not_measured = np.full_like(values, np.nan)
        return Rewards(
            uids=batch.uids,
            values=values,
            part_names=(),
            parts=np.zeros((0, len(values)), np.float32),
            errors=no_errors,
            keep=~no_errors,
            compressed=not_measured,
            repeated=not_measured,
        )


def trajectory_of(prompt: Prompt, response: Sequence[int]) -> Trajectory:
    """The trajectory of a response of the data; its log-probs and versions are 0."""
    length = len(prompt.input_ids) + len(response)
    zeros = np.zeros(length, np.float32)
    return Trajectory(
        uid=prompt.uid,
        prompt_length=len(prompt.input_ids),
        input_ids=np.array([*prompt.input_ids, *response], np.int32),
        response_mask=np.arange(length) >= len(prompt.input_ids),
        rollout_logprobs=zeros,
        policy_versions=zeros.astype(np.int32),
        support_ids=np.zeros((len(response), 0), np.int32),
        finish_reason=FinishReason.stop,
    )
