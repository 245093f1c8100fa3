"""The one online objective: J = E[ sum_t sum_i w_i (log p - log q_i) - lambda R ] (arXiv
2512.23097).

Its gradient splits into a dense term, the closed form of KL(p || q) at each visited prefix, and a
sparse term, G_{t+1} grad log p(y_t) with G_{t+1} = sum_{k>t} gamma^(k-t) c_k - lambda R. This
module computes G before the head pass; kernels.head computes both gradients in that pass. If the
dense term is estimated from the drawn token instead of summed over the vocabulary, that token's own
cost is part of G. Methods differ in settings only, which are in conf/algorithm.

The costs c = log p(y) - log q(y) in G are the learner's. The sampler mu has log-probs too, but a
cost of log mu - log q adds E[(log mu - log p) grad log p] to the gradient, which no importance
ratio removes. This error does not shrink as p approaches q, so near the teacher it dominates: with
the student 99 % of the way to the teacher and the sampler's logits 0.3 N(0,1) away it is 20 times
the gradient, and the sum of the two points uphill (tests/oracle/test_oracle.py). So if sampler and
learner may differ (RunSettings.sampler_differs) and a cost of a drawn token enters G, the learner
computes log p(y) in a forward pass of its own before the update. In float32 without stale rollouts
mu equals p up to rounding, and the sampler's log-probs are used.

In bfloat16 they differ even without stale rollouts: engine and learner round the same weights
differently, by 0.04 to 0.05 nats a token in the mean on SmolLM2-135M. When that model was distilled
into itself (opd, where the gradient is 0), the sampler's costs gave a gradient norm of 0.36 to
0.50, and the learner's costs exactly 0. What remains is that the tokens are drawn from mu and not
from p; algorithm.ratio, if set, corrects that with weights.

The second and later updates of a batch learn from the responses of the policy before the first
update. Each estimates the gradient at the weights that it starts from: costs, values and sequence
ratios are recomputed with these weights. If the costs were still those of p_old, the policy before
the first update, later updates would ignore how far the student has already moved and overshoot
the teacher.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.views import per_token, response_grid, response_ids, response_rows
from hybridrl.core.errors import ConfigError
from hybridrl.data.route import takes
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.objectives.advantages.advantage import ReturnGrid
from hybridrl.objectives.advantages.whole_return import WholeReturn
from hybridrl.objectives.chosen import chosen_advantage, chosen_token_weight
from hybridrl.objectives.credit import Credit
from hybridrl.objectives.needs import Needs
from hybridrl.objectives.token_weights.token_weight import TokenCounts
from hybridrl.ops.divergence import Measure, tail_score
from hybridrl.ops.ratio import RatioBounds
from hybridrl.ops.returns import future_cost, standard_scores
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.settings.choices import (
    EvidenceKind,
    Future,
    Ratio,
    RatioLevel,
    Scale,
    Source,
)
from hybridrl.teachers.evidence import make_evidence
from hybridrl.types import RolloutBatch, ScoredBatch, UpdatePlan


class HybridObjective:
    """Turns a scored batch into per-token weights and costs."""

    def __init__(
        self,
        config: AlgorithmConfig,
        max_new_tokens: int,
        *,
        kinds: Sequence[EvidenceKind] = (),
        sampler_differs: bool = False,
        clips_against_old: bool = False,
    ) -> None:
        """Build the objective of one run.

        Args:
            kinds: the kind of evidence of each scored teacher; empty for pure reinforcement
                learning.
            sampler_differs: the log-probs that come with a response may differ from the learner's.
            clips_against_old: the denominator of the ratio is the learner before the batch's first
                update.
        """
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.measure = Measure(
            divergence=config.divergence, beta=config.jsd_beta, log_ratio_clip=config.log_ratio_clip
        )
        self.weight_of_tokens = chosen_token_weight(config)
        self.standardises = config.scale is Scale.batch
        clips = config.log_ratio_clip is not None  # the share of clipped costs is a metric
        estimates = any(make_evidence(kind, config, drawn=False).estimates for kind in kinds)
        learns_from_costs = bool(kinds) and (config.gamma > 0 or estimates)
        self.has_costs = learns_from_costs or (bool(kinds) and clips)
        # Otherwise all returns are 0, and so is their baseline, unless a user's estimator is set.
        has_returns = (
            config.learns_from_rewards or learns_from_costs or config.advantage is not None
        )
        self.advantage = chosen_advantage(config) if has_returns else WholeReturn()
        has_values = self.advantage.needs_values
        own_costs = self.has_costs and (sampler_differs or config.teacher_fraction > 0)
        self.needs = Needs(
            evidence=tuple(make_evidence(kind, config, drawn=self.has_costs) for kind in kinds),
            rewards=config.learns_from_rewards,
            siblings=self.advantage.needs_siblings or config.scale is Scale.group_std,
            learner_logprobs=own_costs or by_sequence(config) or has_values,
            learner_values=has_values,
            old_logprobs=clips_against_old,
        )

    def credit(self, batch: ScoredBatch, plan: UpdatePlan) -> Credit:
        """G_{t+1} minus its baseline for each response token of whole groups of one source."""
        rollout = batch.rollout
        mask = response_grid(rollout)  # [N, T]
        teacher_weights = teacher_weights_of(batch, plan)
        weight = self.token_weight(batch, plan)
        own, cost = self._imitation(batch, teacher_weights)
        returns = self._returns(batch, plan, own, cost, mask)
        has_values = self.advantage.needs_values
        # Responses of the data have no returns, so no baseline is subtracted.
        from_data = rollout.source is Source.data
        advantage = returns if from_data else self._advantages(returns, mask, batch)
        clips = self.config.log_ratio_clip is not None and rollout.source is not Source.data
        live = weight > 0  # a dropped group's reward is NaN, and 0 * NaN is not 0
        sparse = torch.where(live, advantage[mask], 0.0)
        error = -sparse if has_values else torch.zeros_like(sparse)  # value minus its target
        sampler = response_rows(rollout, rollout.rollout_logprobs)
        old = batch.old_logprobs
        columns = TokenColumns(
            token_ids=response_ids(rollout),
            token_weight=weight,
            sparse=sparse,
            value_slope=self.config.value.loss_weight * weight * error,
            sampler_logprobs=sampler,
            old_logprobs=sampler if old is None else torch.from_numpy(old).to(sampler.dtype),
        )
        watched = {}
        if by_sequence(self.config):
            kept = per_token(torch.from_numpy(batch.rewards.keep.copy()), rollout)
            beyond = per_token(self._sequence_ratio(batch)[1], rollout)
            watched["policy/bounded_frac"] = beyond[kept].double()
        if rollout.source is Source.student and teacher_weights:
            total = torch.stack([per_token(w, rollout) for w in teacher_weights]).sum(0)
            watched["kl/sampled"] = (cost / total)[live & (total != 0) & cost.isfinite()]
        if has_values and not from_data:
            watched["value/loss"] = error[live].square() / 2
        if clips:
            watched["kl/clipped_frac"] = self._clipped(batch, teacher_weights)[live]
        return Credit(
            columns=columns,
            teacher_weights=teacher_weights,
            watched=watched,
            nll=0.0 if rollout.source is Source.student else self.config.nll_weight,
            has_returns=rollout.source is not Source.data,
        )

    def _advantages(self, returns: Tensor, mask: Tensor, batch: ScoredBatch) -> Tensor:
        """[N, T] returns above their baseline; 0 in dropped groups, whose rewards may be NaN and
        which the estimator does not get.
        """
        keep = torch.from_numpy(batch.rewards.keep.copy())
        if not keep.any():
            return torch.zeros_like(returns)
        values = torch.zeros_like(returns)
        if self.advantage.needs_values:
            assert batch.learner_values is not None, "an estimator that needs values gets them"
            values[mask] = torch.from_numpy(batch.learner_values).to(values.dtype)
        grid = ReturnGrid(
            returns=returns[keep],
            values=values[keep],
            mask=mask[keep],
            group_size=batch.rollout.group_size,
        )
        advantages = self.advantage.advantages(grid, self.config)
        assert advantages.shape == grid.mask.shape, (advantages.shape, grid.mask.shape)
        whole = torch.zeros_like(returns)
        whole[keep] = advantages.to(returns.dtype)
        return whole

    def token_weight(self, batch: ScoredBatch, plan: UpdatePlan) -> Tensor:
        """[R] the weight of each token; 0 for dropped groups. With ratio.level=sequence it includes
        the importance ratio of the sequence.

        Raises:
            ConfigError: a user's function gave a weight that is negative or not finite.
        """
        rollout = batch.rollout
        mask = response_grid(rollout)  # [N, T]
        counts = TokenCounts(
            mask=mask,
            group_size=rollout.group_size,
            num_tokens=max(plan.num_tokens, 1),
            num_sequences=max(plan.num_sequences, 1),
            num_groups=max(plan.num_groups, 1),
            max_new_tokens=self.max_new_tokens,
        )
        keep = torch.from_numpy(batch.rewards.keep.copy())[:, None]
        weight = torch.where(keep, self.weight_of_tokens(counts).broadcast_to(mask.shape), 0.0)
        wrong = mask & ~(weight.isfinite() & (weight >= 0))
        if wrong.any():  # such a token would be left out of training
            sequence, token = wrong.nonzero()[0].tolist()
            raise ConfigError(
                f"algorithm.token_weight={self.config.token_weight}: returned "
                f"{weight[sequence, token]:g} for token {token} of a response of "
                f"{mask[sequence].sum()} tokens; return finite weights of 0 or more"
            )
        if by_sequence(self.config):
            weight = weight * self._sequence_ratio(batch)[0][:, None]
        return weight[mask].to(torch.from_numpy(rollout.rollout_logprobs[:0].copy()).dtype)

    def _sequence_ratio(self, batch: ScoredBatch) -> tuple[Tensor, Tensor]:
        """[N] prod_t p(y_t) / mu(y_t), bounded by algorithm.ratio, and [N] bool, whether it was
        outside the bounds.
        """
        assert batch.learner_logprobs is not None, "ratio.level=sequence needs learner_logprobs"
        sampled = response_rows(batch.rollout, batch.rollout.rollout_logprobs)
        mask = response_grid(batch.rollout)
        log_ratio = torch.zeros(mask.shape, dtype=torch.float64)
        log_ratio[mask] = torch.from_numpy(batch.learner_logprobs).double() - sampled.double()
        bounds = RatioBounds(
            kind=self.config.ratio.kind, low=self.config.ratio.low, high=self.config.ratio.high
        )
        total = log_ratio.sum(1)
        return bounds.factor(total, torch.ones_like(total))

    def _imitation(
        self, batch: ScoredBatch, teacher_weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The drawn token's share of the dense term, and its imitation cost sum_i w_i (log p - log
        q_i); both [R].

        log p is the learner's if the sampler may differ from it (see the top of this file). Data
        was not drawn from the student, so its costs are not defined: the first is 0, the second
        NaN, as it is where no cost is needed.
        """
        rollout = batch.rollout
        logp = drawn_logprobs(batch)
        own = torch.zeros_like(logp)
        cost = torch.zeros_like(logp)
        if rollout.source is Source.data or not self.has_costs:
            return own, torch.full_like(cost, torch.nan)
        log_ratio = Measure(log_ratio_clip=self.config.log_ratio_clip)
        drawn = response_ids(rollout)
        for evidence, scores, of_sequence in zip(
            self.needs.evidence, batch.scores, teacher_weights, strict=True
        ):
            weight = per_token(of_sequence, rollout).to(logp.dtype)
            logq = response_rows(rollout, scores.logprobs)
            scored = weight != 0
            cost += torch.where(scored, weight * log_ratio.score(logp, logq), 0.0)
            if evidence.estimates:
                support = torch.from_numpy(scores.support_ids.astype(np.int64))
                inside = (support == drawn[:, None]).any(1)
                score = tail_score(logp, logq, inside, self.measure)
                own += torch.where(scored, weight * score, 0.0)
        return own, cost

    def _clipped(self, batch: ScoredBatch, teacher_weights: Sequence[Tensor]) -> Tensor:
        """[R] bool, whether |log p - log q| of the drawn token exceeds algorithm.log_ratio_clip for
        a teacher that scored it.
        """
        limit = self.config.log_ratio_clip
        assert limit is not None, "costs are compared with a limit only where it is set"
        logp = drawn_logprobs(batch)
        beyond = torch.zeros_like(logp, dtype=torch.bool)
        for scores, of_sequence in zip(batch.scores, teacher_weights, strict=True):
            scored = per_token(of_sequence, batch.rollout) != 0
            log_ratio = logp - response_rows(batch.rollout, scores.logprobs)
            beyond |= scored & (log_ratio.abs() > limit)
        return beyond

    def _returns(
        self, batch: ScoredBatch, plan: UpdatePlan, own: Tensor, cost: Tensor, mask: Tensor
    ) -> Tensor:
        """[N, T] own + future costs - lambda R, and -lambda R after the end of a sequence."""
        reward = torch.from_numpy(batch.rewards.values.astype(np.float64))
        if self.config.overlong_buffer:
            reward = reward + self._overlong_penalty(batch.rollout)
        if self.config.scale is Scale.group_std:
            reward = standard_scores(reward, batch.rollout.group_size)
        has_reward = batch.rollout.source is not Source.data and self.config.learns_from_rewards
        terminal = -plan.reward_weight * reward if has_reward else torch.zeros_like(reward)
        grid_own, grid_cost = (torch.zeros(mask.shape, dtype=own.dtype) for _ in range(2))
        grid_own[mask] = own
        if self.config.gamma > 0:
            grid_cost[mask] = cost.nan_to_num(0.0)  # NaN: no costs, as for responses of the data
        future = future_cost(grid_cost, mask, self.config.gamma)
        if self.config.future is Future.mean:
            later = mask.flip(1).cumsum(1).flip(1) - 1  # response tokens after this one
            future = future / later.clamp_min(1)
        return grid_own + future + terminal.to(own.dtype)[:, None]

    def _overlong_penalty(self, rollout: RolloutBatch) -> Tensor:
        """[N] 0 up to max - buffer tokens, then falling linearly to -1 at max (DAPO, arXiv
        2503.14476, equation 13). Observations count, as they do for rollout.max_new_tokens.
        """
        prompts = np.repeat(rollout.prompt_lengths, rollout.group_size)
        lengths = torch.from_numpy(np.diff(rollout.offsets) - prompts).double()
        free = self.max_new_tokens - self.config.overlong_buffer
        return ((free - lengths) / self.config.overlong_buffer).clamp(-1.0, 0.0)


def by_sequence(config: AlgorithmConfig) -> bool:
    """Whether the importance ratio is that of whole sequences."""
    return config.ratio.kind is not Ratio.none and config.ratio.level is RatioLevel.sequence


def teacher_weights_of(batch: ScoredBatch, plan: UpdatePlan) -> tuple[Tensor, ...]:
    """For each scored teacher [N] the weight w_i of each sequence; 0 if the sequence's prompt is
    not routed to the teacher.
    """
    weights = []
    for weight, route in zip(plan.teacher_weights, plan.teacher_routes, strict=True):
        routed = [takes(route, columns) for columns in batch.rollout.columns]
        of_group = weight * torch.tensor(routed, dtype=torch.float64)
        weights.append(of_group.repeat_interleave(batch.rollout.group_size))
    return tuple(weights)


def drawn_logprobs(batch: ScoredBatch) -> Tensor:
    """[R] log p(y) from the learner's own forward pass if there was one, else from the sampler."""
    sampled = response_rows(batch.rollout, batch.rollout.rollout_logprobs)
    if batch.learner_logprobs is None:
        return sampled
    return torch.from_numpy(batch.learner_logprobs).to(sampled.dtype)
