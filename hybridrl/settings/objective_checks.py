"""Checks of the objective across sections: what the run learns from, and what that needs."""

from hybridrl.core.errors import ConfigError
from hybridrl.settings.built_in import ADVANTAGES, PAIR_LOSSES
from hybridrl.settings.choices import Scale, ScheduleKind
from hybridrl.settings.run import RunSettings


def check_objective(settings: RunSettings) -> None:
    """Check the settings that the chosen built-in estimator or loss depends on.

    objectives/user_code.py has the same rules for a user's own.
    """
    algorithm = settings.algorithm
    if algorithm.pair.loss in PAIR_LOSSES:
        PAIR_LOSSES[algorithm.pair.loss].load()().check(algorithm.pair)
    if (
        algorithm.scale is Scale.batch
        and algorithm.advantage is None
        and ADVANTAGES[algorithm.baseline].load().needs_values
    ):
        raise ConfigError(
            f"algorithm.scale=batch: not with baseline={algorithm.baseline}, whose advantages are "
            "centred already; set algorithm.scale=none"
        )
    weight = algorithm.reward_weight
    if (
        algorithm.scale is Scale.batch
        and algorithm.learns_from_rewards
        and not algorithm.ranks_pairs
        and not settings.learns_from_costs
        and (weight.kind is not ScheduleKind.constant or weight.value != 1)
    ):
        raise ConfigError(
            "algorithm.scale=batch: divides algorithm.reward_weight out again, as no imitation "
            "cost is added to the rewards; set algorithm.reward_weight.value=1 with kind=constant, "
            "or algorithm.scale=none"
        )


def check_something_to_learn(settings: RunSettings) -> None:
    """Check that some term of the loss has a weight."""
    algorithm = settings.algorithm
    likelihood = algorithm.nll_weight and algorithm.data_fraction + algorithm.teacher_fraction
    terms = (algorithm.ranks_pairs, algorithm.imitates, algorithm.learns_from_rewards, likelihood)
    if not any(terms):
        raise ConfigError(
            "algorithm.imitation_weight=0 and algorithm.reward_weight=0: nothing to learn from; "
            "raise one of them"
        )


def check_teacher_given(settings: RunSettings) -> None:
    """Check that there is a teacher where one has to score or to write responses."""
    algorithm = settings.algorithm
    if algorithm.imitates and not settings.teachers:
        raise ConfigError(
            "teachers={}: algorithm.imitation_weight is not 0, so a teacher is needed; "
            "add +teachers.NAME.path=..., or set algorithm.imitation_weight.value=0"
        )
    if algorithm.teacher_fraction and not settings.teachers:
        raise ConfigError(
            "teachers={}: algorithm.teacher_fraction is not 0, so a teacher must write; add "
            "+teachers.NAME.path=..."
        )


def check_teacher_weights(settings: RunSettings) -> None:
    """Check that the weights of teachers have a positive sum, for the prompts of each route.

    Teachers without a route score the prompts of every route too. Whether there are prompts outside
    of all routes is known from the data alone, so these are not checked where teachers have routes.
    """
    algorithm = settings.algorithm
    if not algorithm.imitates or algorithm.ranks_pairs:
        return
    teachers = settings.teachers.values()
    for route in [t.route for t in teachers if t.route] or [{}]:
        total = sum(t.weight for t in teachers if t.route.items() <= route.items())
        if total <= 0:
            of_route = f" with route={route}" if route else ""
            raise ConfigError(
                f"teachers={{{', '.join(settings.teachers)}}}: their weights{of_route} add up to "
                f"{total:g}; the sum must be more than 0, or the student moves away from them "
                "without a bound; add the teacher to imitate, +teachers.main=PATH"
            )


