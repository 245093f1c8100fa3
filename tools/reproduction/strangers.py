"""E8: two teachers of equal accuracy, one of the student's own weights and one of others."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from hybridrl.data.countdown_puzzles import Countdown
from hybridrl.models.loading import load_model, load_tokenizer
from reproduction.curves import draw_curves
from reproduction.differences import difference, points, values
from reproduction.estimate import Estimate, estimate
from reproduction.examination import examine
from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab
from reproduction.made_models import with_made_models
from reproduction.own_pairs import STUDENT
from reproduction.sampling import sample
from reproduction.trained import TEACHER, numbers_of, trained_arm

STEPS = 200
KIN = "teacher of the student's weights"
STRANGER = "teacher of other weights"
EQUAL = 0.03
"""How much the rewards of the teachers may differ."""
RECOVERED = 0.1
"""A difference of the recovered share that would matter."""


@torch.no_grad()
def agreement(student: str | Path, teacher: str, *, problems: int = 512) -> float:
    """Share of the tokens of the student's responses to held-out problems at which both models have
    the same most likely token.
    """
    policy = load_model(str(student))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampled = sample(policy, load_tokenizer(str(student)), Countdown().heldout(problems))
    same = sampled.log_probs(policy).argmax(-1) == sampled.log_probs(load_model(teacher)).argmax(-1)
    return same[sampled.counted].double().mean().item()


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train, and examine the model against its own teacher, and both before training.

    Returns:
        besides those of trained.measure: student_reward before training, teacher_reward, recovered:
        the share of the gap between these that was closed. agreement_start, agreement_end: of
        `agreement` before and after training.
    """
    given = with_made_models(settings, lab.folder / "made")
    teacher = str(given["teachers.main.path"])
    before = examine(STUDENT, teacher, problems=lab.problems)
    of_teacher = examine(teacher, teacher, problems=lab.problems)
    with lab.run(given, seed) as trained:
        numbers = numbers_of(trained, examine(trained.model, teacher, problems=lab.problems))
        return {
            **numbers,
            "student_reward": before.reward,
            "teacher_reward": of_teacher.reward,
            "recovered": (numbers["reward"] - before.reward) / (of_teacher.reward - before.reward),
            "divergence_start": before.divergence,
            "agreement_start": agreement(STUDENT, teacher, problems=lab.problems),
            "agreement_end": agreement(trained.model, teacher, problems=lab.problems),
        }


def arm(name: str, teacher: str) -> Arm:
    settings = {
        "algorithm": "opd_full",
        "train.steps": STEPS,
        "train.lr": 5e-4,
        "eval.every": 50,
        "teachers.main.path": teacher,
    }
    return trained_arm(name, settings, {"teachers.main.path": TEACHER}, measure)


def apart(runs: Runs) -> Estimate:
    """Rewards of the teachers; they do not depend on the seed."""
    return difference(runs, KIN, STRANGER, "teacher_reward")


def judge(runs: Runs) -> Judgement:
    gain = difference(runs, KIN, STRANGER, "recovered")
    agrees = difference(runs, KIN, STRANGER, "agreement_start")
    verdict = Verdict.undecided
    if abs(apart(runs).mean) <= EQUAL:
        if gain.low > RECOVERED and agrees.mean > 0:
            verdict = Verdict.confirmed
        elif gain.high < RECOVERED:
            verdict = Verdict.refuted
    shares = ", ".join(
        f"{estimate(values(runs, name, 'recovered')).text(100, 0)} % from the {name}"
        for name in (KIN, STRANGER)
    )
    starts = ", ".join(
        f"{estimate(values(runs, name, 'agreement_start')).text()} ({name})"
        for name in (KIN, STRANGER)
    )
    return Judgement(
        verdict=verdict,
        effect=f"share of the gap to the teacher that is recovered: {shares}; difference "
        f"{points(gain)}",
        reason=f"The teachers' rewards differ by {points(apart(runs))}. At the start the most "
        f"likely tokens agree at a share of {starts}.",
    )


EXPERIMENT = Experiment(
    id="E8",
    title="Two teachers of equal accuracy",
    claim="Of two teachers of equal accuracy the student learns more from the one that shares its "
    "initial weights, whose most likely tokens agree with its own more often.",
    source="arXiv 2606.30445, figure 6; arXiv 2604.13016",
    design="The shipped student, distilled on its own responses over the whole vocabulary "
    f"(algorithm=opd_full) for {STEPS} steps of 128 responses, AdamW at 5e-4. One teacher is the "
    "shipped one: it started from the same random weights as the student, and its first 400 of "
    "2000 steps had the same problems. The other one was made in the same way, with as many "
    "parameters and steps, from other random weights and by other problems. The share recovered is "
    "the gain of reward over the gap between student and teacher before training. Tokens agree "
    "where both models have the same most likely one, in the student's own responses.",
    rule="Differences, paired by seed, with 95 % intervals. Undecided if the rewards of the "
    f"teachers differ by more than {100 * EQUAL:.0f} points. Else confirmed if the share recovered "
    f"is more than {100 * RECOVERED:.0f} points higher with the first teacher, whose agreement at "
    "the start, one number without an interval, is also higher; refuted if the share is less than "
    f"{100 * RECOVERED:.0f} points higher; otherwise undecided.",
    columns={
        "teacher_reward": "teacher's reward",
        "reward": "reward",
        "recovered": "share recovered",
        "agreement_start": "agreement, start",
        "agreement_end": "agreement, end",
        "divergence": "KL to the teacher, nats",
    },
    arms=(arm(KIN, TEACHER), arm(STRANGER, "made:stranger")),
    seeds=(0, 1, 2, 3, 4),
    judge=judge,
    draw=partial(draw_curves, steps=range(0, STEPS + 1, 50)),
    cuts="One teacher of each kind; the shipped one is rounded to bfloat16, the other is not. "
    "Neither was made by reinforcement learning, and none is larger than the student: what is "
    "varied is whether its weights are related to the student's.",
)
