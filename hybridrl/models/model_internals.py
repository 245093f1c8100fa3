"""The uses of undocumented parts of torch's and transformers' modules.

tests/models/test_model_internals.py runs each of these functions on a real model, and fails when
the installed versions are not those in SEEN.
"""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.fsdp import expand_fsdp_plan
from transformers.modeling_layers import GradientCheckpointingLayer

SEEN = {"torch": "2.13", "transformers": "5.19"}
"""The versions that this file was written for and tested with."""


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation of a loaded model, e.g. "sdpa"; only its setter is public."""
    return config._attn_implementation


def discard_compiled(layer: nn.Module) -> None:
    """Undo layer.compile(), for which torch has no public call."""
    layer._compiled_call_impl = None


def is_compiled(layer: nn.Module) -> bool:
    """Whether layer.compile() is in effect."""
    return layer._compiled_call_impl is not None


def wrapped_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The decoder layers: the modules that transformers wraps so that they can be recomputed.

    After gradient_checkpointing_enable, each of them recomputes if its own `training` is set,
    whatever the mode of the modules around it and inside it.
    """
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def shards_every_layer(model: PreTrainedModel) -> bool:
    """Whether transformers' FSDP2 plan for this kind of model names each decoder layer.

    A layer that it does not name would be gathered together with the rest of the model.
    """
    sharded, _ = expand_fsdp_plan(model, model._fsdp_plan or {})
    layers = wrapped_layers(model)
    named = {id(module) for _, module in sharded}
    return bool(layers) and all(id(layer) in named for layer in layers)
