"""A4: losses on pairs with wrong labels, on a bandit with five arms, for infinitely many pairs.

Pairs are drawn from the reference policy and ranked by Bradley and Terry's model of the rewards; a
label is swapped with a given probability.
"""

from collections.abc import Callable, Mapping

import torch
from matplotlib.axes import Axes
from torch import Tensor

from hybridrl.objectives.pair_losses.pair_loss import PairScores
from hybridrl.settings.built_in import PAIR_LOSSES
from hybridrl.settings.compose import load_config
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

REWARDS = (2.0, 1.0, 0.0, -1.0, -2.0)
REFERENCE = (0.1, 0.2, 0.4, 0.2, 0.1)
NOISE = (0, 10, 25, 50)  # per cent of the labels
DIL = ("dil_lsif", "dil_ukl", "dil_bce")

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of log-probs [A] and the mass of each pair [A, A]: a scalar with the loss's gradient."""


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    """The mean reward of the policy that minimises a loss; exact, the seed is not used."""
    name = str(settings["loss"])
    loss = likelihood if name == "sft" else pair_loss(name, str(settings["reference"]))
    steps = int(settings["steps"])
    return {f"noise_{noise}": minimiser_reward(loss, noise / 100, steps) for noise in NOISE}


def minimiser_reward(loss: Loss, noise: float, steps: int) -> float:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    right = torch.sigmoid(rewards[:, None] - rewards[None, :])
    wins = (1 - noise) * right + noise * (1 - right)  # [i, j]: i is labelled the better one
    mass = 2 * reference[:, None] * reference[None, :] * wins
    logits = reference.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.log_softmax(logits, 0), mass / mass.sum()).backward()
        optimizer.step()
    return float((torch.softmax(logits.detach(), 0) * rewards).sum())


def likelihood(logp: Tensor, mass: Tensor) -> Tensor:
    """SFT on the chosen arms."""
    return -(mass.sum(1) * logp).sum()


def pair_loss(name: str, reference: str) -> Loss:
    """A loss of the product, through its derivatives in closed form.

    Args:
        reference: algorithm.pair.reference, whose draws stand for the reference policy in DIL.
    """
    settings = load_config(
        [
            "run.dir=bandit",
            "experiment=quickstart",
            f"algorithm={name}",
            "algorithm.pair.beta=1",
            f"algorithm.pair.reference={reference}",
        ]
    )
    pair = settings.algorithm.pair
    product = PAIR_LOSSES[name].load()()
    arms = len(REFERENCE)
    chosen = torch.arange(arms).repeat_interleave(arms)
    rejected = torch.arange(arms).repeat(arms)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log()
    one_token = torch.ones(arms * arms, dtype=torch.float64)

    def loss(logp: Tensor, mass: Tensor) -> Tensor:
        scores = PairScores(
            chosen_logp=logp[chosen].detach(),
            rejected_logp=logp[rejected].detach(),
            chosen_ref=ref[chosen],
            rejected_ref=ref[rejected],
            chosen_len=one_token,
            rejected_len=one_token,
        )
        slope = product.gradient(scores, pair)
        linear = slope.d_chosen * logp[chosen] + slope.d_rejected * logp[rejected]
        return (mass.flatten() * linear).sum()

    return loss


def arm(loss: str, reference: str = "rejected") -> Arm:
    return Arm(
        name=f"{loss}, reference={reference}" if loss in DIL else loss,
        settings={"loss": loss, "reference": reference, "steps": 3000},
        small={"steps": 20},
        measure=measure,
    )


def judge(runs: Runs) -> Judgement:
    got = {name: of[0].numbers for name, of in runs.items()}

    def gain(noise: int) -> float:
        """Of the best DIL loss over DPO."""
        best = max(of[f"noise_{noise}"] for name, of in got.items() if name.startswith("dil"))
        return best - got["dpo"][f"noise_{noise}"]

    gains = {noise: gain(noise) for noise in NOISE}
    noisy = (gains[10], gains[25])
    verdict = Verdict.undecided
    if min(noisy) >= 0.05:
        verdict = Verdict.confirmed
    elif max(noisy) <= 0.02:
        verdict = Verdict.refuted
    listed = ", ".join(f"{gain:+.3f} at {noise} %" for noise, gain in gains.items())
    return Judgement(
        verdict=verdict,
        effect=f"mean reward of the best DIL loss above DPO: {listed}",
        reason="With reference=both every DIL loss has the minimiser of SFT on the chosen "
        "responses.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    for name, of in runs.items():
        values = [of[0].numbers[f"noise_{noise}"] for noise in NOISE]
        axes.plot(NOISE, values, "o--" if "rejected" in name else "o-", label=name, linewidth=1.3)
    axes.set_xlabel("swapped labels, per cent")
    axes.set_ylabel("mean reward of the minimiser")
    axes.legend(frameon=False, fontsize=8)


EXPERIMENT = Experiment(
    id="A4",
    title="Wrong labels, infinitely many pairs: DIL against DPO",
    claim="With wrong labels the density-ratio losses of DIL keep more reward than DPO.",
    source="arXiv 2503.05079, robustness to noise; here without the effect of finite samples",
    design="A bandit with rewards 2, 1, 0, -1, -2 and reference (0.1, 0.2, 0.4, 0.2, 0.1); the "
    "mean over all pairs is exact, and 3000 steps of Adam come within 0.003 of the minimiser's "
    "reward. beta=1. What stands for draws of the reference in a DIL loss is the rejected "
    "response, as in the paper, or with reference=both either response of a pair.",
    rule="Confirmed if the best of LSIF, UKL and BCE, with either reference, has a mean reward of "
    "at least 0.05 more than DPO at 10 % and at 25 % of swapped labels. Refuted if it is at most "
    "0.02 more at both, otherwise undecided. This rule was changed after the first run: it took "
    "reference=both alone, which is not the paper's practice; the verdict was the same.",
    columns={f"noise_{noise}": f"{noise} % swapped" for noise in NOISE},
    arms=(
        arm("sft"),
        arm("dpo"),
        *(arm(loss, "both") for loss in DIL),
        *(arm(loss, "rejected") for loss in DIL),
    ),
    seeds=(0,),
    judge=judge,
    draw=draw,
)
