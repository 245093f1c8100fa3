"""Each teacher's held-out accuracy, the level that the student's curve is read against."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hybridrl.controller.evaluation import evaluate
from hybridrl.core.files import read_bytes, replace_text
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.workers import Slots
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

TEACHER_LEVELS = "teacher_levels.json"


def teachers_to_measure(settings: RunSettings) -> list[str]:
    """Those in use that have weights of their own; one without is the student before training,
    which is evaluated anyway.
    """
    if not settings.eval.teacher or not settings.reward.functions:
        return []
    return [name for name in settings.teachers_in_use if settings.teachers[name].path is not None]


def measure_teachers(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    rewards: RewardGroup,
    heldout: Sequence[Prompt],
    run_dir: Path,
    inputs: Mapping[str, str],
) -> dict[str, float]:
    """eval/accuracy_teacher/NAME of each, on a short-lived engine; read back where the directory
    has them already.

    Args:
        inputs: controller.inputs.digests, by which a level is measured again when a teacher's or
            the judge's files changed.
    """
    names = teachers_to_measure(settings)
    target = run_dir / TEACHER_LEVELS
    conditions = conditions_of(settings, heldout) | files_of(inputs)
    levels = read_levels(target, conditions)
    if levels is not None or not names:
        return levels or {}
    levels = {}
    for name in names:
        engine = RolloutGroup(
            settings,
            slots["rollout"][:1],
            model=settings.teacher_model(name),
            device=cluster.device,
            backend=cluster.weight_transfer,
            log_dir=str(run_dir / "logs"),
            name=f"teacher-{name}",
        )
        gather(engine.ready())
        found = evaluate(
            settings.eval,
            engine,
            rewards,
            heldout,
            wave="eval-0",
            step=0,
            temperature=settings.algorithm.temperature,
            seed=settings.run.seed,
        )
        levels[f"eval/accuracy_teacher/{name}"] = found.metrics["eval/accuracy"]
        engine.close()
    replace_text(target, json.dumps({"measured_with": conditions, "levels": levels}, indent=1))
    return levels


def conditions_of(settings: RunSettings, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """All that a level depends on: the teachers, the problems, what counts as right, and how
    responses are drawn.

    It is written into the run directory, so the judge's options, which may hold a key, are named by
    their sha256.
    """
    problems = repr([(p.uid, p.input_ids, p.columns) for p in heldout])
    judge = next(iter(settings.reward.functions.values()), None)  # None: nothing is measured
    return {
        "teachers": {n: asdict(settings.teacher_model(n)) for n in teachers_to_measure(settings)},
        "heldout_sha256": sha256_of(problems),
        "reward": [judge.function, sha256_of(repr(judge.options))] if judge else None,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "max_model_len": settings.rollout.max_model_len,
        "temperature": 0.0 if settings.eval.greedy else settings.algorithm.temperature,
        "seed": settings.run.seed,
    }


def files_of(inputs: Mapping[str, str]) -> dict[str, Any]:
    """The digests of the files that a level depends on besides: those of the teachers and of the
    judge.

    Args:
        inputs: controller.inputs.digests.
    """
    names = ("teachers.", "reward.")
    return {"files": {key: value for key, value in inputs.items() if key.startswith(names)}}


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_levels(path: Path, conditions: dict[str, Any]) -> dict[str, float] | None:
    """The levels on file; None: there are none, or they were measured under other conditions, or
    cannot be read.
    """
    try:
        stored = json.loads(read_bytes(path) or b"")
        levels = stored["levels"] if stored["measured_with"] == conditions else {"": None}
        return {str(name): float(level) for name, level in levels.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
