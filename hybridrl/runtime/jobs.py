"""Jobs of a Ray cluster, through its dashboard: submit one, follow its output, stop it."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from hybridrl.core.errors import ClusterLost, ConfigError
from hybridrl.runtime.job_client_internals import TimedJobClient

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

ADDRESS = "http://127.0.0.1:8265"
"""The default address of a dashboard that `ray start` opened on this machine or a tunnel forwards.
"""
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
QUIET_S = 60.0
"""The longest wait for output before the dashboard is asked whether the job still runs, and the
longest wait for a lost dashboard to answer again.
"""
RETRY_S = 1.0
LOST = (OSError, RuntimeError, requests.RequestException, aiohttp.ClientError)
"""Exceptions of Ray's client if the dashboard does not answer."""
STOPPED_STATUS = os.EX_TEMPFAIL  # 75: the same command continues the run
EXCLUDED = (
    ".git",
    ".venv*",
    "runs",
    "wandb",
    "outputs",
    "multirun",
    "__pycache__",
    ".*_cache",
)
"""Files that are not sent with a working directory, in addition to those in its .gitignore."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job to submit."""

    id: str | None
    """None: Ray chooses one"""
    command: str
    """run by a shell on the head"""
    folder: Path
    """copied to every node; the working directory of the command"""
    variables: Mapping[str, str] = field(default_factory=dict)
    """environment variables; the dashboard shows them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job as the cluster lists it."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED"""
    command: str
    started: datetime | None
    exit_status: int | None
    """of the command; None: the command has not ended, or was killed"""
    message: str

    @property
    def ended(self) -> bool:
        return JobStatus(self.state).is_terminal()


class Jobs:
    """The jobs of one cluster.

    Args:
        address: http(s)://HOST:PORT of the dashboard; None: RAY_API_SERVER_ADDRESS, else port 8265
            of this machine.

    Raises:
        ConfigError: that is no such address, no dashboard answers there, or it refuses the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get(ADDRESS_VARIABLE) or ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"--address {self.address}: must be http(s)://HOST:PORT of the dashboard, which is "
                "usually at port 8265"
            )
        with self._asking(), address_variable(self.address):
            self._client = TimedJobClient(self.address)

    def submit(self, job: Job) -> str:
        """Start a job; returns its id.

        Raises:
            ConfigError: the cluster refuses it, e.g. because there is a job of that id, or the
                folder is too large.
        """
        environment: dict[str, Any] = {
            "working_dir": str(job.folder),
            "excludes": list(EXCLUDED),
            "env_vars": dict(job.variables),
        }
        with self._asking():
            return self._client.submit_job(
                entrypoint=job.command, submission_id=job.id, runtime_env=environment
            )

    def find(self, job_id: str) -> Submitted:
        """The job with this id.

        Raises:
            ConfigError: there is no such job.
        """
        with self._asking():
            return described(self._client.get_job_info(job_id))

    def all(self) -> list[Submitted]:
        """All jobs that were submitted to this cluster, newest first."""
        with self._asking():
            listed = [described(d) for d in self._client.list_jobs() if d.submission_id]
        return sorted(listed, key=lambda job: job.started or datetime.max, reverse=True)

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to a job; a run then saves a checkpoint and ends."""
        with self._asking():
            self._client.stop_job(job_id)

    def follow(self, job_id: str, write: Callable[[str], Any] = sys.stdout.write) -> Submitted:
        """Write the job's output from its beginning until the job ends. A lost connection is opened
        again, without repeating output.

        Returns:
            The job after its end.

        Raises:
            ConfigError: there is no such job.
            ClusterLost: the dashboard did not answer for QUIET_S.
        """
        self.find(job_id)
        asyncio.run(Output(self._client, self.address, job_id, write).follow())
        return self.find(job_id)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn each error of Ray's client into a ConfigError of one sentence."""
        try:
            yield
        except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
            raise ConfigError(
                f"--address {self.address}: no Ray dashboard answers there; start the cluster, "
                "open a tunnel to its head (ssh -L 8265:127.0.0.1:8265 HEAD), or give the address"
            ) from error
        except AuthenticationError as error:
            raise ConfigError(
                f"--address {self.address}: the cluster refuses the token; copy the head's "
                "~/.ray/auth_token here, mode 600, and set RAY_AUTH_MODE=token"
            ) from error
        except RuntimeError as error:
            raise ConfigError(f"--address {self.address}: {refusal(error)}") from error
        except (requests.RequestException, KeyError) as error:  # e.g. a page for a login
            raise ConfigError(
                f"--address {self.address}: what answers there is no Ray dashboard "
                f"({refusal(error)})"
            ) from error


@contextmanager
def address_variable(address: str) -> Iterator[None]:
    """Set RAY_API_SERVER_ADDRESS within the block: Ray's client takes the address of that variable,
    or of RAY_ADDRESS, in place of the one that it is given.
    """
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


class Output:
    """Writes the whole output of a job once, over connections that may be lost."""

    def __init__(
        self,
        client: JobSubmissionClient,
        address: str,
        job_id: str,
        write: Callable[[str], Any],
    ) -> None:
        self._client = client
        self._address = address
        self._job_id = job_id
        self._write = write
        self._written = 0  # characters

    async def follow(self) -> None:
        lost_at: float | None = None
        loop = asyncio.get_running_loop()
        while True:
            before = self._written
            try:
                whole = await self._tail()
                if self._client.get_job_status(self._job_id).is_terminal() and whole:
                    return
                lost_at = None
            except LOST as error:
                if self._written > before:
                    lost_at = None  # this connection worked for a while
                lost_at = lost_at or loop.time()
                if loop.time() - lost_at > QUIET_S:
                    raise ClusterLost(
                        f"job {self._job_id}: the dashboard at {self._address} has not answered "
                        f"for {QUIET_S:g} s ({refusal(error)}); the job may go on: hybridrl jobs "
                        f"{self._job_id} follows it again"
                    ) from error
            await asyncio.sleep(RETRY_S)

    async def _tail(self) -> bool:
        """Write the output that one connection delivers, except what earlier ones delivered, until
        the connection ends or has delivered nothing for QUIET_S. A network may fail without ending
        the connection.

        Returns:
            Whether the connection has ended, so that all output was delivered.
        """
        seen = 0
        texts = self._client.tail_job_logs(self._job_id)
        while True:
            try:
                async with asyncio.timeout(QUIET_S):
                    text = await anext(texts)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            fresh = text[max(self._written - seen, 0) :]
            seen += len(text)
            if fresh:
                self._write(fresh)
                self._written += len(fresh)


def exit_status(job: Submitted) -> int:
    """The exit status of a command that waited for the job: 0 if it succeeded, 75 if it was stopped
    (the same command continues it), otherwise the job's own, or 1 if that is unknown.
    """
    match JobStatus(job.state):
        case JobStatus.SUCCEEDED:
            return 0
        case JobStatus.STOPPED:
            return STOPPED_STATUS
    return job.exit_status or 1


def described(details: JobDetails) -> Submitted:
    """Convert Ray's description of a job, leaving out its environment."""
    started = details.start_time
    return Submitted(
        id=str(details.submission_id),
        state=str(details.status),
        command=details.entrypoint,
        started=None if not started else datetime.fromtimestamp(started / 1000),
        exit_status=details.driver_exit_code,
        message=details.message or "",
    )


def refusal(error: BaseException) -> str:
    """The last line of an error of Ray's client, which may hold a traceback of the server and end
    with lines that hold a full stop alone.
    """
    lines = [line.strip().rstrip(".") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)
