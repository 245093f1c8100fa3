"""The run directory: its lock, its settings in config.yaml, and the checks before continuing."""

import fcntl
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from hybridrl.core.errors import CheckpointError, ConfigError, RunDirectoryError
from hybridrl.core.files import entries, read_bytes, read_text, replace_bytes, replace_text
from hybridrl.core.trace import WHOLE
from hybridrl.run_dir.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    STEP_FOLDER,
    Checkpoint,
    Checkpointer,
    config_text,
    read_checkpoint,
    step_folders,
)
from hybridrl.run_dir.inputs import DATA, IMPORTS, SETS
from hybridrl.run_dir.ledger import LEDGER
from hybridrl.run_dir.setting_changes import changes, stretched_by_steps, within
from hybridrl.settings.choices import Resume
from hybridrl.settings.compose import from_yaml, saved_tree
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.jsonl import METRICS, SAMPLES, TOKENS_FILE, samples_files
from hybridrl.weights.hugging_face import TEMPLATE

log = logging.getLogger(__name__)

HOLDER = ".holder"
EXPORT = "export"
"""The folder of exported models, step_NNNNNN and others."""
SET_ASIDE = ".earlier-"
"""Part of the name of an export whose steps are repeated."""
WRITTEN_INTO = ("logs", "skipped")
"""Folders with files that workers write."""
PARTS = (
    ".lock",
    METRICS,
    LEDGER,
    SAMPLES,
    CHECKPOINTS,
    TEMPLATE,
    EXPORT,
    "evals",
    "wandb",
    *WRITTEN_INTO,
    WHOLE,
)
"""Files and folders that a run writes in place, removes files from, or copies into exports."""


