"""The one online objective: J = E[ sum_t sum_i w_i (log p - log q_i) - lambda R ] (arXiv
2512.23097).

Its gradient splits into a dense term, the closed form of KL(p || q) at each visited prefix, and a
sparse term, G_{t+1} grad log p(y_t) with G_{t+1} = sum_{k>t} gamma^(k-t) c_k - lambda R. This
class makes G before the head pass; kernels.head makes both gradients in that pass. Where the dense
term is estimated from the drawn token instead of summed over the vocabulary, that token's own cost
is part of G. Methods differ in settings only: conf/algorithm holds them.

The costs c = log p(y) - log q(y) in G are the learner's. The sampler mu has log-probs too, but a
cost of log mu - log q adds E[(log mu - log p) grad log p] to the gradient, which no importance
ratio removes. That addition does not become smaller as p comes closer to q, so near the teacher it
decides the direction: with the student 99 % of the way to the teacher and the sampler's logits 0.3
N(0,1) away it is 20 times the gradient, and the sum of the two points uphill
(tests/oracle/test_oracle.py). So wherever sampler and learner may differ
(RunSettings.sampler_differs) and a cost of a drawn token enters G, the learner computes log p(y)
in a forward pass of its own before the update. In float32 without stale rollouts mu is p to
rounding, and the sampler's log-probs are taken as they are.

bfloat16 is such a difference too, without any stale rollout: engine and learner round the same
weights differently, by 0.04 to 0.05 nats a token in the mean on SmolLM2-135M. Distilled into
itself (opd, where the gradient is 0) the sampler's costs gave a gradient norm of 0.36 to 0.50, and
the learner's exactly 0. What is left of the gap is in the tokens, drawn from mu and not from p;
algorithm.ratio weights them, where it is set.
"""

import numpy as np
import torch
from torch import Tensor

from hybridrl.objectives.credit import Credit, LearnerView, Signal, per_token, response_grid
from hybridrl.ops.divergence import Measure, tail_score
from hybridrl.ops.ratio import RatioBounds
from hybridrl.ops.returns import future_cost, generalised_advantage, sibling_mean, standard_scores
from hybridrl.settings.algorithm import AlgorithmConfig
from hybridrl.settings.choices import (
    Baseline,
    Future,
    Normalizer,
    Ratio,
    RatioLevel,
    Scale,
    Source,
    Support,
    SupportSource,
    TeacherSignal,
)
from hybridrl.types import RolloutBatch, ScoredBatch, UpdatePlan


