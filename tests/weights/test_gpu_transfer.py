"""The transfer of weights between GPUs, executed on CPUs: vLLM's own trainer and worker engines of
the backends nccl and ipc, with the substitutes of tests/support/gpu_substitutes.py for NCCL and for
handles of memory.
"""

import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

from hybridrl.planning.memory import TRANSFER_BUFFER
from hybridrl.rollout.engine import Rollout
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
from hybridrl.weights import vllm_transfer
from hybridrl.weights.parameters import NamedTensor
from hybridrl.weights.stream import WeightStream
from hybridrl.weights.vllm_transfer import (
    EngineClient,
    ObjectStoreTransferEngine,
    ObjectStoreUpdateInfo,
    trainer_engine,
)
from tests.support import gpu_substitutes
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
    """The learner has two ranks with ZeRO-3, and other weights than the engines at their start. The
    engines run their core in its own process. When the learner's weights have changed, the engines
    receive them through a new channel, as after the loss of an engine, which is tested in
    tests/runtime/test_weight_sync.py.
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
        assert sync.publish(1) == stream_of(Path(settings.model.path)).nbytes
        serve_the_learners_weights(engines, learner, prompts)
        # 512 responses for each engine, which samples 64 at a time.
        chunks = engines.generate(prompts, wave="a", group_size=128, temperature=1.0, seed=1)
        sync.publish(2)
        spans = set()
        for chunk in chunks:
            batch = ray.get(chunk.batch.ref)
            for i in range(batch.num_sequences):
                row = batch.trajectory(i)
                versions = row.policy_versions[row.response_mask].tolist()
                assert versions == sorted(versions)
                spans.add((versions[0], versions[-1]))
        assert (1, 2) in spans, "some response has tokens of both versions"
        assert spans <= {(1, 1), (1, 2), (2, 2)}
        learner.group.call_all("double", deadline_s=settings.deadlines.learn_s)
        assert max(gaps(engines, learner, prompts)) > 0.1, "the engines' weights are older"
        learner.connected = None
        sync.publish(3)
        assert learner.is_connected(engines)
        serve_the_learners_weights(engines, learner, prompts)
        learner.close()
        engines.close()


def gaps(engines: RolloutGroup, learner: LearnerGroup, prompts: Sequence[Prompt]) -> list[float]:
    """The mean of |log p - log mu| in nats of the tokens that each of the two engines samples; log
    p is computed by the learner.
    """
    probes = engines.probe(prompts, num_tokens=16, temperature=1.0)
    assert set(probes) == {"rollout/0", "rollout/1"}
    return [gap for own in gather(learner.logprob_gaps([*probes.values()])) for gap in own]


def serve_the_learners_weights(
    engines: RolloutGroup, learner: LearnerGroup, prompts: Sequence[Prompt]
) -> None:
    assert max(gaps(engines, learner, prompts)) < 1e-4


def with_tests(slots: Sequence[Slot]) -> list[Slot]:
    """The slots with an environment in which workers can import the tests."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return [replace(slot, env={**slot.env, "PYTHONPATH": path}) for slot in slots]


# -- ipc -------------------------------------------------------------------------------------------


class Receiver(nn.Module):
    """A stand-in for vLLM's model that keeps the weights it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.received: dict[str, Tensor] = {}
        self.chunks: list[int] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        self.received |= {name: tensor.clone() for name, tensor in weights}
        self.chunks.append(len(self.received))
        return set(self.received)


class LocalEngine:
    """An engine in this process: vLLM's worker side of ipc, with the methods that a learner
    calls.
    """

    def __init__(self, model: Receiver) -> None:
        config = SimpleNamespace(parallel_config=None, model_config=SimpleNamespace(dtype=None))
        device = SimpleNamespace(index=0)
        self.worker = IPCWeightTransferEngine(None, config, device, model)
        self.versions: list[int] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.worker.init_transfer_engine(self.worker.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        self.worker.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.worker.update_weights(update_info)

    def finish_weight_update(self, version: int) -> None:
        self.worker.finish_weight_update()
        self.versions.append(version)


def test_ipc_hands_over_all_weights_in_one_buffer_and_holds_no_second_copy_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The buffer has the size of the largest tensor, the embedding, instead of 1 GiB."""
    monkeypatch.setattr(vllm_transfer, "DEFAULT_PACKED_BUFFER_SIZE_BYTES", 1)
    stream = stream_of(save_tiny(tmp_path, 0))
    engine = LocalEngine(Receiver())

    def call(method: str, arguments: Sequence[tuple]) -> None:
        for own in arguments:
            getattr(engine, method)(*own)

    client = EngineClient(call, num_engines=1, tensor_parallel=1)
    with gpu_substitutes.substituted():
        sender = trainer_engine("ipc", 0, ("", 0), client, stream)
        client.version = 3
        sender.send_weights()
        [buffer] = gpu_substitutes.EXPORTED.values()
        largest = max(tensor.nbytes for _, tensor in stream)
        assert buffer.nbytes == stream.largest_nbytes == largest
    model = engine.worker.model
    assert engine.versions == [3]
    assert len(model.chunks) > 2, "several pieces"
    sent = dict(stream)
    assert model.received.keys() == sent.keys()
    assert all(torch.equal(model.received[name], sent[name]) for name in sent)


