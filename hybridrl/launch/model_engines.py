"""The engines and reward workers of a run, for a model that is not being trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hybridrl.launch.loadable_model import LoadableModel
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.start_up import StartUp
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.run import RunSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEngines:
    """The running workers."""

    rollout: RolloutGroup
    rewards: RewardGroup | None  # None: nothing is judged


@contextmanager
def started_engines(
    model: LoadableModel, log_dir: str, say: Callable[[str], None], *, judged: bool
) -> Iterator[ModelEngines]:
    """Start rollout.engines engines with the model; they end with the block.

    Args:
        log_dir: the folder with one log for each worker.
        say: prints a line about each worker that is up.
        judged: also start reward.workers workers, with reward.gpus each.

    Raises:
        PlacementError: the cluster cannot hold them.
        WorkerError: a worker could not be built, within deadlines.start_s.
    """
    settings = model.settings
    start_up = StartUp(say)
    with Cluster(settings) as cluster:
        slots = cluster.place(teams_of(settings, judged=judged))
        rewards = RewardGroup(settings, slots["reward"], log_dir=log_dir) if judged else None
        if rewards is not None and settings.cluster.colocate:
            start_up.wait(rewards.ready())  # an engine measures the free memory of its GPU
        engines = RolloutGroup(
            settings,
            slots["rollout"],
            model=model.config,
            device=cluster.device,
            backend=WeightTransfer.object_store,  # no weights arrive; a failed engine is replaced
            log_dir=log_dir,
            teacher=model.teacher,
        )
        starting = [*engines.ready(), *(rewards.ready() if rewards else [])]
        start_up.wait(starting)
        yield ModelEngines(rollout=engines, rewards=rewards)


def teams_of(settings: RunSettings, *, judged: bool) -> list[Team]:
    """The workers, kind by kind, with as many GPUs as in the run."""
    rollout = settings.rollout
    reward = settings.reward
    teams = [Team(name="rollout", size=rollout.engines, gpus=rollout.tensor_parallel, heavy=True)]
    if judged:
        teams.append(Team(name="reward", size=reward.workers, gpus=reward.gpus, heavy=False))
    return teams
