"""The common part of the DIL losses: density-ratio estimation over a chosen and a rejected response
(arXiv 2503.05079).
"""

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairScores
from hybridrl.objectives.pair_losses.scored_sides import log_ratios
from hybridrl.ops.preference import MAX_LOG_RATIO, Term, straightened
from hybridrl.settings.algorithm import PairConfig
from hybridrl.settings.choices import Reference


def density_ratio(
    scores: PairScores, pair: PairConfig, chosen_term: Term, reference_term: Term
) -> PairGradient:
    """E_chosen[chosen_term(s)] + E_ref[reference_term(s)], the Bregman divergence that DIL
    minimises over r = exp(s) = pi/pi_ref.

    pair.reference says which responses are taken as samples of pi_ref: `rejected` is exact only if
    rejected responses follow pi_ref, `both` if the pair was drawn from pi_ref before it was ranked.

    Above the clamp c a term is continued by its tangent, f(c) + f'(c) (s - c). So the loss is
    finite for every finite s, its slope is bounded by the slope at c, and a rejected response that
    became far too likely is still pushed down; a plain clamp of s would give it no gradient.
    """
    sides = log_ratios(scores, pair)
    limit = MAX_LOG_RATIO if pair.clamp is None else min(pair.clamp, MAX_LOG_RATIO)
    loss, d_chosen = straightened(chosen_term, sides.chosen, limit)
    at_rejected, d_rejected = straightened(reference_term, sides.rejected, limit)
    if pair.reference is Reference.both:
        at_chosen, slope = straightened(reference_term, sides.chosen, limit)
        loss = loss + 0.5 * at_chosen
        d_chosen = d_chosen + 0.5 * slope
        at_rejected = 0.5 * at_rejected
        d_rejected = 0.5 * d_rejected
    clamped = (sides.chosen > limit) | (sides.rejected > limit)
    return sides.gradient(pair, loss + at_rejected, d_chosen, d_rejected, clamped)
