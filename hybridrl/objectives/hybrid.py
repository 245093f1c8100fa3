"""The one online objective: J = E[ sum_t sum_i w_i (log p - log q_i) - lambda R ] (arXiv 2512.23097).

Its gradient splits into a dense term, the closed form of KL(p || q) at each visited prefix, and a sparse term,
G_{t+1} grad log p(y_t) with G_{t+1} = sum_{k>t} gamma^(k-t) c_k - lambda R. This class makes G before the head pass;
ops.head makes both gradients in that pass. Methods differ in settings only: conf/algorithm holds the presets.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from hybridrl.choices import Baseline, Normalizer
from hybridrl.config import AlgorithmConfig
from hybridrl.ops.returns import future_cost, sibling_mean
from hybridrl.types import Rewards, RolloutBatch, TokenScores, UpdatePlan


class Signal(StrEnum):
    """What a configuration needs from the other workers."""

    teacher_hidden = "teacher_hidden"  # the teacher's last hidden states
    teacher_logprobs = "teacher_logprobs"  # log q(y_t), one head pass of the scorer
    rewards = "rewards"


class HybridObjective:
    """Turns a scored batch into per-token weights and costs."""

    def __init__(self, config: AlgorithmConfig, max_new_tokens: int) -> None:
        self.config, self.max_new_tokens = config, max_new_tokens
        signals = set()
        if not config.imitation_weight.is_zero():
            signals.add(Signal.teacher_hidden)
            if config.gamma > 0:
                signals.add(Signal.teacher_logprobs)
        if not config.reward_weight.is_zero():
            signals.add(Signal.rewards)
        self.signals = frozenset(signals)

    def token_weight(self, plan: UpdatePlan) -> float:
        """1 / normaliser, the same for every token of the global batch."""
        if self.config.normalizer is Normalizer.constant:
            return 1.0 / max(plan.num_sequences * self.max_new_tokens, 1)
        return 1.0 / max(plan.num_tokens, 1)

    def sparse_costs(self, batch: RolloutBatch, scores: Sequence[TokenScores], rewards: Rewards, plan: UpdatePlan) -> Tensor:
        """G_{t+1} minus its baseline for each response token of a chunk of whole groups.

        Args:
            batch: N sequences, R response tokens.
            scores: one per teacher, in the order of plan.teacher_weights.
            rewards: of the same sequences.

        Returns:
            [R] float32 in batch order.
        """
        mask = response_grid(batch)  # [N, T]
        costs = torch.zeros(mask.shape)  # [N, T] float32
        if self.config.gamma > 0:
            per_token = sum(
                w * (batch.rollout_logprobs - s.logprobs)[batch.response_mask] for w, s in zip(plan.teacher_weights, scores, strict=True)
            )
            costs[mask] = torch.as_tensor(np.asarray(per_token, dtype=np.float32))
        terminal = -plan.reward_weight * torch.from_numpy(rewards.values.copy())[:, None]  # [N, 1]
        returns = future_cost(costs, mask, self.config.gamma) + terminal  # [N, T]
        if self.config.baseline is not Baseline.none:
            returns = returns - sibling_mean(returns, batch.group_size, leave_one_out=self.config.baseline is Baseline.leave_one_out)
        return returns[mask]


def response_grid(batch: RolloutBatch) -> Tensor:
    """[N, T] bool: response tokens left-aligned, T the longest response; row-major order is batch order."""
    lengths = torch.from_numpy(batch.response_lengths.copy())
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
