"""The private names of torch and transformers in hybridrl/models/model_internals.py."""

import torch
from torch import nn

from hybridrl.models.loading import load_model
from hybridrl.models.model_internals import attention_of, discard_compiled, is_compiled


def test_a_compiled_layer_is_recognised_and_runs_eagerly_once_discarded():
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append("compiled")
        return graph.forward

    layer = nn.Linear(2, 2)
    assert not is_compiled(layer)
    layer.compile(backend=backend)
    assert is_compiled(layer)
    discard_compiled(layer)
    assert not is_compiled(layer)
    layer(torch.zeros(1, 2))
    assert calls == []


def test_the_attention_implementation_is_the_one_that_was_set():
    model = load_model("builtin:countdown-student")
    assert attention_of(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert attention_of(model.config) == "eager"