class HybridObjective:
    """Turns a scored batch into per-token weights and costs."""

    def __init__(
        self, config: AlgorithmConfig, max_new_tokens: int, *, sampler_differs: bool = False
    ) -> None:
        """sampler_differs: the log-probs that come with a response may not be the learner's."""
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.sampler_differs = sampler_differs or config.teacher_fraction > 0
        self.measure = Measure(
            divergence=config.divergence, beta=config.jsd_beta, log_ratio_clip=config.log_ratio_clip
        )
        self.signals = frozenset(self._signals())
        self.standardises = config.scale is Scale.batch

    def _signals(self) -> set[Signal]:
        config, signals = self.config, set()
        if config.imitates:
            if config.support is Support.full:
                by_hidden = config.teacher_signal is TeacherSignal.hidden
                signals.add(Signal.teacher_hidden if by_hidden else Signal.teacher_vocabulary)
            elif config.support is Support.topk:
                signals.add(Signal.teacher_support)
                if config.topk.source is SupportSource.sampler:
                    signals.add(Signal.sampler_support)
            clips = config.log_ratio_clip is not None  # the share of clipped costs is a metric
            if config.learns_from_costs or clips:
                signals.add(Signal.teacher_logprobs)
                if self.sampler_differs:
                    signals.add(Signal.learner_logprobs)
        if config.learns_from_rewards:
            signals.add(Signal.rewards)
        if config.ratio.kind is not Ratio.none and config.ratio.level is RatioLevel.sequence:
            signals.add(Signal.learner_logprobs)
        if config.baseline is Baseline.value:
            signals |= {Signal.learner_logprobs, Signal.learner_values}
        return signals

    def credit(self, batch: ScoredBatch, plan: UpdatePlan, learner: LearnerView | None) -> Credit:
        """G_{t+1} minus its baseline for each response token of whole groups of one source."""
        rollout, mask = batch.rollout, response_grid(batch.rollout)  # [N, T]
        weight = self.token_weight(batch, plan, learner)
        own, cost = self._imitation(batch, plan, learner)
        returns = self._returns(batch, plan, own, cost, mask)
        values = torch.zeros_like(returns)
        match (
            Baseline.none if rollout.source is Source.data else self.config.baseline
        ):  # data is no policy's, and has no return
            case Baseline.none:
                advantage = returns
            case Baseline.value:
                assert learner is not None, "baseline=value asks for learner_values"
                values[mask] = learner.values.to(values.dtype)
                advantage = generalised_advantage(
                    returns, values, mask, self.config.value.gae_lambda
                )
            case _:
                loo = self.config.baseline is Baseline.leave_one_out
                advantage = returns - sibling_mean(returns, rollout.group_size, leave_one_out=loo)
        has_values = self.config.baseline is Baseline.value
        clips = self.config.log_ratio_clip is not None and rollout.source is not Source.data
        live = weight > 0  # a dropped group's reward is NaN, and 0 * NaN is not 0
        sparse = torch.where(live, advantage[mask], 0.0)
        error = -sparse if has_values else torch.zeros_like(sparse)  # value minus its target
        return Credit(
            token_weight=weight,
            sparse=sparse,
            nll=0.0 if rollout.source is Source.student else self.config.nll_weight,
            has_returns=rollout.source is not Source.data,
            value_slope=self.config.value.loss_weight * weight * error,
            watched={
                **(
                    {"kl/sampled": cost[live & cost.isfinite()]}
                    if rollout.source is Source.student
                    else {}
                ),
                **({"value/loss": error[live].square() / 2} if has_values else {}),
                **({"kl/clipped_frac": self._clipped(batch, plan, learner)[live]} if clips else {}),
            },
        )

    def token_weight(
        self, batch: ScoredBatch, plan: UpdatePlan, learner: LearnerView | None
    ) -> Tensor:
        """[R] 1 / normaliser; 0 for dropped groups; times the sequence's importance ratio where
        that is asked for.
        """
        rollout, sequences = batch.rollout, max(plan.num_sequences, 1)
        lengths = torch.from_numpy(rollout.response_lengths.copy()).double()
        match self.config.normalizer:
            case Normalizer.token_mean:
                weight = torch.full_like(lengths, 1.0 / max(plan.num_tokens, 1))
            case Normalizer.sequence_mean:
                weight = 1.0 / (
                    max(plan.num_groups, 1) * rollout.group_size * lengths
                )  # every prompt weighs the same
            case Normalizer.constant:
                weight = torch.full_like(lengths, 1.0 / (sequences * self.max_new_tokens))
        weight = torch.where(torch.from_numpy(batch.rewards.keep.copy()), weight, 0.0)
        if (
            self.config.ratio.kind is not Ratio.none
            and self.config.ratio.level is RatioLevel.sequence
        ):
            assert learner is not None, "ratio.level=sequence asks for learner_logprobs"
            weight = weight * self._sequence_ratio(rollout, learner)
        return per_token(weight, rollout).to(
            torch.from_numpy(rollout.rollout_logprobs[:0].copy()).dtype
        )

    def _sequence_ratio(self, rollout: RolloutBatch, learner: LearnerView) -> Tensor:
        """[N] prod_t p(y_t) / mu(y_t), bounded as algorithm.ratio says."""
        mask = response_grid(rollout)
        log_ratio = torch.zeros(mask.shape, dtype=torch.float64)
        log_ratio[mask] = (
            learner.logprobs.double() - response_rows(rollout, rollout.rollout_logprobs).double()
        )
        bounds = RatioBounds(
            kind=self.config.ratio.kind, low=self.config.ratio.low, high=self.config.ratio.high
        )
        total = log_ratio.sum(1)
        return bounds.factor(total, torch.ones_like(total))[0]

    def _imitation(
        self, batch: ScoredBatch, plan: UpdatePlan, learner: LearnerView | None
    ) -> tuple[Tensor, Tensor]:
        """The drawn token's share of the dense term, and its imitation cost sum_i w_i (log p - log
        q_i); both [R].

        log p is the learner's where the sampler may differ from it (see the top of this file). Data
        was not drawn from the student, so neither is defined there.
        """
        rollout, logp = batch.rollout, drawn_logprobs(batch.rollout, learner)
        own, cost = torch.zeros_like(logp), torch.zeros_like(logp)
        if rollout.source is Source.data or Signal.teacher_logprobs not in self.signals:
            return own, torch.full_like(cost, torch.nan)
        log_ratio = Measure(log_ratio_clip=self.config.log_ratio_clip)
        for k, scores in enumerate(batch.scores):
            weight = per_token(teacher_weight(batch, plan, k), rollout).to(logp.dtype)
            logq = response_rows(rollout, scores.logprobs)
            heard = weight != 0
            cost += torch.where(heard, weight * log_ratio.score(logp, logq), 0.0)
            if self.config.estimates_divergence:
                drawn = torch.from_numpy(rollout.input_ids[rollout.response_mask].astype(np.int64))
                inside = (
                    torch.from_numpy(scores.support_ids.astype(np.int64)) == drawn[:, None]
                ).any(1)
                own += torch.where(
                    heard, weight * tail_score(logp, logq, inside, self.measure), 0.0
                )
        return own, cost

    def _clipped(self, batch: ScoredBatch, plan: UpdatePlan, learner: LearnerView | None) -> Tensor:
        """[R] bool, the drawn token's |log p - log q| is beyond algorithm.log_ratio_clip for some
        teacher.
        """
        logp = drawn_logprobs(batch.rollout, learner)
        beyond = torch.zeros_like(logp, dtype=torch.bool)
        for k, scores in enumerate(batch.scores):
            heard = per_token(teacher_weight(batch, plan, k), batch.rollout) != 0
            beyond |= heard & (
                (logp - response_rows(batch.rollout, scores.logprobs)).abs()
                > self.config.log_ratio_clip
            )
        return beyond

    def _returns(
        self, batch: ScoredBatch, plan: UpdatePlan, own: Tensor, cost: Tensor, mask: Tensor
    ) -> Tensor:
        """[N, T] own + future costs - lambda R, padded with -lambda R where a sequence has
        ended.
        """
        reward = torch.from_numpy(batch.rewards.values.astype(np.float64))
        if self.config.overlong_buffer:
            reward = reward + self._overlong_penalty(batch.rollout)
        if self.config.scale is Scale.group_std:
            reward = standard_scores(reward, batch.rollout.group_size)
        known = batch.rollout.source is not Source.data and self.config.learns_from_rewards
        terminal = (-plan.reward_weight * reward if known else torch.zeros_like(reward)).to(
            own.dtype
        )[:, None]
        grid_own, grid_cost = (torch.zeros(mask.shape, dtype=own.dtype) for _ in range(2))
        grid_own[mask] = own
        if self.config.gamma > 0:
            grid_cost[mask] = cost.nan_to_num(0.0)  # where nobody scored, nothing is to be imitated
        future = future_cost(grid_cost, mask, self.config.gamma)
        if self.config.future is Future.mean:
            left = mask.flip(1).cumsum(1).flip(1) - 1  # response tokens after this one
            future = future / left.clamp_min(1)
        return grid_own + future + terminal

    def _overlong_penalty(self, rollout: RolloutBatch) -> Tensor:
        """[N] 0 up to max - buffer tokens, then down to -1 at max (DAPO, arXiv 2503.14476, equation
        13).
        """
        lengths = torch.from_numpy(rollout.response_lengths.copy()).double()
        free = self.max_new_tokens - self.config.overlong_buffer
        return ((free - lengths) / self.config.overlong_buffer).clamp(-1.0, 0.0)


def teacher_weight(batch: ScoredBatch, plan: UpdatePlan, teacher: int) -> Tensor:
    """[N] w_i of each sequence: 0 where the prompt is not routed to this teacher."""
    route = plan.teacher_routes[teacher]
    asked = [
        all(columns.get(key) == value for key, value in route.items())
        for columns in batch.rollout.columns
    ]
    weight = plan.teacher_weights[teacher] * torch.tensor(asked, dtype=torch.float64)
    return weight.repeat_interleave(batch.rollout.group_size)


def drawn_logprobs(batch: RolloutBatch, learner: LearnerView | None) -> Tensor:
    """[R] log p(y): from the learner's own forward pass where there was one, else from the
    sampler.
    """
    sampled = response_rows(batch, batch.rollout_logprobs)
    return sampled if learner is None else learner.logprobs.to(sampled.dtype)


def response_rows(batch: RolloutBatch, column: np.ndarray) -> Tensor:
    """[T] -> [R] a per-token column at the response tokens."""
    return torch.from_numpy(column[batch.response_mask])
