"""M1: methods at equally many responses."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from reproduction.curves import COLOURS
from reproduction.differences import paired, points, values
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict
from reproduction.own_pairs import STUDENT
from reproduction.trained import COLUMNS, trained_arm

STEPS = 50
"""Cut from 100 before the first run: those would have taken 242 of the 120 minutes."""
RATES = (2e-4, 6e-4)
SOLUTIONS: Mapping[str, Setting] = {
    "+data.options.responses": "solution",
    "train.prompts_per_step": 128,
    "rollout.groups_per_chunk": 128,
}
"""One response to each prompt: as many of a step as the others have with four."""
FROM_START: Mapping[str, Setting] = {"teachers.main.path": STUDENT}
"""The KL is that to the student before training."""
METHODS: Mapping[str, Mapping[str, Setting]] = {
    "hybrid": {"algorithm": "hybrid"},
    "hybrid_rising": {"algorithm": "hybrid_rising"},
    "sft": {"algorithm": "sft", **SOLUTIONS},
    "seqkd": {"algorithm": "seqkd"},
    "opd": {"algorithm": "opd"},
    "opd_full": {"algorithm": "opd_full"},
    # Half of the prompts have one response, of the data, and the others four.
    "gkd": {
        "algorithm": "gkd",
        **SOLUTIONS,
        "train.prompts_per_step": 52,
        "rollout.groups_per_chunk": 52,
    },
    "minillm": {"algorithm": "minillm"},
    "grpo": {"algorithm": "grpo", **FROM_START},
    "dapo": {"algorithm": "dapo"},
    "ppo": {"algorithm": "ppo", **FROM_START},
    "rloo": {"algorithm": "rloo"},
    "reinforce_kl": {"algorithm": "reinforce_kl", **FROM_START},
    "g_opd, 1.25": {"algorithm": "g_opd"},
    "g_opd, 1.5": {
        "algorithm": "g_opd",
        "algorithm.imitation_weight.value": 1.5,
        "teachers.initial.weight": -1 / 3,
    },
}
"""g_opd at weight 1 is opd."""
HYBRID = "hybrid"
MARGIN = 0.02
"""A difference of reward below it is taken for none."""


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
    return paired(ours, theirs)


def judge(runs: Runs) -> Judgement:
    gains = {method: gain(runs, HYBRID, method) for method in METHODS if method != HYBRID}
    below = [method for method, of in gains.items() if of.high < -MARGIN]
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
    ahead = f" Ahead of the hybrid: {', '.join(below)}." if below else ""
    return Judgement(
        verdict=verdict,
        effect=f"reward of the hybrid minus that of the best other method, {nearest}: "
        f"{points(gains[nearest])}",
        reason=f"Rewards with the better learning rate of each method: {order}.{ahead}",
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
    title="Methods at equally many responses",
    claim="From the same number of responses the hybrid reaches more reward than every other "
    "method.",
    source="arXiv 2512.23097, its motivation",
    design=f"Student, teacher and measures of E1; {STEPS} steps of 128 responses, four to a "
    "prompt, each method with the settings of its preset and both learning rates of the grid "
    f"{', '.join(f'{rate:g}' for rate in RATES)}. sft and gkd learn from solutions of the data, of "
    "which a prompt has one: sft has 128 prompts, gkd 52 and so about 130 responses. dapo draws up "
    "to twice as many responses as it trains on. The KL of grpo, ppo and reinforce_kl is that to "
    "the student before training. g_opd weighs the teacher 1.25 and 1.5 times against the start; "
    "with 1 it is opd. The tokens trained on are in the table.",
    rule="Each method with the learning rate of its higher mean reward. Differences of reward of "
    "the hybrid to each other method are paired by seed, with 95 % intervals. Confirmed if all lie "
    f"above 0, refuted if the interval of one lies below -{100 * MARGIN:.0f} points, otherwise "
    "undecided.",
    columns=COLUMNS,
    arms=tuple(arm(method, rate) for method in METHODS for rate in RATES),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    budget_s=7200.0,
    cuts=f"{STEPS} steps instead of 100, which would have taken twice the budget, so that a method "
    "that starts slowly is at a disadvantage. Two learning rates, of which the better one is "
    "chosen by the same seeds, three seeds, and no comparison at equal seconds, for which the "
    "machine would have to be idle. The differences are not corrected for their number. The hybrid "
    "has its preset's lambda of 1; in E1, after 100 steps, it ends with 3 points more at 10. The "
    "last 13 runs, those of g_opd and one of opd, were made by a second process of this tool with "
    "two threads, which has the same digests.",
)
