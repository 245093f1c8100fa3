"""Which commit on the hub a model's name means."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from hybridrl.models.loading import BUILTIN


def newest_commit(path: str) -> str | None:
    """The commit that a name without a revision means now. None: it is a folder or built in, or
    cannot be had, which loading it will say.
    """
    if path.startswith(BUILTIN) or Path(path).exists():
        return None
    try:
        snapshot = Path(snapshot_download(path, allow_patterns=["config.json"]))
    except (OSError, HFValidationError):
        return None
    return snapshot.name if snapshot.parent.name == "snapshots" else None
