"""D4: the likelihood of chosen responses over several epochs of the same pairs."""

from matplotlib.axes import Axes

from reproduction.curves import COLOURS, draw_mean
from reproduction.differences import paired, per_seed
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Verdict
from reproduction.preference_runs import PAIRS_PER_STEP, UNTRAINED, WINDOW, course, pair_arm

EPOCHS = 10
STEPS_PER_EPOCH = 20
STEPS = EPOCHS * STEPS_PER_EPOCH
PAIRS = STEPS_PER_EPOCH * PAIRS_PER_STEP
DIL = ("dil_lsif", "dil_ukl")
LOSSES = (*DIL, "dpo", "simpo")


def arm(name: str, loss: str, lr: float) -> Arm:
    return pair_arm(name, loss, STEPS, pairs=PAIRS, noise=0.0, lr=lr, constant=True, apart=True)


def changes(runs: Runs, loss: str, part: str, epoch: int) -> list[float]:
    """Of the log-prob of a token since the start, in the last half of an epoch, for each seed."""
    at = epoch * STEPS_PER_EPOCH // WINDOW
    pairs = zip(runs[loss], runs[UNTRAINED], strict=True)
    return [course(run, untrained, part)[at] for run, untrained in pairs]


def gap(runs: Runs, dil: str, epoch: int) -> list[float]:
    """Chosen log-prob of a DIL loss above that of DPO, for each seed."""
    return per_seed(changes(runs, dil, "chosen", epoch), changes(runs, "dpo", "chosen", epoch))


def growth(runs: Runs, dil: str) -> Estimate:
    """Of the gap, from the first epoch to the last."""
    return paired(gap(runs, dil, EPOCHS), gap(runs, dil, 1))


def judge(runs: Runs) -> Judgement:
    found = {dil: growth(runs, dil) for dil in DIL}
    ends = {loss: estimate(changes(runs, loss, "chosen", EPOCHS)) for loss in LOSSES}
    verdict = Verdict.undecided
    if (
        all(of.low > 0 for of in found.values())
        and all(ends[dil].low > 0 for dil in DIL)
        and ends["dpo"].high < 0
    ):
        verdict = Verdict.confirmed
    elif (
        any(of.high < 0 for of in found.values())
        or any(ends[dil].high < 0 for dil in DIL)
        or ends["dpo"].low > 0
    ):
        verdict = Verdict.refuted
    changed = ", ".join(f"{loss} {of.text(1, 2)}" for loss, of in ends.items())
    return Judgement(
        verdict=verdict,
        effect=f"change of the chosen log-prob of a token in {EPOCHS} epochs, nats: {changed}",
        reason="From the first epoch to the last the gap to DPO grows by "
        + ", ".join(f"{of.text(1, 2)} ({dil})" for dil, of in found.items())
        + " nats a token.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    epochs = [i * WINDOW / STEPS_PER_EPOCH for i in range(STEPS // WINDOW + 1)]
    for colour, loss in zip(COLOURS, LOSSES, strict=False):
        for part, style in (("chosen", "-"), ("rejected", ":")):
            pairs = list(zip(runs[loss], runs[UNTRAINED], strict=True))
            of = [course(run, untrained, part) for run, untrained in pairs]
            draw_mean(axes, epochs, of, colour=colour, label=f"{loss}, {part}", style=style)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlabel("epochs")
    axes.set_ylabel("change of the log-prob, nats a token")
    axes.legend(frameon=False, fontsize=7, ncols=2)


EXPERIMENT = Experiment(
    id="D4",
    title="Several epochs of the same pairs",
    claim="With LSIF and UKL the likelihood of the chosen responses rises over the epochs, with "
    "DPO it falls, and the gap widens.",
    source="arXiv 2503.05079, an open question; the prediction follows from the losses' slopes",
    design=f"{PAIRS} pairs of D1's kind, {EPOCHS} epochs of {STEPS_PER_EPOCH} steps of "
    f"{PAIRS_PER_STEP} pairs, AdamW at 2e-4, which does not fall, so that late epochs count as "
    "much as early ones. Log-probs are of the training pairs of the second half of an epoch, "
    "before their updates; those of the student before training on the same pairs are subtracted. "
    "No training pair has a problem of the held-out pairs.",
    rule="With 95 % intervals over the seeds. Confirmed if, for LSIF and UKL, the gap of the "
    f"chosen log-prob to DPO's grows from epoch 1 to epoch {EPOCHS}, their own has risen at the "
    "end, and DPO's has fallen. Refuted if one of these has the opposite sign. Otherwise "
    "undecided.",
    columns={
        "chosen_end": "chosen log-prob of a token, end",
        "rejected_end": "rejected log-prob of a token, end",
        "ranked": "held-out pairs ranked by the loss's own score",
        "reward": "reward",
        "divergence": "KL to the start, nats",
    },
    arms=(
        arm(UNTRAINED, "dpo", 1e-12),
        *(arm(loss, loss, 2e-4) for loss in LOSSES),
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
)
