"""E10: on-policy distillation against SFT, on short and on long responses."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from reproduction.chain_runs import chain_arm
from reproduction.chains import MOST
from reproduction.curves import draw_curves
from reproduction.differences import difference, points, values
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Setting, Verdict

STEPS = 100
SHORT = 2
LONG = MOST
ONLINE = "on-policy"
OFFLINE = "SFT"
METHODS: Mapping[str, Setting] = {ONLINE: "opd_full", OFFLINE: "seqkd"}
MARGIN = 0.02


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


def gain(runs: Runs, operations: int) -> Estimate:
    """Reward of on-policy above SFT."""
    return difference(runs, name(operations, ONLINE), name(operations, OFFLINE), "reward")


def growth(runs: Runs) -> Estimate:
    """How much larger the gain is with the long chains, paired by seed."""

    def gains(operations: int) -> list[float]:
        ours = values(runs, name(operations, ONLINE), "reward")
        theirs = values(runs, name(operations, OFFLINE), "reward")
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    return estimate([a - b for a, b in zip(gains(LONG), gains(SHORT), strict=True)])


def judge(runs: Runs) -> Judgement:
    grows = growth(runs)
    verdict = Verdict.undecided
    if grows.low > 0 and gain(runs, LONG).low > 0:
        verdict = Verdict.confirmed
    elif grows.high < MARGIN:
        verdict = Verdict.refuted
    return Judgement(
        verdict=verdict,
        effect=f"reward of on-policy above SFT: {points(gain(runs, SHORT))} with {SHORT} "
        f"operations, {points(gain(runs, LONG))} with {LONG}",
        reason=f"The gain grows by {points(grows)}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    draw_curves(axes, runs, range(0, STEPS + 1, 25))


EXPERIMENT = Experiment(
    id="E10",
    title="On-policy distillation against SFT, on short and on long responses",
    claim="On-policy distillation gains more over SFT on the teacher's responses where responses "
    "are longer, since SFT never sees what follows an error of the student's own.",
    source="arXiv 2606.30445, the motivation of online imitation (compounding errors)",
    design=f"The task, the student and the teacher of E5: chains of {SHORT} operations, whose "
    f"responses have {4 * SHORT + 2} tokens, and of {LONG}, with {4 * LONG + 2}. {STEPS} steps of "
    "128 responses, AdamW at 5e-4: SFT on the teacher's responses (algorithm=seqkd), and the "
    "reverse KL over the whole vocabulary on the student's own (algorithm=opd_full).",
    rule="Gains of reward, which is the share of right samples, are paired by seed, with 95 % "
    "intervals. Confirmed if the gain is larger with the long chains and above 0 there. Refuted if "
    f"it is less than {100 * MARGIN:.0f} points larger (interval below that). Otherwise undecided.",
    columns={
        "reward": "reward",
        "greedy": "greedy accuracy",
        "divergence": "KL to the teacher, nats",
        "tokens": "tokens",
    },
    arms=tuple(arm(operations, method) for method in METHODS for operations in (SHORT, LONG)),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    cuts="Two lengths and three seeds.",
)
