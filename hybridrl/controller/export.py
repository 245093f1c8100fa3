"""A run's newest checkpoint as a Hugging Face folder; needs neither Ray nor a GPU."""

from pathlib import Path

from hybridrl.config import RunSettings
from hybridrl.controller.checkpoint import Checkpointer
from hybridrl.controller.run_directory import check_no_links, read_settings
from hybridrl.data.chat import read_template
from hybridrl.durable import replace_text
from hybridrl.errors import CheckpointError, ConfigError
from hybridrl.models.export import TEMPLATE, export, master_weights
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
    weights = master_weights(checkpoint.folder, settings.model.dtype)
    export(weights, source, target, run_dir / TEMPLATE)
    return target


def keep_template(settings: RunSettings, run_dir: Path) -> None:
    """Copy data.chat_template_file into the run directory, for exports must read conversations as the run did."""
    kept = run_dir / TEMPLATE
    if settings.data.chat_template_file is None:
        kept.unlink(missing_ok=True)
    else:
        replace_text(kept, read_template(settings.data.chat_template_file))
