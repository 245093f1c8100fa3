"""The conditions of running workers: a job may use those of another job with equal conditions."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from hybridrl.objectives import make_objective
from hybridrl.rollout.engine import most_logprobs
from hybridrl.runtime.workers import teams
from hybridrl.settings.built_in import is_own
from hybridrl.settings.run import RunSettings

TAKEN_ANEW = (
    # Read by the driver, which serves one job, or sent with each call.
    "run.dir",
    "run.resume",
    "run.resume_from",
    "run.allow_changes",
    "data",
    "eval",
    "generate",
    "tracking",
    "checkpoint",
    "diagnostics.every",
    "pipeline.max_staleness",
    "pipeline.on_stale",
    "pipeline.max_inflight_bytes",
    "rollout.max_new_tokens",
    "rollout.groups_per_chunk",
    "rollout.oversample",
    "rollout.max_logprob_gap",
    "train.steps",
    "train.prompts_per_step",
    "train.updates_per_batch",
    "train.epochs_per_batch",
    "train.samples_per_prompt",
    "train.lr",
    "train.lr_warmup_steps",
    "train.lr_end",
    # Reward workers start anew with each job.
    "reward",
    # Read in each update, or by `configure` and `begin_job` of learner and scorers. Values that a
    # worker derives from these when it is built are in `chosen_by`.
    "run.seed",
    "train.betas",
    "train.weight_decay",
    "train.grad_clip",
    "train.max_skipped",
    "train.head_chunk",
    "train.exact_logits",
    "train.max_tokens_per_micro_batch",
    "scorer.max_tokens_per_micro_batch",
    "teachers.*.weight",
    "teachers.*.schedule",
    "teachers.*.route",
    "teachers.*.evidence",
    "algorithm.divergence",
    "algorithm.jsd_beta",
    "algorithm.support",
    "algorithm.topk",
    "algorithm.teacher_signal",
    "algorithm.log_ratio_clip",
    "algorithm.imitation_weight",
    "algorithm.reward_weight",
    "algorithm.gamma",
    "algorithm.future",
    "algorithm.baseline",
    "algorithm.advantage",
    "algorithm.scale",
    "algorithm.ratio",
    "algorithm.value",
    "algorithm.overlong_buffer",
    "algorithm.dynamic_sampling",
    "algorithm.nll_weight",
    "algorithm.teacher_fraction",
    "algorithm.data_fraction",
    "algorithm.pair",
    "algorithm.normalizer",
    "algorithm.token_weight",
    "algorithm.temperature",
)
"""The settings, and sections of them, that may differ from those with which workers were built; `*`
is a teacher's name. All others must be equal. So a change of a setting that is added to hybridrl
restarts the workers, until someone has checked that no worker keeps its value.
"""


def worker_conditions(settings: RunSettings, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Everything on which the workers of a run depend besides the arguments of their calls.

    The keys are names of settings, or phrases for values that follow from settings.

    Args:
        inputs: run_dir.inputs.digests.
    """
    built = {key: value for key, value in leaves(asdict(settings)) if not is_taken_anew(key)}
    files = {
        f"the files of {key}": digest
        for key, digest in inputs.items()
        if key.startswith(("model.", "teachers."))
    }
    return built | files | chosen_by(settings)


def chosen_by(settings: RunSettings) -> dict[str, Any]:
    """Values fixed when a worker is built. They must be equal in jobs that share workers, although
    the settings behind them may otherwise differ.
    """
    train = settings.train
    return {
        # Workers look for a user's files in it.
        "the working directory": os.getcwd(),
        "the scored teachers": settings.scored_teachers,
        "the number of workers": {team.name: (team.size, team.gpus) for team in teams(settings)},
        "the value head": make_objective(settings).needs.learner_values,
        "the log-probs of an engine": most_logprobs(settings),
        # Layers are compiled for this number of tokens.
        "train.max_tokens_per_micro_batch": (
            train.max_tokens_per_micro_batch if train.packing else None
        ),
        # The first values of adapters are drawn with it.
        "run.seed": None if settings.lora.rank is None else settings.run.seed,
    }


def alone(settings: RunSettings) -> str | None:
    """Why a run may share its workers neither with the job before it nor with the one after it;
    None: it may.
    """
    if settings.diagnostics.trace:
        return "diagnostics.trace records all work of the workers"
    if settings.cluster.take_turns:
        return "cluster.take_turns: a job begins with workers of which none has released memory"
    algorithm = settings.algorithm
    own = {
        "algorithm.advantage": algorithm.advantage,
        "algorithm.token_weight": algorithm.token_weight,
        "algorithm.pair.loss": algorithm.pair.loss,
    }
    own |= {f"teachers.{name}.model": settings.teachers[name].model for name in settings.teachers}
    for setting, name in own.items():
        if name is not None and is_own(name):
            return f"{setting}={name} is your own code, whose state only a new process resets"
    return None


def needs_room(device: str, *, measures: bool) -> str | None:
    """Why a run cannot begin while the workers of another one run; None: it can.

    Args:
        device: the cluster's device, cpu or cuda.
        measures: the run begins with measuring its teachers.
    """
    if measures and device == "cuda":
        return "the engine that measures the teachers needs a GPU of these workers (eval.teacher)"
    return None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the conditions that differ, in alphabetical order."""
    absent = object()
    names = sorted({*one, *other})
    return [name for name in names if one.get(name, absent) != other.get(name, absent)]


def leaves(tree: Mapping[str, Any], key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each value in nested mappings that is not a mapping, or is empty."""
    for name, value in tree.items():
        dotted = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, dotted)
        else:
            yield dotted, value


def is_taken_anew(key: str) -> bool:
    """Whether a setting, or the section that it is in, is among TAKEN_ANEW."""
    parts = key.split(".")
    for allowed in TAKEN_ANEW:
        names = allowed.split(".")
        beginning = parts[: len(names)]
        if len(beginning) == len(names) and all(
            name in ("*", part) for name, part in zip(names, beginning, strict=True)
        ):
            return True
    return False
