"""Every error that hybridrl raises on purpose.

All of them but StopTraining, which a user raises, derive from HybridRLError. They keep their
constructor arguments in `args`, so that they survive pickling between processes. Where a standard
exception fits, the error is of that type too.
"""


class HybridRLError(Exception):
    """Base class of all errors that are raised on purpose."""


class ConfigError(HybridRLError, ValueError):
    """A setting that cannot work; the message names the field, value, rule and remedy."""


class DataError(HybridRLError, ValueError):
    """A prompt, answer or file that cannot be used; the message names the row."""


class CheckpointError(HybridRLError):
    """A checkpoint that is missing, incomplete or not what its manifest says."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files certainly differ from those that were saved."""


class RunDirectoryError(HybridRLError):
    """The run directory cannot be used.

    Another run has locked it, it holds another run, or it was changed while the run used it.
    """


class RunDirectoryTaken(RunDirectoryError):
    """Another directory has replaced the run's own; nothing may be written there."""


class LedgerError(HybridRLError):
    """A run's ledger is damaged, or records that a prompt was trained twice or omitted."""


class PlacementError(HybridRLError):
    """The cluster cannot hold the requested workers; the message lists demand and supply."""


class ContractError(HybridRLError):
    """A running teacher or engine breaks an assumption of the objective; the message names it."""


class WeightSyncError(HybridRLError):
    """An engine did not receive the weights that the learner sent."""


class MetricError(HybridRLError):
    """A setting names a metric that no step of the run measures."""


class RewardError(HybridRLError):
    """Reward calls failed: more than reward.max_error_rate, or any under reward.on_error=fail."""


class NonFiniteError(HybridRLError):
    """A loss or gradient was NaN or infinite; the update was not saved."""


class SkippedStep(NonFiniteError):
    """A gradient was NaN or infinite, and the weights were not changed."""


class WorkerError(HybridRLError):
    """A call to a worker process failed.

    Args:
        worker: name of the worker, e.g. "rollout/0".
        call: the method that was running.
        reason: one sentence.
        epoch: how many workers of that name preceded this one.
    """

    def __init__(self, worker: str, call: str, reason: str, epoch: int = 0) -> None:
        super().__init__(worker, call, reason, epoch)
        self.worker = worker
        self.call = call
        self.reason = reason
        self.epoch = epoch

    def __str__(self) -> str:
        return f"{self.worker} failed in {self.call}: {self.reason}"


class WorkerDied(WorkerError):
    """The worker's process has ended."""


class WorkerTimeout(WorkerError, TimeoutError):
    """The worker did not answer within its deadline."""


def raised(error: WorkerError) -> bool:
    """Whether the worker itself raised an exception, which the same call may raise again.

    False where the worker died or did not answer in time.
    """
    return not isinstance(error, WorkerDied | WorkerTimeout)


class ServerError(HybridRLError):
    """A server or an engine that scores for a teacher did not answer in time, or its answer cannot
    be used.

    The message names the setting and, for a server, its address.
    """


class HubError(HybridRLError):
    """The Hugging Face hub refused a request, or did not answer."""


class FleetExhausted(HybridRLError):
    """Workers of one kind failed more often than cluster.max_restarts allows.

    Also raised where a replacement cannot help.
    """


class ClusterLost(HybridRLError):
    """Ray itself has ended, so that workers can be neither called nor replaced."""


class StopTraining(Exception):
    """Raised by a user's on_step to end the run after the present step.

    The run saves its state and the call returns; the same call continues the run.
    """


class Preempted(HybridRLError):
    """A stop signal (SIGTERM, SIGHUP or Ctrl-C) ended the run, which saved what it had learned.

    The same command continues the run.
    """
