"""The settings that differ between two starts of a run, and those that may."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from hybridrl.core import redact
from hybridrl.run_dir.inputs import SETS
from hybridrl.settings.choices import ScheduleKind
from hybridrl.settings.run import RunSettings
from hybridrl.settings.servers import ServedConfig

ABSENT = "(not set)"

SIZES = (
    "tensor_parallel_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "enforce_eager",
)
"""Arguments of a teacher's engine that may change when a run continues."""

FREE = (
    "cluster",
    "deadlines",
    "tracking",
    "checkpoint",
    "diagnostics",
    "generate",
    "scorer",
    "run.resume",
    "run.resume_from",
    "run.dir",
    "run.allow_changes",
    "eval.every",
    "eval.samples",
    "eval.teacher",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.groups_per_chunk",
    "rollout.max_num_seqs",
    "rollout.kv_cache_bytes",
    "rollout.gpu_memory_utilization",
    "rollout.enforce_eager",
    "rollout.weight_transfer",
    "rollout.max_logprob_gap",
    "pipeline.max_inflight_bytes",
    "model.attention",
    "lora.sync",
    "learner.ranks",
    "learner.zero_stage",
    "learner.offload",
    "learner.gradient_checkpointing",
    "reward.workers",
    "reward.processes",
    "reward.gpus",
    "reward.timeout_s",
    "reward.max_error_rate",
    "train.max_tokens_per_micro_batch",
    "train.packing",
    "train.head_chunk",
)
"""Settings and sections that may change when a run continues.

They affect neither what is learned nor the meaning of the accuracy, but where, how fast and how
often something is done. train.steps may change too, unless a schedule ends at it, and held-out sets
may be added and left out. `changes` allows a few more. All other settings, including every future
one, must stay the same.
"""


def changes(old: RunSettings, new: RunSettings) -> dict[str, tuple[Any, Any]]:
    """The (old, new) values of each setting that differs and must stay the same, by dotted key.

    Example: {"train.lr": (0.001, 0.002), "teachers.b.path": ("(not set)", "/models/b")}
    """
    prolonged = () if stretched_by_steps(old) or stretched_by_steps(new) else ("train.steps",)
    free = (
        *FREE,
        *prolonged,
        *places_of_servers(old, new),
        *sizes_of_engines(old, new),
        # share_base only decides which worker scores with the same model.
        *(f"teachers.{name}.share_base" for name in old.teachers.keys() & new.teachers.keys()),
    )
    free += tuple(f"{SETS}.{name}" for name in old.eval.sets.keys() ^ new.eval.sets.keys())
    # Secrets are masked in both, since they are masked in config.yaml.
    before = flat(redact.tree(asdict(old)))
    after = flat(redact.tree(asdict(new)))
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after}
    return {
        key: (a, b)
        for key, (a, b) in pairs.items()
        if not redact.agree(a, b) and not within(key, free)
    }


def places_of_servers(old: RunSettings, new: RunSettings) -> Iterator[str]:
    """The settings that may change of teachers that a server runs in both `old` and `new`: its
    address and its use, but not its model.
    """
    parts = ["url", "api_key", *(f"served.{f.name}" for f in fields(ServedConfig))]
    parts.remove("served.model")
    for name in old.teachers.keys() & new.teachers.keys():
        if old.teachers[name].url is not None and new.teachers[name].url is not None:
            yield from (f"teachers.{name}.{part}" for part in parts)


def sizes_of_engines(old: RunSettings, new: RunSettings) -> Iterator[str]:
    """The arguments that may change of engines that score in both `old` and `new`: their devices
    and memory, as for the engines that sample.
    """
    for name in old.teachers.keys() & new.teachers.keys():
        if old.teachers[name].engine is not None and new.teachers[name].engine is not None:
            yield from (f"teachers.{name}.engine.{part}" for part in SIZES)


def stretched_by_steps(settings: RunSettings) -> list[str]:
    """The settings of the schedules that end at train.steps. With another number of steps, every
    step so far would have been different.
    """
    moving = (ScheduleKind.linear, ScheduleKind.cosine)
    names = [
        name
        for name, schedule in settings.schedules.items()
        if schedule.kind in moving and schedule.steps is None
    ]
    return [*(["train.lr_end"] if settings.train.lr_end is not None else []), *names]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, by dotted key.

    Example: {"a": {"b": 1, "c": [2]}} -> {"a.b": 1, "a.c": [2]}.
    """
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of the names, or lies in a section that is one of them."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)
