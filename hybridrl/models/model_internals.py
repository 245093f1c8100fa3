"""The private names of torch and transformers that this package uses.

They are as in torch 2.13 and transformers 5.19; tests/models/test_model_internals.py fails when
they change.
"""

from torch import nn
from transformers import PreTrainedConfig


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation of a loaded model, e.g. "sdpa"; only its setter is public."""
    return config._attn_implementation


def discard_compiled(layer: nn.Module) -> None:
    """Undo layer.compile(), for which torch has no public call."""
    layer._compiled_call_impl = None


def is_compiled(layer: nn.Module) -> bool:
    """Whether layer.compile() is in effect."""
    return layer._compiled_call_impl is not None
