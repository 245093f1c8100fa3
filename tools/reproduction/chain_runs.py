"""Arms that train on chains of operations, and the numbers of their runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from reproduction import chain_reward
from reproduction.chains import MAX_NEW_TOKENS, Chain, chain_files, chain_task, written
from reproduction.examination import examine
from reproduction.experiment import Arm, Numbers, Setting
from reproduction.lab import Lab
from reproduction.made_models import with_made_models
from reproduction.own_pairs import STUDENT
from reproduction.trained import SMALL, TEACHER, numbers_of

COMMON: Mapping[str, Setting] = {
    "model.path": "made:chain-student",
    "teachers.main.path": "made:chain-teacher",
    "rollout.max_new_tokens": MAX_NEW_TOKENS,
    "rollout.max_model_len": 64,
}
SMALL_CHAINS: Mapping[str, Setting] = {
    **SMALL,
    "model.path": STUDENT,
    "teachers.main.path": TEACHER,
}
"""The small run does without the models of the task, whose making takes minutes."""
OWN = ("operations",)
"""Settings of an arm that are none of the run."""


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train on chains of `operations` operations, and examine the model on held-out ones.

    Returns:
        as trained.measure; the divergence is that to the chains' teacher. of_an_operation:
        reward^(1/operations). after_right, after_error: share of the operations, given the result
        before each, that are right after right ones alone, and after an error; absent if there are
        none.
    """
    operations = int(settings["operations"])
    folder = lab.folder / "made"
    given = with_made_models(run_settings(settings, *chain_files(folder, operations, seed)), folder)
    teacher = str(given["teachers.main.path"])
    with lab.run(given, seed) as trained:
        task = chain_task(operations)
        found = examine(trained.model, teacher, task, problems=lab.problems)
        return {
            **numbers_of(trained, found),
            "of_an_operation": found.reward ** (1 / operations),
            **shares(task.heldout(lab.problems), found.texts),
        }


def shares(problems: Sequence[Chain], texts: Sequence[str]) -> Numbers:
    """after_right and after_error of `measure`; each problem has equally many texts, which follow
    each other.
    """
    each = len(texts) // len(problems)
    repeated = [chain for chain in problems for _ in range(each)]
    found = [one for pair in zip(repeated, texts, strict=True) for one in written(*pair)]
    names = {"after_right": False, "after_error": True}
    parts = {name: [w.right for w in found if w.after_error == of] for name, of in names.items()}
    return {name: sum(part) / len(part) for name, part in parts.items() if part}


def run_settings(
    settings: Mapping[str, Setting], train: Path, heldout: Path
) -> Mapping[str, Setting]:
    """Those of hybridrl, by the settings of an arm and its files of problems."""
    reward = Path(chain_reward.__file__)
    return {
        "data.task": "records",
        "data.path": str(train),
        "data.heldout_path": str(heldout),
        # Of the quickstart, whose reward of Countdown is not wanted.
        "reward.functions.countdown.function": f"{reward}:solved",
        **{name: value for name, value in settings.items() if name not in OWN},
    }


def chain_arm(
    name: str,
    operations: int,
    settings: Mapping[str, Setting],
    small: Mapping[str, Setting] | None = None,
) -> Arm:
    """An arm of `measure`.

    Args:
        small: as in trained_arm.
    """
    return Arm(
        name=name,
        settings={"operations": operations, **COMMON, **settings},
        small={**SMALL_CHAINS, **(small or {})},
        measure=measure,
    )
