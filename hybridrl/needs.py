"""What the settings must have for the objective, and the pipeline, to do with them."""

from typing import TYPE_CHECKING

from hybridrl.algorithm import AlgorithmConfig
from hybridrl.choices import Baseline, Correction, OnStale, PairLoss, Ratio, Support, SupportSource
from hybridrl.errors import ConfigError

if TYPE_CHECKING:  # config.py checks its settings with this module
    from hybridrl.config import RunSettings

REFERENCED = (PairLoss.dpo, PairLoss.ipo, PairLoss.dil_lsif, PairLoss.dil_ukl, PairLoss.dil_bce)
"""Pair losses over log-ratios to a reference."""


def check_needs(settings: "RunSettings") -> None:
    """What the objective asks for is there, and what it is given it uses."""
    algorithm, pairs = settings.algorithm, settings.algorithm.pair.loss is not PairLoss.none
    from_student = algorithm.data_fraction + algorithm.teacher_fraction < 1
    likelihood = algorithm.nll_weight and algorithm.data_fraction + algorithm.teacher_fraction
    if not (pairs or algorithm.imitates or algorithm.learns_from_rewards or likelihood):
        raise ConfigError(
            "algorithm.imitation_weight=0 and algorithm.reward_weight=0: nothing to learn from; raise one of them"
        )
    if algorithm.imitates and not settings.teachers:
        raise ConfigError(
            "teachers={}: algorithm.imitation_weight is not 0, so a teacher is needed; "
            "add +teachers.NAME.path=..., or set algorithm.imitation_weight.value=0"
        )
    against = algorithm.pair.against
    if algorithm.pair.loss in REFERENCED and (
        against not in settings.teachers if against else len(settings.teachers) != 1
    ):
        raise ConfigError(
            f"algorithm.pair.against={against}: algorithm.pair.loss={algorithm.pair.loss} needs one reference among "
            f"teachers={{{', '.join(settings.teachers)}}}; name one, e.g. +teachers.initial.path=null algorithm.pair.against=initial"
        )
    if (
        algorithm.pair.loss in REFERENCED
        and settings.teachers[against or next(iter(settings.teachers))].route
    ):
        raise ConfigError(
            f"teachers.{against or next(iter(settings.teachers))}.route: algorithm.pair.loss={algorithm.pair.loss} takes every pair's "
            "log-ratio to it; leave the route out"
        )
    if algorithm.teacher_fraction and not settings.teachers:
        raise ConfigError(
            "teachers={}: algorithm.teacher_fraction is not 0, so a teacher must write; add +teachers.NAME.path=..."
        )
    if (
        algorithm.learns_from_rewards or (pairs and from_student)
    ) and not settings.reward.functions:
        raise ConfigError(
            "reward.functions={}: algorithm.reward_weight is not 0, so a reward is needed; "
            "add +reward.functions.NAME.function=..., or set algorithm.reward_weight.value=0"
        )
    k = settings.train.samples_per_prompt
    compares = algorithm.baseline in (Baseline.leave_one_out, Baseline.group_mean)
    if (
        from_student
        and not pairs
        and compares
        and k < 2
        and (algorithm.learns_from_rewards or algorithm.imitates)
    ):
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.baseline={algorithm.baseline} compares siblings, needs >= 2; "
            "raise it or set algorithm.baseline=none"
        )
    if pairs and from_student and k < 2:
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.pair.loss={algorithm.pair.loss} ranks siblings, needs >= 2; raise it"
        )
    if pairs and algorithm.teacher_fraction:
        raise ConfigError(
            "algorithm.teacher_fraction: pairs come from the student or the data; set it to 0, or algorithm.pair.loss=none"
        )
    if algorithm.data_fraction and algorithm.ratio.kind is not Ratio.none:
        raise ConfigError(
            "algorithm.data_fraction: data has no sampler log-probs to take a ratio with; set algorithm.ratio.kind=none"
        )
    if (
        algorithm.data_fraction
        and algorithm.support is Support.topk
        and algorithm.topk.source is SupportSource.sampler
    ):
        raise ConfigError(
            "algorithm.data_fraction: data has no sampler whose tokens could be the support; set algorithm.topk.source=teacher"
        )
    if (
        algorithm.teacher_fraction
        and algorithm.ratio.kind is Ratio.none
        and (algorithm.learns_from_rewards or algorithm.learns_from_costs)
    ):
        raise ConfigError(
            f"algorithm.teacher_fraction={algorithm.teacher_fraction}: rewards and costs of what the teacher wrote count for the "
            "student only when they are weighted by algorithm.ratio; set algorithm.ratio.kind=truncate, "
            "or algorithm.teacher_fraction=0"
        )
    if (
        algorithm.teacher_fraction
        and algorithm.nll_weight
        and algorithm.ratio.kind is not Ratio.none
    ):
        raise ConfigError(
            "algorithm.nll_weight: the likelihood of what the teacher wrote is no return to be weighted by algorithm.ratio; "
            "set algorithm.ratio.kind=none, or algorithm.nll_weight=0"
        )
    if algorithm.data_fraction and algorithm.imitates and not pairs:
        check_imitation_of_data(algorithm)
    if algorithm.dynamic_sampling and not algorithm.learns_from_rewards:
        raise ConfigError(
            "algorithm.dynamic_sampling: compares rewards, and algorithm.reward_weight is 0; set it to 0"
        )
    if algorithm.dynamic_sampling and k < 2:
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.dynamic_sampling compares siblings, needs >= 2; raise it"
        )


def check_imitation_of_data(algorithm: AlgorithmConfig) -> None:
    """Where nobody drew the token, nothing can be estimated from it."""
    if algorithm.support is Support.sampled and not algorithm.nll_weight:
        raise ConfigError(
            "algorithm.support=sampled: estimates by the drawn token, and data was not drawn; set algorithm.support=full or topk, "
            "or algorithm.data_fraction=0"
        )
    if algorithm.support is Support.topk and algorithm.topk.correction is Correction.unbiased:
        raise ConfigError(
            "algorithm.topk.correction=unbiased: corrects by the drawn token, and data was not drawn; choose another correction, "
            "algorithm.support=full, or algorithm.data_fraction=0"
        )


def check_pipeline(settings: "RunSettings") -> None:
    """What runs ahead, or finishes first, is something that the objective and the data can do with."""
    algorithm, pipeline = settings.algorithm, settings.pipeline
    if (
        pipeline.on_stale is OnStale.reweight
        and pipeline.ahead
        and algorithm.ratio.kind is Ratio.none
    ):
        raise ConfigError(
            "pipeline.on_stale=reweight: stale tokens are weighted by algorithm.ratio, and algorithm.ratio.kind=none leaves it out; "
            "set algorithm.ratio.kind=truncate, or pipeline.on_stale=wait"
        )
    if settings.rollout.oversample and algorithm.teacher_fraction:
        raise ConfigError(
            "rollout.oversample: the groups that are done first would decide the teacher's share, not algorithm.teacher_fraction; "
            "set one of them to 0"
        )
    if settings.rollout.oversample and algorithm.data_fraction:
        raise ConfigError(
            "rollout.oversample: data is not sampled, so nothing of it is late; set it to 0, or algorithm.data_fraction=0"
        )
