"""V2: responses until the student has learned most of what the teacher can."""

import math
from collections.abc import Mapping
from itertools import pairwise

from matplotlib.axes import Axes

from reproduction.curves import COLOURS, draw_mean
from reproduction.differences import paired
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Run, Runs, Setting, Verdict
from reproduction.methods import FROM_START, RATES, SOLUTIONS, name
from reproduction.trained import COLUMNS, trained_arm

STEPS = 200
EVERY = 20
RESPONSES_PER_STEP = 128
BUDGET = STEPS * RESPONSES_PER_STEP
STUDENT_ACCURACY = 0.299  # greedy, of the shipped models on the 512 held-out problems
TEACHER_ACCURACY = 0.566
MOST = 0.9 * TEACHER_ACCURACY
HALF_WAY = (STUDENT_ACCURACY + TEACHER_ACCURACY) / 2
FEWER = 1.1
"""How many times more responses a method must need to count as worse."""
HYBRID = "hybrid"
OTHERS = ("opd", "grpo", "rloo", "ppo")
METHODS: Mapping[str, Mapping[str, Setting]] = {
    HYBRID: {"algorithm": HYBRID},
    "hybrid_rising": {"algorithm": "hybrid_rising"},
    "opd": {"algorithm": "opd"},
    "grpo": {"algorithm": "grpo", **FROM_START},
    "rloo": {"algorithm": "rloo"},
    "ppo": {"algorithm": "ppo", **FROM_START},
    "sft": {"algorithm": "sft", **SOLUTIONS},
}


def rates(method: str) -> tuple[float, ...]:
    """Both for the methods that estimate everything from drawn tokens."""
    return RATES if method in OTHERS else RATES[-1:]


def arm(method: str, rate: float) -> Arm:
    settings = {
        "train.steps": STEPS,
        "train.lr": rate,
        "train.lr_end": rate,
        "eval.every": EVERY,
        **METHODS[method],
    }
    same = {"train.lr": RATES[0], "train.lr_end": RATES[0]}
    return trained_arm(name(method, rate), settings, same)


def reached(run: Run, accuracy: float) -> float:
    """Responses until the first of two evaluations in succession that are not below `accuracy`,
    from the evaluation before it on by a straight line; BUDGET if there are none.

    Example: after 0.2, 0.3, 0.5, 0.5 the accuracy 0.4 was reached after 2.5 intervals.
    """
    curve = [run.numbers[f"accuracy_{step}"] for step in range(0, STEPS + 1, EVERY)]
    for number, (now, later) in enumerate(pairwise(curve)):
        if min(now, later) >= accuracy:
            before = curve[number - 1] if number else now
            share = (accuracy - before) / (now - before) if now > before else 1.0
            return max(0.0, number - 1 + share) * EVERY * RESPONSES_PER_STEP
    return float(BUDGET)


def responses(runs: Runs, arm: str, accuracy: float) -> list[float]:
    return [reached(run, accuracy) for run in runs[arm]]


def best(runs: Runs, method: str, accuracy: float) -> str:
    """The arm of the method's better learning rate: the fewest responses, then the highest
    accuracy at the end.
    """

    def order(arm: str) -> tuple[float, float]:
        ends = [run.numbers[f"accuracy_{STEPS}"] for run in runs[arm]]
        return estimate(responses(runs, arm, accuracy)).mean, -estimate(ends).mean

    return min((name(method, rate) for rate in rates(method)), key=order)


def decisive(runs: Runs) -> float | None:
    """The accuracy at which methods are compared; None: none reaches any in every seed."""
    for accuracy in (MOST, HALF_WAY):
        for method in (HYBRID, *OTHERS):
            found = responses(runs, best(runs, method, accuracy), accuracy)
            if max(found) < BUDGET:
                return accuracy
    return None


def savings(runs: Runs, other: str, accuracy: float) -> Estimate:
    """log2 of how many times more responses `other` needs than the hybrid, paired by seed."""
    ours = responses(runs, best(runs, HYBRID, accuracy), accuracy)
    theirs = responses(runs, best(runs, other, accuracy), accuracy)
    return paired([math.log2(b) for b in theirs], [math.log2(max(a, 1)) for a in ours])


