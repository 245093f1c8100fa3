"""D3: preference losses when a share of the labels is wrong."""

from matplotlib.axes import Axes

from reproduction.curves import COLOURS
from reproduction.differences import values
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Experiment, Judgement, Runs, Verdict
from reproduction.preference_runs import PAIRS_PER_STEP, pair_arm

STEPS = 100
DIL = ("dil_lsif", "dil_bce")
OTHERS = ("dpo", "simpo")
LEVELS = (0.0, 0.1, 0.25, 0.5)
DECISIVE = 0.25


def name(loss: str, noise: float) -> str:
    return f"{loss}, {noise:.0%} wrong"


def losses_of_reward(runs: Runs, loss: str, noise: float) -> list[float]:
    """By how much the noise lowers the reward, for each seed."""
    clean = values(runs, name(loss, 0.0), "reward")
    noisy = values(runs, name(loss, noise), "reward")
    return [a - b for a, b in zip(clean, noisy, strict=True)]


def advantage(runs: Runs, dil: str, other: str) -> Estimate:
    """How much more `other` loses to the noise than `dil`, over the seeds."""
    pairs = zip(
        losses_of_reward(runs, other, DECISIVE), losses_of_reward(runs, dil, DECISIVE), strict=True
    )
    return estimate([a - b for a, b in pairs])


def judge(runs: Runs) -> Judgement:
    found = {(dil, other): advantage(runs, dil, other) for dil in DIL for other in OTHERS}
    verdict = Verdict.undecided
    if all(of.low > 0 for of in found.values()):
        verdict = Verdict.confirmed
    elif any(of.high < 0 for of in found.values()):
        verdict = Verdict.refuted
    drops = ", ".join(
        f"{loss} {estimate(losses_of_reward(runs, loss, DECISIVE)).text(100, 1)}"
        for loss in (*DIL, *OTHERS)
    )
    rewards = ", ".join(
        f"{loss} {100 * estimate(values(runs, name(loss, 0.0), 'reward')).mean:.1f} %"
        for loss in (*DIL, *OTHERS)
    )
    return Judgement(
        verdict=verdict,
        effect=f"points of reward that 25 % wrong labels cost: {drops}",
        reason=f"Without wrong labels the rewards are {rewards}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    percent = [100 * level for level in LEVELS]
    for colour, loss in zip(COLOURS, (*DIL, *OTHERS), strict=False):
        of = [values(runs, name(loss, level), "reward") for level in LEVELS]
        for one in zip(*of, strict=True):
            axes.plot(percent, [100 * y for y in one], color=colour, linewidth=0.4, alpha=0.4)
        found = [estimate(each) for each in of]
        axes.errorbar(
            percent,
            [100 * at.mean for at in found],
            yerr=[100 * at.error for at in found],
            color=colour,
            capsize=3,
            label=loss,
        )
    axes.set_xlabel("wrong labels, per cent")
    axes.set_ylabel("reward of sampled responses, per cent")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    id="D3",
    title="Wrong labels",
    claim="DIL losses lose less to wrong labels than DPO and SimPO.",
    source="arXiv 2503.05079, the first of its next checks",
    design=f"As D1 ({STEPS} steps of {PAIRS_PER_STEP} pairs, one epoch), with a share of the "
    "training pairs swapped. With infinitely many pairs LSIF and DPO keep the same reward (A4), so "
    "an advantage could only come from finitely many.",
    rule="At 25 % wrong labels: by how many points the reward falls below that without wrong "
    "labels, paired by seed, with 95 % intervals. Confirmed if LSIF and BCE both lose less than "
    "DPO and SimPO, refuted if one of them loses more than one of these, otherwise undecided.",
    columns={
        "reward": "reward",
        "greedy": "greedy accuracy",
        "ranked": "held-out pairs ranked",
        "divergence": "KL to the start, nats",
    },
    arms=tuple(
        pair_arm(name(loss, noise), loss, STEPS, pairs=STEPS * PAIRS_PER_STEP, noise=noise, lr=2e-4)
        for noise in LEVELS
        for loss in (*DIL, *OTHERS)
    ),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    cuts="Two of the three DIL losses and three seeds.",
)
