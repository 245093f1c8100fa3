"""hybridrl: distributed post-training by one objective, dense imitation plus sparse reward."""

from typing import TYPE_CHECKING, Any

__all__ = ["RunResult", "StopTraining", "WarmWorkers", "__version__", "train"]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hybridrl.api import train
    from hybridrl.core.errors import StopTraining
    from hybridrl.launch.run_result import RunResult
    from hybridrl.launch.warm_workers import WarmWorkers


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, because the imports take seconds."""
    if name == "train":
        from hybridrl.api import train

        return train
    if name == "StopTraining":
        from hybridrl.core.errors import StopTraining

        return StopTraining
    if name == "RunResult":
        from hybridrl.launch.run_result import RunResult

        return RunResult
    if name == "WarmWorkers":
        from hybridrl.launch.warm_workers import WarmWorkers

        return WarmWorkers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