def check_reference(settings: RunSettings) -> None:
    """Check that a pair loss over log-ratios has one reference, which scores every pair."""
    pair = settings.algorithm.pair
    if not pair.needs_reference:
        return
    against = pair.against
    if against not in settings.teachers if against else len(settings.teachers) != 1:
        raise ConfigError(
            f"algorithm.pair.against={against}: algorithm.pair.loss={pair.loss} needs "
            f"one reference among teachers={{{', '.join(settings.teachers)}}}; name one, e.g. "
            "+teachers.initial.path=null algorithm.pair.against=initial"
        )
    reference = against or next(iter(settings.teachers))
    if settings.teachers[reference].route:
        raise ConfigError(
            f"teachers.{reference}.route={settings.teachers[reference].route}: "
            f"algorithm.pair.loss={pair.loss} takes every pair's log-ratio to it; leave the "
            "route out"
        )


def check_reward_given(settings: RunSettings) -> None:
    """Check that there is a reward function if the run learns from rewards or ranks responses."""
    algorithm = settings.algorithm
    ranks = algorithm.ranks_pairs and _samples(settings)
    if settings.reward.functions:
        return
    if ranks:
        raise ConfigError(
            f"reward.functions={{}}: rewards rank the sampled responses of "
            f"algorithm.pair.loss={algorithm.pair.loss}; add "
            "+reward.functions.NAME.function=..., or set algorithm.data_fraction=1, which takes "
            "the pairs of the data"
        )
    if algorithm.learns_from_rewards:
        raise ConfigError(
            "reward.functions={}: algorithm.reward_weight is not 0, so a reward is needed; "
            "add +reward.functions.NAME.function=..., or set algorithm.reward_weight.value=0"
        )


def check_pair_terms(settings: RunSettings) -> None:
    """A loss on pairs is the whole loss, so no other term may have a weight.

    Rewards rank the student's responses, whatever their weight is.
    """
    algorithm = settings.algorithm
    if not algorithm.ranks_pairs:
        return
    loss = f"algorithm.pair.loss={algorithm.pair.loss}"
    for name in ("imitation_weight", "reward_weight"):
        if not getattr(algorithm, name).is_zero():
            raise ConfigError(
                f"{loss}: is the whole loss, but algorithm.{name} is not 0; set "
                f"algorithm.{name}=0, or start from a preset of pairs, e.g. algorithm=dpo"
            )
    if algorithm.nll_weight:
        raise ConfigError(
            f"algorithm.nll_weight={algorithm.nll_weight}: has no effect with {loss}; for the "
            "likelihood of the chosen response set algorithm.pair.nll_weight"
        )


def check_siblings(settings: RunSettings) -> None:
    """Check that each prompt has several responses if they are compared with each other."""
    algorithm = settings.algorithm
    k = settings.train.samples_per_prompt
    single = k < 2 and _samples(settings)
    if (
        single
        and settings.learns_from_returns
        and algorithm.advantage is None
        and ADVANTAGES[algorithm.baseline].load().needs_siblings
    ):
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.baseline={algorithm.baseline} compares "
            "siblings, needs >= 2; raise it or set algorithm.baseline=none"
        )
    if single and algorithm.scale is Scale.group_std and algorithm.learns_from_rewards:
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.scale=group_std compares siblings, needs >= "
            "2; raise it or set algorithm.scale=none"
        )
    if single and algorithm.ranks_pairs:
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.pair.loss={algorithm.pair.loss} ranks "
            "siblings, needs >= 2; raise it"
        )
    compares = algorithm.learns_from_rewards or algorithm.ranks_pairs
    if algorithm.dynamic_sampling and not compares:
        raise ConfigError(
            f"algorithm.dynamic_sampling={algorithm.dynamic_sampling}: compares rewards, and "
            "algorithm.reward_weight is 0; set it to 0"
        )
    if algorithm.dynamic_sampling and k < 2:
        raise ConfigError(
            f"train.samples_per_prompt={k}: algorithm.dynamic_sampling compares siblings, needs "
            ">= 2; raise it"
        )


def _samples(settings: RunSettings) -> bool:
    """Whether some responses are sampled, by the student or by a teacher."""
    return settings.algorithm.data_fraction < 1
