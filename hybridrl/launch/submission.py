"""`hybridrl submit`: training as a job of a Ray cluster, and the jobs that were submitted."""

import argparse
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybridrl.core.errors import ConfigError
from hybridrl.core.redact import variable_secrets
from hybridrl.runtime.jobs import Job, Jobs, Submitted, exit_status
from hybridrl.settings.compose import jobs_of_sweep
from hybridrl.settings.settings_file import load_settings

TRAIN = ("hybridrl", "train")
NUMBER = "${hydra:job.num}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The options and settings of one `hybridrl submit`."""

    address: str | None
    id: str | None
    folder: Path
    program: str
    variables: dict[str, str]
    wait: bool
    config: str | None
    """a YAML file of settings in `folder`; the overrides take precedence over it"""
    overrides: list[list[str]]
    """the overrides of each job"""


def submit(arguments: Sequence[str]) -> int:
    """Submit a job, or the jobs of a sweep one after another, each after the end of the one before
    unless --no-wait is given; returns the exit status of the last job that failed, else 0.

    Raises:
        ConfigError: a setting is wrong, or the cluster refuses the job.
        ClusterLost: the dashboard ended while the job ran.
    """
    submission = parsed(arguments)
    config = submission.config
    for overrides in submission.overrides:
        check(overrides, None if config is None else submission.folder / config)
    jobs = Jobs(submission.address)
    status = 0
    for number, overrides in enumerate(submission.overrides):
        job_id = jobs.submit(job_of(submission, number, overrides))
        print(f"job {job_id} at {jobs.address}; hybridrl jobs {job_id} follows it", flush=True)
        if submission.wait:
            status = ended(jobs, job_id) or status
    return status


def parsed(arguments: Sequence[str]) -> Submission:
    """The submission that the arguments describe.

    Raises:
        ConfigError: an option or an override is malformed, or the file of settings is not in the
            folder that is sent.
    """
    parser = argparse.ArgumentParser(
        prog="hybridrl submit",
        description="Train as a job of a Ray cluster. A job that was stopped or failed continues "
        "when the same settings are submitted again.",
        usage="%(prog)s [options] KEY=VALUE ...",
    )
    parser.add_argument(
        "--config", type=Path, help="YAML file of settings, in the folder that is sent"
    )
    parser.add_argument("--address", help="http://HOST:PORT of the dashboard")
    parser.add_argument("--id", help="name of the job; by default Ray chooses one")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="folder to send to every node; by default the current one",
    )
    parser.add_argument(
        "--program", default=TRAIN[0], help="path of hybridrl on the nodes; by default from PATH"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the job"
    )
    parser.add_argument("--no-wait", action="store_true", help="return when it is submitted")
    parser.add_argument("--resume", metavar="ID", help="start from the settings of that job")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="a sweep: one job for each combination"
    )
    options, overrides = parser.parse_known_args(arguments)
    if flags := [o for o in overrides if o.startswith("-")]:
        raise ConfigError(f"{flags[0]}: hybridrl submit has no such option; see --help")
    earlier_config = None
    if options.resume:
        earlier_config, earlier = settings_of(Jobs(options.address).find(options.resume))
        overrides = [*earlier, *overrides]
    folder = options.folder.expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"--folder {options.folder}: is not a folder; name the checkout")
    config = earlier_config if options.config is None else in_folder(options.config, folder)
    jobs = jobs_of_sweep(overrides) if options.multirun else [overrides]
    return Submission(
        address=options.address,
        id=options.id,
        folder=folder,
        program=options.program,
        variables=dict(variables(options.env)),
        wait=not options.no_wait,
        config=config,
        overrides=[
            [o.replace(NUMBER, str(number)) for o in job] for number, job in enumerate(jobs)
        ],
    )


def in_folder(config: Path, folder: Path) -> str:
    """The path of a file of settings as the job sees it.

    Raises:
        ConfigError: it is not a file, or is not in the folder that is sent.
    """
    path = config.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"--config {config}: is not a file")
    if not path.is_relative_to(folder):
        raise ConfigError(
            f"--config {config}: must be in {folder}, which is sent to the nodes; move it "
            "there, or name its folder by --folder"
        )
    return str(path.relative_to(folder))


