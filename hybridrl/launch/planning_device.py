"""The devices that `hybridrl plan` plans for, and the check of a run against their memory."""

import torch

from hybridrl.core.errors import ConfigError
from hybridrl.launch.doctor import memory_bytes
from hybridrl.planning.fit import check_fit
from hybridrl.planning.plan import GIB, make_plan
from hybridrl.settings.choices import Device
from hybridrl.settings.run import RunSettings

H100_GIB = 79
"""GiB that a process can use of an H100 with 80 GB."""


def planned_device(settings: RunSettings) -> tuple[str, int]:
    """cpu or cuda, and the bytes of one GPU or of this node.

    A Ray cluster is not asked. With cluster.device=auto the GPUs of this machine decide.
    """
    cluster = settings.cluster
    has_gpu = torch.cuda.is_available()
    if cluster.device is Device.cuda or (cluster.device is Device.auto and has_gpu):
        return "cuda", known_gpu_bytes(settings) or H100_GIB * GIB
    if cluster.device_memory_gib is not None:
        return "cpu", int(cluster.device_memory_gib * GIB)
    return "cpu", memory_bytes()


def known_gpu_bytes(settings: RunSettings) -> int | None:
    """The bytes of one GPU, as set or as this machine's GPU has them; None: neither is known."""
    if settings.cluster.device_memory_gib is not None:
        return int(settings.cluster.device_memory_gib * GIB)
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None


def check_memory(settings: RunSettings, device: str) -> None:
    """Refuse a run on GPUs that cannot hold its workers, before any of them starts.

    Does nothing where the memory of a GPU is not known, on CPUs, and with
    cluster.check_memory=false.

    Args:
        device: of the cluster, cpu or cuda.

    Raises:
        ConfigError: as planning.fit.check_fit; the message adds the setting that turns this check
            off.
    """
    if device == "cpu" or not settings.cluster.check_memory:
        return
    gpu_bytes = known_gpu_bytes(settings)
    if gpu_bytes is None:
        return
    plan = make_plan(settings, device=device, device_bytes=gpu_bytes)
    try:
        check_fit(plan)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; if the plan is wrong, cluster.check_memory=false starts the run all the same"
        ) from error
