"""Builds small batches from token ids, and the other values of hybridrl/types.py for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.types import (
    FinishReason,
    Prompt,
    Rewards,
    RolloutBatch,
    TokenScores,
    Trajectory,
    UpdatePlan,
)

Ids = Sequence[int]


def make_batch(groups: Sequence[tuple[Ids, Sequence[Ids]]], logprob: float = -1.0) -> RolloutBatch:
    """A batch with one group per (prompt ids, responses); each sampler log-prob is `logprob`."""
    prompts = [
        Prompt(uid=f"p{g}", input_ids=tuple(prompt), text="", columns={})
        for g, (prompt, _) in enumerate(groups)
    ]
    trajectories = [
        Trajectory(
            uid=f"p{g}",
            prompt_length=len(prompt),
            input_ids=np.array([*prompt, *response], np.int32),
            response_mask=np.array([False] * len(prompt) + [True] * len(response)),
            rollout_logprobs=np.array([0.0] * len(prompt) + [logprob] * len(response), np.float32),
            policy_versions=np.zeros(len(prompt) + len(response), np.int32),
            support_ids=np.zeros((len(response), 0), np.int32),
            finish_reason=FinishReason.stop,
        )
        for g, (prompt, responses) in enumerate(groups)
        for response in responses
    ]
    return RolloutBatch.pack(prompts, len(groups[0][1]), trajectories)


def make_rewards(
    batch: RolloutBatch, values: Sequence[float], keep: Sequence[bool] | None = None
) -> Rewards:
    """The rewards of one function, NaN where it failed; every sequence is kept by default."""
    n = batch.num_sequences
    return Rewards(
        uids=batch.uids,
        values=np.array(values, np.float32),
        part_names=("it",),
        parts=np.array([values], np.float32),
        errors=np.isnan(values),
        keep=np.ones(n, bool) if keep is None else np.array(keep),
        compressed=np.full(n, np.nan, np.float32),
        repeated=np.full(n, np.nan, np.float32),
    )


def make_scores(
    batch: RolloutBatch, logprobs: Sequence[float], hidden: np.ndarray | None = None
) -> TokenScores:
    """The scores of one teacher.

    Args:
        logprobs: of the response tokens, in the order of the batch.
        hidden: the rows of evidence; None: zeros of width 2.
    """
    column = np.zeros(len(batch.input_ids), np.float32)
    column[batch.response_mask] = logprobs
    rows = np.zeros((len(logprobs), 2), np.float32) if hidden is None else hidden
    return TokenScores(
        teacher="main",
        logprobs=column,
        rows=rows,
        support_ids=np.zeros((len(logprobs), 0), np.int32),
    )


def make_plan(batch: RolloutBatch, **changes) -> UpdatePlan:
    """The plan of step 0 for this batch with one teacher of weight 1, lambda 1 and one micro-batch,
    except for `changes`.
    """
    values = {
        "step": 0,
        "num_tokens": int(batch.response_mask.sum()),
        "num_sequences": batch.num_sequences,
        "num_groups": len(batch.uids),
        "num_micro_batches": 1,
        "lr": 1e-2,
        "teacher_weights": (1.0,),
        "reward_weight": 1.0,
        "diagnose": False,
    } | changes
    return UpdatePlan(**{"teacher_routes": ({},) * len(values["teacher_weights"])} | values)


def token_columns(
    *,
    token_ids: Tensor,
    token_weight: Tensor,
    sparse: Tensor,
    sampler_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
) -> TokenColumns:
    """Columns [R] of a run without a value head; without old_logprobs, the sampler's are used."""
    return TokenColumns(
        token_ids=token_ids,
        token_weight=token_weight,
        sparse=sparse,
        value_slope=torch.zeros_like(sampler_logprobs),
        sampler_logprobs=sampler_logprobs,
        old_logprobs=sampler_logprobs if old_logprobs is None else old_logprobs,
    )


def text_batch(
    responses: Sequence[str], *, group_size: int, text: str, columns: dict[str, Any]
) -> RolloutBatch:
    """A batch of responses to the prompts "p0", "p1", ..., which all have the tokens 5 and 6. The
    tokens of a response are the code points of its text and the end token 0.
    """
    prompts = [
        Prompt(uid=f"p{i}", input_ids=(5, 6), text=text, columns=columns)
        for i in range(len(responses) // group_size)
    ]
    trajectories = []
    for i, response in enumerate(responses):
        ids = np.array([5, 6, *map(ord, response), 0], np.int32)
        trajectories.append(
            Trajectory(
                uid=f"p{i // group_size}",
                prompt_length=2,
                input_ids=ids,
                response_mask=np.arange(len(ids)) >= 2,
                rollout_logprobs=np.zeros(len(ids), np.float32),
                policy_versions=np.zeros(len(ids), np.int32),
                support_ids=np.zeros((len(ids) - 2, 0), np.int32),
                finish_reason=FinishReason.stop,
            )
        )
    return RolloutBatch.pack(prompts, group_size, trajectories)
