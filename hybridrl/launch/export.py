"""`hybridrl export`: a checkpoint as a Hugging Face folder; needs neither Ray nor a GPU."""

from dataclasses import dataclass
from pathlib import Path

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.core.files import replace_text
from hybridrl.core.folders import is_empty_folder
from hybridrl.data.chat import read_template
from hybridrl.models.loading import TEXT_FILES, resolve
from hybridrl.run_dir.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    Checkpoint,
    Checkpointer,
    read_checkpoint,
    step_of,
)
from hybridrl.run_dir.directory import EXPORT, check_no_links, read_settings
from hybridrl.settings.models import DTYPES
from hybridrl.settings.run import RunSettings
from hybridrl.weights.adapter_folder import check_adapter_run, export_adapters
from hybridrl.weights.hugging_face import TEMPLATE, checkpoint_tensors, export
from hybridrl.weights.parameters import weights_kind

BEST = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The export of one checkpoint, which has passed every check that needs no weights."""

    run_dir: Path
    checkpoint: Checkpoint
    settings: RunSettings
    dtype: str  # of the written weights
    adapter: bool
    template: Path | None  # the chat template; None: that of the model
    folder: Path  # to which it is written

    @classmethod
    def of(
        cls,
        source: Path,
        folder: Path | None = None,
        *,
        step: str | None = None,
        dtype: str | None = None,
        adapter: bool = False,
    ) -> "Export":
        """The export of a checkpoint; writes nothing.

        Args:
            source: a run directory, or one checkpoint, RUN/checkpoints/step_NNNNNN.
            folder: a new or empty folder. None: export/step_NNNNNN in the run directory, with the
                dtype in its name unless that is model.dtype, and with -adapter; an existing one is
                replaced.
            step: which checkpoint of the run: a number, or "best" by checkpoint.best. None: the
                newest one that is not damaged.
            dtype: of the written weights, float32 or bfloat16; None: model.dtype.
            adapter: write the adapters alone, in peft's format; false: merge them into the model.

        Raises:
            RunDirectoryError: `source` holds no run, or a part of it is a link.
            CheckpointError: there is no such checkpoint, or it is damaged.
            ConfigError: `folder` is not empty, or is missing for a checkpoint outside of its run;
                `step` or `dtype` has no valid value; the run's chat template is gone; or `adapter`
                is set for a run without adapters.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: must be {' or '.join(DTYPES)}")
        one_checkpoint = (source / MANIFEST).is_file()
        if one_checkpoint and step is not None:
            raise ConfigError(
                f"--step {step}: {source} is one checkpoint; give its run directory instead"
            )
        run_dir = source.absolute().parent.parent if one_checkpoint else source
        if one_checkpoint and folder is None and source.absolute().parent.name != CHECKPOINTS:
            raise ConfigError(
                f"{source}: is a checkpoint outside of its run; name the folder to write to"
            )
        settings = read_settings(source if (source / CONFIG).is_file() else run_dir)
        if folder is None:
            check_no_links(run_dir)
        checkpointer = Checkpointer(run_dir, settings.checkpoint)
        checkpoint = read_checkpoint(source) if one_checkpoint else _chosen(checkpointer, step)
        if folder is not None and folder.exists() and not is_empty_folder(folder):
            raise ConfigError(f"{folder}: exists and is not empty; name a new folder")
        if adapter:
            check_adapter_run(settings)
        template = kept_template(run_dir.absolute(), settings)
        dtype = dtype or settings.model.dtype
        name = _folder_name(checkpoint, dtype, settings)
        return cls(
            run_dir=run_dir,
            checkpoint=checkpoint,
            settings=settings,
            dtype=dtype,
            adapter=adapter,
            template=template,
            folder=folder or run_dir / EXPORT / (f"{name}-adapter" if adapter else name),
        )

    def write(self) -> Path:
        """Write the checkpoint as the learner itself would export it at that step; returns the
        folder.

        Raises:
            CheckpointError: the checkpoint holds the weights of another model.
            ConfigError: the model that training started from is gone.
        """
        settings = self.settings
        source = self.checkpoint.folder
        if self.adapter:
            export_adapters(source, settings, self.dtype, self.folder, self.template)
            return self.folder
        model = resolve(settings.model.path, settings.model.revision, files=TEXT_FILES)
        kind = weights_kind(settings)
        tensors = checkpoint_tensors(source, settings.model, self.dtype, kind=kind)
        export(tensors, model, self.folder, self.template, kind=kind, eos=settings.model.eos)
        return self.folder


