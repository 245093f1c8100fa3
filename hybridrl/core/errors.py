"""Every error a user can meet.

All derive from HybridRLError, keep their constructor arguments in `args` and so survive pickling
between processes. Where a standard type fits, the error is that type too.
"""


class HybridRLError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(HybridRLError, ValueError):
    """A setting that cannot work: the message names field, value, rule and remedy."""


class DataError(HybridRLError, ValueError):
    """A prompt, answer or file that cannot be used; the message names the row."""


class CheckpointError(HybridRLError):
    """A checkpoint that is missing, incomplete or not what its manifest says."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are certainly not those that were saved."""


class RunDirectoryError(HybridRLError):
    """The run directory cannot be used: locked by another run, holds another run, or was changed
    under the run.
    """


class RunDirectoryTaken(RunDirectoryError):
    """Another directory stands in the place of the run's own; nothing may be written there."""


class LedgerError(HybridRLError):
    """A run's ledger is damaged, or says that a prompt was trained twice or left out."""


class PlacementError(HybridRLError):
    """The cluster cannot hold what was asked for; the message lists demand against supply."""


class ContractError(HybridRLError):
    """A running teacher or engine does not give what the objective takes for granted; the message
    names it.
    """


class WeightSyncError(HybridRLError):
    """An engine did not receive the weights that the learner sent."""


class MetricError(HybridRLError):
    """A setting follows a metric that no step of the run measures."""


class RewardError(HybridRLError):
    """More reward calls failed than `reward.max_error_rate` allows, or the policy is to fail."""


class NonFiniteError(HybridRLError):
    """A loss or gradient was NaN or infinite; nothing of it is saved."""


class SkippedStep(NonFiniteError):
    """A gradient was NaN or infinite, and the weights are as they were before."""


class WorkerError(HybridRLError):
    """A worker process failed at a call.

    Args:
        worker: name of the worker, e.g. "rollout/0".
        call: the method that was running.
        reason: one sentence.
        epoch: how many workers of that name there were before this one.
    """

    def __init__(self, worker: str, call: str, reason: str, epoch: int = 0) -> None:
        super().__init__(worker, call, reason, epoch)
        self.worker, self.call, self.reason, self.epoch = worker, call, reason, epoch

    def __str__(self) -> str:
        return f"{self.worker} failed in {self.call}: {self.reason}"


class WorkerDied(WorkerError):
    """The worker's process is gone."""


class WorkerTimeout(WorkerError, TimeoutError):
    """The worker did not answer within its deadline."""


def raised(error: WorkerError) -> bool:
    """Whether the worker raised an exception, and neither died nor stayed silent: the same call may
    raise it again.
    """
    return not isinstance(error, WorkerDied | WorkerTimeout)


class FleetExhausted(HybridRLError):
    """Workers of one kind were lost more often than cluster.max_restarts allows, or a replacement
    cannot help.
    """


class ClusterLost(HybridRLError):
    """Ray itself is gone, so that workers can be neither called nor replaced."""


class Preempted(HybridRLError):
    """The run was told to end (SIGTERM) and has saved what it could; the same command continues."""
