"""The internals of wandb that wandb_internals.py uses are unchanged.

If a test of a version fails after an upgrade, compare hybridrl/tracking/wandb_internals.py with the
new version, then change the version there. test_wandb_overview.py executes the used parts of
wandb-workspaces.
"""

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import wandb

from hybridrl.tracking.wandb_internals import (
    VERSION,
    WORKSPACES_VERSION,
    quiet_settings,
    run_folder,
)


def test_wandb_is_the_version_that_was_read():
    assert wandb.__version__.rpartition(".")[0] == VERSION, "see the first lines of this file"


def test_wandb_workspaces_is_the_version_that_was_read():
    installed = version("wandb-workspaces").rpartition(".")[0]
    assert installed == WORKSPACES_VERSION, "see the first lines of this file"


def test_wandb_takes_every_setting():
    """wandb's settings refuse an unknown name with an error that contains the name."""
    settings = quiet_settings(init_s=30, finish_s=2)
    assert settings.x_disable_stats and settings.x_disable_meta and settings.x_disable_machine_info
    assert not settings.x_save_requirements
    assert (settings.finish_timeout, settings.finish_timeout_raises) == (2, True)


def test_the_folder_of_a_run_has_its_id(tmp_path: Path):
    settings = quiet_settings(init_s=30, finish_s=2)
    settings.run_id = "abc123"
    settings.root_dir = str(tmp_path)
    folder = Path(run_folder(SimpleNamespace(settings=settings)))
    assert folder.name.endswith("-abc123") and tmp_path in folder.parents, (
        f"wandb keeps a run in another folder, {folder}"
    )
