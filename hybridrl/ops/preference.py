"""Losses on pairs of responses, a chosen and a rejected one, and their derivatives in closed form.

Each function of PAIR_LOSSES looks only at sums of token log-probs that were computed before,
without a graph, and returns d loss / d (sum of policy log-probs) of both responses: fixed
coefficients that the head op backpropagates.

P pairs. s_w, s_l are the scores that a loss compares: log pi - log pi_ref of the chosen (w) and of
the rejected (l) response, or log pi alone where the loss has no reference model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hybridrl.settings.choices import PairLoss, Reference

MAX_LOG_RATIO = 20.0
"""From here on each term of a DIL loss is a straight line. LSIF's slope is then exp(2 * 20) =
2.4e17: fp32 holds even its square.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """Sums over the response tokens, end token included. All [P] and of one floating dtype;
    log-probs in nats.
    """

    chosen_logp: Tensor  # [P] log pi(chosen); bradley_terry: the reward model's score
    rejected_logp: Tensor  # [P]
    chosen_ref: Tensor  # [P] log pi_ref(chosen); read by dpo, ipo and dil_*
    rejected_ref: Tensor  # [P]
    chosen_len: Tensor  # [P] tokens, at least 1; read where PairOptions.average
    rejected_len: Tensor  # [P]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOptions:
    beta: float  # of dpo and simpo
    # ipo: tau, the margin aimed at is 1/(2 tau); slic: d, the margin that costs nothing; simpo:
    # gamma
    target: float
    # l: adds -l log pi(chosen) to any loss but bradley_terry. slic has one; simpo with target 0,
    # summed, and one is CPO
    nll_weight: float
    # log-probs per token: part of simpo and, in the official code, of DIL. False: sums, as in dpo
    # and slic
    average: bool
    log_ratio_clamp: (
        float | None
    )  # of dil_*: where its terms become straight lines; None: MAX_LOG_RATIO, which is also the most
    # of dil_*: which responses stand for draws from pi_ref. rejected is exact only if rejected ones
    # follow
    reference: Reference
    # pi_ref; both is exact if the pair was drawn from pi_ref before it was ranked


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGradient:
    """What a loss makes of P pairs; all [P]. Example: dpo, beta 1, s_w = s_l: loss log 2, d_chosen
    -0.5, d_rejected 0.5.
    """

    loss: Tensor
    d_chosen: (
        Tensor  # d loss / d chosen_logp, the SUM over tokens: any division by the length is inside
    )
    d_rejected: Tensor
    margin: Tensor  # s_w - s_l; positive: the pair is ranked as labelled
    chosen_score: Tensor  # s_w, per token where options.average
    rejected_score: Tensor  # s_l
    clamped: Tensor  # bool, s_w or s_l stood above a DIL loss's clamp; False for all other losses


