"""D3: preference losses when a share of the labels is wrong."""

from matplotlib.axes import Axes

from reproduction.curves import COLOURS
from reproduction.differences import paired, values
from reproduction.estimate import estimate
from reproduction.experiment import Experiment, Judgement, Runs, Verdict
from reproduction.preference_runs import PAIRS_PER_STEP, pair_arm

STEPS = 100
DIL = ("dil_lsif", "dil_bce")
OTHERS = ("dpo", "simpo")
LEVELS = (0.0, 0.1, 0.25, 0.5)
DECISIVE = 0.25
START_REWARD = 0.202  # of the student before training, by the same measure


def name(loss: str, noise: float) -> str:
    return f"{loss}, {noise:.0%} wrong"


def kept(runs: Runs, loss: str) -> list[float]:
    """Share of the reward gained without wrong labels that is gained with them, for each seed."""
    clean = estimate(values(runs, name(loss, 0.0), "reward")).mean
    noisy = values(runs, name(loss, DECISIVE), "reward")
    return [(reward - START_REWARD) / (clean - START_REWARD) for reward in noisy]


def judge(runs: Runs) -> Judgement:
    shares = {loss: kept(runs, loss) for loss in (*DIL, *OTHERS)}
    found = [paired(shares[dil], shares[other]) for dil in DIL for other in OTHERS]
    verdict = Verdict.undecided
    if all(of.low > 0 for of in found):
        verdict = Verdict.confirmed
    elif any(of.high < 0 for of in found):
        verdict = Verdict.refuted
    listed = ", ".join(f"{loss} {estimate(of).text(100, 0)} %" for loss, of in shares.items())
    rewards = ", ".join(
        f"{loss} {100 * estimate(values(runs, name(loss, 0.0), 'reward')).mean:.1f} and "
        f"{100 * estimate(values(runs, name(loss, DECISIVE), 'reward')).mean:.1f} %"
        for loss in shares
    )
    return Judgement(
        verdict=verdict,
        effect=f"share of the gain of reward that is kept with 25 % wrong labels: {listed}",
        reason=f"Rewards without wrong labels and with 25 %: {rewards}; before training "
        f"{START_REWARD:.1%}.",
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
    claim="With wrong labels DIL losses keep more of what they learn than DPO and SimPO.",
    source="arXiv 2503.05079, an open question",
    design=f"As D1 ({STEPS} steps of {PAIRS_PER_STEP} pairs, one epoch), with a share of the "
    "training pairs swapped. With infinitely many pairs LSIF and DPO keep the same reward (A4), so "
    "an advantage could only come from finitely many. No training pair has a problem of the "
    "held-out pairs.",
    rule="At 25 % wrong labels: the gain of reward over the student before training, as a share of "
    "the mean gain without wrong labels, so that a loss that has learned little does not look "
    "robust; paired by seed, with 95 % intervals. Confirmed if LSIF and BCE each keep a larger "
    "share than DPO and than SimPO, refuted if one of them keeps a smaller share than one of "
    "these, otherwise undecided.",
    columns={
        "reward": "reward",
        "greedy": "greedy accuracy",
        "ranked": "held-out pairs ranked by the loss's own score",
        "divergence": "KL to the start, nats",
    },
    arms=tuple(
        pair_arm(
            name(loss, noise),
            loss,
            STEPS,
            pairs=STEPS * PAIRS_PER_STEP,
            noise=noise,
            lr=2e-4,
            apart=True,
        )
        for noise in LEVELS
        for loss in (*DIL, *OTHERS)
    ),
    seeds=(0, 1, 2),
    judge=judge,
    draw=draw,
    cuts="Two of the three DIL losses and three seeds; four comparisons without a correction for "
    "their number. The intervals of the shares leave out the error of the gain by which they are "
    "divided, that without wrong labels: dpo gains only 3.9 [-5.1, 12.9] points, and simpo 7.0 "
    "[0.0, 14.0], so their shares mean little.",
)
