"""Weights from learner to engine: the packed stream, the real vLLM engine, and the logic of the GPU
backends.
"""

import asyncio
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hybridrl.core.errors import WeightSyncError
from hybridrl.models.loading import load_model
from hybridrl.settings.choices import AdapterSync
from hybridrl.settings.lora import LoraConfig
from hybridrl.types import FinishReason, GenerateOrder, Prompt, RolloutBatch
from hybridrl.weights.parameters import FullFineTuning, LowRankAdapters
from hybridrl.weights.stream import WeightStream, unpack
from tests.support.graph import save_tiny, tiny_settings

PROMPTS = [
    Prompt(uid=f"p{i}", input_ids=(1, 4 + i, 8, 20, 6), text="", columns={}) for i in range(8)
]
ORDER = GenerateOrder(
    wave="w", chunk=0, num_chunks=1, group_size=2, temperature=1.0, max_new_tokens=12, seed=5
)


def stream_of(folder: Path) -> WeightStream:
    weights = FullFineTuning(load_model(str(folder)))
    return WeightStream(weights.published(), lambda parameters: nullcontext())


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_stream_unpacks_to_the_same_tensors_and_always_names_the_output_head(
    tmp_path, tied
):
    stream = stream_of(save_tiny(tmp_path, 0, tied=tied))
    manifest, packed = stream.pack(version=3)
    unpacked = dict(unpack(manifest, packed))
    assert manifest.names.count("lm_head.weight") == 1 and len(set(manifest.names)) == len(
        manifest.names
    )
    for name, parameter in load_model(str(tmp_path)).named_parameters():
        assert torch.equal(unpacked[name], parameter)
    assert torch.equal(unpacked["lm_head.weight"], unpacked["model.embed_tokens.weight"]) == tied
    assert manifest.version == 3 and manifest.nbytes == packed.nbytes


def test_one_changed_byte_changes_the_digest(tmp_path):
    model = load_model(str(save_tiny(tmp_path, 0)))
    stream = WeightStream(FullFineTuning(model).published(), lambda parameters: nullcontext())
    before, _ = stream.pack(0)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-7
    assert stream.pack(0)[0].digest != before.digest


def test_parameters_are_gathered_one_layer_at_a_time(tmp_path):
    """A ZeRO-3 learner never holds more than a layer of whole parameters."""
    gathered: list[int] = []

    @contextmanager
    def gather(parameters):
        gathered.append(len(parameters))
        yield

    weights = FullFineTuning(load_model(str(save_tiny(tmp_path, 0))))
    list(WeightStream(weights.published(), gather))
    assert gathered == [1, 9, 9, 9, 9, 1, 1], (
        "embedding, four layers of nine tensors, final norm, output head"
    )


def test_vllm_reads_the_same_names_and_shapes_before_and_while_it_receives(tmp_path):
    """The nccl receiver computes the sizes of its buffers from the metadata alone."""
    from hybridrl.weights.vllm_transfer import StreamSource

    source = StreamSource(stream_of(save_tiny(tmp_path, 0)))
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (n, t.dtype, tuple(t.shape)) for n, t in source
    ]
    assert sum(len(group) for group in source.groups()) == len(source.metadata())
    assert source.stream.nbytes == sum(t.nbytes for _, t in source)


def test_engines_get_nccl_ranks_one_after_another_behind_the_sender():
    from hybridrl.weights.vllm_transfer import EngineClient

    calls: list[tuple] = []
    client = EngineClient(
        lambda method, arguments: calls.append((method, arguments)),
        num_engines=3,
        tensor_parallel=2,
    )
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.version = 4
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    assert [info["rank_offset"] for (info,) in calls[0][1]] == [1, 3, 5]
    assert calls[1:] == [
        ("start_weight_update", [()] * 3),
        ("update_weights", [({"names": ["a"]},)] * 3),
        ("finish_weight_update", [(4,)] * 3),
    ]


