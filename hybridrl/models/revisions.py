"""The commit on the hub to which the name of a model refers."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from hybridrl.models.loading import BUILTIN


def newest_commit(path: str) -> str | None:
    """The commit that a name without a revision refers to at present.

    None for a folder, for a built-in model, and for a model that cannot be reached, whose loading
    raises an error with the reason.
    """
    if path.startswith(BUILTIN) or Path(path).exists():
        return None
    try:
        snapshot = Path(snapshot_download(path, allow_patterns=["config.json"]))
    except (OSError, HFValidationError):
        return None
    return snapshot.name if snapshot.parent.name == "snapshots" else None
