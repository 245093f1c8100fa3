"""Which counts of workers, devices and ways of moving weights go together: what one section of the settings cannot see."""

import math
from typing import TYPE_CHECKING

from hybridrl.choices import Device, WeightTransfer
from hybridrl.errors import ConfigError

if TYPE_CHECKING:  # config.py checks its settings with this module
    from hybridrl.algorithm import AlgorithmConfig
    from hybridrl.config import RunSettings

SHARED_GPU_LIMIT = 0.5
"""Largest rollout.gpu_memory_utilization on a GPU that learner and teachers use too."""


def check_places(settings: "RunSettings") -> None:
    """Every worker has something to do, and a way to do it where it stands.

    Raises:
        ConfigError: one sentence on the first rule that is broken.
    """
    _check_counts(settings)
    _check_weight_transfer(settings)
    if settings.cluster.colocate and settings.cluster.device is not Device.cpu:
        _check_shared_gpus(settings)


def chunk_size(prompts: int, groups_per_chunk: int, engines: int) -> int:
    """Prompts of one chunk: as set, but every engine gets one. Example: 10 prompts, groups_per_chunk=96, 2 engines: 5."""
    return max(min(groups_per_chunk, -(-prompts // engines)), 1)


def shares(prompts: int, algorithm: "AlgorithmConfig", step: int) -> tuple[int, int, int]:
    """How many of a step's prompts the student, the first teacher and the data answer; they add up to `prompts`.

    What rounding takes from a share at one step it gets at a later one: over steps 0 ... n each has answered its share
    of all prompts to within one. The numbers depend on the step alone, so a resumed run continues them.
    Example: 4 prompts, a tenth of them for the teacher: the teacher answers 0, 1, 0, 1, 0, 0, 1, 0, 1, 0 in ten steps.

    Args:
        prompts: of one step, the same number at every step.
        step: from 0.
    """
    now = _answered(prompts * (step + 1), algorithm)
    before = _answered(prompts * step, algorithm)
    by_student, by_teacher, by_data = (a - b for a, b in zip(now, before, strict=True))
    return by_student, by_teacher, by_data


def _answered(prompts: int, algorithm: "AlgorithmConfig") -> tuple[int, int, int]:
    """Of the first `prompts` prompts of a run. No entry ever falls as `prompts` grows: the teacher's is a share of what
    the data leaves."""
    by_data = math.floor(algorithm.data_fraction * prompts + 0.5)
    rest = prompts - by_data
    sampled_fraction = 1 - algorithm.data_fraction
    share = min(algorithm.teacher_fraction / sampled_fraction, 1.0) if sampled_fraction else 0.0
    by_teacher = math.floor(share * rest + 0.5)
    return rest - by_teacher, by_teacher, by_data


def _check_counts(settings: "RunSettings") -> None:
    rollout, algorithm, prompts = (
        settings.rollout,
        settings.algorithm,
        settings.train.prompts_per_step,
    )
    for name, count in {
        "rollout.engines": rollout.engines,
        "learner.ranks": settings.learner.ranks,
    }.items():
        if prompts < count:
            raise ConfigError(
                f"train.prompts_per_step={prompts}: must be at least {name}={count}, one prompt for each; raise it"
            )
    by_student, by_teacher, by_data = shares(prompts, algorithm, step=0)
    chunks = -(-by_student // chunk_size(by_student, rollout.groups_per_chunk, rollout.engines))
    chunks += -(-by_teacher // chunk_size(by_teacher, rollout.groups_per_chunk, 1)) + (by_data > 0)
    counts = {
        "scorer.replicas": settings.scorer.replicas if settings.scored_teachers else 1,
        "reward.workers": settings.reward.workers,
    }
    for name, count in counts.items():
        if count > chunks:
            raise ConfigError(
                f"{name}={count}: a step has {chunks} chunks, each for one worker, so the rest would idle; "
                f"lower it or rollout.groups_per_chunk={rollout.groups_per_chunk}"
            )


def _check_weight_transfer(settings: "RunSettings") -> None:
    chosen = settings.rollout.weight_transfer
    if chosen not in (WeightTransfer.nccl, WeightTransfer.ipc):
        return
    if settings.cluster.device is Device.cpu:
        raise ConfigError(
            f"rollout.weight_transfer={chosen}: needs GPUs, cluster.device is cpu; use object_store"
        )
    if chosen is WeightTransfer.ipc and settings.rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.weight_transfer=ipc: hands over memory of one GPU, and rollout.tensor_parallel={settings.rollout.tensor_parallel} "
            "needs several; set rollout.tensor_parallel=1, or use nccl"
        )
    if chosen is WeightTransfer.ipc and not settings.cluster.colocate:
        raise ConfigError(
            "rollout.weight_transfer=ipc: learner and engine must use the same GPU; set cluster.colocate=true, or use nccl or auto"
        )
    if chosen is WeightTransfer.nccl and settings.cluster.colocate:
        raise ConfigError(
            "rollout.weight_transfer=nccl: NCCL refuses two ranks on one GPU, which is what cluster.colocate=true means; "
            "use ipc, object_store or auto"
        )


def _check_shared_gpus(settings: "RunSettings") -> None:
    rollout, ranks = settings.rollout, settings.learner.ranks
    if rollout.tensor_parallel > 1:
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel}: under cluster.colocate=true an engine has a share of one GPU; "
            "set it to 1, or cluster.colocate=false"
        )
    if rollout.weight_transfer is not WeightTransfer.object_store and rollout.engines > ranks:
        raise ConfigError(
            f"rollout.engines={rollout.engines}: under cluster.colocate=true an engine's weights come from the learner rank on its GPU, "
            f"and learner.ranks={ranks}; lower it, or use rollout.weight_transfer=object_store"
        )
    if rollout.gpu_memory_utilization > SHARED_GPU_LIMIT:
        raise ConfigError(
            f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization}: under cluster.colocate=true learner and teachers need the "
            f"rest of the GPU; set it to {SHARED_GPU_LIMIT} or less"
        )
