"""E7: problems outside of the training range, and a task that was learned before."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from countdown_models import NUM_HELDOUT_TWO
from matplotlib.axes import Axes

from hybridrl.data.countdown_puzzles import Countdown, Equation
from hybridrl.models.loading import load_model, load_tokenizer
from reproduction.curves import COLOURS
from reproduction.differences import difference, points, values
from reproduction.estimate import Estimate, estimate
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab
from reproduction.made_models import with_made_models
from reproduction.own_pairs import STUDENT
from reproduction.realizability import OFFLINE, ONLINE, cases
from reproduction.sampling import sample
from reproduction.scatter import draw_arm
from reproduction.trained import TEACHER, numbers_of, trained_arm

STEPS = 200
PARTS = ("far", "kept")
MARGIN = 0.05


def far_problems(num: int) -> list[Equation]:
    """Three numbers up to 20, at least one of them above 10."""
    wider = Countdown(max_number=20).heldout(2 * num)
    return [equation for equation in wider if max(equation.numbers) > 10][:num]


def old_problems() -> list[Equation]:
    """Two numbers up to 10; no made model was trained on them."""
    return Countdown(num_numbers=2).heldout(NUM_HELDOUT_TWO)


def reward(model: str | Path, equations: Sequence[Equation], samples: int) -> float:
    """Share of right samples at temperature 1, with a constant seed."""
    repeated = [equation for equation in equations for _ in range(samples)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rewards = sample(load_model(str(model)), load_tokenizer(str(model)), repeated).rewards
    return sum(rewards) / len(rewards)


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Besides those of trained.measure: far and kept, the rewards on far_problems and old_problems,
    and far_start and kept_start before training.
    """
    given = with_made_models(settings, lab.folder / "made")
    start = str(given["model.path"])
    far, old = far_problems(lab.problems), old_problems()
    with lab.run(given, seed) as trained:
        return {
            **numbers_of(trained, TEACHER, lab.problems),
            "far": reward(trained.model, far, 2),
            "kept": reward(trained.model, old, 16),
            "far_start": reward(start, far, 2),
            "kept_start": reward(start, old, 16),
        }


def arm(name: str, algorithm: str, *, realizable: bool) -> Arm:
    settings = {
        "algorithm": algorithm,
        "train.steps": STEPS,
        "train.lr": 5e-4,
        "eval.every": 50,
        "model.path": "made:both-tasks" if realizable else "made:both-tasks-one-layer",
    }
    return trained_arm(name, settings, {"model.path": STUDENT}, measure)


def gain(runs: Runs, part: str, *, realizable: bool) -> Estimate:
    """Of on-policy over SFT."""
    return difference(runs, ONLINE[realizable], OFFLINE[realizable], part)


def judge(runs: Runs) -> Judgement:
    copied = [gain(runs, part, realizable=True) for part in PARTS]
    other = [gain(runs, part, realizable=False) for part in PARTS]
    verdict = Verdict.undecided
    if any(of.low > MARGIN for of in copied) or any(of.high < MARGIN for of in other):
        verdict = Verdict.refuted
    elif all(of.high < MARGIN for of in copied) and all(of.low > MARGIN for of in other):
        verdict = Verdict.confirmed
    lost = ", ".join(
        f"{points(difference_from_start(runs, arm))} ({arm})"
        for names in (ONLINE, OFFLINE)
        for arm in names.values()
    )
    return Judgement(
        verdict=verdict,
        effect=f"on-policy above SFT, outside of the range: {points(copied[0])} (realizable), "
        f"{points(other[0])} (not); on the old task: {points(copied[1])}, {points(other[1])}",
        reason=f"The reward on the old task has changed by {lost}.",
    )


def difference_from_start(runs: Runs, arm: str) -> Estimate:
    """Of the reward on the old task."""
    pairs = zip(values(runs, arm, "kept"), values(runs, arm, "kept_start"), strict=True)
    return estimate([after - before for after, before in pairs])


def draw(axes: Axes, runs: Runs) -> None:
    arms = [*ONLINE.values(), *OFFLINE.values()]
    for colour, arm in zip(COLOURS, arms, strict=False):
        x = [100 * value for value in values(runs, arm, "kept")]
        y = [100 * value for value in values(runs, arm, "far")]
        draw_arm(axes, x, y, colour=colour, label=arm)
    for colour, realizable in zip(COLOURS, (True, False), strict=False):
        of = runs[ONLINE[realizable]][0].numbers
        axes.scatter(
            100 * of["kept_start"],
            100 * of["far_start"],
            marker="x",
            color=colour,
            label=f"before, {'realizable' if realizable else 'not realizable'}",
        )
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("reward on the old task, per cent")
    axes.set_ylabel("reward outside of the training range, per cent")


EXPERIMENT = Experiment(
    id="E7",
    title="Outside of the training range, and what was known before",
    claim="On problems outside of the training range and on a task learned before, on-policy "
    "distillation is as good as SFT on an expert that can be copied, and both are much better than "
    "SFT on one that cannot.",
    source="arXiv 2606.30445, figure 5",
    design="The expert is the shipped Countdown teacher, which knows problems of three numbers up "
    "to 10. The student that can copy it has its architecture, the other one a single layer; both "
    "were made for this with equally many problems of two and of three numbers. Each learns three "
    f"numbers for {STEPS} steps of 128 responses: SFT from the expert's responses "
    "(algorithm=seqkd), on-policy from its distribution over the whole vocabulary "
    "(algorithm=opd_full). Outside of the range are 512 problems of three numbers up to 20, one of "
    f"them above 10; the old task are {NUM_HELDOUT_TWO} held-out problems of two numbers. Rewards "
    "are shares of right samples at temperature 1.",
    rule="Gains of on-policy over SFT, paired by seed, with 95 % intervals, of both rewards. "
    f"Refuted if one of the two lies above {100 * MARGIN:.0f} points with the student that can "
    f"copy, or below {100 * MARGIN:.0f} points with the other one. Confirmed if both lie below "
    f"{100 * MARGIN:.0f} points with the first and above with the second. Otherwise undecided.",
    columns={
        "reward": "reward",
        "far": "reward outside of the range",
        "far_start": "the same before",
        "kept": "reward on the old task",
        "kept_start": "the same before",
        "divergence": "KL to the expert, nats",
    },
    arms=cases(arm),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
    cuts="The expert was trained by SFT and not by RL from the student; the old task is a simpler "
    "form of the new one.",
)
