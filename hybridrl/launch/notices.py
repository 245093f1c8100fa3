"""The lines that the console prints about a run, and the remedy added to an error that ends it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hybridrl.core.errors import (
    ClusterLost,
    FleetExhausted,
    Preempted,
    ServerError,
)
from hybridrl.kernels.products import processor, products_notice
from hybridrl.launch.teacher_levels import teachers_left_out
from hybridrl.launch.warm_workers import Kept
from hybridrl.models.arithmetic import dtype_notice
from hybridrl.run_dir.checkpoint import Checkpoint, Checkpointer
from hybridrl.runtime.cluster import Cluster
from hybridrl.settings.choices import Resume
from hybridrl.settings.models import AUTO
from hybridrl.settings.run import RunSettings


def start_notice(
    settings: RunSettings,
    checkpoint: Checkpoint | None,
    kept: Kept | None = None,
    levels: Mapping[str, float] | None = None,
) -> str:
    """The line that the console prints before workers start.

    Args:
        kept: the workers of the job before, which are used again; None: all workers start.
        levels: the teachers' accuracies, where the job before has measured the same; None: it has
            not.
    """
    start = "starting workers" if kept is None else "reusing the workers of the previous job"
    known = checkpoint or (kept and levels)
    teachers = "" if known else ", ".join(settings.measured_teachers)
    served = "" if checkpoint else ", ".join(teachers_left_out(settings))
    left_out = f" (teacher {served} is on a server, and is not measured)" if served else ""
    if not teachers:
        return f"{start} ...{left_out}"
    return f"{start}, and measuring teacher {teachers} on the held-out problems ...{left_out}"


def ready_notices(
    requested: RunSettings, settings: RunSettings, cluster: Cluster, seconds: float
) -> Iterator[str]:
    """The lines that the console prints when all workers answer.

    Args:
        requested: the settings as the user gave them, in which a dtype may be `auto`.
        seconds: since the start of the run.
    """
    if requested.model.dtype == AUTO and cluster.device == "cpu":
        yield dtype_notice(settings.model.dtype, processor())
    if narrow_models(settings) and cluster.device == "cpu":
        yield products_notice(settings.train.products, processor())
    yield (
        f"workers ready after {seconds:.0f} s on {cluster.device}, weights are sent by "
        f"{cluster.weight_transfer}; the longest silent wait is "
        f"{settings.deadlines.longest_silence_s:g} s"
    )


def stop_notice(settings: RunSettings, steps_done: int) -> str:
    """The line that the console prints when on_step has ended the run early."""
    return (
        f"on_step ended the run after step {steps_done} of {settings.train.steps}; "
        f"{how_to_continue(settings, f'step_{steps_done:06d}')}"
    )


def narrow_models(settings: RunSettings) -> list[str]:
    """The bfloat16 models that the learner or a scorer runs, by the setting of their dtype."""
    dtypes = {"model.dtype": settings.model.dtype} | {
        f"teachers.{name}.dtype": settings.teacher_model(name).dtype
        for name in settings.scored_teachers
    }
    return [setting for setting, dtype in dtypes.items() if dtype == "bfloat16"]


@contextmanager
def naming_what_is_saved(settings: RunSettings, run_dir: Path) -> Iterator[None]:
    """If the run ends before its last step, add to the error a remedy that continues it.

    Raises:
        FleetExhausted, ClusterLost, ServerError, Preempted: with that addition.
    """
    try:
        yield
    except (FleetExhausted, ClusterLost, ServerError) as error:
        folders = []
        with suppress(OSError):  # the folder cannot be listed: the error itself matters more
            folders = Checkpointer(run_dir, settings.checkpoint).folders()
        newest = folders[-1].name if folders else None
        raise type(error)(f"{error}; {how_to_continue(settings, newest)}") from error
    except Preempted as error:
        if settings.run.resume is not Resume.never:
            raise
        raise Preempted(f"{error}, but with run.resume=auto") from error


def how_to_continue(settings: RunSettings, newest: str | None) -> str:
    """What the same command would do after the run has ended.

    Args:
        newest: the run's newest checkpoint; None: there is none.
    """
    if settings.run.resume is Resume.never:
        from_where = f"goes on from {newest}" if newest else "starts afresh, as nothing is saved"
        return f"the same command with run.resume=auto {from_where}"
    if newest:
        return f"the same command goes on from {newest}"
    if settings.run.resume_from:
        return f"the same command starts from {settings.run.resume_from} again"
    return "the same command starts afresh: nothing is saved yet"
