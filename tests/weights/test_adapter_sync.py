"""Adapters that go to the engine by themselves (lora.sync=adapter), with the real vLLM engine."""

import asyncio
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import torch

from hybridrl.core.errors import WeightSyncError
from hybridrl.models.loading import load_model
from hybridrl.settings.choices import AdapterSync
from hybridrl.settings.lora import ENGINE_RANKS, LoraConfig
from hybridrl.types import RolloutBatch
from hybridrl.weights.parameters import LowRankAdapters, scaled
from hybridrl.weights.stream import WeightStream
from tests.support.graph import save_tiny, tiny_settings
from tests.weights.test_vllm_transfer import ORDER, PROMPTS, gap

SYNC = ("lora.rank=3", "lora.alpha=9", "lora.sync=adapter")
LORA = {"rank": 3, "alpha": 9.0}


def adapted(base: Path, seed: int, sync: str) -> WeightStream:
    """A student whose adapters have moved away from zero, by random numbers of this seed."""
    lora = LoraConfig(**LORA, sync=AdapterSync(sync))
    weights = LowRankAdapters(load_model(str(base)), lora=lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in weights.layers:
            layer.up.normal_(0, 0.1, generator=generator)
    return WeightStream(weights.published(), lambda parameters: nullcontext())


def save_merged(base: Path, seed: int, folder: Path) -> Path:
    """The model that a merged sync of that student would make engines serve."""
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
    """In a process of its own, because vLLM's CPU worker patches torch."""
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
def test_an_engine_with_the_adapter_beside_the_base_samples_as_one_with_merged_weights(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(gaps, tmp_path).result(timeout=240)
    assert max(found.untouched, found.first, found.second) < 1e-4 and found.stale > 0.1
    assert "sent" in found.refusals[0] and "with 000000000000" in found.refusals[0]
    assert found.refusals[1].endswith(
        "vLLM's model has no place for the adapters of 4 layers, e.g. "
        "model.layers.0.self_attn.x_proj; set lora.sync=merged"
    )


def test_only_the_adapters_travel_and_b_has_the_factor_in_it(tmp_path: Path):
    base = save_tiny(tmp_path, 0)
    alone = adapted(base, 1, "adapter")
    whole = adapted(base, 1, "merged")
    assert all(".lora_" in tensor.name for tensor in alone.tensors)
    assert alone.nbytes == sum(math.prod(tensor.shape) for tensor in alone.tensors) * 4
    assert alone.nbytes < whole.nbytes / 8
    up = dict(alone)["model.layers.0.self_attn.v_proj.lora_B.weight"]
    model = load_model(str(base))
    down = dict(alone)["model.layers.0.self_attn.v_proj.lora_A.weight"]
    weight = model.model.layers[0].self_attn.v_proj.weight
    assert torch.allclose(
        weight + up @ down, dict(whole)["model.layers.0.self_attn.v_proj.weight"], atol=1e-6
    )


def test_the_factor_is_rounded_once():
    third = torch.tensor([[1 / 3]], dtype=torch.bfloat16)
    assert scaled(third, scale=2.0).item() == 2 * third.item()
    assert scaled(third, scale=3.0).item() == 1.0 and scaled(third, scale=3.0).dtype == third.dtype


def test_the_ranks_of_the_engine_are_those_of_vllm():
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == ENGINE_RANKS
    assert [LoraConfig(rank=rank).engine_rank for rank in (1, 3, 8, 33, 512)] == [1, 8, 8, 64, 512]
