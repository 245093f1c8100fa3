"""A1: misspecification that does or does not matter to the reward, in two dimensions.

The expert is N((-2, 2), I), and a point y is rewarded if its second coordinate is at least 0. Of
the students, class A is N((0, m), I) and class B is N((a, a), I): neither contains the expert.
"""

import math
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from torch import Tensor

from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

MIXTURE = ((0.9, 2.0), (0.1, -20.0))
"""Weights and second coordinates of the two means of the expert that is a mixture."""


def phi(x: float) -> float:
    """The distribution function of N(0, 1)."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    """The student that minimises a divergence, by gradient descent with integrals by quadrature.

    Nothing is random: the seed is not used.
    """
    parts = MIXTURE if settings["expert"] == "mixture" else ((1.0, 2.0),)
    slope = (0.0, 1.0) if settings["students"] == "A" else (1.0, 1.0)
    points = torch.linspace(-9.0, 9.0, int(settings["points"]), dtype=torch.float64)
    weights = torch.softmax(-0.5 * points**2, 0)
    grid = torch.stack(torch.meshgrid(points, points, indexing="ij"), -1).reshape(-1, 2)
    mass = (weights[:, None] * weights).reshape(-1)

    def log_expert(y: Tensor) -> Tensor:
        """[n, 2] -> [n], without the constant that all densities share."""
        each = [
            math.log(weight) - 0.5 * ((y[:, 0] + 2) ** 2 + (y[:, 1] - mean) ** 2)
            for weight, mean in parts
        ]
        return torch.logsumexp(torch.stack(each), 0)

    def divergence(parameter: Tensor) -> Tensor:
        """[] from the student to the expert, or from the expert to the student, in nats."""
        mean = parameter * torch.tensor(slope, dtype=torch.float64)
        if settings["divergence"] == "reverse_kl":
            y = grid + mean
            return (mass * (-0.5 * grid.square().sum(1) - log_expert(y))).sum()
        total = torch.zeros((), dtype=torch.float64)
        for weight, second in parts:
            y = grid + torch.tensor([-2.0, second], dtype=torch.float64)
            log_student = -0.5 * (y - mean).square().sum(1)
            total = total + weight * (mass * (log_expert(y) - log_student)).sum()
        return total

    parameter = torch.tensor(float(settings["start"]), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameter], max_iter=int(settings["steps"]), tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(parameter)
        value.backward()
        return value

    optimizer.step(closure)
    mean = parameter.item()
    return {
        "mean": mean,
        "divergence": divergence(parameter.detach()).item(),
        "value": phi(slope[1] * mean),
        "expert_value": sum(weight * phi(second) for weight, second in parts),
        "distance": 2 * phi(math.hypot(2 + slope[0] * mean, 2 - slope[1] * mean) / 2) - 1,
    }


def arm(name: str, students: str, divergence: str, *, expert: str = "one", start: float) -> Arm:
    settings = {
        "students": students,
        "divergence": divergence,
        "expert": expert,
        "start": start,
        "points": 201,
        "steps": 100,
    }
    return Arm(name=name, settings=settings, small={"points": 61}, measure=measure)


def judge(runs: Runs) -> Judgement:
    got = {name: of[0].numbers for name, of in runs.items()}
    benign = abs(got["A, reverse KL"]["value"] - got["A, reverse KL"]["expert_value"])
    harmful = got["B, reverse KL"]["expert_value"] - got["B, reverse KL"]["value"]
    direction = (
        got["mixture, A, reverse KL"]["value"] - got["mixture, A, forward KL (SFT)"]["value"]
    )
    parts = (benign <= 0.01, harmful >= 0.3, direction >= 0.3)
    if all(parts):
        verdict = Verdict.confirmed
    elif not any(parts):
        verdict = Verdict.refuted
    else:
        verdict = Verdict.undecided
    far = got["mixture, A, reverse KL, far start"]["value"]
    return Judgement(
        verdict=verdict,
        effect=f"value lost: {benign:.3f} (class A), {harmful:.3f} (class B); reverse KL above SFT "
        f"by {direction:.3f} (mixture)",
        reason=f"{sum(parts)} of the three differences are as claimed. "
        f"From a start beyond the expert's rare mode, which is no part of the rule, reverse "
        f"KL ends in that mode, with the value {far:.3f}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    names = list(runs)
    values = [runs[name][0].numbers["value"] for name in names]
    expert = [runs[name][0].numbers["expert_value"] for name in names]
    axes.barh(names, values, color="#0072B2")
    axes.plot(expert, names, "|", color="#D55E00", markersize=22, markeredgewidth=2.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of a reward (mark: the expert)")


EXPERIMENT = Experiment(
    id="A1",
    title="Misspecification that the reward does not see",
    claim="Imitation by reverse KL reaches the expert's value although every student is far from "
    "the expert, if the reward does not see the difference (class A), and loses it otherwise "
    "(class B). Where the expert has a rare second mode, SFT and reverse KL end at different "
    "students, and only the second keeps the value.",
    source="arXiv 2606.30445, figure 3; the mixture is an addition of this project",
    design="In two dimensions, with unit variances: the expert is a normal distribution around "
    "(-2, 2), the reward is 1 where the second coordinate is at least 0, and the students are "
    "normal distributions, of class A around (0, m) and of class B around (a, a). Each class has "
    "one parameter, which is fitted by L-BFGS; integrals are sums over a grid of 201 x 201 points. "
    "The value is the probability that the second coordinate is at least 0. The expert that is a "
    "mixture has 0.9 of its mass at (-2, 2) and 0.1 at (-2, -20).",
    rule="Confirmed if class A is within 0.01 of the expert's value, class B at least 0.3 below "
    "it, and reverse KL at least 0.3 above SFT on the mixture, started at SFT's solution. Refuted "
    "if none of the three holds, otherwise undecided.",
    columns={
        "mean": "m of class A, a of class B",
        "divergence": "divergence, nats",
        "distance": "total variation to the expert's main mode",
        "value": "value",
        "expert_value": "expert's value",
    },
    arms=(
        arm("A, reverse KL", "A", "reverse_kl", start=0.0),
        arm("B, reverse KL", "B", "reverse_kl", start=1.0),
        arm("A, forward KL (SFT)", "A", "forward_kl", start=0.0),
        arm("mixture, A, forward KL (SFT)", "A", "forward_kl", expert="mixture", start=0.0),
        arm("mixture, A, reverse KL", "A", "reverse_kl", expert="mixture", start=-0.2),
        arm("mixture, A, reverse KL, far start", "A", "reverse_kl", expert="mixture", start=-25.0),
    ),
    seeds=(0,),
    judge=judge,
    draw=draw,
)
