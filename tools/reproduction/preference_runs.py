"""Arms that train on preference pairs of the student's own samples, and what their runs say."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from reproduction.examination import examine
from reproduction.experiment import Arm, Numbers, Run, Setting
from reproduction.lab import Lab
from reproduction.own_pairs import STUDENT, own_pairs

PAIRS_PER_STEP = 64
WINDOW = 10  # steps whose pairs are averaged
UNTRAINED = "untrained"
"""The arm whose learning rate is next to nothing: its windows are those of the same pairs under the
student before training, so that a difference to it has no noise of the pairs."""


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train on pairs.

    Args:
        settings: `pairs` in the file, `noise`, the share of them that is swapped, and `apart`, as
            own_pairs; all others are the run's.

    Returns:
        chosen_N, rejected_N: mean log-prob of a token of the chosen and the rejected responses in
        the WINDOW steps up to step N, before their updates; chosen_end, rejected_end: in the last
        of them. ranked: share of 256 held-out pairs
        that the loss's own scores rank correctly. reward, greedy, divergence: of Examination,
        against the student before training.
    """
    path, heldout = own_pairs(
        lab.folder / "made",
        pairs=int(settings["pairs"]),
        noise=float(settings["noise"]),
        seed=seed,
        apart=bool(settings.get("apart", False)),
    )
    given = run_settings(settings, path, heldout)
    with lab.run(given, seed) as trained:
        found = examine(trained.model, STUDENT, problems=lab.problems)
        numbers = {
            "reward": found.reward,
            "greedy": found.greedy,
            "divergence": found.divergence,
            "ranked": trained.values("eval/pair_accuracy")[-1],
        }
        for part in ("chosen", "rejected"):
            values = trained.values(f"pair/{part}_logprob")
            for end in range(WINDOW, len(values) + 1, WINDOW):
                numbers[f"{part}_{end}"] = math.fsum(values[end - WINDOW : end]) / WINDOW
            numbers[f"{part}_end"] = math.fsum(values[-WINDOW:]) / WINDOW
        return numbers


def run_settings(
    settings: Mapping[str, Setting], path: Path, heldout: Path
) -> Mapping[str, Setting]:
    """Those of hybridrl, by the settings of an arm and its files of pairs."""
    own = {"pairs", "noise", "apart"}
    return {
        "data.task": "records",
        "data.path": str(path),
        "data.heldout_path": str(heldout),
        **{name: value for name, value in settings.items() if name not in own},
    }


def pair_arm(
    name: str,
    algorithm: str,
    steps: int,
    *,
    pairs: int,
    noise: float,
    lr: float,
    constant: bool = False,
    apart: bool = False,
) -> Arm:
    """An arm of `measure`; a loss's noise does not change its small run.

    Args:
        constant: the learning rate stays at `lr`, else it falls to 0.
    """
    settings = {
        "algorithm": algorithm,
        "pairs": pairs,
        "noise": noise,
        "train.steps": steps,
        "train.lr": lr,
        "train.prompts_per_step": PAIRS_PER_STEP,
        "rollout.groups_per_chunk": PAIRS_PER_STEP,
        "eval.every": steps,
        **({"train.lr_end": lr} if constant else {}),
        **({"apart": True} if apart else {}),
    }
    small = {"pairs": 640, "noise": 0.0, "train.steps": WINDOW, "eval.every": WINDOW}
    return Arm(name=name, settings=settings, small=small, measure=measure)


def course(run: Run, untrained: Run, part: str) -> Sequence[float]:
    """Change of the log-prob of a token since the start, at the end of each window; 0 first."""
    of_part = [name.removeprefix(f"{part}_") for name in run.numbers if name.startswith(part)]
    ends = sorted(int(end) for end in of_part if end != "end")
    names = [f"{part}_{end}" for end in ends]
    return [0.0, *[run.numbers[name] - untrained.numbers[name] for name in names]]


def margins(run: Run, untrained: Run) -> Sequence[float]:
    """By how much the chosen responses have gained on the rejected ones, as `course`."""
    chosen = course(run, untrained, "chosen")
    rejected = course(run, untrained, "rejected")
    return [a - b for a, b in zip(chosen, rejected, strict=True)]


def chosen_at(run: Run, untrained: Run, margin: float) -> float:
    """Change of the chosen log-prob where the margin first reaches a value, between two windows by
    a straight line.

    Raises:
        ValueError: it never does.
    """
    chosen = course(run, untrained, "chosen")
    reached = margins(run, untrained)
    for number in range(1, len(reached)):
        before, after = reached[number - 1], reached[number]
        if after >= margin > before:
            share = (margin - before) / (after - before)
            return chosen[number - 1] + share * (chosen[number] - chosen[number - 1])
    raise ValueError(f"the margin of {run.arm}, seed {run.seed} never reaches {margin}")