def test_a_buffer_of_ipc_has_at_least_the_size_that_vllm_chooses_and_that_of_the_largest_tensor():
    """The embedding of Qwen2.5-7B in bfloat16 has 152064 * 3584 * 2 bytes, more than 1 GiB."""
    shape = (152064, 3584)
    tensor = NamedTensor(name="embedding", shape=shape, dtype=torch.bfloat16, sources={})
    stream = WeightStream([tensor], lambda parameters: None)
    client = EngineClient(lambda method, arguments: None, num_engines=1, tensor_parallel=1)
    for rank in (0, 1):
        with gpu_substitutes.substituted():
            sender = trainer_engine("ipc", rank, ("", 0), client, stream)
        assert sender.packed and sender.packed_buffer_size_bytes == 1_089_994_752
    assert packed_tensor.DEFAULT_PACKED_BUFFER_SIZE_BYTES == TRANSFER_BUFFER, "as in the plan"


# -- object_store with several devices -------------------------------------------------------------


def test_the_devices_of_an_engine_read_the_packed_weights_from_a_file(tmp_path: Path):
    stream = stream_of(save_tiny(tmp_path / "model", 0))
    manifest, packed = stream.pack(version=1)
    packed.tofile(tmp_path / "packed")
    config = SimpleNamespace(parallel_config=None, model_config=SimpleNamespace(dtype=None))
    worker = ObjectStoreTransferEngine(None, config, torch.device("cpu"), Receiver())
    info = {"manifest": asdict(manifest), "path": str(tmp_path / "packed")}
    worker.start_weight_update()
    worker.receive_weights(ObjectStoreUpdateInfo(**info))
    worker.finish_weight_update()
    assert worker.received_digest == manifest.digest
    sent = dict(stream)
    assert all(torch.equal(worker.model.received[name], sent[name]) for name in sent)
    other = asdict(replace(manifest, digest="0" * 32))
    with pytest.raises(ValueError, match=f"received {manifest.nbytes} bytes with digest"):
        worker.receive_weights(ObjectStoreUpdateInfo(**(info | {"manifest": other})))


def test_an_engine_of_several_devices_hands_the_buffer_to_them_as_a_file():
    worker = Rollout.__new__(Rollout)
    packed = np.arange(5, dtype=np.uint8)
    worker.own_process = True
    with worker._within_reach(packed) as place:
        assert np.fromfile(place["path"], np.uint8).tolist() == [0, 1, 2, 3, 4]
    assert not Path(place["path"]).exists()
    worker.own_process = False
    with worker._within_reach(packed) as place:
        assert place["packed"] is packed


# -- the substitutes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "substitute"),
    # Read when tests are collected, since an engine in this process replaces functions of
    # torch.cuda.
    [
        pytest.param(getattr(module, name), substitute, id=f"{module.__name__}.{name}")
        for module, name, substitute in gpu_substitutes.SUBSTITUTES
    ],
)
def test_a_substitute_has_the_signature_of_what_it_stands_for(real: Any, substitute: Any):
    assert parameters(substitute) == parameters(real)
    for method in ("broadcast", "destroy"):
        if isinstance(real, type):
            assert parameters(getattr(substitute, method)) == parameters(getattr(real, method))


def parameters(function: Any) -> list[tuple[str, Any]]:
    """The names and defaults of the parameters of a function, or of a class's constructor."""
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.default) for parameter in found]
