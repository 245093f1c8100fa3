"""The settings of the head pass, which the learner, the scorers and the oracle share."""

from hybridrl.kernels.head import HeadRule
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds
from hybridrl.settings.choices import Products, Ratio, RatioLevel
from hybridrl.settings.run import RunSettings


def head_rule(settings: RunSettings) -> HeadRule:
    """The settings of the head pass. They bound only a ratio of tokens; a ratio of whole sequences
    is a factor of the token weights.
    """
    algorithm = settings.algorithm
    per_token = algorithm.ratio.level is RatioLevel.token and not algorithm.ranks_pairs
    ratio = (
        RatioBounds(kind=algorithm.ratio.kind, low=algorithm.ratio.low, high=algorithm.ratio.high)
        if per_token
        else RatioBounds()
    )
    correction = (
        RatioBounds(kind=Ratio.truncate, high=algorithm.ratio.sampler_high)
        if settings.clips_against_old
        else RatioBounds()
    )
    measure = Measure(
        divergence=algorithm.divergence,
        beta=algorithm.jsd_beta,
        log_ratio_clip=algorithm.log_ratio_clip,
    )
    return HeadRule(
        temperature=algorithm.temperature,
        chunk=settings.train.head_chunk,
        exact_logits=settings.train.exact_logits,
        wide_products=settings.train.products is Products.float32,
        measure=measure,
        ratio=ratio,
        correction=correction,
    )