def variables(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each --env.

    Raises:
        ConfigError: one is not NAME=VALUE, or is a secret.
    """
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--env {text}: must be NAME=VALUE")
        if variable_secrets(name, value):
            raise ConfigError(
                f"--env {name}: looks like a secret, and Ray's dashboard shows the variables of a "
                "job; export it on every node before `ray start`"
            )
        yield name, value


def settings_of(job: Submitted) -> tuple[str | None, list[str]]:
    """The file of settings and the overrides of a job that was submitted by `hybridrl submit`.

    Raises:
        ConfigError: its command is not `hybridrl train`.
    """
    try:
        words = shlex.split(job.command)
    except ValueError:  # a quote without its end
        words = []
    has_file = words[2:3] == ["--config"]
    if (
        len(words) < (4 if has_file else 3)
        or words[1] != TRAIN[1]
        or Path(words[0]).name != TRAIN[0]
    ):
        raise ConfigError(f"--resume {job.id}: its command is not hybridrl train: {job.command}")
    if has_file:
        return words[3], words[4:]
    return None, words[2:]


def check(overrides: Sequence[str], config: Path | None = None) -> None:
    """Refuse settings with which the job would fail, as far as this machine can tell.

    Args:
        config: the file of settings over which the overrides take precedence; None: there is none.

    Raises:
        ConfigError: a setting is wrong, or run.dir would be lost with the job.
    """
    texts = list(overrides)
    if config is not None:  # load_settings refuses other bytes
        texts.append(config.read_text(encoding="utf-8", errors="replace"))
    with placeholders(texts):
        run_dir = Path(load_settings(overrides, config).run.dir).expanduser()
    if not run_dir.is_absolute():
        raise ConfigError(
            f"run.dir={run_dir}: must be absolute, because a job runs in a copy of this folder "
            "that is deleted; give a path on storage that all nodes share"
        )


@contextmanager
def placeholders(texts: Sequence[str]) -> Iterator[None]:
    """Set, within the block, the variables to which ${oc.env:NAME} in these texts refers and that
    this environment lacks, since they may be set on the cluster. The value is an absolute path, as
    run.dir may begin with such a variable.
    """
    names = re.findall(r"\$\{oc\.env:(\w+)\}", " ".join(texts))
    missing = [name for name in dict.fromkeys(names) if name not in os.environ]
    os.environ.update(dict.fromkeys(missing, "/set-on-the-cluster"))
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def job_of(submission: Submission, number: int, overrides: Sequence[str]) -> Job:
    """The job of one combination of a sweep, which is numbered where there are several."""
    several = len(submission.overrides) > 1
    config = [] if submission.config is None else ["--config", submission.config]
    return Job(
        id=f"{submission.id}-{number}" if submission.id and several else submission.id,
        command=shlex.join([submission.program, TRAIN[1], *config, *overrides]),
        folder=submission.folder,
        variables=submission.variables,
    )


def ended(jobs: Jobs, job_id: str) -> int:
    """Follow a job to its end; returns its exit status. After Ctrl-C the job goes on.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        ClusterLost: the dashboard ended.
    """
    try:
        job = jobs.follow(job_id)
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on: hybridrl jobs {job_id} follows it, hybridrl jobs {job_id} --stop "
            "stops it",
            flush=True,
        )
        raise
    status = exit_status(job)
    print(f"job {job.id}: {job.state.lower()}, exit status {status}", flush=True)
    return status


def jobs(arguments: Sequence[str]) -> int:
    """List the jobs of a cluster, or follow or stop one; returns the exit status of a job that was
    followed.

    Raises:
        ConfigError: there is no such job, or no cluster, or an option needs an ID.
        ClusterLost: the dashboard ended while the job ran.
    """
    parser = argparse.ArgumentParser(
        prog="hybridrl jobs",
        description="List the jobs of a Ray cluster; with ID follow that job to its end.",
    )
    parser.add_argument("id", metavar="ID", nargs="?")
    parser.add_argument("--address", help="http://HOST:PORT of the dashboard")
    parser.add_argument("--stop", action="store_true", help="save a checkpoint and end")
    parser.add_argument("--status", action="store_true", help="print its state and return")
    options = parser.parse_args(arguments)
    if options.id is None and (options.stop or options.status):
        option = "--stop" if options.stop else "--status"
        raise ConfigError(f"{option}: give the ID of a job; `hybridrl jobs` lists them")
    cluster = Jobs(options.address)
    if options.id is None:
        for job in cluster.all():
            print(line_of(job))
        return 0
    if options.stop:
        cluster.stop(options.id)
    if options.stop or options.status:
        print(line_of(cluster.find(options.id)))
        return 0
    return ended(cluster, options.id)


def line_of(job: Submitted) -> str:
    started = job.started.isoformat(" ", "seconds") if job.started else "not started"
    return f"{job.id}  {job.state.lower()}  {started}  {job.command}"
