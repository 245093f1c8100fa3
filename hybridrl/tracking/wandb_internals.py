"""What is used of wandb and wandb-workspaces beyond their documented interface: settings whose
names begin with x_, which may change without notice, the folder of a run, the address of the server
and the hosts of its key, and the internal name of a view.

Read in the versions below. tests/tracking/test_wandb_internals.py fails when another version is
installed or when one of them is gone.
"""

import json
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from wandb import Run, Settings
    from wandb_workspaces.workspaces import Workspace

VERSION = "0.31"
WORKSPACES_VERSION = "0.4"


def quiet_settings(*, init_s: float, finish_s: float, system_metrics: bool = False) -> "Settings":
    """Settings by which wandb logs what it is given, and no more.

    Probes of machine, git and packages take time and publish more than was asked for. Its own probe
    of git also publishes the address of the remote, which may contain a password.

    Args:
        system_metrics: whether it samples the use of the driver's machine every 15 s.
        init_s: seconds to wait at the start for the server.
        finish_s: seconds to wait at the end, after which a TimeoutError is raised.
    """
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_stats=not system_metrics,
        x_disable_meta=True,
        x_disable_machine_info=not system_metrics,  # which switches off the statistics too
        x_save_requirements=False,
        init_timeout=init_s,
        finish_timeout=finish_s,
        finish_timeout_raises=True,
    )


def run_folder(run: "Run") -> str:
    """The folder that `wandb sync` takes."""
    return run.settings.sync_dir


def server_address() -> str:
    """The address of the server that wandb uses: that of WANDB_BASE_URL, else of the file that
    `wandb login --host` writes, else its default.
    """
    from wandb.sdk import wandb_setup

    return os.environ.get("WANDB_BASE_URL") or wandb_setup.singleton().settings.base_url


def key_hosts(address: str) -> list[str]:
    """The hosts whose netrc entry wandb takes as the key for a server: itself, and the one behind
    it.
    """
    from wandb.sdk.lib.urls import forge_upstream_url

    hosts = [urlsplit(url).netloc for url in (address, forge_upstream_url(address))]
    return [host for host in hosts if host]


def view_exists(entity: str, project: str, name: str) -> bool:
    """Whether the project has a view of this internal name, which its address has as ?nw=name."""
    from wandb_workspaces.workspaces import internal
    from wandb_workspaces.workspaces.errors import SpecVersionError

    try:
        internal.get_view_dict(entity, project, name)
    except (SpecVersionError, json.JSONDecodeError):
        return True  # written by another version of the app
    except ValueError:
        return False
    return True


def set_view_name(workspace: "Workspace", name: str) -> None:
    """Give a new view an internal name, which would be drawn at random when it is saved.

    Args:
        name: without the parts "nw-" and "-v", which the library adds and takes away.
    """
    workspace._internal_name = f"nw-{name}-v"
