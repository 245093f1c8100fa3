"""The run directory: locked while a run lasts, and holding one run only, whose settings are its
config.yaml.
"""

import fcntl
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybridrl.core import redact
from hybridrl.core.errors import CheckpointError, ConfigError, RunDirectoryError
from hybridrl.core.files import entries, read_bytes, read_text, replace_bytes, replace_text
from hybridrl.run_dir.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    Checkpoint,
    Checkpointer,
    read_checkpoint,
    step_folders,
)
from hybridrl.run_dir.inputs import DATA, IMPORTS
from hybridrl.run_dir.ledger import LEDGER
from hybridrl.settings.choices import Resume, ScheduleKind
from hybridrl.settings.compose import from_yaml, saved_tree, to_yaml
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.jsonl import METRICS, SAMPLES, samples_files
from hybridrl.weights.hugging_face import TEMPLATE

HOLDER = ".holder"
WRITTEN_INTO = ("logs", "skipped")
"""Folders whose files workers write."""
PARTS = (
    ".lock",
    METRICS,
    LEDGER,
    SAMPLES,
    CHECKPOINTS,
    TEMPLATE,
    "export",
    "wandb",
    *WRITTEN_INTO,
)
"""Files and folders that a run writes to in place, removes files from, or copies into exports."""

ABSENT = "(not set)"

FREE = (
    "cluster",
    "deadlines",
    "tracking",
    "checkpoint",
    "diagnostics",
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
    "learner.ranks",
    "learner.zero_stage",
    "learner.gradient_checkpointing",
    "reward.workers",
    "reward.processes",
    "reward.timeout_s",
    "reward.max_error_rate",
    "train.max_tokens_per_micro_batch",
    "train.packing",
    "train.head_chunk",
)
"""Settings and sections that decide neither what is learned nor what accuracy means: where, how
fast and how often.

train.steps joins them where no schedule is stretched over it, so that a run can be prolonged.
Whatever is not named here, and so every setting of the future, is held fast.
"""


@contextmanager
def run_directory(settings: RunSettings) -> Iterator[Path]:
    """The run directory, made if need be, locked while the run lasts.

    Raises:
        RunDirectoryError: another run holds it, or as check_usable.
        ConfigError: as check_usable.
    """
    run_dir = check_usable(settings)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        replace_text(run_dir / HOLDER, f"process {os.getpid()} on {socket.gethostname()}")
        yield run_dir


