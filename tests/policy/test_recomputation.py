"""Layers that are recomputed in the backward pass give the same results as other layers."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig

from hybridrl.models.model_internals import wrapped_layers
from hybridrl.policy.training_setup import checkpoint_activations

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=16),
    "opt": OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=8, dropout=0.5),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_recomputed_layers_have_the_outputs_and_gradients_of_others_and_drop_nothing(kind: str):
    """OPT's layers apply dropout themselves if they are in training mode."""
    plain = passes(CONFIGS[kind], recomputes=False)
    again = passes(CONFIGS[kind], recomputes=True)
    for numbers, recomputed in zip(plain, again, strict=True):
        assert torch.equal(numbers, recomputed)


def passes(config: PreTrainedConfig, *, recomputes: bool) -> list[Tensor]:
    """Logits and gradients of two passes over the same tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    calls = []
    if recomputes:
        checkpoint_activations(model)
        inner = next(wrapped_layers(model)[0].children())
        inner.register_forward_hook(lambda *_: calls.append("computed"))
    made = []
    for _ in range(2):
        logits = model(input_ids=torch.tensor([[1, 2, 3, 4]]), use_cache=False).logits
        logits.square().sum().backward()
        made += [logits.detach()]
    assert len(calls) == (4 if recomputes else 0), "once forward and once again backward"
    return [*made, *(p.grad for p in model.parameters())]
