"""What the groups have in common whose workers hold no state that a run would miss."""

from typing import Any

from hybridrl.settings.run import RunSettings


def replaceable(settings: RunSettings, log_dir: str) -> dict[str, Any]:
    """Of groups whose workers hold no state that the run would miss."""
    return {"log_dir": log_dir, "any_order": True, "max_restarts": settings.cluster.max_restarts}