def judge(runs: Runs) -> Judgement:
    accuracy = decisive(runs)
    if accuracy is None:
        return Judgement(
            verdict=Verdict.undecided,
            effect=f"no method reaches {HALF_WAY:.1%} in every seed, within {BUDGET} responses",
            reason=f"At the end the accuracies are {ends(runs, HALF_WAY)}.",
        )
    found = {other: savings(runs, other, accuracy) for other in OTHERS}
    margin = math.log2(FEWER)
    verdict = Verdict.undecided
    if all(of.low > 0 for of in found.values()):
        verdict = Verdict.confirmed
    elif any(of.high < -margin for of in found.values()):
        verdict = Verdict.refuted
    factors = ", ".join(f"{other} {times(of)}" for other, of in found.items())
    return Judgement(
        verdict=verdict,
        effect=f"times as many responses as the hybrid until {accuracy:.1%}: {factors}",
        reason=f"Responses, {BUDGET} standing for at least as many: {counts(runs, accuracy)}. At "
        f"the end the accuracies are {ends(runs, accuracy)}.",
    )


def times(of: Estimate) -> str:
    return f"{2**of.mean:.2f} [{2**of.low:.2f}, {2**of.high:.2f}]"


def counts(runs: Runs, accuracy: float) -> str:
    return ", ".join(
        f"{method} "
        f"{estimate(responses(runs, best(runs, method, accuracy), accuracy)).text(digits=0)}"
        for method in METHODS
    )


def ends(runs: Runs, accuracy: float) -> str:
    of = {
        method: estimate(
            [run.numbers[f"accuracy_{STEPS}"] for run in runs[best(runs, method, accuracy)]]
        )
        for method in METHODS
    }
    return ", ".join(f"{method} {100 * found.mean:.1f} %" for method, found in of.items())


def draw(axes: Axes, runs: Runs) -> None:
    """Each method with its better learning rate."""
    accuracy = decisive(runs) or HALF_WAY
    steps = range(0, STEPS + 1, EVERY)
    x = [step * RESPONSES_PER_STEP for step in steps]
    for colour, method in zip(COLOURS, METHODS, strict=False):
        chosen = best(runs, method, accuracy)
        curves = [[100 * run.numbers[f"accuracy_{step}"] for step in steps] for run in runs[chosen]]
        for curve in curves:
            axes.plot(x, curve, color=colour, linewidth=0.4, alpha=0.4)
        draw_mean(axes, x, curves, colour=colour, label=chosen)
    for level in (MOST, HALF_WAY):
        axes.axhline(100 * level, color="black", linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("responses trained on")
    axes.set_ylabel("greedy accuracy on held-out problems, per cent")


EXPERIMENT = Experiment(
    id="V2",
    title="Responses until the student has learned most of the teacher",
    claim="To reach most of the teacher's accuracy, the hybrid needs fewer responses of the "
    "student than distillation from drawn tokens and than reinforcement learning.",
    source="arXiv 2512.23097, its motivation",
    design=f"Student and teacher of E1, {STEPS} steps of {RESPONSES_PER_STEP} responses, four to a "
    "prompt (sft: one to a prompt), at a constant learning rate. The greedy accuracy on the 512 "
    f"held-out problems is taken every {EVERY} steps: {STUDENT_ACCURACY:.1%} at the start, "
    f"{TEACHER_ACCURACY:.1%} of the teacher. An accuracy counts as reached at the first of two "
    "evaluations in succession that are not below it, between evaluations by a straight line. The "
    "KL of grpo and ppo is that to the student before training. The hybrids, of which the one with "
    "a rising weight is shown for comparison, and sft, which learns from solutions of the data, "
    f"have the learning rate {RATES[-1]:g}; the others, whose gradients vary more, the better one "
    f"of it and {RATES[0]:g}.",
    rule=f"Decided at {MOST:.1%}, which is 90 % of the teacher's accuracy, if one of hybrid, opd, "
    f"grpo, rloo and ppo reaches it in every seed; else at {HALF_WAY:.1%}, half-way from student "
    "to teacher, if one reaches that in every seed; else undecided. A run that does not reach it "
    f"counts {BUDGET} responses, all that it had. Of the hybrid against opd, grpo, rloo and ppo: "
    "log2 of the ratio of responses, paired by seed, with 95 % intervals. Confirmed if all lie "
    f"above 0, refuted if the hybrid needs more than {FEWER:g} times as many as one of them "
    "(interval beyond that), otherwise undecided.",
    columns=COLUMNS,
    arms=tuple(arm(method, rate) for method in METHODS for rate in rates(method)),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    budget_s=7200.0,
    cuts=f"{STEPS} steps and three seeds, so that {BUDGET} responses may not be enough for 90 %; "
    "two learning rates for the methods that the hybrids are compared with, one for the hybrids, "
    "and the better one is chosen by the same seeds.",
)
