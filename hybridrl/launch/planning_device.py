"""The devices that `hybridrl plan` plans for."""

import torch

from hybridrl.launch.doctor import memory_bytes
from hybridrl.planning.plan import GIB
from hybridrl.settings.choices import Device
from hybridrl.settings.run import RunSettings

H100_GIB = 79
"""Of its 80 GB, what a process can use."""


def planned_device(settings: RunSettings) -> tuple[str, int]:
    """cpu or cuda, and the bytes of one GPU or of this node.

    A Ray cluster is not asked. With cluster.device=auto the GPUs of this machine decide.
    """
    cluster = settings.cluster
    has_gpu = torch.cuda.is_available()
    on_gpu = cluster.device is Device.cuda or (cluster.device is Device.auto and has_gpu)
    device = "cuda" if on_gpu else "cpu"
    if cluster.device_memory_gib is not None:
        return device, int(cluster.device_memory_gib * GIB)
    if not on_gpu:
        return device, memory_bytes()
    if has_gpu:
        return device, torch.cuda.get_device_properties(0).total_memory
    return device, H100_GIB * GIB
