"""A model is refused unless its logits are its last hidden states times its output embedding."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hybridrl.core.errors import ConfigError
from hybridrl.models.output_head import output_weight
from tests.batch.test_packing import APART, COMMON, LLAMA, TOGETHER, tiny

IDS = torch.tensor([[1, 7, 20, 11]])
PLAIN: dict[str, Any] = APART | {kind: TOGETHER[kind] for kind in ("opt", "bloom", "mamba", "lfm2")}
HEADS: dict[str, Any] = LLAMA | {"head_dim": 8}
NOT_PLAIN: dict[str, Any] = {
    "recurrent_gemma": TOGETHER["recurrent_gemma"],  # soft cap
    "gemma2": HEADS,  # soft cap
    "vaultgemma": HEADS,  # soft cap
    "nanochat": HEADS,  # soft cap
    "cohere": LLAMA,  # a scale, by default 0.0625
    "granite": LLAMA | {"logits_scaling": 8.0},
    "phi": LLAMA,  # a bias
    "llama4_text": LLAMA,  # its base_model is the whole model
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_head_passes_and_neither_model_nor_random_state_is_changed(
    kind: str, dtype: torch.dtype
):
    if kind == "mamba" and dtype is torch.bfloat16:
        dtype = torch.float32  # on the CPU its layers run only in float32
    model = tiny(kind, PLAIN[kind], dtype)
    before = logits(model)
    state = torch.random.get_rng_state()
    weight = output_weight(model)
    assert weight is model.get_output_embeddings().weight
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(model), before)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_model_that_changes_its_logits_after_the_head_is_refused(kind: str):
    with pytest.raises(ConfigError, match=r"teachers\.main\.path: .*choose another causal"):
        output_weight(tiny(kind, NOT_PLAIN[kind], torch.float32), setting="teachers.main.path")


def test_a_soft_cap_is_detected_even_where_logits_are_far_below_it():
    """The logits of a random model are near 0, where a cap of 30 changes them by less than 1e-3."""
    model = tiny("gemma2", HEADS, torch.bfloat16)
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state
        plain = hidden @ model.get_output_embeddings().weight.T
    assert (logits(model) - plain).abs().max() < 0.01
    with pytest.raises(ConfigError, match="caps, scales"):
        output_weight(model)


def test_a_scale_of_one_and_no_cap_are_a_plain_head():
    config = AutoConfig.for_model("gemma2", **COMMON, **HEADS, final_logit_softcapping=None)
    uncapped = AutoModelForCausalLM.from_config(config).eval()
    for model in (tiny("granite", {**LLAMA}, torch.float32), uncapped):
        assert output_weight(model) is model.get_output_embeddings().weight
