"""A3: what a discount of future imitation costs changes: bias, variance, and where training ends.

The model is that of `hybridrl check`: 5 tokens and 3 steps, random student, teacher and rewards.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from torch import Tensor

from hybridrl.oracle.cases import Case
from hybridrl.oracle.mdp import Mdp, make_mdp
from hybridrl.oracle.verdict import Scope
from hybridrl.oracle.verdict import judge as judge_case
from reproduction.differences import values
from reproduction.estimate import estimate
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

GAMMAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
BATCHES = (16, 256, 4096)
REWARD_WEIGHT = 2.0


def objective(mdp: Mdp, logits: Tensor) -> Tensor:
    """[] J = E[sum_t KL_t - lambda R], by summing over all sequences."""
    logp = mdp.logp(logits)
    divergence = (logp.exp() * (logp - mdp.logp(mdp.teachers[0]))).sum(1)
    reward = (mdp.probability(logits) * mdp.rewards).sum()
    return (mdp.visits(logits) * divergence).sum() - REWARD_WEIGHT * reward


def discounted_gradient(mdp: Mdp, logits: Tensor, gamma: float) -> Tensor:
    """[P, V] the mean of the hybrid gradient: the imitation cost of k tokens later counts gamma^k
    times (arXiv 2512.23097), the reward in full; gamma=1 is the gradient of J.
    """
    logits = logits.clone().requires_grad_()
    logp = mdp.logp(logits)
    divergence = (logp.exp() * (logp - mdp.logp(mdp.teachers[0]))).sum(1)
    dense = (mdp.visits(logits).detach() * divergence).sum()
    costs = torch.where(mdp.mask, divergence.detach()[mdp.prefixes], 0.0)  # [S, T]
    future = torch.zeros_like(costs)
    for t in reversed(range(costs.shape[1] - 1)):
        future[:, t] = gamma * (costs[:, t + 1] + future[:, t + 1])
    returns = future - REWARD_WEIGHT * mdp.rewards[:, None]
    chance = mdp.probability(logits).detach()
    sparse = (chance[:, None] * returns * mdp.token_logp(logits)).sum()
    (dense + sparse).backward()
    assert logits.grad is not None
    return logits.grad


def trained_gap(mdp: Mdp, gamma: float, steps: int) -> float:
    """J where gradient descent ends minus the least J, -log E_teacher[exp(lambda R)]."""
    logits = mdp.student.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(steps):
        logits.grad = discounted_gradient(mdp, logits.detach(), gamma)
        optimizer.step()
    tilted = mdp.probability(mdp.teachers[0]) * (REWARD_WEIGHT * mdp.rewards).exp()
    return (objective(mdp, logits.detach()) + tilted.sum().log()).item()


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    gamma = float(settings["gamma"])
    scope = Scope(
        seed=seed, vocabulary=int(settings["vocabulary"]), horizon=int(settings["horizon"])
    )
    options = ("baseline=none", "normalizer=constant", "reward_weight.value=2", f"gamma={gamma:g}")
    row = judge_case(Case(method="hybrid", options=options), scope)
    mdp = make_mdp(seed=seed, vocabulary=scope.vocabulary, horizon=scope.horizon, ends=False)
    whole = discounted_gradient(mdp, mdp.student, 1.0)
    squared = (row.bias * float(whole.norm())) ** 2
    return {
        "bias": row.bias,
        "cosine": row.cosine,
        "variance": row.variance,
        "gap": trained_gap(mdp, gamma, int(settings["steps"])),
        **{f"error_{n}": squared + row.variance / n for n in BATCHES},
    }


def arm(gamma: float) -> Arm:
    settings = {"gamma": gamma, "vocabulary": 5, "horizon": 3, "steps": 4000}
    small = {"vocabulary": 4, "horizon": 2, "steps": 20}
    return Arm(name=f"gamma={gamma:g}", settings=settings, small=small, measure=measure)


def judge(runs: Runs) -> Judgement:
    def of(gamma: float, name: str) -> Sequence[float]:
        return values(runs, f"gamma={gamma:g}", name)

    def by_model(name: str) -> list[tuple[float, ...]]:
        """The number at each gamma, of each model."""
        return list(zip(*(of(gamma, name) for gamma in GAMMAS), strict=True))

    best = {}
    for n in BATCHES:
        means = {gamma: estimate(of(gamma, f"error_{n}")).mean for gamma in GAMMAS}
        best[n] = min(means, key=means.__getitem__)
    moves = list(best.values())
    ordered = moves == sorted(moves) and moves[0] < moves[-1]
    bias = estimate(of(0.0, "bias"))
    ratio = estimate([a / b for a, b in zip(of(0.0, "variance"), of(1.0, "variance"), strict=True)])
    exceptions = {
        "bias": sum(any(b >= a for a, b in pairwise(of_model)) for of_model in by_model("bias")),
        "variance": sum(
            any(b <= a for a, b in pairwise(of_model)) for of_model in by_model("variance")
        ),
    }
    parts = (exceptions["bias"] == 0, exceptions["variance"] == 0, ordered)
    verdict = Verdict.undecided
    if all(parts):
        verdict = Verdict.confirmed
    elif not parts[0] or not parts[1]:
        verdict = Verdict.refuted
    models = len(runs["gamma=0"])
    listed = ", ".join(f"{gamma:g} at {n} samples" for n, gamma in best.items())
    ends = ", ".join(
        f"{estimate(of(gamma, 'gap')).text(digits=4)} at gamma={gamma:g}"
        for gamma in (0.0, 0.9, 1.0)
    )
    return Judgement(
        verdict=verdict,
        effect=f"the bias does not fall with gamma in {exceptions['bias']} of {models} models, the "
        f"variance does not rise in {exceptions['variance']}",
        reason=f"At gamma=0 the bias is {bias.text()} of the gradient, and the variance "
        f"{ratio.text()} of that at gamma=1. The gamma of the least squared error is {listed}. "
        f"Training ends above the least J by {ends}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    shades = ("#D55E00", "#E69F00", "#0072B2")
    for colour, n in zip(shades, BATCHES, strict=True):
        for i in range(len(next(iter(runs.values())))):
            axes.plot(
                GAMMAS,
                [runs[f"gamma={g:g}"][i].numbers[f"error_{n}"] for g in GAMMAS],
                color=colour,
                alpha=0.25,
                linewidth=0.8,
            )
        means = [estimate([r.numbers[f"error_{n}"] for r in runs[f"gamma={g:g}"]]) for g in GAMMAS]
        axes.plot(GAMMAS, [m.mean for m in means], "o-", color=colour, label=f"{n} samples")
        axes.fill_between(
            GAMMAS,
            [max(m.mean - m.error, 1e-9) for m in means],
            [m.mean + m.error for m in means],
            color=colour,
            alpha=0.15,
        )
    axes.set_yscale("log")
    axes.set_xlabel("gamma")
    axes.set_ylabel("squared bias + variance / samples")
    axes.legend(frameon=False, fontsize=9)


EXPERIMENT = Experiment(
    id="A3",
    title="The discount of future imitation costs: bias against variance",
    claim="A smaller gamma makes the hybrid gradient more biased and less variable, so that the "
    "best gamma grows with the number of samples.",
    source="arXiv 2512.23097, the discount factor; the paper measures nothing",
    design="Exact enumeration of random models with 5 tokens, 3 steps and lambda=2: bias and "
    "variance of the production gradient, and the J at which 4000 steps of Adam on its exact mean "
    "end. A seed is a model.",
    rule="Confirmed if, for every seed, the bias falls and the variance rises with gamma, and if "
    "the gamma of the least mean squared error does not fall from 16 to 256 to 4096 samples and is "
    "larger at the end. Refuted if bias or variance is not monotone, otherwise undecided.",
    columns={
        "bias": "bias / gradient",
        "cosine": "cosine",
        "variance": "variance of a sample",
        "gap": "J above its minimum",
        **{f"error_{n}": f"squared error, {n} samples" for n in BATCHES},
    },
    arms=tuple(arm(gamma) for gamma in GAMMAS),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
)
