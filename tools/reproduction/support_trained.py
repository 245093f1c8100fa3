"""E3T: students that are trained with a support of K tokens, to the end."""

from functools import partial

from reproduction.curves import draw_curves
from reproduction.differences import difference, paired, points, values
from reproduction.estimate import Estimate
from reproduction.experiment import Arm, Experiment, Judgement, Runs, Verdict
from reproduction.own_pairs import STUDENT
from reproduction.trained import COLUMNS, trained_arm

STEPS = 100
WHOLE = "whole vocabulary"
CLOSE = 0.03
NOTHING = 0.02
CELLS = {
    "student's 4, renormalize": (4, "sampler", "renormalize"),
    "student's 4, tail_bucket": (4, "sampler", "tail_bucket"),
    "teacher's 4, renormalize": (4, "teacher", "renormalize"),
    "student's 1, renormalize": (1, "sampler", "renormalize"),
}
"""K, algorithm.topk.source and algorithm.topk.correction."""
NEAR = ("student's 4, renormalize", "student's 4, tail_bucket")
SINGLE = "student's 1, renormalize"


def arm(name: str) -> Arm:
    settings = {
        "algorithm": "opd_full",
        "model.path": STUDENT,
        "train.steps": STEPS,
        "train.lr": 5e-4,
        "eval.every": 25,
    }
    if name == WHOLE:
        return trained_arm(name, settings)
    k, source, correction = CELLS[name]
    return trained_arm(
        name,
        {
            **settings,
            "algorithm.support": "topk",
            "algorithm.topk.k": k,
            "algorithm.topk.source": source,
            "algorithm.topk.correction": correction,
        },
        {"algorithm.topk.k": 4} if k > 1 else None,
    )


def learned(runs: Runs) -> Estimate:
    """Gain of greedy accuracy with a single renormalised token."""
    return paired(values(runs, SINGLE, f"accuracy_{STEPS}"), values(runs, SINGLE, "accuracy_0"))


def judge(runs: Runs) -> Judgement:
    lost = {name: difference(runs, WHOLE, name, "reward") for name in CELLS}
    single = learned(runs)
    verdict = Verdict.undecided
    if any(lost[name].low > CLOSE for name in NEAR) or single.low > NOTHING:
        verdict = Verdict.refuted
    elif all(lost[name].high < CLOSE for name in NEAR) and single.high < NOTHING:
        verdict = Verdict.confirmed
    below = ", ".join(f"{points(of)} ({name})" for name, of in lost.items())
    return Judgement(
        verdict=verdict,
        effect=f"reward below that of the whole vocabulary: {below}",
        reason=f"With a single renormalised token the greedy accuracy changes by {points(single)}.",
    )


EXPERIMENT = Experiment(
    id="E3T",
    title="Top-K support: students trained to the end",
    claim="Distillation on the student's four most likely tokens, renormalised or with a bucket "
    "for the others, ends where that on the whole vocabulary does; renormalised with K=1 nothing "
    "is learned.",
    source="arXiv 2512.23097, top-K approximation; the paper measures nothing",
    design="Student, teacher and measures of E1, reverse KL on the student's own responses "
    f"(algorithm=opd_full) for {STEPS} steps of 128 responses, AdamW at 5e-4. Four cells of K, the "
    "model that chooses the tokens and the correction, beside the whole vocabulary of 23 tokens. "
    "E3 measured the gradients before training: a cosine with the whole one of 0.999, 1.000, 0.652 "
    "and 0 in the order of the table.",
    rule="Losses of reward against the whole vocabulary, paired by seed, with 95 % intervals. "
    "Refuted if one of the two cells with the student's four tokens loses more than "
    f"{100 * CLOSE:.0f} points, or if the greedy accuracy with K=1 rises by more than "
    f"{100 * NOTHING:.0f} points (interval above that). Confirmed if both cells lose less than "
    f"{100 * CLOSE:.0f} points and K=1 gains less than {100 * NOTHING:.0f}. Otherwise undecided.",
    columns=COLUMNS,
    arms=tuple(arm(name) for name in (WHOLE, *CELLS)),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=partial(draw_curves, steps=range(0, STEPS + 1, 25)),
    cuts="Four cells of the grid, and a vocabulary of 23 tokens.",
)
