"""The sink for Weights & Biases: online if a key is configured, else offline, without prompting for
an account.
"""

import http.client
import json
import logging
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.git_commit import git_commit
from hybridrl.settings.choices import WandbMode
from hybridrl.settings.run import TrackingConfig
from hybridrl.tracking.wandb_internals import (
    key_hosts,
    quiet_settings,
    run_folder,
    server_address,
)
from hybridrl.tracking.wandb_overview import SavingOverview
from hybridrl.types import RunInfo, Sample

INIT_S = 30.0
FINISH_S = 60.0
REACH_S = 5.0
"""Timeout of the first request to the server."""
OVERVIEW_S = 5.0
"""Longest wait, in seconds, at the end of a run for a view that is still being saved."""
MOST_BYTES = 65536
"""Largest part of the server's first answer that is read."""

log = logging.getLogger(__name__)


class WandbSink:
    """Writes one W&B run. A resumed training continues the same run, by the id in its checkpoint.

    The run's config contains the settings and, as git_commit, the commit of the working directory.

    Metrics go to wandb's own process, which writes them to disk and uploads them; only start and
    close wait for a server. A thread saves the view of tracking.overview.

    Args:
        finish_s: seconds to wait at the end for the upload of the remaining data.

    Raises:
        ConfigError: tracking.wandb=online without a key, for which wandb would prompt.
    """

    name = "wandb"

    def __init__(self, config: TrackingConfig, *, finish_s: float = FINISH_S) -> None:
        self._config = config
        self._finish_s = finish_s
        self._mode = resolve_mode(config.wandb)
        self._run: Any = None
        self._run_id: str | None = None
        self._overview: SavingOverview | None = None

    def state_dict(self) -> str | None:
        """The id of the W&B run; None before the first start, and when W&B is disabled."""
        return self._run_id

    def load_state_dict(self, state: str | None) -> None:
        """Continue the W&B run of that id; None: begin a new one."""
        self._run_id = state

    def start(self, info: RunInfo) -> None:
        if self._mode is WandbMode.disabled or self._run is not None:
            return
        if self._mode is WandbMode.online and (reason := unreachable()):
            log.warning(
                "W&B: %s; this run is tracked offline, `wandb sync %s/wandb/offline-run-*` sends "
                "it later",
                reason,
                info.run_dir,
            )
            self._mode = WandbMode.offline
        try:
            self._open(info)
        except Exception as error:  # W&B's client has no base class for a refusal by the server
            if self._mode is not WandbMode.online:
                raise
            log.warning(
                "W&B: the server at %s refused the run (%s); it is tracked offline, `wandb sync "
                "%s/wandb/offline-run-*` sends it later",
                server_address(),
                str(error).splitlines()[0] if str(error) else type(error).__name__,
                info.run_dir,
            )
            self._mode = WandbMode.offline
            self._open(info)

    def _open(self, info: RunInfo) -> None:
        import wandb

        self._run = wandb.init(
            mode="online" if self._mode is WandbMode.online else "offline",
            dir=info.run_dir,
            id=self._run_id,
            resume="allow",
            name=self._config.name or run_name(info),
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=list(self._config.tags),
            config=info.config | ({"git_commit": commit} if (commit := git_commit()) else {}),
            settings=quiet_settings(
                init_s=INIT_S,
                finish_s=self._finish_s,
                system_metrics=self._config.system_metrics,
            ),
        )
        self._run_id = self._run.id
        self._run.define_metric("*", step_metric="train/step")
        if self._config.overview and self._mode is WandbMode.online:
            self._overview = SavingOverview(self._run.entity, self._run.project)

    def log(self, metrics: Mapping[str, float]) -> None:
        # Without step=, because W&B drops rows below its own counter, and a resumed run has such.
        if self._run is not None:
            self._run.log(dict(metrics))

    def samples(self, rows: Sequence[Sample]) -> None:
        self._log_table("eval/samples", rows)

    def rollouts(self, rows: Sequence[Sample]) -> None:
        self._log_table("train/rollouts", rows)

    def _log_table(self, key: str, rows: Sequence[Sample]) -> None:
        """One row for each response, with a column for each reward function."""
        if self._run is None or not rows:
            return
        import wandb

        names = [f.name for f in fields(Sample) if f.name != "parts"]
        functions = list(rows[0].parts)
        table = wandb.Table(
            columns=[*names, *(f"reward/{function}" for function in functions)],
            data=[
                [getattr(row, name) for name in names] + [row.parts[name] for name in functions]
                for row in rows
            ],
        )
        self._run.log({"train/step": rows[0].step, key: table})

    def close(self, exit_code: int) -> None:
        """Upload the remaining data and end the run.

        Raises:
            TimeoutError: the upload took too long; all data are on disk.
        """
        if self._run is None:
            return
        if self._overview is not None:
            self._overview.wait(min(OVERVIEW_S, self._finish_s))
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError as error:
            remedy = f"`wandb sync {run_folder(self._run)}` sends it"
            raise TimeoutError(
                f"the rest of the run was not uploaded within {self._finish_s:g} s; {remedy}"
            ) from error