def bradley_terry(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log sigma(r_w - r_l), the likelihood of the label under Bradley and Terry's model.

    Args:
        chosen, rejected: [P] scores of a reward model.

    Returns:
        loss, d loss / d chosen, d loss / d rejected, all [P].
    """
    loss, slope = _logistic(chosen - rejected)
    return loss, slope, -slope


def reward_model(scores: PairScores, options: PairOptions) -> PairGradient:
    """bradley_terry on chosen_logp and rejected_logp, which here hold a reward model's scores; no
    option is read.
    """
    chosen, rejected = scores.chosen_logp, scores.rejected_logp
    loss, d_chosen, d_rejected = bradley_terry(chosen, rejected)
    return PairGradient(
        loss=loss,
        d_chosen=d_chosen,
        d_rejected=d_rejected,
        margin=chosen - rejected,
        chosen_score=chosen,
        rejected_score=rejected,
        clamped=torch.zeros_like(loss, dtype=torch.bool),
    )


def dpo(scores: PairScores, options: PairOptions) -> PairGradient:
    """-log sigma(beta (s_w - s_l)) (arXiv 2305.18290, equation 7)."""
    sides = _log_ratios(scores, options)
    loss, slope = _logistic(options.beta * sides.margin)
    return _gradient(sides, options, loss, options.beta * slope, -options.beta * slope)


def ipo(scores: PairScores, options: PairOptions) -> PairGradient:
    """(s_w - s_l - 1/(2 tau))^2 (arXiv 2310.12036)."""
    sides = _log_ratios(scores, options)
    error = sides.margin - 1 / (2 * options.target)
    return _gradient(sides, options, error.square(), 2 * error, -2 * error)


def slic(scores: PairScores, options: PairOptions) -> PairGradient:
    """max(0, d - log pi(w) + log pi(l)) - l log pi(w) (arXiv 2305.10425); no reference model."""
    sides = _policy_logprobs(scores, options)
    missing = options.target - sides.margin
    slope = -(missing > 0).to(missing.dtype)
    return _gradient(sides, options, missing.clamp(min=0), slope, -slope)


def simpo(scores: PairScores, options: PairOptions) -> PairGradient:
    """-log sigma(beta (log pi(w)/|w| - log pi(l)/|l|) - gamma) (arXiv 2405.14734); no reference
    model.
    """
    sides = _policy_logprobs(scores, options)
    loss, slope = _logistic(options.beta * sides.margin - options.target)
    return _gradient(sides, options, loss, options.beta * slope, -options.beta * slope)


def dil_lsif(scores: PairScores, options: PairOptions) -> PairGradient:
    """-exp(s_w) + E_ref[exp(2 s)] / 2: DIL with h(r) = (r - 1)^2 / 2 (arXiv 2503.05079)."""
    return _dil(
        scores,
        options,
        lambda s: (-s.exp(), -s.exp()),
        lambda s: (0.5 * (2 * s).exp(), (2 * s).exp()),
    )


def dil_ukl(scores: PairScores, options: PairOptions) -> PairGradient:
    """-s_w + E_ref[exp(s)]: DIL with h(r) = r log r - r (arXiv 2503.05079)."""
    return _dil(scores, options, lambda s: (-s, -torch.ones_like(s)), lambda s: (s.exp(), s.exp()))


def dil_bce(scores: PairScores, options: PairOptions) -> PairGradient:
    """-log sigma(s_w) - E_ref[log sigma(-s)]: DIL with h(r) = r log r - (1 + r) log(1 + r) (arXiv
    2503.05079).
    """
    return _dil(scores, options, _logistic, lambda s: (-logsigmoid(-s), s.sigmoid()))


PAIR_LOSSES: dict[PairLoss, Callable[[PairScores, PairOptions], PairGradient]] = {
    PairLoss.dpo: dpo,
    PairLoss.ipo: ipo,
    PairLoss.slic: slic,
    PairLoss.simpo: simpo,
    PairLoss.dil_lsif: dil_lsif,
    PairLoss.dil_ukl: dil_ukl,
    PairLoss.dil_bce: dil_bce,
    PairLoss.bradley_terry: reward_model,
}

Term = Callable[[Tensor], tuple[Tensor, Tensor]]
"""One term of a separable loss: from s [P] to its value and slope, both [P]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sides:
    """The two scores of each pair, and how they move with the summed log-probs; all [P]."""

    chosen: Tensor  # s_w
    rejected: Tensor  # s_l
    chosen_logp: Tensor  # log pi(w), per token where averaged
    chosen_scale: Tensor  # d s_w / d chosen_logp: 1, or 1/|w|
    rejected_scale: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


def _policy_logprobs(scores: PairScores, options: PairOptions) -> _Sides:
    chosen, rejected = scores.chosen_logp, scores.rejected_logp
    assert chosen.ndim == 1 and chosen.shape == rejected.shape, (chosen.shape, rejected.shape)
    scales = [
        1 / n.to(chosen.dtype) if options.average else torch.ones_like(chosen)
        for n in (scores.chosen_len, scores.rejected_len)
    ]
    return _Sides(
        chosen=chosen * scales[0],
        rejected=rejected * scales[1],
        chosen_logp=chosen * scales[0],
        chosen_scale=scales[0],
        rejected_scale=scales[1],
    )


def _log_ratios(scores: PairScores, options: PairOptions) -> _Sides:
    policy = _policy_logprobs(scores, options)
    return _Sides(
        chosen=(scores.chosen_logp - scores.chosen_ref) * policy.chosen_scale,
        rejected=(scores.rejected_logp - scores.rejected_ref) * policy.rejected_scale,
        chosen_logp=policy.chosen_logp,
        chosen_scale=policy.chosen_scale,
        rejected_scale=policy.rejected_scale,
    )


def _logistic(margin: Tensor) -> tuple[Tensor, Tensor]:
    """-log sigma(u) and its slope -sigma(-u); neither overflows."""
    return -logsigmoid(margin), -torch.sigmoid(-margin)


def _dil(
    scores: PairScores, options: PairOptions, chosen_term: Term, reference_term: Term
) -> PairGradient:
    """E_chosen[chosen_term(s)] + E_ref[reference_term(s)], the Bregman divergence that DIL
    minimises over r = exp(s) = pi/pi_ref.

    Above the clamp c a term goes on along its tangent, f(c) + f'(c) (s - c). So a loss is finite
    wherever s is, its slope is bounded by the one at c, and a rejected response that became far too
    likely is still pushed down; a plain clamp of s would leave it without any gradient.
    """
    sides = _log_ratios(scores, options)
    limit = (
        MAX_LOG_RATIO
        if options.log_ratio_clamp is None
        else min(options.log_ratio_clamp, MAX_LOG_RATIO)
    )
    loss, d_chosen = _straightened(chosen_term, sides.chosen, limit)
    at_rejected, d_rejected = _straightened(reference_term, sides.rejected, limit)
    if options.reference is Reference.both:
        at_chosen, slope = _straightened(reference_term, sides.chosen, limit)
        loss, d_chosen = loss + 0.5 * at_chosen, d_chosen + 0.5 * slope
        at_rejected, d_rejected = 0.5 * at_rejected, 0.5 * d_rejected
    clamped = (sides.chosen > limit) | (sides.rejected > limit)
    return _gradient(sides, options, loss + at_rejected, d_chosen, d_rejected, clamped)


def _straightened(term: Term, s: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Value and slope of a term that follows its tangent above `limit`."""
    value, slope = term(s.clamp(max=limit))
    return value + slope * (s - limit).clamp(min=0), slope


def _gradient(
    sides: _Sides,
    options: PairOptions,
    loss: Tensor,
    d_chosen: Tensor,
    d_rejected: Tensor,
    clamped: Tensor | None = None,
) -> PairGradient:
    """From derivatives with respect to s_w and s_l to those with respect to summed log-probs, the
    NLL term added.

    Args:
        clamped: [P] bool; None: the loss never clamps.
    """
    return PairGradient(
        loss=loss - options.nll_weight * sides.chosen_logp,
        d_chosen=(d_chosen - options.nll_weight) * sides.chosen_scale,
        d_rejected=d_rejected * sides.rejected_scale,
        margin=sides.margin,
        chosen_score=sides.chosen,
        rejected_score=sides.rejected,
        clamped=torch.zeros_like(loss, dtype=torch.bool) if clamped is None else clamped,
    )
