"""D1: what preference losses do to the likelihood of the chosen responses."""

from matplotlib.axes import Axes

from reproduction.curves import COLOURS, draw_mean
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Experiment, Judgement, Runs, Verdict
from reproduction.preference_runs import (
    PAIRS_PER_STEP,
    UNTRAINED,
    WINDOW,
    chosen_at,
    course,
    margins,
    pair_arm,
)

STEPS = 100
DIL = ("dil_lsif", "dil_ukl", "dil_bce")
OTHERS = ("dpo", "simpo")
LOSSES = (*DIL, *OTHERS, "slic", "ipo")
LEAST = 0.02  # nats a token; a common margin below it shows nothing


def common_margins(runs: Runs) -> list[float]:
    """Of each seed: the largest margin that all the losses of the rule reach."""
    return [
        min(max(margins(runs[loss][i], untrained)) for loss in (*DIL, *OTHERS))
        for i, untrained in enumerate(runs[UNTRAINED])
    ]


def advantage(runs: Runs, dil: str, other: str) -> Estimate:
    """Chosen log-prob of `dil` minus that of `other`, at the common margin, over the seeds."""
    return estimate(
        [
            chosen_at(runs[dil][i], runs[UNTRAINED][i], margin)
            - chosen_at(runs[other][i], runs[UNTRAINED][i], margin)
            for i, margin in enumerate(common_margins(runs))
        ]
    )


def judge(runs: Runs) -> Judgement:
    common = common_margins(runs)
    verdict = Verdict.undecided
    effect = f"the losses have no common margin of {LEAST} nats in every seed"
    if min(common) >= LEAST:
        found = {(d, o): advantage(runs, d, o) for d in DIL for o in OTHERS}
        if all(of.low > 0 for of in found.values()):
            verdict = Verdict.confirmed
        elif any(of.high < 0 for of in found.values()):
            verdict = Verdict.refuted
        effect = "chosen log-prob of a token at equal margin, nats: " + "; ".join(
            f"{d} minus dpo {found[d, 'dpo'].text()}, minus simpo {found[d, 'simpo'].text()}"
            for d in DIL
        )
    ends = ", ".join(
        f"{loss} {estimate(last(runs, loss)).mean:+.3f}" for loss in LOSSES if loss in runs
    )
    return Judgement(
        verdict=verdict,
        effect=effect,
        reason=f"The common margin is {estimate(common).text()} nats a token. At the end the "
        f"chosen log-prob has changed by {ends} nats a token.",
    )


def last(runs: Runs, loss: str) -> list[float]:
    pairs = zip(runs[loss], runs[UNTRAINED], strict=True)
    return [course(run, untrained, "chosen")[-1] for run, untrained in pairs]


def draw(axes: Axes, runs: Runs) -> None:
    for colour, loss in zip(COLOURS, LOSSES, strict=False):
        pairs = list(zip(runs[loss], runs[UNTRAINED], strict=True))
        x = [margins(run, untrained) for run, untrained in pairs]
        y = [course(run, untrained, "chosen") for run, untrained in pairs]
        for one_x, one_y in zip(x, y, strict=True):
            axes.plot(one_x, one_y, color=colour, linewidth=0.4, alpha=0.4)
        mean_x = [estimate(values).mean for values in zip(*x, strict=True)]
        draw_mean(axes, mean_x, y, colour=colour, label=loss)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("margin gained, nats a token")
    axes.set_ylabel("change of the chosen log-prob, nats a token")


EXPERIMENT = Experiment(
    id="D1",
    title="The likelihood of chosen responses",
    claim="DIL losses (LSIF, UKL, BCE) lower the likelihood of the chosen responses less than DPO "
    "and SimPO, at an equal margin between chosen and rejected ones.",
    source="arXiv 2503.05079, figure 2",
    design=f"{STEPS * PAIRS_PER_STEP} pairs of a right and a wrong sample of the shipped Countdown "
    f"student, one epoch of {STEPS} steps of {PAIRS_PER_STEP} pairs, AdamW at 2e-4, each loss with "
    f"the settings of its preset. Log-probs are means over {WINDOW} steps, before their updates, "
    "so on pairs that were not trained on, although most of their problems were; those of the "
    "student before training on the same pairs are subtracted. In each seed losses are compared "
    "where their margin first reaches the largest one that all the five reach. 'other pairs "
    "ranked' is the share of 256 further pairs, nearly all of problems that are trained on, that a "
    "loss's own score ranks correctly.",
    rule="Differences of the chosen log-prob, paired by seed, with 95 % intervals, of each of the "
    "three DIL losses against DPO and SimPO. Confirmed if all six lie above 0, refuted if one lies "
    f"below 0, otherwise undecided; also undecided if the common margin is below {LEAST} nats in a "
    "seed.",
    columns={
        "chosen_end": "chosen log-prob of a token, end",
        "rejected_end": "rejected log-prob of a token, end",
        "ranked": "other pairs ranked",
        "reward": "reward",
        "greedy": "greedy accuracy",
        "divergence": "KL to the start, nats",
    },
    arms=(
        pair_arm(UNTRAINED, "dpo", STEPS, pairs=STEPS * PAIRS_PER_STEP, noise=0.0, lr=1e-12),
        *(
            pair_arm(loss, loss, STEPS, pairs=STEPS * PAIRS_PER_STEP, noise=0.0, lr=2e-4)
            for loss in LOSSES
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
    cuts="Six tests without a correction for their number. Labels without noise; D3 has it. No "
    "grid of learning rates: the comparison at equal margin is for that. dpo reaches this margin "
    "after about 30 steps, the DIL losses after 50 to 100, when the learning rate has fallen; at "
    "half of it the differences to dpo are 0.07 to 0.08. The seeds have the same pairs in another "
    "order.",
)