def run_name(info: RunInfo) -> str:
    """The default name of a run: its directory, and settings that usually differ between the runs
    of a sweep.

    Example: "a countdown-student lr=0.001 seed=0" for runs/a
    """
    settings = info.config
    student = str(settings["model"]["path"]).rstrip("/").replace(":", "/").rpartition("/")[2]
    return f"{info.name} {student} lr={settings['train']['lr']:g} seed={settings['run']['seed']}"


def resolve_mode(mode: WandbMode) -> WandbMode:
    """The mode to use. Auto becomes WANDB_MODE if that is offline or disabled, else online with a
    key and offline without one.

    Raises:
        ConfigError: the mode is online, and there is no key.
    """
    if mode is WandbMode.auto:
        environment_mode = os.environ.get("WANDB_MODE")
        if environment_mode in ("offline", "disabled"):
            return WandbMode(environment_mode)
        return WandbMode.online if has_key() else WandbMode.offline
    if mode is WandbMode.online and not has_key():
        raise ConfigError(
            "tracking.wandb=online: no WANDB_API_KEY and no netrc entry; set one, run `wandb "
            "login`, or set tracking.wandb=offline"
        )
    return mode


def unreachable() -> str:
    """Why a run cannot be sent to the W&B server, as a clause; empty if it can.

    This is asked first because the client of W&B retries for most of a minute before it reports an
    error. Only a GraphQL answer counts, not a login page, a page of a proxy, or the JSON of another
    service. The key is not checked here, since the client reports an invalid key itself.
    """
    url = f"{server_address().rstrip('/')}/graphql"
    query = json.dumps({"query": "{ serverInfo { cliVersionInfo } }"}).encode()
    request = urllib.request.Request(
        url, data=query, headers={"Content-Type": "application/json", "User-Agent": "hybridrl"}
    )
    try:
        with urllib.request.urlopen(request, timeout=REACH_S) as answer:
            status = answer.status
            body = answer.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        status = error.code
        body = error.read(MOST_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"there is no answer from {server_address()} ({getattr(error, 'reason', error)})"
    if status >= 500:
        return f"the server at {server_address()} answers with status {status}"
    try:
        parsed = json.loads(body)
    except ValueError:
        return (
            f"{server_address()} answers with a page (status {status}) and not as a W&B server "
            "does, perhaps the login page of a proxy"
        )
    if not isinstance(parsed, dict) or not parsed.keys() & {"data", "errors"}:
        return f"{server_address()} answers with status {status}, but not as a W&B server does"
    return ""


def has_key() -> bool:
    """Whether W&B can log in without a prompt: by WANDB_API_KEY or a netrc entry for its host."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) for host in key_hosts(server_address()))
    except (OSError, netrc.NetrcParseError):
        return False