def check_usable(settings: RunSettings) -> Path:
    """The absolute path of run.dir, where a run may write; nothing is made or changed.

    Raises:
        RunDirectoryError: it holds files and never was a run's, or a part of it is a link.
        ConfigError: it would vanish with a Ray job's upload folder.
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
    """Refuse a directory whose files are somebody's own: a run replaces files and removes old ones.

    Hidden files do no harm, nor a file that this process's own output goes to.

    Raises:
        RunDirectoryError: names some of the files.
    """
    files = [
        path.name
        for path in entries(run_dir)
        if not path.name.startswith(".") and path.name != "lost+found" and not is_output(path)
    ]
    if files and not was_run(run_dir):
        names = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise RunDirectoryError(
            f"run.dir={run_dir}: holds files ({names}) and never was a run of hybridrl, which "
            "would replace files there; choose a new or empty directory"
        )


def is_output(path: Path) -> bool:
    """Whether this process's stdout or stderr goes to that file, as in `hybridrl train ... >
    DIR/log`.
    """
    streams = [stream for stream in (sys.__stdout__, sys.__stderr__) if stream is not None]
    with suppress(OSError, ValueError):  # closed, or no file at all
        there = path.stat()
        return any(os.path.samestat(os.fstat(stream.fileno()), there) for stream in streams)
    return False


def was_run(run_dir: Path) -> bool:
    """Whether a run was started in the directory: it wrote its name there, or its settings, or a
    checkpoint.
    """
    names = {path.name for path in entries(run_dir)}
    if HOLDER in names:
        return True
    try:
        if {"run", "model", "train"} <= saved_tree(read_text(run_dir / CONFIG) or "").keys():
            return True
    except (ConfigError, RunDirectoryError):
        pass  # no settings of ours
    return any(read_bytes(path / MANIFEST) is not None for path in step_folders(run_dir))


def check_no_links(run_dir: Path) -> None:
    """Refuse a directory in which a part that is written to leads elsewhere, as one that was made
    by somebody else may.

    Files that are replaced whole, like config.yaml, need no check: the link itself is replaced. A
    link to a single checkpoint is renamed or removed, never written through.

    Raises:
        RunDirectoryError: names the link.
    """
    inner = [path for folder in WRITTEN_INTO for path in entries(run_dir / folder)]
    parts = [*(run_dir / name for name in PARTS), *inner]
    if link := next((path for path in parts if path.is_symlink()), None):
        raise RunDirectoryError(
            f"{link}: a link, and a run does not write through links in its directory; put what "
            "it leads to in its place, or make the run directory as a whole a link"
        )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Two locks, of the directory itself and of its file .lock; both are the kernel's and end with
    this process, however that ends. The first cannot be lost by removing a file, the second also
    works where directories cannot be locked (NFS).

    Raises:
        RunDirectoryError: another run holds one of them.
    """
    file_lock = FileLock(run_dir / ".lock")
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without such locks
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
    holder = None
    with suppress(OSError, RunDirectoryError):
        holder = read_text(run_dir / HOLDER)
    return RunDirectoryError(
        f"run.dir={run_dir}: another run holds it, {holder or 'which has not yet said who it is'}; "
        "wait for it, end it, or choose another run.dir"
    )


def find_checkpoint(
    settings: RunSettings, run_dir: Path, inputs: Mapping[str, str]
) -> Checkpoint | None:
    """Where to continue, None: from the start; config.yaml is `settings` afterwards. Call it under
    run_directory's lock.

    Args:
        inputs: controller.inputs.digests of what the run would read.

    Raises:
        RunDirectoryError: run.resume=never and the directory holds a run, or it holds one of other
            settings or inputs, or one that is beyond train.steps; it is left as it was.
        CheckpointError: run.resume=required and there is none, or all are damaged, or that of
            run.resume_from is, or the newest one cannot be read now.
    """
    checkpointer = Checkpointer(run_dir, settings.checkpoint)
    checkpointer.clean()
    if settings.run.resume is Resume.never and (
        os.path.lexists(run_dir / METRICS) or checkpointer.folders()
    ):
        raise RunDirectoryError(
            f"run.dir={run_dir}: holds a run and run.resume=never; choose another run.dir or "
            "run.resume=auto"
        )
    checkpoint = checkpointer.newest()
    other = checkpoint is None and settings.run.resume_from is not None
    if other:
        checkpoint = read_checkpoint(Path(settings.run.resume_from).expanduser().absolute())
    if checkpoint is None and settings.run.resume is Resume.required:
        raise CheckpointError(
            f"run.resume=required: no checkpoint in {checkpointer.root}; use run.resume=auto to "
            "start"
        )
    if checkpoint:
        check_same_run(settings, checkpoint.folder.parent.parent)
        check_inputs(settings, checkpoint.state.inputs, inputs)
        if checkpoint.state.step > settings.train.steps:
            raise RunDirectoryError(
                f"{checkpoint.folder}: {checkpoint.state.step} steps are done, and "
                f"train.steps={settings.train.steps}; set it as high at least, or choose another "
                "run.dir"
            )
    if other:
        checkpoint = continue_other(checkpoint, run_dir)
    elif checkpoint:
        checkpointer.set_aside_newer(checkpoint.state.step)
    replace_text(run_dir / CONFIG, to_yaml(settings))
    return checkpoint


def describe_directory(settings: RunSettings, inputs: Mapping[str, str]) -> str:
    """What a run of these settings would do with its run.dir, in words; nothing is written.

    Raises:
        RunDirectoryError, CheckpointError: as find_checkpoint.
    """
    run_dir = Path(settings.run.dir).expanduser().absolute()
    checkpointer = Checkpointer(run_dir, settings.checkpoint)
    holds_run = (run_dir / METRICS).exists() or bool(checkpointer.folders())
    if settings.run.resume is Resume.never and holds_run:
        raise RunDirectoryError(
            f"run.dir={run_dir}: holds a run and run.resume=never; choose another run.dir or "
            "run.resume=auto"
        )
    checkpoint = checkpointer.newest()
    if checkpoint is None:
        return "holds a run without a checkpoint, which starts afresh" if holds_run else "a new run"
    check_same_run(settings, run_dir)
    check_inputs(settings, checkpoint.state.inputs, inputs)
    return f"continues after step {checkpoint.state.step}"


def continue_other(checkpoint: Checkpoint, run_dir: Path) -> Checkpoint:
    """Begin run_dir as a copy of the run that the checkpoint is of: its rows, samples and ledger,
    which are cut at the checkpoint's step when the run starts. Trackers get a run of its own.

    Raises:
        RunDirectoryError: one of those files is a link or a special file.
        OSError: one cannot be read or copied.
    """
    origin = checkpoint.folder.parent.parent
    samples = [Path(SAMPLES, path.name) for _, path in samples_files(origin)]
    (run_dir / SAMPLES).mkdir(exist_ok=True)
    for name in (Path(METRICS), Path(LEDGER), *samples):
        content = read_bytes(origin / name)
        if content is not None:
            replace_bytes(run_dir / name, content)
    return replace(checkpoint, state=replace(checkpoint.state, trackers={}))


def earlier_settings(settings: RunSettings) -> RunSettings | None:
    """Settings of the run that `settings` would continue, before anything is checked; None: there
    is none, or none that this version can read, which find_checkpoint says where it matters.

    Raises:
        OSError: they cannot be read.
    """
    origins = [Path(settings.run.dir)]
    if settings.run.resume_from is not None:
        origins.append(Path(settings.run.resume_from).parent.parent)
    for run_dir in origins:
        with suppress(RunDirectoryError):
            return read_settings(run_dir.expanduser().absolute())
    return None


def read_settings(run_dir: Path) -> RunSettings:
    """What the run was last started with; where config.yaml is gone, what its newest checkpoint was
    saved with.

    Raises:
        RunDirectoryError: there is no config.yaml, or it is not of this version.
        OSError: it cannot be read.
    """
    for folder in (run_dir, *reversed(step_folders(run_dir))):
        text = read_text(folder / CONFIG)
        if text is None:
            continue
        try:
            return from_yaml(text)
        except ConfigError as error:
            raise RunDirectoryError(
                f"{folder / CONFIG}: no settings of this version of hybridrl: {error}"
            ) from error
    raise RunDirectoryError(
        f"{run_dir / CONFIG}: cannot be read (No such file), so it is unknown what run this is"
    )


def check_same_run(settings: RunSettings, run_dir: Path) -> None:
    """Refuse to continue a run under settings that would have made it another run.

    Raises:
        RunDirectoryError: names each changed setting with both values, and the remedies.
    """
    changed = changes(read_settings(run_dir), settings)
    held = {
        key: values
        for key, values in changed.items()
        if not within(key, settings.run.allow_changes)
    }
    if not held:
        return
    told = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in held.items())
    if stretched := "train.steps" in held and ", ".join(stretched_by_steps(settings)):
        told += f" (train.steps stretches {stretched})"
    allow = ",".join(dict.fromkeys([*settings.run.allow_changes, *held]))
    raise RunDirectoryError(
        f"run.dir={run_dir}: holds a run with other settings: {told}; "
        f"choose another run.dir, or continue that run with them by run.allow_changes=[{allow}]"
    )


def check_inputs(settings: RunSettings, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to continue a run on other data or rewards: its cursor and its ledger would speak of
    prompts that are others now.

    Raises:
        RunDirectoryError: names what changed, and the remedies.
    """
    changed = [key for key in before.keys() & now.keys() if before[key] != now[key]]
    held = sorted(key for key in changed if not within(key, settings.run.allow_changes))
    if held:
        what = ", ".join(described_input(key) for key in held)
        allow = ",".join([*settings.run.allow_changes, *held])
        raise RunDirectoryError(
            f"run.dir={settings.run.dir}: {what} changed since the checkpoint; restore it, choose "
            f"another run.dir, or continue that run with it by run.allow_changes=[{allow}]"
        )


def described_input(key: str) -> str:
    """What a digest is of, in words."""
    if key == DATA:
        return "the prompts that data.* gives"
    if key.endswith(".path"):
        return f"the files of {key}"
    if key.endswith(f".{IMPORTS}"):
        return f"a module that the file of {file_setting(key.removesuffix(f'.{IMPORTS}'))} imports"
    return f"the file of {file_setting(key)}"


def file_setting(key: str) -> str:
    """The setting that names a user's file, from the key of its digest."""
    return f"{key}.function" if key.startswith("reward.functions.") else key


def changes(old: RunSettings, new: RunSettings) -> dict[str, tuple[Any, Any]]:
    """(old, new) value of each setting that differs and decides what is learned, by its dotted key.

    Example: {"train.lr": (0.001, 0.002), "teachers.b.path": ("(not set)", "/models/b")}
    """
    free = (
        *FREE,
        *(() if stretched_by_steps(old) or stretched_by_steps(new) else ("train.steps",)),
    )
    before, after = (
        flat(redact.tree(asdict(old))),
        flat(redact.tree(asdict(new))),
    )  # secrets are masked in what is on file
    pairs = {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in before | after}
    return {
        key: (a, b)
        for key, (a, b) in pairs.items()
        if not redact.agree(a, b) and not within(key, free)
    }


def stretched_by_steps(settings: RunSettings) -> list[str]:
    """Schedules that run to train.steps: with another number of steps, every step so far would have
    been another one.
    """
    moving = (ScheduleKind.linear, ScheduleKind.cosine)
    names = [
        name
        for name, schedule in settings.schedules.items()
        if schedule.kind in moving and schedule.steps is None
    ]
    return [*(["train.lr_end"] if settings.train.lr_end is not None else []), *names]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings. Example: {"a": {"b": 1, "c": [2]}} -> {"a.b": 1, "a.c":
    [2]}.
    """
    found = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{name}": value}
        )
    return found


def within(key: str, names: Iterable[str]) -> bool:
    """Whether `key` is one of the names or lies in a section that they name."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)
