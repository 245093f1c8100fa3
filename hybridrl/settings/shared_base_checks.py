"""Checks of the settings of teachers that share the learner's weights, without its adapters."""

from hybridrl.core.errors import ConfigError
from hybridrl.settings.models import AUTO
from hybridrl.settings.run import RunSettings


def check_shared_bases(settings: RunSettings) -> None:
    """A teacher with share_base is the student before training, and the learner has its weights.

    Raises:
        ConfigError: one sentence about the first rule that is broken.
    """
    for name, teacher in settings.teachers.items():
        if teacher.share_base:
            _check_adapters(settings, name)
            _check_alone(settings, name)
            _check_model(settings, name)


def _check_adapters(settings: RunSettings, name: str) -> None:
    if settings.lora.rank is None:
        raise ConfigError(
            f"teachers.{name}.share_base=true: scores by the weights that adapters leave as they "
            "are, and without lora.rank all weights train; set lora.rank, e.g. to 16, or "
            "share_base=false"
        )


def _check_alone(settings: RunSettings, name: str) -> None:
    """No other setting says where the model runs."""
    teacher = settings.teachers[name]
    others = {"url": teacher.url, "model": teacher.model, "engine": teacher.engine}
    for setting, value in others.items():
        if value is not None:
            raise ConfigError(
                f"teachers.{name}.share_base=true: scores by the learner's own weights, and "
                f"teachers.{name}.{setting}={value} is another model; leave one of them out"
            )
    if teacher.devices != 1:
        raise ConfigError(
            f"teachers.{name}.devices={teacher.devices}: divides a model that a scorer loads, and "
            f"with teachers.{name}.share_base=true the learner scores; set learner.ranks or "
            "learner.zero_stage=3 in its place"
        )


def _check_model(settings: RunSettings, name: str) -> None:
    """The teacher has the student's files and dtype."""
    teacher = settings.teachers[name]
    model = settings.model
    if teacher.path not in (None, model.path):
        raise ConfigError(
            f"teachers.{name}.path={teacher.path}: with teachers.{name}.share_base=true the "
            f"teacher is the student before training, model.path={model.path}; set "
            f"teachers.{name}.path=null, or share_base=false"
        )
    if teacher.path is not None and teacher.revision != model.revision:
        raise ConfigError(
            f"teachers.{name}.revision={teacher.revision}: with teachers.{name}.share_base=true "
            f"the teacher is the student before training, model.revision={model.revision}; set "
            f"teachers.{name}.path=null and leave the revision out"
        )
    if teacher.dtype not in (AUTO, model.dtype):
        raise ConfigError(
            f"teachers.{name}.dtype={teacher.dtype}: with teachers.{name}.share_base=true the "
            f"teacher has the learner's weights, in model.dtype={model.dtype}; leave it out, or "
            "set share_base=false"
        )