def largest_gaps(folder: Path) -> tuple[float, float]:
    """The largest difference in nats between the engine's log-probs and a plain forward pass with
    the weights it was sent, and with the weights it started with.

    This runs in its own process, because vLLM's CPU worker patches torch. The output head is not
    tied; the graphs of other tests, whose probes compare engine and learner, have tied heads.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from hybridrl.rollout.engine import Rollout

    old, new = (
        save_tiny(folder / name, seed, tied=False) for seed, name in enumerate(("old", "new"))
    )
    settings = tiny_settings(folder / "run", f"model.path={old}")

    async def sample() -> RolloutBatch:
        engine = Rollout(settings, model=settings.model, device="cpu", backend="object_store")
        manifest, packed = stream_of(new).pack(version=1)
        assert await engine.load_weights(manifest, packed) == manifest.digest
        return (await engine.generate(ORDER, PROMPTS))[1]

    batch = asyncio.run(sample())
    assert (
        set(batch.policy_versions[batch.response_mask]) == {1}
        and FinishReason.aborted not in batch.finish_reasons
    )
    return gap(batch, new), gap(batch, old)


def gap(batch: RolloutBatch, folder: Path) -> float:
    model, worst = load_model(str(folder)), 0.0
    for i in range(batch.num_sequences):
        row = batch.trajectory(i)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        at = np.flatnonzero(row.response_mask)
        mine = logprobs[at - 1, ids[at]].numpy()
        worst = max(worst, float(np.abs(mine - row.rollout_logprobs[at]).max()))
    return worst


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process that has imported vLLM, in which engines are started one after the other."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.graph
def test_after_a_sync_the_engine_samples_from_exactly_the_weights_it_was_sent(
    process: ProcessPoolExecutor, tmp_path: Path
):
    sent, stale = process.submit(largest_gaps, tmp_path).result(timeout=240)
    assert sent < 1e-4 and stale > 0.1


# -- adapters by themselves ------------------------------------------------------------------------

SYNC = ("lora.rank=3", "lora.alpha=9", "lora.sync=adapter")
LORA = {"rank": 3, "alpha": 9.0}


def adapted(base: Path, seed: int, sync: str) -> WeightStream:
    """The weight stream of a student whose adapters were moved away from zero by random numbers."""
    lora = LoraConfig(**LORA, sync=AdapterSync(sync))
    weights = LowRankAdapters(load_model(str(base)), lora=lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in weights.layers:
            layer.up.normal_(0, 0.1, generator=generator)
    return WeightStream(weights.published(), lambda parameters: nullcontext())


def save_merged(base: Path, seed: int, folder: Path) -> Path:
    """Save the model that engines would serve after a merged sync of that student."""
    model = load_model(str(base))
    state = {name: tensor.clone() for name, tensor in adapted(base, seed, "merged")}
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder)
    return folder


class Gaps(NamedTuple):
    """The largest differences in nats a token between the engine and a plain forward pass."""

    untouched: float  # before any update, from the base model
    first: float  # after the first update, from the merged model
    second: float  # after the second update
    stale: float  # after the second update, from the merged model of the first
    refusals: tuple[str, ...]


def gaps(folder: Path) -> Gaps:
    """Measure the gaps of an engine. This must run in its own process, because vLLM's CPU worker
    patches torch.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from hybridrl.rollout.engine import Rollout

    base = save_tiny(folder / "base", 0)
    merged = [save_merged(base, seed, folder / f"merged{seed}") for seed in (1, 2)]
    settings = tiny_settings(folder / "run", f"model.path={base}", *SYNC)

    async def sample() -> Gaps:
        engine = Rollout(settings, model=settings.model, device="cpu", backend="object_store")

        async def batch(wave: str, version: int) -> RolloutBatch:
            found = (await engine.generate(replace(ORDER, wave=wave), PROMPTS))[1]
            assert set(found.policy_versions[found.response_mask]) == {version}
            return found

        untouched = gap(await batch("w0", -1), base)
        manifest, packed = adapted(base, 1, "adapter").pack(1)
        assert await engine.load_weights(manifest, packed) == manifest.digest
        first = gap(await batch("w1", 1), merged[0])
        manifest, packed = adapted(base, 2, "adapter").pack(2)
        refusals = []
        elsewhere = tuple(name.replace("q_proj", "x_proj") for name in manifest.names)
        for wrong in (replace(manifest, digest="0" * 32), replace(manifest, names=elsewhere)):
            with pytest.raises(WeightSyncError) as refused:
                await engine.load_weights(wrong, packed)
            refusals.append(str(refused.value))
        assert await engine.load_weights(manifest, packed) == manifest.digest
        last = await batch("w2", 2)
        return Gaps(untouched, first, gap(last, merged[1]), gap(last, merged[0]), tuple(refusals))

    return asyncio.run(sample())


@pytest.mark.graph
def test_an_engine_with_the_adapter_beside_the_base_samples_as_one_with_merged_weights(
    process: ProcessPoolExecutor, tmp_path: Path
):
    found = process.submit(gaps, tmp_path).result(timeout=240)
    assert max(found.untouched, found.first, found.second) < 1e-4 and found.stale > 0.1
    assert "sent" in found.refusals[0] and "with 000000000000" in found.refusals[0]
    assert found.refusals[1].endswith(
        "vLLM's model has no place for the adapters of 4 layers, e.g. "
        "model.layers.0.self_attn.x_proj; set lora.sync=merged"
    )
