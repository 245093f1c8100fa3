"""The held-out accuracy of each teacher, with which that of the student is compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hybridrl.controller.evaluation import evaluate
from hybridrl.core.files import read_bytes, replace_text
from hybridrl.rollout.engine_arguments import sampling_by
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.workers import Slots
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

TEACHER_LEVELS = "teacher_levels.json"


def teachers_left_out(settings: RunSettings) -> list[str]:
    """The teachers in use that would be measured, if they were not on servers."""
    if not settings.eval.teacher or not settings.reward.functions:
        return []
    return [name for name in settings.teachers_in_use if settings.teachers[name].url is not None]


def place_of(settings: RunSettings, slots: Slots, name: str) -> tuple[RunSettings, Slot]:
    """The settings of the engine that samples a teacher, and its place.

    A teacher that an engine scores is sampled by an engine with the same arguments, in the place of
    the scoring one, which has as many GPUs. Any other teacher is sampled by an engine with the
    settings of rollout, in the place of one of the student's engines.
    """
    arguments = settings.teachers[name].engine
    if arguments is None or name not in settings.scored_teachers:
        return settings, slots["rollout"][0]
    rollout = sampling_by(arguments, settings.rollout)
    return replace(settings, rollout=rollout), slots[f"scorer-{name}"][0]


def measure_teachers(
    settings: RunSettings,
    cluster: Cluster,
    slots: Slots,
    rewards: RewardGroup,
    heldout: Sequence[Prompt],
    run_dir: Path,
    inputs: Mapping[str, str],
) -> dict[str, float]:
    """eval/accuracy_teacher/NAME of each measured teacher, which a temporary engine samples.

    Levels that an earlier start of the run has measured are read from the run directory.

    Args:
        inputs: run_dir.inputs.digests; if the files of a teacher or of the reward function changed,
            the levels are measured again.
    """
    names = settings.measured_teachers
    levels = same_levels(settings, heldout, inputs, run_dir)
    if levels is not None or not names:
        return levels or {}
    levels = {}
    for name in names:
        of_engine, slot = place_of(settings, slots, name)
        if cluster.device == "cpu":  # it runs beside the engine that is loading there
            slot = replace(slot, num_cpus=0.0)
        engine = RolloutGroup(
            of_engine,
            [slot],
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
    write_levels(settings, heldout, inputs, run_dir, levels)
    return levels


def same_levels(
    settings: RunSettings, heldout: Sequence[Prompt], inputs: Mapping[str, str], run_dir: Path
) -> dict[str, float] | None:
    """The levels that a run has measured under the conditions of this one; None: there are none.

    Args:
        inputs: run_dir.inputs.digests of this run.
        run_dir: the directory of the run whose levels are read.
    """
    conditions = conditions_of(settings, heldout) | files_of(inputs)
    return read_levels(run_dir / TEACHER_LEVELS, conditions)


def write_levels(
    settings: RunSettings,
    heldout: Sequence[Prompt],
    inputs: Mapping[str, str],
    run_dir: Path,
    levels: Mapping[str, float],
) -> None:
    """Store the levels of this run with the conditions under which they were measured."""
    conditions = conditions_of(settings, heldout) | files_of(inputs)
    content = {"measured_with": conditions, "levels": dict(levels)}
    replace_text(run_dir / TEACHER_LEVELS, json.dumps(content, indent=1))


def conditions_of(settings: RunSettings, heldout: Sequence[Prompt]) -> dict[str, Any]:
    """All settings and data on which the levels depend.

    They are written into the run directory, so the options of the reward function, which may
    contain a key, are replaced by their sha256.
    """
    problems = repr([(p.uid, p.input_ids, p.columns, *p.teacher_prompts.values()) for p in heldout])
    # Accuracy is measured by the first reward function, or with routes by the first that takes the
    # problem. None: nothing is measured.
    functions = settings.reward.functions.values()
    judge = next(iter(functions), None)
    routed = [[f.function, sha256_of(repr(f.options)), f.route] for f in functions]
    names = settings.measured_teachers
    engines = {
        n: arguments for n in names if (arguments := settings.teachers[n].engine) is not None
    }
    return {
        "teachers": {n: asdict(settings.teacher_model(n)) for n in names},
        **({"engines": engines} if engines else {}),
        **({"routes": routed} if any(f.route for f in functions) else {}),
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
    """The stored levels; None: none can be read, or they have other conditions."""
    try:
        stored = json.loads(read_bytes(path) or b"")
        if stored["measured_with"] != conditions:
            return None
        return {str(name): float(level) for name, level in stored["levels"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
