"""D2: at which lengths the losses of DIL and DPO leave the range of their numbers.

The log-ratio of a token to the reference is drawn from N(0.05, 0.3^2) for both responses of a pair,
as if the student had drifted away from the reference. The slopes are those of the losses with
respect to the score of each response; `published` evaluates the formula as it stands, `product` is
the code of hybridrl/objectives/pair_losses, which continues each term by its tangent above 20.
"""

from collections.abc import Callable, Mapping

import torch
from matplotlib.axes import Axes
from torch import Tensor

from hybridrl.objectives.pair_losses.pair_loss import PairScores
from hybridrl.settings.algorithm import PairConfig
from hybridrl.settings.built_in import PAIR_LOSSES
from reproduction.curves import COLOURS, draw_mean
from reproduction.estimate import estimate
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

LENGTHS = (128, 256, 512, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSSES = ("dil_lsif", "dil_ukl", "dil_bce", "dpo")

Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Scores s_w and s_l -> the slopes at both."""

PUBLISHED: Mapping[str, Slopes] = {
    "dil_lsif": lambda w, r: (-w.exp(), (2 * r).exp()),
    "dil_ukl": lambda w, r: (-torch.ones_like(w), r.exp()),
    "dil_bce": lambda w, r: (-torch.sigmoid(-w), torch.sigmoid(r)),
    "dpo": lambda w, r: (-torch.sigmoid(r - w), torch.sigmoid(r - w)),
}
"""The derivatives of the formulas in arXiv 2503.05079 and 2305.18290, beta=1."""


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    """For each length the share of pairs with a slope that is not finite, and the largest slope."""
    loss = str(settings["loss"])
    dtype = DTYPES[str(settings["dtype"])]
    average = settings["score"] == "mean"
    numbers: dict[str, float] = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(seed * 10_000 + length)
        drawn = torch.randn(
            2, int(settings["pairs"]), length, generator=generator, dtype=torch.float64
        )
        sums = (0.05 + 0.3 * drawn).sum(-1).to(dtype)
        if settings["form"] == "published":
            scores = sums / length if average else sums
            slopes = PUBLISHED[loss](scores[0], scores[1])
        else:
            slopes = product(loss, sums, length, average=average)
        both = torch.stack(slopes)
        failed = ~torch.isfinite(both).all(0)
        numbers[f"failed_{length}"] = failed.double().mean().item()
        numbers[f"score_{length}"] = float(sums.double().max()) / (length if average else 1)
    return numbers


def product(loss: str, sums: Tensor, length: int, *, average: bool) -> tuple[Tensor, Tensor]:
    """Slopes of the product's loss with respect to the scores."""
    pairs = sums.shape[1]
    zeros = torch.zeros(pairs, dtype=sums.dtype)
    lengths = torch.full((pairs,), length)
    scores = PairScores(
        chosen_logp=sums[0],
        rejected_logp=sums[1],
        chosen_ref=zeros,
        rejected_ref=zeros,
        chosen_len=lengths,
        rejected_len=lengths,
    )
    found = (
        PAIR_LOSSES[loss]
        .load()()
        .gradient(scores, PairConfig(loss=loss, beta=1.0, average=average))
    )
    return found.d_chosen, found.d_rejected


def arm(loss: str, form: str, score: str, dtype: str) -> Arm:
    settings = {"loss": loss, "form": form, "score": score, "dtype": dtype, "pairs": 512}
    return Arm(
        name=f"{loss}, {form}, {score}, {dtype}",
        settings=settings,
        small={"pairs": 16},
        measure=measure,
    )


def failed(runs: Runs, name: str, length: int) -> float:
    return estimate([run.numbers[f"failed_{length}"] for run in runs[name]]).mean


def judge(runs: Runs) -> Judgement:
    def worst(form: str, score: str) -> float:
        return max(
            failed(runs, name, length)
            for name in runs
            if f", {form}, {score}, fp32" in name
            for length in LENGTHS
        )

    long_sums = min(
        failed(runs, f"{loss}, published, sum, fp32", 2048) for loss in ("dil_lsif", "dil_ukl")
    )
    averaged = worst("published", "mean")
    ours = max(worst("product", "sum"), worst("product", "mean"))
    verdict = Verdict.undecided
    if long_sums >= 0.5 and averaged == 0:
        verdict = Verdict.confirmed
    elif long_sums == 0 or averaged > 0:
        verdict = Verdict.refuted
    half = max(
        failed(runs, name, length) for name in runs if "mean, fp16" in name for length in LENGTHS
    )
    sums = max(
        failed(runs, name, length)
        for name in runs
        if "product, sum, fp16" in name
        for length in LENGTHS
    )
    return Judgement(
        verdict=verdict,
        effect="pairs with a slope that is not finite at 2048 tokens, fp32: at least "
        f"{100 * long_sums:.0f} % with sums, {100 * averaged:.0f} % with means",
        reason="In fp32 the largest share of pairs in which this project's form fails is "
        f"{100 * ours:.0f} %, with sums and with means. In fp16 it is {100 * half:.0f} % with "
        f"means, in either form, and {100 * sums:.0f} % with sums, in this project's form.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    shown = [name for name in runs if "sum, fp32" in name and not name.startswith("dpo")]
    for colour, name in zip(COLOURS, shown, strict=False):
        curves = [
            [100 * run.numbers[f"failed_{length}"] for length in LENGTHS] for run in runs[name]
        ]
        style = "o-" if "published" in name else "s--"
        for curve in curves:
            axes.plot(LENGTHS, curve, style[1:], color=colour, linewidth=0.4, alpha=0.4)
        draw_mean(axes, LENGTHS, curves, colour=colour, label=name, style=style)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a response")
    axes.set_ylabel("pairs with a slope that is not finite, per cent")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    id="D2",
    title="Range of numbers of the DIL losses, from 128 to 2048 tokens",
    claim="With log-ratios summed over tokens the exponentials of DIL overflow on long responses; "
    "averaged over tokens they do not.",
    source="arXiv 2503.05079, the average over tokens",
    design="The slopes are the derivatives of a loss by the scores of the chosen and of the "
    "rejected response. `published` evaluates the formula as it stands; `product` is the code of "
    "this project, which continues each exponential by its tangent above 20. 512 pairs of a seed; "
    "per-token log-ratios from N(0.05, 0.3^2), so that a sum over n tokens is near 0.05 n: 6.4 at "
    "128 tokens, 102 at 2048. No model is trained.",
    rule="Confirmed if, in fp32 and at 2048 tokens, the published forms of LSIF and of UKL have "
    "slopes that are not finite in at least half of the pairs with sums, and no loss has any at "
    "any length with means. Refuted if one of the two never fails with sums, or if means fail. "
    "Otherwise undecided.",
    columns={f"failed_{length}": f"failed, {length} tokens" for length in LENGTHS},
    arms=tuple(
        arm(loss, form, score, dtype)
        for loss in LOSSES
        for form in ("published", "product")
        for score in ("sum", "mean")
        for dtype in DTYPES
    ),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
    cuts="No model is trained at these lengths, and no bound of the exponent is varied.",
)
