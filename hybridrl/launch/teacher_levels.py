"""The held-out accuracy of each teacher, with which that of the student is compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
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
    """The teachers in use that have their own weights.

    A teacher without a path is the student before training, which is evaluated anyway.
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
    """eval/accuracy_teacher/NAME of each teacher, each sampled by a temporary engine in the place
    of one of the student's.

    Levels that an earlier start of the run has measured are read from the run directory.

    Args:
        inputs: run_dir.inputs.digests; if the files of a teacher or of the reward function changed,
            the levels are measured again.
    """
    names = teachers_to_measure(settings)
    target = run_dir / TEACHER_LEVELS
    conditions = conditions_of(settings, heldout) | files_of(inputs)
    levels = read_levels(target, conditions)
    if levels is not None or not names:
        return levels or {}
    levels = {}
    slots_of_engine = slots["rollout"][:1]
    if cluster.device == "cpu":  # beside the student's engine, which is loading there
        slots_of_engine = [replace(slot, num_cpus=0.0) for slot in slots_of_engine]
    for name in names:
        engine = RolloutGroup(
            settings,
            slots_of_engine,
            model=settings.teacher_model(name),
            device=cluster.device,
            backend=cluster.weight_transfer,
            log_dir=str(run_dir / "logs"),
            name=f"teacher-{name}",
            teacher=name,
        )
        gather(engine.ready())
        evaluation = evaluate(
            settings.eval,
            engine,
            rewards,
            heldout,
            wave="eval-0",
            step=0,
            temperature=settings.algorithm.temperature,
            seed=settings.run.seed,
        )
        levels[f"eval/accuracy_teacher/{name}"] = evaluation.metrics["eval/accuracy"]
        engine.close()
    replace_text(target, json.dumps({"measured_with": conditions, "levels": levels}, indent=1))
    return levels


def conditions_of(settings: RunSettings, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """All settings and data on which the levels depend.

    They are written into the run directory, so the options of the reward function, which may
    contain a key, are replaced by their sha256.
    """
    problems = repr([(p.uid, p.input_ids, p.columns, *p.teacher_prompts.values()) for p in heldout])
    # Accuracy is measured by the first reward function. None: nothing is measured.
    judge = next(iter(settings.reward.functions.values()), None)
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
    """The digests of the files on which the levels depend: of teachers and reward functions.

    Args:
        inputs: run_dir.inputs.digests.
    """
    names = ("teachers.", "reward.")
    return {"files": {key: value for key, value in inputs.items() if key.startswith(names)}}


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_levels(path: Path, conditions: dict[str, Any]) -> dict[str, float] | None:
    """The stored levels; None: there are none under the same conditions that can be read."""
    try:
        stored = json.loads(read_bytes(path) or b"")
        if stored["measured_with"] != conditions:
            return None
        return {str(name): float(level) for name, level in stored["levels"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
