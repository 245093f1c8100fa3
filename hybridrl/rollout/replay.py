"""Responses that the data already holds, in the shape of a rollout: SFT, distillation on data,
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
    """Answers a rollout order from Prompt.responses. All prompts of a run have the same number of
    them.
    """

    def ping(self) -> None:
        """Answers once the worker is built."""

    def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        """K = order.group_size responses of each prompt, in the data's order.

        Raises:
            DataError: a prompt has another number of responses.
        """
        for prompt in prompts:
            if len(prompt.responses) != order.group_size:
                raise DataError(
                    f"{prompt.uid}: has {len(prompt.responses)} responses in the data, needs "
                    f"{order.group_size}"
                )
        trajectories = [
            given(prompt, response) for prompt in prompts for response in prompt.responses
        ]
        batch = RolloutBatch.pack(prompts, order.group_size, trajectories, Source.data)
        return chunk_header(batch, [0.0] * batch.num_sequences), batch

    def rank(self, batch: RolloutBatch) -> Rewards:
        """The data's own order as reward: the first response 1, the last 0."""
        k = batch.group_size
        values = np.tile(np.linspace(1.0, 0.0, k, dtype=np.float32), len(batch.uids))
        sure = np.zeros(batch.num_sequences, bool)
        unread = np.full_like(values, np.nan)
        return Rewards(
            uids=batch.uids,
            values=values,
            part_names=(),
            parts=np.zeros((0, len(values)), np.float32),
            errors=sure,
            keep=~sure,
            compressed=unread,
            repeated=unread,
        )


def given(prompt: Prompt, response: Sequence[int]) -> Trajectory:
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
