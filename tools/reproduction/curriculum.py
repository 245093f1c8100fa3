"""E2: a reward weight that rises during training against constant ones."""

from collections.abc import Mapping
from functools import partial

from reproduction.curves import draw_curves
from reproduction.differences import difference, points
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict
from reproduction.trained import COLUMNS, trained_arm

STEPS = 160
COMMON: Mapping[str, Setting] = {
    "algorithm": "hybrid",
    "train.steps": STEPS,
    "train.lr": 5e-4,
    "eval.every": 40,
}
RISING = "rising, 0.5 to 3"
FALLING = "falling, 3 to 0.5"
SAME_MEAN = "constant, 1.75"
SAME_LAST = "constant, 3"
SAME_FIRST = "constant, 0.5"
WEIGHTS = {
    RISING: (0.5, 3.0),
    SAME_MEAN: (1.75, 1.75),
    SAME_LAST: (3.0, 3.0),
    SAME_FIRST: (0.5, 0.5),
    FALLING: (3.0, 0.5),
}
"""lambda at the first and at the last step, in the order of the table"""
MARGIN = 0.02
"""A gain of reward that is below it is taken for none."""


def weight(first: float, last: float) -> Mapping[str, Setting]:
    return {
        "algorithm.reward_weight.kind": "linear",
        "algorithm.reward_weight.value": first,
        "algorithm.reward_weight.end": last,
    }


def arm(name: str) -> Arm:
    settings = {**COMMON, **weight(*WEIGHTS[name])}
    return trained_arm(name, settings, weight(*WEIGHTS[RISING]))


def judge(runs: Runs) -> Judgement:
    gains = {c: difference(runs, RISING, c, "reward") for c in (SAME_MEAN, SAME_LAST)}
    costs = {c: difference(runs, RISING, c, "divergence") for c in gains}
    verdict = Verdict.undecided
    if any(of.high < MARGIN for of in gains.values()):
        verdict = Verdict.refuted
    elif all(of.low > 0 for of in gains.values()) and all(of.low <= 0 for of in costs.values()):
        verdict = Verdict.confirmed
    falling = difference(runs, RISING, FALLING, "reward")
    return Judgement(
        verdict=verdict,
        effect=f"reward {points(gains[SAME_MEAN])} above the constant weight of equal mean, "
        f"{points(gains[SAME_LAST])} above that of equal end (a gain below 2 points is none)",
        reason=f"The KL to the teacher differs by {costs[SAME_MEAN].text(1, 2)} and "
        f"{costs[SAME_LAST].text(1, 2)} nats. Against a falling weight the reward differs by "
        f"{points(falling)}.",
    )


EXPERIMENT = Experiment(
    id="E2",
    title="A rising reward weight against constant ones",
    claim="A curriculum, lambda = lambda_0 (1 + alpha t), imitates first and optimises the reward "
    "later, and ends with more reward at no more KL than constant weights.",
    source="arXiv 2512.23097; the paper measures nothing, the experiment was proposed for it",
    design="Student, teacher, batch and measures are those of E1. The teacher is imperfect (49 % "
    f"of its samples are right), so that the reward can add something. {STEPS} steps; lambda rises "
    "from 0.5 to 3. Its controls are the constant weight of equal mean, 1.75, and that of equal "
    "end, 3; for comparison 0.5, and the same weights in falling order.",
    rule="Differences of reward and KL are paired by seed, with 95 % intervals. Refuted if the "
    "interval of the gain of reward over one of the two controls lies below 2 points. Else "
    "confirmed if both gains lie above 0 and the KL is not significantly above that of either "
    "control. Otherwise undecided.",
    columns=COLUMNS,
    arms=tuple(arm(name) for name in WEIGHTS),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=partial(draw_curves, steps=range(0, STEPS + 1, 40)),
    cuts=f"{STEPS} steps, so that 25 runs take less than an hour. The last quarter of the steps, "
    "with the largest weights, has 3 % of the sum of the learning rates. Weighted by the rate, the "
    "mean of lambda is 1.30 for the rising and 2.20 for the falling weight, not 1.75: a curriculum "
    "at a constant rate is not tested.",
)
