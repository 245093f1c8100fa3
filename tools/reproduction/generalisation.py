"""E7: problems outside of the training range, and a task that was learned before."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from countdown_models import NUM_HELDOUT_TWO
from matplotlib.axes import Axes

from hybridrl.data.countdown_puzzles import Countdown, Equation
from hybridrl.models.loading import load_model, load_tokenizer
from reproduction.curves import COLOURS
from reproduction.differences import paired, per_seed, points, values
from reproduction.estimate import estimate
from reproduction.examination import examine
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
FLOOR = 0.01
"""A task of which no student solves more, before or after training, shows no difference."""
UNTESTED = (
    "Outside of the range no student solves more than 1 %, so half of the claim is not tested. "
)


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
            **numbers_of(trained, examine(trained.model, TEACHER, problems=lab.problems)),
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


def changes(runs: Runs, arm: str, part: str) -> list[float]:
    """Of a reward since the start, of each seed."""
    return per_seed(values(runs, arm, part), values(runs, arm, f"{part}_start"))


def is_solved(runs: Runs, part: str) -> bool:
    """Whether some arm's mean reward, before or after training, is above FLOOR."""
    numbers = (part, f"{part}_start")
    means = [estimate(values(runs, arm, number)).mean for arm in runs for number in numbers]
    return max(means) > FLOOR


def judge(runs: Runs) -> Judgement:
    solved = [part for part in PARTS if is_solved(runs, part)]
    copied = {
        part: paired(changes(runs, ONLINE[True], part), changes(runs, OFFLINE[True], part))
        for part in PARTS
    }
    above = [
        paired(changes(runs, arm, part), changes(runs, OFFLINE[False], part))
        for arm in (ONLINE[True], OFFLINE[True])
        for part in solved
    ]
    decisive = [copied[part] for part in solved]
    verdict = Verdict.undecided
    if (
        solved == [*PARTS]
        and all(of.low > -MARGIN and of.high < MARGIN for of in decisive)
        and all(of.low > MARGIN for of in above)
    ):
        verdict = Verdict.confirmed
    elif any(of.low > MARGIN or of.high < -MARGIN for of in decisive) or any(
        of.high < MARGIN for of in above
    ):
        verdict = Verdict.refuted
    changed = ", ".join(
        f"{points(estimate(changes(runs, arm, 'far')))} and "
        f"{points(estimate(changes(runs, arm, 'kept')))} ({arm})"
        for names in (ONLINE, OFFLINE)
        for arm in names.values()
    )
    return Judgement(
        verdict=verdict,
        effect=f"on-policy minus SFT with the student that can copy: {points(copied['far'])} "
        f"outside of the range, {points(copied['kept'])} on the old task",
        reason=f"{'' if 'far' in solved else UNTESTED}Changes of the reward outside of the range "
        f"and on the old task: {changed}.",
    )


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
    "(algorithm=opd_full). Outside of the range are 512 problems of three numbers up to 20, at "
    f"least one above 10; the old task is that of {NUM_HELDOUT_TWO} held-out problems of two "
    "numbers. Rewards are shares of right samples at temperature 1.",
    rule="Changes of both rewards since the start, compared paired by seed, with 95 % intervals. "
    "Confirmed if, with the student that can copy, on-policy and SFT differ by less than "
    f"{100 * MARGIN:.0f} points in both, and each of them changes both by more than "
    f"{100 * MARGIN:.0f} points above what SFT changes with the other student. Refuted if one of "
    "these differences lies beyond its bound. Otherwise undecided. A task of which no student "
    "solves more than 1 % decides nothing: this was added after the runs, in which none solved a "
    "problem outside of the range; by the rule before it the claim was refuted, as no difference "
    "there can be more than 5 points.",
    columns={
        "reward": "reward",
        "far": "reward outside of the range",
        "far_start": "outside of the range, before training",
        "kept": "reward on the old task",
        "kept_start": "on the old task, before training",
        "divergence": "KL to the expert, nats",
    },
    arms=cases(arm),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=draw,
    cuts="The expert was trained by SFT and not by RL from the student; the old task is a simpler "
    "form of the new one. On-policy learns from whole distributions and SFT from drawn tokens.",
)