@contextmanager
def run_directory(settings: RunSettings) -> Iterator[Path]:
    """Create the run directory if necessary, and lock it until the end of the `with` block.

    Raises:
        RunDirectoryError: another run has the lock, or check_usable raised it.
        ConfigError: check_usable raised it.
    """
    run_dir = check_usable(settings)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        replace_text(run_dir / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
        yield run_dir


def check_usable(settings: RunSettings) -> Path:
    """Check that a run may write to run.dir, without changing anything; returns its absolute path.

    Raises:
        RunDirectoryError: it holds files but never held a run, or a part of it is a link.
        ConfigError: it is in the upload folder of a Ray job, which is deleted with the job.
    """
    run_dir = Path(settings.run.dir).expanduser().absolute()
    if "working_dir_files" in run_dir.parts:
        raise ConfigError(
            f"run.dir={settings.run.dir}: lies in the Ray job's upload folder {run_dir}, which is "
            "deleted; give an absolute path on shared storage"
        )
    check_not_foreign(run_dir)
    check_no_links(run_dir)
    return run_dir


def check_not_foreign(run_dir: Path) -> None:
    """Check that a directory holds a run or no files, since a run replaces and removes files.

    Hidden files, lost+found, and a file to which the output of this process goes are allowed.

    Raises:
        RunDirectoryError: it holds other files; the message names some of them.
    """
    files = [
        path.name
        for path in entries(run_dir)
        if not path.name.startswith(".") and path.name != "lost+found" and not is_output(path)
    ]
    if files and not was_run(run_dir):
        names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise RunDirectoryError(
            f"run.dir={run_dir}: holds files ({names}) that are not from a run of hybridrl, and a "
            "run would replace files there; choose a new or empty directory"
        )


def is_output(path: Path) -> bool:
    """Whether this process writes stdout or stderr to the file, e.g. with `> DIR/log`."""
    streams = [stream for stream in (sys.__stdout__, sys.__stderr__) if stream is not None]
    with suppress(OSError, ValueError):  # a stream is closed, or is not a file
        status = path.stat()
        return any(os.path.samestat(os.fstat(stream.fileno()), status) for stream in streams)
    return False


def was_run(run_dir: Path) -> bool:
    """Whether the directory has held a run: it has .holder, a run's settings, or a checkpoint."""
    names = {path.name for path in entries(run_dir)}
    if HOLDER in names:
        return True
    try:
        if {"run", "model", "train"} <= saved_tree(read_text(run_dir / CONFIG) or "").keys():
            return True
    except (ConfigError, RunDirectoryError):
        pass  # config.yaml is not that of a run
    return any(read_bytes(path / MANIFEST) is not None for path in step_folders(run_dir))


def check_no_links(run_dir: Path) -> None:
    """Check that a directory has no link in a place to which a run writes.

    Somebody else may have made the directory. Files that are replaced as a whole, like config.yaml,
    need no check, since that replaces the link itself. A link to a single checkpoint is renamed or
    removed, and never written through.

    Raises:
        RunDirectoryError: it has one; the message names the link.
    """
    inner = [path for folder in WRITTEN_INTO for path in entries(run_dir / folder)]
    parts = [*(run_dir / name for name in PARTS), *inner]
    if link := next((path for path in parts if path.is_symlink()), None):
        raise RunDirectoryError(
            f"{link}: is a link, and a run does not write through links in its directory; replace "
            "it with what it leads to, or make the run directory as a whole a link"
        )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock the directory itself and its file .lock, until the end of the `with` block.

    The kernel releases both locks when this process ends for any reason. The first one does not
    depend on a file that could be removed; the second one also works on file systems that cannot
    lock directories (NFS).

    Raises:
        RunDirectoryError: another run has one of the locks.
    """
    file_lock = FileLock(run_dir / ".lock")
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # the file system has no locks on directories
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise held_by_another(run_dir) from error
        try:
            file_lock.acquire(timeout=0)
        except Timeout as error:
            raise held_by_another(run_dir) from error
        yield
    finally:
        file_lock.release()
        os.close(directory)


def held_by_another(run_dir: Path) -> RunDirectoryError:
    """The error for a directory that another run has locked."""
    holder = None
    with suppress(OSError, RunDirectoryError):
        holder = read_text(run_dir / HOLDER)
    return RunDirectoryError(
        f"run.dir={run_dir}: is locked by another run, "
        f"{holder or 'whose process is not known yet'}; wait for it, end it, or choose another "
        "run.dir"
    )


def find_checkpoint(
    settings: RunSettings, run_dir: Path, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """Find the checkpoint to continue from, and prepare the directory: write the settings to
    config.yaml and set aside what is left of later steps.

    The caller must hold the lock of run_directory.

    Args:
        inputs: run_dir.inputs.digests of what the run would read.

    Returns:
        The checkpoint; None: start at step 0.

    Raises:
        RunDirectoryError: the directory holds a run and run.resume=never, or a run with other
            settings or inputs, or one that is beyond train.steps. The directory is unchanged,
            except that leftovers of a killed run are removed (Checkpointer.clean).
        CheckpointError: run.resume=required and there is no checkpoint; or all are damaged, or the
            one of run.resume_from is, or the newest cannot be read at the moment.
    """
    checkpointer = Checkpointer(run_dir, settings.checkpoint)
    checkpointer.clean()
    checkpoint = checkpoint_to_continue(settings, run_dir, inputs)
    set_aside_exports(run_dir, checkpoint.state.step if checkpoint else 0)
    if checkpoint is not None:
        if checkpoint.folder in checkpointer.folders():
            checkpointer.set_aside_newer(checkpoint.state.step)
        else:
            checkpoint = continue_other(checkpoint, run_dir)
    replace_text(run_dir / CONFIG, config_text(settings))
    return checkpoint


def set_aside_exports(run_dir: Path, step: int) -> None:
    """Rename the exports of steps after `step`. These steps are repeated, and no command may take
    such an export for the present model of the run.
    """
    for folder in sorted((run_dir / EXPORT).glob("step_*")):
        found = STEP_FOLDER.match(folder.name)
        if found and int(found[1]) > step and SET_ASIDE not in folder.name:
            renamed = folder.with_name(f"{folder.name}{SET_ASIDE}{uuid.uuid4().hex[:6]}")
            folder.rename(renamed)
            log.warning("%s: its step is repeated, so it was renamed to %s", folder, renamed.name)


def checkpoint_to_continue(
    settings: RunSettings, run_dir: Path, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """The newest checkpoint of the run, or that of run.resume_from; None: start at step 0. Changes
    nothing.

    Args:
        inputs: as in find_checkpoint.

    Raises:
        RunDirectoryError, CheckpointError: as find_checkpoint.
    """
    checkpointer = Checkpointer(run_dir, settings.checkpoint)
    if settings.run.resume is Resume.never and holds_run(run_dir):
        raise RunDirectoryError(
            f"run.dir={run_dir}: holds a run and run.resume=never; choose another run.dir or "
            "run.resume=auto"
        )
    checkpoint = checkpointer.newest()
    if checkpoint is None and settings.run.resume_from is not None:
        checkpoint = read_checkpoint(Path(settings.run.resume_from).expanduser().absolute())
    if checkpoint is None and settings.run.resume is Resume.required:
        raise CheckpointError(
            f"run.resume=required: no checkpoint in {checkpointer.root}; use run.resume=auto to "
            "start"
        )
    if checkpoint is not None:
        check_same_run(settings, run_dir, checkpoint.folder)
        check_inputs(settings, checkpoint.state.inputs, inputs)
        if checkpoint.state.step > settings.train.steps:
            raise RunDirectoryError(
                f"{checkpoint.folder}: {checkpoint.state.step} steps are done, but "
                f"train.steps={settings.train.steps}; set it to at least {checkpoint.state.step}, "
                "or choose another run.dir"
            )
    return checkpoint


def holds_run(run_dir: Path) -> bool:
    """Whether a run has written metrics or checkpoints into the directory."""
    return os.path.lexists(run_dir / METRICS) or bool(step_folders(run_dir))


def describe_directory(settings: RunSettings, inputs: Mapping[str, str]) -> str:
    """A phrase that says what a run with these settings would do with run.dir; changes nothing.

    Raises:
        RunDirectoryError, CheckpointError: as find_checkpoint.
    """
    run_dir = Path(settings.run.dir).expanduser().absolute()
    checkpoint = checkpoint_to_continue(settings, run_dir, inputs)
    if checkpoint is None:
        starts = "holds a run without a checkpoint: starts at step 0"
        return starts if holds_run(run_dir) else "a new run"
    origin = "" if checkpoint.folder in step_folders(run_dir) else f", from {checkpoint.folder}"
    return f"continues after step {checkpoint.state.step}{origin}"


def continue_other(checkpoint: Checkpoint, run_dir: Path) -> Checkpoint:
    """Copy metrics, samples and ledger of the checkpoint's run into run_dir.

    Their entries after the checkpoint's step are removed when the run starts. For trackers it is a
    new run, so the returned checkpoint has no tracker ids.

    Raises:
        RunDirectoryError: one of those files is a link or a special file.
        OSError: one of them cannot be read or copied.
    """
    copied = replace(checkpoint, state=replace(checkpoint.state, trackers={}))
    if checkpoint.folder.parent.name != CHECKPOINTS:
        return copied  # the checkpoint is not in the directory of its run
    origin = checkpoint.folder.parent.parent
    files = samples_files(origin) + samples_files(origin, TOKENS_FILE)
    samples = [Path(SAMPLES, path.name) for _, path in files]
    (run_dir / SAMPLES).mkdir(exist_ok=True)
    for name in (Path(METRICS), Path(LEDGER), *samples):
        content = read_bytes(origin / name)
        if content is not None:
            replace_bytes(run_dir / name, content)
    return copied


def earlier_settings(settings: RunSettings) -> RunSettings | None:
    """The settings of the run that `settings` would continue, without any checks.

    None: there is no such run, or this version cannot read its settings; find_checkpoint then
    raises the error if the run has a checkpoint.

    Raises:
        OSError: they cannot be read.
    """
    with suppress(RunDirectoryError):
        return read_settings(Path(settings.run.dir).expanduser().absolute())
    if settings.run.resume_from is not None:
        with suppress(RunDirectoryError):
            return settings_of(Path(settings.run.resume_from).expanduser().absolute())
    return None


def settings_of(checkpoint: Path) -> RunSettings:
    """The settings with which a checkpoint was made, from its own config.yaml; without that file,
    those of the last start of its run.

    Raises:
        RunDirectoryError, OSError: as read_settings.
    """
    own = settings_in(checkpoint)
    return read_settings(checkpoint.parent.parent) if own is None else own


def read_settings(run_dir: Path) -> RunSettings:
    """The settings of the last start of the run; if run_dir has no config.yaml, those of the newest
    checkpoint that has one.

    Raises:
        RunDirectoryError: there is no config.yaml, or it is not of this version.
        OSError: it cannot be read.
    """
    for folder in (run_dir, *reversed(step_folders(run_dir))):
        if (found := settings_in(folder)) is not None:
            return found
    raise RunDirectoryError(
        f"{run_dir / CONFIG}: cannot be read (No such file), so the settings of this run are "
        "unknown"
    )


def settings_in(folder: Path) -> RunSettings | None:
    """The settings in the config.yaml of a folder; None: there is no such file.

    Raises:
        RunDirectoryError: it is not of this version.
        OSError: it cannot be read.
    """
    text = read_text(folder / CONFIG)
    if text is None:
        return None
    try:
        return from_yaml(text)
    except ConfigError as error:
        raise RunDirectoryError(
            f"{folder / CONFIG}: not settings of this version of hybridrl: {error}"
        ) from error


def check_same_run(settings: RunSettings, run_dir: Path, checkpoint: Path) -> None:
    """Check that no setting has changed that must stay the same.

    Args:
        run_dir: the directory of the run that `settings` start or continue.
        checkpoint: the folder from which it continues. For a checkpoint of another run, `settings`
            are compared with those with which it was made.

    Raises:
        RunDirectoryError: one has changed; the message names each such setting with both values,
            and the remedies.
    """
    own = checkpoint in step_folders(run_dir)
    changed = changes(read_settings(run_dir) if own else settings_of(checkpoint), settings)
    refused = {
        key: values
        for key, values in changed.items()
        if not within(key, settings.run.allow_changes)
    }
    if not refused:
        return
    text = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in refused.items())
    if stretched := "train.steps" in refused and ", ".join(stretched_by_steps(settings)):
        text += f" (train.steps stretches {stretched})"
    allow = ",".join(dict.fromkeys([*settings.run.allow_changes, *refused]))
    if not own:
        raise RunDirectoryError(
            f"run.resume_from={checkpoint}: was made with other settings: {text}; give its own, or "
            f"continue it with these by run.allow_changes=[{allow}]"
        )
    raise RunDirectoryError(
        f"run.dir={run_dir}: holds a run with other settings: {text}; "
        f"choose another run.dir, or continue that run with them by run.allow_changes=[{allow}]"
    )


def check_inputs(settings: RunSettings, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Check that no input of a run has changed: data, models, or files with the user's code.

    With other data, the data cursor and the ledger would refer to other prompts than before.

    Args:
        before: run_dir.inputs.digests in the checkpoint.
        now: run_dir.inputs.digests of this start.

    Raises:
        RunDirectoryError: an input has changed; the message names it, and the remedies.
    """
    changed = [key for key in before.keys() & now.keys() if before[key] != now[key]]
    refused = sorted(key for key in changed if not within(key, settings.run.allow_changes))
    if refused:
        inputs = ", ".join(described_input(key) for key in refused)
        allow = ",".join([*settings.run.allow_changes, *refused])
        raise RunDirectoryError(
            f"run.dir={settings.run.dir}: {inputs} changed since the checkpoint; restore it, "
            f"choose another run.dir, or continue that run with it by run.allow_changes=[{allow}]"
        )


def described_input(key: str) -> str:
    """The name of an input for an error message, by its key in run_dir.inputs.digests."""
    if key == DATA:
        return "the prompts that data.* gives"
    if key.startswith(f"{SETS}."):
        return f"the problems of {key}"
    if key.endswith(".path"):
        return f"the files of {key}"
    if key.endswith(f".{IMPORTS}"):
        return f"a module that the file of {file_setting(key.removesuffix(f'.{IMPORTS}'))} imports"
    return f"the file of {file_setting(key)}"


def file_setting(key: str) -> str:
    """The setting that names a user's file, from the key of its digest."""
    return f"{key}.function" if key.startswith("reward.functions.") else key
