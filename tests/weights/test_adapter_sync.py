"""Adapters that are sent to the engine without the base weights (lora.sync=adapter).
test_vllm_transfer.py sends some to the real vLLM engine.
"""

import math
from pathlib import Path
from typing import get_args

import torch

from hybridrl.models.loading import load_model
from hybridrl.settings.lora import ENGINE_RANKS, LoraConfig
from hybridrl.weights.parameters import scaled
from tests.support.graph import save_tiny
from tests.weights.test_vllm_transfer import adapted


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
