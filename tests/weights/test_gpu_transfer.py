"""Weights between GPUs, on CPUs: vLLM's own trainer and worker engines of the backends nccl and
ipc, with the substitutes of tests/support/gpu_substitutes.py for NCCL and for handles of memory.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.runtime.weight_sync import WeightSync
from hybridrl.runtime.workers import teams
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.models import ModelConfig
from hybridrl.types import Prompt
from hybridrl.weights.stream import WeightStream
from hybridrl.weights.vllm_transfer import EngineClient, trainer_engine
from tests.support.graph import save_tiny, tiny_settings
from tests.weights.test_vllm_transfer import stream_of

ROOT = Path(__file__).parents[2]


class Learners(LearnerGroup):
    worker = "tests.support.gloo_workers:GlooLearner"


class Engines(RolloutGroup):
    worker = "tests.support.gloo_workers:GlooRollout"


@pytest.mark.graph
def test_two_engines_of_two_devices_take_a_sharded_learners_weights_while_they_sample(
    tmp_path: Path,
):
    """A learner with ZeRO-3 on two ranks, from other weights than the engines begin with. The
    engines run their core in a process of its own.
    """
    settings = tiny_settings(
        tmp_path,
        "learner.ranks=2",
        "learner.zero_stage=3",
        "rollout.engines=2",
        "rollout.tensor_parallel=2",
        "rollout.max_new_tokens=24",
        "cluster.threads_per_worker=1",
    )
    other = ModelConfig(path=str(save_tiny(tmp_path / "other", 2)), dtype="float32")
    prompts = [
        Prompt(uid=f"p{i}", input_ids=(1, 4 + i, 8, 20, 6), text="", columns={}) for i in range(8)
    ]
    nccl = WeightTransfer.nccl
    with Cluster(settings) as cluster:
        slots = {name: with_tests(own) for name, own in cluster.place(teams(settings)).items()}
        log_dir = str(tmp_path / "logs")
        engines = Engines(
            settings, slots["rollout"], model=other, device="cpu", backend=nccl, log_dir=log_dir
        )
        learner = Learners(settings, slots["learner"], device="cpu", log_dir=log_dir)
        gather([*engines.ready(), *learner.ready()])
        sync = WeightSync(learner, engines, nccl)
        early = engines.generate(prompts, wave="a", group_size=4, temperature=1.0, seed=1)
        assert sync.publish(1) == stream_of(Path(settings.model.path)).nbytes
        for chunk in early:
            batch = ray.get(chunk.batch.ref)
            for i in range(batch.num_sequences):
                row = batch.trajectory(i)
                versions = row.policy_versions[row.response_mask].tolist()
                assert set(versions) <= {-1, 1} and versions == sorted(versions)
        probes = engines.probe(prompts, num_tokens=16, temperature=1.0)
        assert len(probes) == 2
        gaps = np.concatenate(gather(learner.logprob_gaps([*probes.values()])))
        assert gaps.max() < 1e-4, "the engines sample from the learner's weights"
        learner.close()
        engines.close()


def with_tests(slots: Sequence[Slot]) -> list[Slot]:
    """Workers that can import the tests."""
    return [replace(slot, env={**slot.env, "PYTHONPATH": str(ROOT)}) for slot in slots]
