"""The internals of torch and transformers that hybridrl/models/model_internals.py uses, tested on a
real model.

If the first test fails after an upgrade, compare that file with the new version, then change SEEN.
"""

import torch
import transformers
from torch import Tensor, nn

from hybridrl.models.loading import load_model
from hybridrl.models.model_internals import (
    SEEN,
    attention_of,
    discard_compiled,
    is_compiled,
    wrapped_layers,
)


def test_the_installed_libraries_are_those_that_were_read():
    installed = {
        library.__name__: ".".join(library.__version__.split(".")[:2])
        for library in (torch, transformers)
    }
    assert installed == SEEN, "read models/model_internals.py again, then change SEEN"


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


def test_a_wrapped_layer_alone_is_recomputed_where_it_alone_is_in_training():
    model = load_model("builtin:countdown-student")
    layers = wrapped_layers(model)
    assert len(layers) == model.config.num_hidden_layers, "transformers wraps its layers otherwise"
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = [0] * len(layers)

    def counted(index: int) -> None:
        forward = layers[index].forward

        def count(*args: Tensor, **kwargs: object) -> Tensor:
            calls[index] += 1
            return forward(*args, **kwargs)

        layers[index].forward = count

    for index in range(len(layers)):
        counted(index)
    layers[0].training = True
    ids = torch.zeros(1, 3, dtype=torch.int64)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    hidden.sum().backward()
    assert calls == [2] + [1] * (len(layers) - 1), (
        "a layer of transformers is not recomputed by its own `training` any more"
    )