def export_checkpoint(source: Path, folder: Path | None = None, *, step: str | None = None) -> Path:
    """Write a checkpoint as a model in the dtype of its run; returns the folder.

    Args and errors are those of Export.of and Export.write.
    """
    return Export.of(source, folder, step=step).write()


def _folder_name(checkpoint: Checkpoint, dtype: str, settings: RunSettings) -> str:
    """step_NNNNNN, with the dtype unless that is model.dtype."""
    name = f"step_{checkpoint.state.step:06d}"
    return name if dtype == settings.model.dtype else f"{name}-{dtype}"


def kept_template(run_dir: Path, settings: RunSettings) -> Path | None:
    """The chat template that the run trained with: its own copy, or else the file that the settings
    name; None: that of the model.

    Raises:
        ConfigError: neither exists, as for a checkpoint that was moved out of its run.
    """
    named = settings.data.chat_template_file
    if named is None:
        return None
    files = (run_dir / TEMPLATE, Path(named).expanduser())
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(
            f"data.chat_template_file={named}: does not exist, nor does {files[0]}, the run's copy "
            "of it; copy the template to one of these places"
        )
    return found


def _chosen(checkpointer: Checkpointer, step: str | None) -> Checkpoint:
    """The checkpoint that `step` names; with None the newest one that is not damaged."""
    folders = checkpointer.folders()
    if not folders:
        raise CheckpointError(
            f"{checkpointer.root}: no checkpoint to export; train until the first, see "
            "checkpoint.every"
        )
    if step is None:
        newest = checkpointer.newest()
        assert newest is not None, "newest raises if there are folders and all are damaged"
        return newest
    if step == BEST:
        return read_checkpoint(best_folder(checkpointer, folders))
    if not (step.isascii() and step.isdecimal()):
        raise ConfigError(f"--step {step}: must be the number of a step, or {BEST}")
    folder_of = {step_of(folder): folder for folder in folders}
    if int(step) not in folder_of:
        raise CheckpointError(
            f"--step {step}: {checkpointer.root} holds no checkpoint of that step, only of "
            f"{_steps(folders)}"
        )
    return read_checkpoint(folder_of[int(step)])


def best_folder(checkpointer: Checkpointer, folders: list[Path]) -> Path:
    """The folder of the checkpoint with the best value of checkpoint.best.

    Raises:
        ConfigError: the run has no checkpoint.best.
        CheckpointError: no checkpoint has a value of that metric.
    """
    metric = checkpointer.config.best
    if metric is None:
        raise ConfigError(
            f"--step {BEST}: the run has no checkpoint.best, the metric to choose by; give one of "
            f"its steps, {_steps(folders)}"
        )
    best = checkpointer.best(folders)
    if best is None:
        raise CheckpointError(
            f"--step {BEST}: no checkpoint in {checkpointer.root} has a value of {metric}; give "
            f"one of its steps, {_steps(folders)}"
        )
    return best


def _steps(folders: list[Path]) -> str:
    return ", ".join(str(step_of(folder)) for folder in folders)


def keep_template(settings: RunSettings, run_dir: Path) -> None:
    """Copy data.chat_template_file into the run directory, so that exports have the same template.

    Without that setting, a copy by an earlier start of the run is removed.
    """
    copy = run_dir / TEMPLATE
    if settings.data.chat_template_file is None:
        copy.unlink(missing_ok=True)
    else:
        replace_text(copy, read_template(settings.data.chat_template_file))
