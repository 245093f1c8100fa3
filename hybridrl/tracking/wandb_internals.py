"""The uses of undocumented parts of wandb and wandb-workspaces: settings whose names begin with x_,
which may change without notice, the folder of a run, the address of the server and the hosts of its
key, and the internal name of a view.

They were read in the versions below. tests/tracking/test_wandb_internals.py fails when another
version is installed or when one of these parts is gone.
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
    """Settings with which wandb logs only the data that the sink passes to it.

    Probes of machine, git and packages take time and publish more than was asked for. The probe of
    git also publishes the address of the remote, which may contain a password.

    Args:
        init_s: seconds to wait at the start for the server.
        finish_s: seconds to wait at the end, after which a TimeoutError is raised.
        system_metrics: whether wandb samples the use of the driver's machine every 15 s.
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
        x_disable_machine_info=not system_metrics,  # it would switch off the statistics too
        x_save_requirements=False,
        init_timeout=init_s,
        finish_timeout=finish_s,
        finish_timeout_raises=True,
    )


def run_folder(run: "Run") -> str:
    """The folder of the run, which is the argument of `wandb sync`."""
    return run.settings.sync_dir


def server_address() -> str:
    """The address of the server that wandb uses: WANDB_BASE_URL, else that in the file that
    `wandb login --host` writes, else wandb's default.
    """
    from wandb.sdk import wandb_setup

    return os.environ.get("WANDB_BASE_URL") or wandb_setup.singleton().settings.base_url


def key_hosts(address: str) -> list[str]:
    """The hosts whose netrc entries wandb uses as the key of a server: the server's own, and that
    of its upstream server.
    """
    from wandb.sdk.lib.urls import forge_upstream_url

    hosts = [urlsplit(url).netloc for url in (address, forge_upstream_url(address))]
    return [host for host in hosts if host]


def view_exists(entity: str, project: str, name: str) -> bool:
    """Whether the project has a view of this internal name; a view's address contains ?nw=name."""
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
    """Set the internal name of a new view, which would otherwise be random.

    Args:
        name: without the parts "nw-" and "-v", which the library adds and removes.
    """
    workspace._internal_name = f"nw-{name}-v"
