"""Checks of the settings of teachers for which vLLM engines score."""

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import Device
from hybridrl.settings.run import RunSettings
from hybridrl.settings.server_checks import check_reported


def check_teacher_engines(settings: RunSettings) -> None:
    """A teacher's engine has its own model and whole GPUs, and can give the evidence.

    Raises:
        ConfigError: one sentence about the first rule that is broken.
    """
    for name, teacher in settings.teachers.items():
        if teacher.engine is None:
            continue
        _check_alone(settings, name)
        _check_devices(settings, name)
        check_reported(settings, name, f"teachers.{name}.engine", "an engine")


def _check_alone(settings: RunSettings, name: str) -> None:
    """No other setting says where the model runs."""
    teacher = settings.teachers[name]
    engine = f"teachers.{name}.engine"
    if teacher.url is not None:
        raise ConfigError(
            f"{engine}: is an engine of the run, and the server at teachers.{name}.url="
            f"{teacher.url} has its own; leave one of them out"
        )
    if teacher.model is not None:
        raise ConfigError(
            f"{engine}: loads the model at teachers.{name}.path, and teachers.{name}.model="
            f"{teacher.model} is a class of yours; leave one of them out"
        )
    if teacher.devices != 1:
        raise ConfigError(
            f"teachers.{name}.devices={teacher.devices}: divides a model that a scorer loads, and "
            f"{engine} divides its own; set {engine}.tensor_parallel_size in its place"
        )


def _check_devices(settings: RunSettings, name: str) -> None:
    """The engine has one GPU or several, which it does not share."""
    engine = f"teachers.{name}.engine"
    ranks = (settings.teachers[name].engine or {}).get("tensor_parallel_size", 1)
    if type(ranks) is not int or ranks < 1:
        raise ConfigError(f"{engine}.tensor_parallel_size={ranks}: must be a number from 1 up")
    if settings.cluster.colocate and settings.cluster.device is not Device.cpu:
        raise ConfigError(
            f"{engine}: needs GPUs of its own, and under cluster.colocate=true it would share "
            "them; set cluster.colocate=false, or leave it out"
        )
