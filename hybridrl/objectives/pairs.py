"""Preference losses: the best and the worst response of each group, ranked by the data or by the
reward, form one pair.

The loss of a pair reads summed log-probs that were computed before the update. So its derivative is
a fixed coefficient of grad log p(y) for every token of both responses, which enters the gradient
through the sparse term, as returns do.
"""

import torch
from torch import Tensor

from hybridrl.batch.views import per_token, response_ids, response_rows
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.objectives.chosen import chosen_pair_loss
from hybridrl.objectives.credit import Credit
from hybridrl.objectives.hybrid import teacher_weights_of
from hybridrl.objectives.needs import Needs
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairScores
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.teachers.evidence import Drawn
from hybridrl.types import RolloutBatch, ScoredBatch, UpdatePlan


class PairObjective:
    """The objective of a loss on pairs (chosen, rejected); groups whose rewards are all equal have
    no pair.
    """

    standardises = False

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        self.loss = chosen_pair_loss(config.pair)
        self.needs = Needs(
            evidence=(Drawn(),) if self.loss.needs_reference else (),
            rewards=True,
            siblings=True,
            pairs=True,
            learner_logprobs=not self.loss.scores_by_value,
            learner_values=self.loss.scores_by_value,
        )

    def credit(self, batch: ScoredBatch, plan: UpdatePlan) -> Credit:
        rollout = batch.rollout
        chosen, rejected = ranked(batch)
        gradient = self.pair_gradient(batch, chosen, rejected)
        slope = torch.zeros(rollout.num_sequences, dtype=gradient.loss.dtype)
        slope[chosen] = gradient.d_chosen
        slope[rejected] = gradient.d_rejected
        weight = torch.zeros_like(slope)
        weight[chosen] = weight[rejected] = 1.0 / max(plan.num_groups, 1)
        watched = self._watched(gradient, batch, chosen, rejected)
        columns = self._columns(rollout, slope, weight)
        return Credit(
            columns=columns, teacher_weights=teacher_weights_of(batch, plan), watched=watched
        )

    def _columns(self, rollout: RolloutBatch, slope: Tensor, weight: Tensor) -> TokenColumns:
        """The columns of the response tokens.

        Args:
            slope: [N] the derivative of a pair's loss; 0 for responses of no pair.
            weight: [N] 1 / number of pairs; 0 for responses of no pair.
        """
        weights = per_token(weight, rollout)
        sparse = per_token(slope, rollout)
        value_slope = torch.zeros_like(sparse)
        if self.loss.scores_by_value:  # a reward model's score is the value at the last token
            value_slope = torch.where(last_tokens(rollout), weights * sparse, 0.0)
            sparse = torch.zeros_like(sparse)
        sampler = response_rows(rollout, rollout.rollout_logprobs)
        return TokenColumns(
            token_ids=response_ids(rollout),
            token_weight=weights,
            sparse=sparse,
            value_slope=value_slope,
            sampler_logprobs=sampler,
            old_logprobs=sampler,
        )

    def _watched(
        self,
        gradient: PairGradient,
        batch: ScoredBatch,
        chosen: Tensor,
        rejected: Tensor,
    ) -> dict[str, Tensor]:
        watched = {
            "pair/loss": gradient.loss,
            "pair/accuracy": torch.heaviside(
                gradient.margin, torch.tensor(0.5).to(gradient.margin)
            ),
            "pair/margin": gradient.margin,
            "pair/chosen_score": gradient.chosen_score,
            "pair/rejected_score": gradient.rejected_score,
            "pair/score_max": torch.cat([gradient.chosen_score, gradient.rejected_score]).abs(),
            "pair/clamped_frac": gradient.clamped,
        }
        if not self.loss.scores_by_value:
            lengths = torch.from_numpy(batch.rollout.response_lengths.copy())
            mean_logp = sums(own_logprobs(batch), batch.rollout) / lengths
            watched |= {
                "pair/chosen_logprob": mean_logp[chosen],
                "pair/rejected_logprob": mean_logp[rejected],
            }
        if self.loss.needs_reference:  # the scores are log-ratios
            watched["pair/rejected_ratio"] = gradient.rejected_score.exp()
        return watched

    def pair_gradient(self, batch: ScoredBatch, chosen: Tensor, rejected: Tensor) -> PairGradient:
        """The loss of each pair and its derivatives.

        Args:
            chosen, rejected: [P] indices of sequences.
        """
        rollout = batch.rollout
        if self.loss.scores_by_value:
            assert batch.learner_values is not None, "a loss on values needs learner_values"
            values = torch.from_numpy(batch.learner_values)
            policy = torch.zeros(rollout.num_sequences, dtype=values.dtype)
            policy += values[last_tokens(rollout)]
        else:
            policy = sums(own_logprobs(batch), rollout)
        reference = (
            sums(response_rows(rollout, batch.scores[0].logprobs), rollout)
            if self.loss.needs_reference
            else torch.zeros_like(policy)
        )
        lengths = torch.from_numpy(rollout.response_lengths.copy()).to(policy.dtype)
        scores = PairScores(
            chosen_logp=policy[chosen],
            rejected_logp=policy[rejected],
            chosen_ref=reference[chosen].to(policy.dtype),
            rejected_ref=reference[rejected].to(policy.dtype),
            chosen_len=lengths[chosen],
            rejected_len=lengths[rejected],
        )
        return self.loss.gradient(scores, self.config.pair)


def own_logprobs(batch: ScoredBatch) -> Tensor:
    """[R] log p(y_t) of the learner."""
    assert batch.learner_logprobs is not None, "a loss on log-probs needs learner_logprobs"
    return torch.from_numpy(batch.learner_logprobs)


def ranked(batch: ScoredBatch) -> tuple[Tensor, Tensor]:
    """Sequence indices of the best and the worst response of each group that is kept and whose
    rewards differ; both [P].
    """
    k = batch.rollout.group_size
    rewards = torch.from_numpy(batch.rewards.values.copy()).unflatten(0, (-1, k))  # [G, K]
    kept = torch.from_numpy(batch.rewards.keep.copy()).unflatten(0, (-1, k)).all(1)
    best = rewards.max(1)
    worst = rewards.min(1)
    usable = kept & (best.values > worst.values)
    first = torch.arange(len(rewards)) * k
    return (first + best.indices)[usable], (first + worst.indices)[usable]


def sums(column: Tensor, batch: RolloutBatch) -> Tensor:
    """[N] float64, the sum of an [R] column over each response."""
    owner = per_token(torch.arange(batch.num_sequences), batch)
    return torch.zeros(batch.num_sequences, dtype=torch.float64).index_add_(
        0, owner, column.double()
    )


def last_tokens(batch: RolloutBatch) -> Tensor:
    """[R] bool, the last response token of each sequence."""
    last = torch.zeros(int(batch.response_lengths.sum()), dtype=torch.bool)
    last[torch.from_numpy(batch.response_lengths.cumsum() - 1)] = True
    return last
