"""Placement on GPUs by a real Ray that is configured with four GPUs, on a machine without any."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster as RayNodes

from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.reward_group import RewardGroup
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.compose import load_config

ROOT = Path(__file__).parents[2]
UUIDS = ("GPU-0a", "GPU-1b", "GPU-2c", "GPU-3d")
NVIDIA_SMI = "#!/bin/sh\n" + "".join(f'echo "{u}, {i}"\n' for i, u in enumerate(UUIDS))
NOSET = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a Ray with one node, whose GPUs have UUIDs instead of indices."""
    nodes = RayNodes(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "num_gpus": 4,
            "env_vars": {"CUDA_VISIBLE_DEVICES": ",".join(UUIDS)},
        },
    )
    yield nodes.address
    nodes.shutdown()


class Rewards(RewardGroup):
    worker = "tests.support.failing_worker:OnDevice"


def with_nvidia_smi(folder: Path, slot: Slot) -> str:
    """A PATH for the worker with a stand-in for nvidia-smi that knows the GPUs."""
    (folder / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}:{slot.env['PATH']}"


def gpus_of(
    address: str, folder: Path, teams: list[Team], *overrides: str, env: dict[str, str]
) -> tuple[dict[str, list[list[str]]], WeightTransfer]:
    """The GPUs that each worker sees, by team, and the backend of weight transfer."""
    settings = load_config(
        [
            f"run.dir={folder}",
            "experiment=quickstart",
            "cluster.device=cuda",
            f"cluster.address={address}",
            *overrides,
        ]
    )
    seen = {}
    groups = []
    with Cluster(settings) as cluster:
        assert cluster.device == "cuda"
        for name, slots in cluster.place(teams).items():
            path = with_nvidia_smi(folder, slots[0])
            own = [
                replace(s, env={**s.env, "PATH": path, "PYTHONPATH": str(ROOT), **env})
                for s in slots
            ]
            worker = "tests.support.failing_worker:OnGpus"
            groups.append(ActorGroup(name, worker, own, [{}] * len(own), log_dir=str(folder)))
        for group in groups:
            seen[group.name] = group.call_all("gpus", deadline_s=60)
        for group in groups:
            group.close()
        return seen, cluster.weight_transfer


@pytest.mark.graph
@pytest.mark.parametrize("env", [{}, NOSET], ids=["set by Ray", "not set by Ray"])
def test_each_worker_has_gpus_of_its_own_by_their_numbers(
    env: dict[str, str], address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    teams = [
        Team(name="learner", size=2, gpus=1, heavy=True),
        Team(name="rollout", size=1, gpus=2, heavy=True),
    ]
    seen, transfer = gpus_of(address, tmp_path, teams, env=env)
    assert [len(gpus) for gpus in (*seen["learner"], *seen["rollout"])] == [1, 1, 2]
    assert sorted(g for gpus in (*seen["learner"], *seen["rollout"]) for g in gpus) == list("0123")
    assert transfer is WeightTransfer.nccl


@pytest.mark.graph
def test_the_reward_models_of_a_worker_with_a_gpu_compute_on_it(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """This is seen from the worker's argument `device`, and from the GPUs that Ray has assigned."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    place = ["cluster.device=cuda", f"cluster.address={address}"]
    settings = load_config([f"run.dir={tmp_path}", "experiment=quickstart", *place])
    with Cluster(settings) as cluster:
        (slot,) = cluster.place([Team(name="reward", size=1, gpus=1, heavy=False)])["reward"]
        path = with_nvidia_smi(tmp_path, slot)
        own = replace(slot, env={**slot.env, "PATH": path, "PYTHONPATH": str(ROOT)})
        rewards = Rewards(settings, [own], log_dir=str(tmp_path))
        assert rewards.group.call_all("place", deadline_s=60) == [("cuda", 1)]
        rewards.close()


@pytest.mark.graph
def test_colocated_workers_of_one_number_share_a_gpu(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    teams = [
        Team(name=name, size=2, gpus=1, heavy=True) for name in ("learner", "rollout", "scorer")
    ]
    shared = ("cluster.colocate=true", "rollout.gpu_memory_utilization=0.4")
    seen, transfer = gpus_of(address, tmp_path, teams, *shared, env=NOSET)
    assert seen["learner"] == seen["rollout"] == seen["scorer"]
    first, second = seen["learner"]
    assert len(first) == len(second) == 1 and first != second
    assert transfer is WeightTransfer.ipc
