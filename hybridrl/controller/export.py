"""A run's newest checkpoint as a Hugging Face folder; needs neither Ray nor a GPU."""

from pathlib import Path

from hybridrl.controller.checkpoint import Checkpointer
from hybridrl.controller.run_directory import check_no_links, read_settings
from hybridrl.errors import CheckpointError, ConfigError
from hybridrl.models.export import export, master_weights
from hybridrl.models.loading import resolve


def export_checkpoint(run_dir: Path, folder: Path | None = None) -> Path:
    """Write what the learner itself would export at that step; returns the folder.

    Args:
        folder: must be new or empty; None: export/step_NNNNNN in the run directory, replaced if it is there.

    Raises:
        RunDirectoryError: `run_dir` holds no run, or a part of it is a link.
        CheckpointError: there is no checkpoint, or none is sound.
        ConfigError: `folder` holds something, or the model that training started from is gone.
    """
    settings = read_settings(run_dir)
    check_no_links(run_dir)
    checkpointer = Checkpointer(run_dir, settings.checkpoint)
    checkpoint = checkpointer.newest()
    if checkpoint is None:
        raise CheckpointError(
            f"{checkpointer.root}: no checkpoint to export; train until the first, see checkpoint.every"
        )
    if (
        folder is not None
        and folder.exists()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise ConfigError(f"{folder}: exists and is not empty; name a new folder")
    target = folder or run_dir / "export" / checkpoint.folder.name
    source = resolve(settings.model.path, settings.model.revision)
    export(master_weights(checkpoint.folder, settings.model.dtype), source, target)
    return target
