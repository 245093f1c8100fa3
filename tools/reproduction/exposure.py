"""E10: on-policy distillation against SFT, on short and on long responses."""

from collections.abc import Mapping
from functools import partial

from reproduction.chain_runs import chain_arm
from reproduction.chains import MOST
from reproduction.curves import draw_curves
from reproduction.differences import difference, paired, per_seed, points, values
from reproduction.estimate import estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict

STEPS = 100
SHORT = 2
LONG = MOST
ONLINE = "on-policy"
OFFLINE = "SFT"
METHODS: Mapping[str, Setting] = {ONLINE: "opd_full", OFFLINE: "seqkd"}
MORE = 0.01
"""By how much the accuracy of an operation must gain more with the long chains."""
HARM = 0.02
"""By how much more an error must lower the accuracy of what follows it."""


def name(operations: int, method: str) -> str:
    return f"{operations} operations, {method}"


def arm(operations: int, method: str) -> Arm:
    settings = {
        "algorithm": METHODS[method],
        "train.steps": STEPS,
        "train.lr": 5e-4,
        "eval.every": 25,
    }
    return chain_arm(name(operations, method), operations, settings)


def gains(runs: Runs, operations: int) -> list[float]:
    """Accuracy of an operation on-policy, minus that by SFT, for each seed."""
    ours = values(runs, name(operations, ONLINE), "of_an_operation")
    theirs = values(runs, name(operations, OFFLINE), "of_an_operation")
    return per_seed(ours, theirs)


def harms(runs: Runs, method: str) -> list[float]:
    """By how much an error lowers the accuracy of the operations after it, for each seed."""
    right = values(runs, name(LONG, method), "after_right")
    error = values(runs, name(LONG, method), "after_error")
    return per_seed(right, error)


def judge(runs: Runs) -> Judgement:
    grows = paired(gains(runs, LONG), gains(runs, SHORT))
    harm = paired(harms(runs, OFFLINE), harms(runs, ONLINE))
    verdict = Verdict.undecided
    if grows.low > MORE and harm.low > HARM:
        verdict = Verdict.confirmed
    elif grows.high < MORE or harm.high < HARM:
        verdict = Verdict.refuted
    rewards = ", ".join(
        f"{points(difference(runs, name(n, ONLINE), name(n, OFFLINE), 'reward'))} with {n} "
        "operations"
        for n in (SHORT, LONG)
    )
    return Judgement(
        verdict=verdict,
        effect="accuracy of an operation, on-policy minus SFT: "
        f"{points(estimate(gains(runs, SHORT)))} with {SHORT} operations, "
        f"{points(estimate(gains(runs, LONG)))} with {LONG}",
        reason=f"An error lowers the accuracy of what follows it by {points(harm)} more after SFT "
        f"than on-policy. The reward of on-policy minus that of SFT is {rewards}.",
    )


EXPERIMENT = Experiment(
    id="E10",
    title="On-policy distillation against SFT, on short and on long responses",
    claim="On-policy distillation gains more over SFT on the teacher's responses where responses "
    "are longer, since SFT never sees what follows an error of the student's own.",
    source="arXiv 2606.30445, the motivation of online imitation (compounding errors)",
    design=f"The task of E5: chains of {SHORT} operations, whose "
    f"responses have {4 * SHORT + 2} tokens, and of {LONG}, with {4 * LONG + 2}. {STEPS} steps of "
    "128 responses, AdamW at 5e-4: SFT on the teacher's responses (algorithm=seqkd), and the "
    "reverse KL over the whole vocabulary on the student's own (algorithm=opd_full). Student and "
    "teacher are made as those of E5, but on another machine, so they are not the same: the "
    "student solves 73.4 % of the short and 22.1 % of the long chains at the beginning, that of E5 "
    "69.7 % and 23.0 %.",
    rule="Differences are paired by seed, with 95 % intervals. The reward of a chain of n "
    "operations is a product of n accuracies, so its n-th root is compared, the accuracy of an "
    f"operation. Confirmed if on-policy minus SFT is more than {100 * MORE:.0f} point larger with "
    "the long chains, and if, in the samples of the long ones, an earlier error lowers the "
    f"accuracy of an operation by more than {100 * HARM:.0f} points more after SFT than after "
    "on-policy training; an operation is right if its result follows from the one that the "
    "response has before it. Refuted if one of the two differences lies below its bound. Otherwise "
    "undecided.",
    columns={
        "reward": "reward",
        "of_an_operation": "accuracy of an operation",
        "after_right": "of one after right ones",
        "after_error": "of one after an error",
        "greedy": "greedy accuracy",
        "divergence": "KL to the teacher, nats",
        "tokens": "tokens",
    },
    arms=tuple(arm(operations, method) for method in METHODS for operations in (SHORT, LONG)),
    seeds=(0, 1, 2),
    judge=judge,
    draw=partial(draw_curves, steps=range(0, STEPS + 1, 25)),
    cuts="Two lengths and three seeds. SFT sees what follows errors of the teacher, which about 28 "
    "% of its long responses have, if it is as good as that of E5; only the student's own are new "
    "to it. On-policy learns from whole distributions and SFT from drawn tokens. The student is an "
    "early checkpoint of the teacher's own training.",
)
