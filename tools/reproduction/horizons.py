"""E5: the discount of future imitation costs against the length of the responses."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from reproduction.chain_runs import chain_arm
from reproduction.chains import MOST
from reproduction.curves import COLOURS, draw_mean
from reproduction.differences import paired
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict
from reproduction.trained import COLUMNS

STEPS = 100
GAMMAS = (0.0, 0.5, 0.9, 1.0)
SHORT = 2
LONG = MOST
REWARD_WEIGHT = 2.0
COMMON: Mapping[str, Setting] = {
    "algorithm": "hybrid",
    "algorithm.reward_weight.value": REWARD_WEIGHT,
    "train.steps": STEPS,
    "train.lr": 5e-4,
    "eval.every": 25,
}


def name(operations: int, gamma: float) -> str:
    return f"{operations} operations, gamma={gamma:g}"


def arm(operations: int, gamma: float) -> Arm:
    return chain_arm(name(operations, gamma), operations, {**COMMON, "algorithm.gamma": gamma})


def objectives(runs: Runs, operations: int, gamma: float) -> list[float]:
    """J of each seed: nats to the teacher less the weighted reward."""
    return [
        run.numbers["divergence"] - REWARD_WEIGHT * run.numbers["reward"]
        for run in runs[name(operations, gamma)]
    ]


def best(runs: Runs, operations: int) -> float:
    """The gamma of the least mean J."""
    return min(GAMMAS, key=lambda gamma: estimate(objectives(runs, operations, gamma)).mean)


def excess(runs: Runs, operations: int, gamma: float, other: float) -> Estimate:
    """How much larger J is with gamma than with the other one, paired by seed."""
    return paired(objectives(runs, operations, gamma), objectives(runs, operations, other))


def judge(runs: Runs) -> Judgement:
    short = best(runs, SHORT)
    long = best(runs, LONG)
    moved = [excess(runs, SHORT, long, short), excess(runs, LONG, short, long)]
    verdict = Verdict.undecided
    if long < short and all(of.low > 0 for of in moved):
        verdict = Verdict.confirmed
    elif (long > short and all(of.low > 0 for of in moved)) or (
        long == short
        and all(
            excess(runs, operations, gamma, short).low > 0
            for operations in (SHORT, LONG)
            for gamma in GAMMAS
            if gamma != short
        )
    ):
        verdict = Verdict.refuted
    costs = "; ".join(
        f"{operations} operations: "
        + ", ".join(
            f"{estimate(objectives(runs, operations, gamma)).text()} (gamma={gamma:g})"
            for gamma in GAMMAS
        )
        for operations in (SHORT, LONG)
    )
    above = ", ".join(
        f"{excess(runs, operations, 1.0, 0.0).text(1, 2)} nats with {operations} operations"
        for operations in (SHORT, LONG)
    )
    return Judgement(
        verdict=verdict,
        effect=f"the least J is at gamma={short:g} with {SHORT} operations, at gamma={long:g} with "
        f"{LONG}",
        reason=f"With gamma=1 J ends above that with gamma=0 by {above}. J of {costs}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    """How far J is above that of gamma=0, so that both lengths have one scale."""
    for colour, operations in zip(COLOURS, (SHORT, LONG), strict=False):
        base = objectives(runs, operations, 0.0)
        columns = [objectives(runs, operations, gamma) for gamma in GAMMAS]
        curves = [[column[i] - base[i] for column in columns] for i in range(len(base))]
        for curve in curves:
            axes.plot(GAMMAS, curve, color=colour, linewidth=0.4, alpha=0.4)
        label = f"{operations} operations, {4 * operations + 2} tokens"
        draw_mean(axes, GAMMAS, curves, colour=colour, label=label, style="o-")
    axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("gamma")
    axes.set_ylabel("J above that of gamma=0, nats")


EXPERIMENT = Experiment(
    id="E5",
    title="The discount of future imitation costs against the length of responses",
    claim="The best gamma is smaller for longer responses: the variance of the sum of future "
    "imitation costs grows with their number, the bias of leaving them out does not.",
    source="arXiv 2512.23097, the discount factor; the paper measures nothing",
    design="The task is made for this: a chain of operations on single digits, whose every result "
    f"is written down, e.g. 7+5*3: 7+5=2*3=6; the reward is 1 if all are right. With {SHORT} "
    f"operations a response has {4 * SHORT + 2} tokens, with {LONG} it has {4 * LONG + 2}, and the "
    "same student and teacher are used. Both have the size of the shipped models; both learned "
    f"chains of 1 to {LONG} operations, the student until 15 % of its greedy answers to the "
    "longest were right. About 53 % of the student's samples are right with the short chains and 8 "
    "% with the long ones, and 91 % and 72 % of the teacher's. The hybrid with "
    f"lambda={REWARD_WEIGHT:g}, leave-one-out baseline and one of four gammas, {STEPS} steps of "
    "128 responses, AdamW at 5e-4. J = E[sum_t KL_t - lambda R] is measured after training, from "
    "2048 responses to held-out problems, with the exact KL at each of their tokens.",
    rule="J is compared paired by seed, with 95 % intervals. The best gamma of a length is that of "
    "the least mean J. Confirmed if it is smaller for the long chains, and each length's J is "
    "higher with the other's best gamma (both intervals above 0). Refuted if it is larger for the "
    "long chains in the same sense, or if one gamma is the best of both lengths, and significantly "
    "better than each other one. Otherwise undecided.",
    columns=COLUMNS,
    arms=tuple(arm(operations, gamma) for operations in (SHORT, LONG) for gamma in GAMMAS),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    cuts="Two lengths, four gammas and three seeds, so that 24 runs would take less than an hour; "
    "they took 75 minutes. The KL of a response grows with its length and its reward does not, so "
    "the two lengths also differ in how KL and reward are balanced. The student is an early "
    "checkpoint of the teacher's own training. At which step it is taken depends on rounding "
    "errors, so another machine trains another one.",
)
