"""M1: methods at equal student tokens."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from reproduction.curves import COLOURS
from reproduction.differences import values
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict
from reproduction.trained import trained_arm

STEPS = 100
RATES = (2e-4, 6e-4)
SOLUTIONS = {"+data.options.responses": "solution"}
METHODS: Mapping[str, Mapping[str, Setting]] = {
    "hybrid": {"algorithm": "hybrid"},
    "hybrid_rising": {"algorithm": "hybrid_rising"},
    "sft": {"algorithm": "sft", **SOLUTIONS},
    "seqkd": {"algorithm": "seqkd"},
    "opd": {"algorithm": "opd"},
    "opd_full": {"algorithm": "opd_full"},
    "gkd": {"algorithm": "gkd", **SOLUTIONS},
    "minillm": {"algorithm": "minillm"},
    "grpo": {"algorithm": "grpo"},
    "dapo": {"algorithm": "dapo"},
    "ppo": {"algorithm": "ppo"},
    "rloo": {"algorithm": "rloo"},
    "reinforce_kl": {"algorithm": "reinforce_kl"},
    "g_opd, 1.25": {"algorithm": "g_opd"},
    "g_opd, 1.5": {
        "algorithm": "g_opd",
        "algorithm.imitation_weight.value": 1.5,
        "teachers.initial.weight": -1 / 3,
    },
}
"""g_opd at weight 1 is opd."""
HYBRIDS = ("hybrid", "hybrid_rising")


def name(method: str, rate: float) -> str:
    return f"{method}, lr {rate:g}"


def arm(method: str, rate: float) -> Arm:
    settings = {"train.steps": STEPS, "train.lr": rate, "eval.every": 25, **METHODS[method]}
    return trained_arm(name(method, rate), settings, {"train.lr": RATES[0]})


def best(runs: Runs, method: str) -> str:
    """The arm of the method's better learning rate, by its mean reward."""
    return max(
        (name(method, rate) for rate in RATES),
        key=lambda arm: estimate(values(runs, arm, "reward")).mean,
    )


def gain(runs: Runs, method: str, other: str) -> Estimate:
    """Of reward, each method with its better learning rate, paired by seed."""
    ours = values(runs, best(runs, method), "reward")
    theirs = values(runs, best(runs, other), "reward")
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def judge(runs: Runs) -> Judgement:
    others = [method for method in METHODS if method not in HYBRIDS]
    ahead = max(HYBRIDS, key=lambda m: estimate(values(runs, best(runs, m), "reward")).mean)
    gains = {other: gain(runs, ahead, other) for other in others}
    below = [other for other, of in gains.items() if of.high < 0]
    verdict = Verdict.undecided
    if all(of.low > 0 for of in gains.values()):
        verdict = Verdict.confirmed
    elif below:
        verdict = Verdict.refuted
    ranked = sorted(
        METHODS, key=lambda m: estimate(values(runs, best(runs, m), "reward")).mean, reverse=True
    )
    order = ", ".join(
        f"{m} {100 * estimate(values(runs, best(runs, m), 'reward')).mean:.1f} %" for m in ranked
    )
    nearest = min(gains, key=lambda other: gains[other].mean)
    return Judgement(
        verdict=verdict,
        effect=f"{ahead} is {gains[nearest].text(100, 1)} points of reward above {nearest}",
        reason=f"Rewards with the better learning rate of each method: {order}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    order = sorted(METHODS, key=lambda m: estimate(values(runs, best(runs, m), "reward")).mean)
    for row, method in enumerate(order):
        for colour, rate in zip(COLOURS, RATES, strict=False):
            of = values(runs, name(method, rate), "reward")
            axes.scatter([100 * value for value in of], [row] * len(of), s=8, color=colour)
            found = estimate(of)
            axes.errorbar(
                100 * found.mean,
                row,
                xerr=100 * found.error,
                fmt="o",
                color=colour,
                label=f"lr {rate:g}" if row == 0 else None,
            )
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set_xlabel("reward of sampled responses, per cent")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    id="M1",
    title="Methods at equal student tokens",
    claim="From the same number of student tokens the hybrid, with a constant or a rising weight, "
    "reaches more reward than every other method.",
    source="arXiv 2512.23097, its motivation",
    design=f"Student, teacher and measures of E1; {STEPS} steps of 32 prompts with 4 responses, "
    "each method with the settings of its preset and both learning rates of the grid "
    f"{', '.join(f'{rate:g}' for rate in RATES)}. sft and gkd learn from solutions of the data.",
    rule="Each method with the learning rate of its higher mean reward. Differences of reward of "
    "the better one of hybrid and hybrid_rising to each other method are paired by seed, with 95 % "
    "intervals. Confirmed if all lie above 0, refuted if one lies below 0, otherwise undecided.",
    columns={
        "reward": "reward",
        "greedy": "greedy accuracy",
        "divergence": "KL to the teacher, nats",
        "tokens": "tokens",
    },
    arms=tuple(arm(method, rate) for method in METHODS for rate in RATES),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    budget_s=7200.0,
    cuts="Two learning rates, three seeds, and no comparison at equal seconds, for which the "
    "machine would have to be idle.",
)
