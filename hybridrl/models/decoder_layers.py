"""How decoder layers run on the CPU: attention by plain matrix products and layers as compiled
graphs, where either pays.

Between its matrix products a layer of transformers makes some fifty passes over its activations.
Compiled (torch.compile, its C++ backend) they are a few; the products stay as they are.
"""

import logging
import time

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hybridrl.core.compiler import has_compiler

logger = logging.getLogger(__name__)

PLAIN_ATTENTION_TOKENS = 1024

COMPILE_FROM = 256
"""Hidden size from which layers are worth a compilation (of SmolLM2: 46 s once, kept on disk by
torch; then 8 to 10 s a start).
"""

MOST_GRAPHS = 16
"""Of all layers together: two kinds of layers, each with and without gradients, for one row and for
several, and room for as many.
"""

TRACED_TOKENS = 61
"""Of each sequence that the graphs are made from; like no size of a model."""


def attends_plainly(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a learner's attention is to be plain matrix products. In bf16 torch's fused kernel
    for CPUs takes four times as long over 84 tokens, forward and backward, and still 1.6 times over
    512; it is kept where scores of all pairs of tokens would be large.

    Args:
        tokens: of the longest row.
    """
    return (
        model.device.type == "cpu"
        and model.dtype is torch.bfloat16
        and tokens <= PLAIN_ATTENTION_TOKENS
    )


def compile_layers(model: PreTrainedModel, *, tokens: int, packed: bool, learns: bool) -> bool:
    """Compile the layers, with plain attention, where that is plain anyway and the model is large
    enough.

    The graphs serve every number of sequences and tokens, and are made here, from sizes that are
    always the same: made from the first batch, they could differ with it in how they round, and a
    resumed run has another first batch.

    Args:
        tokens: of the longest row.
        packed: sequences will come one after the other in one row, without a mask; otherwise
            padded, with one.
        learns: gradients will be asked for, besides plain forward passes.

    Returns:
        whether they are compiled; layers that are no single graph each, as those that choose among
        experts, are not.
    """
    layers, config = (
        [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)],
        model.config.get_text_config(),
    )
    if not (
        layers
        and attends_plainly(model, tokens)
        and config.hidden_size >= COMPILE_FROM
        and has_compiler()
    ):
        return False
    started, attention = time.monotonic(), config._attn_implementation
    model.set_attn_implementation("eager")
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=True, recompile_limit=MOST_GRAPHS)
    try:
        for rows in (1,) if packed else (2, 1):  # torch makes graphs of their own for one row
            for gradients in (True, False) if learns else (False,):
                trace(model, rows, packed=packed, gradients=gradients)
    except Exception as error:  # the compiler's, of whatever kind: the layers work without it
        for layer in layers:
            layer._compiled_call_impl = None
        model.set_attn_implementation(attention)
        told = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            "%s: its layers run as they are, for compiling them failed: %s",
            type(model).__name__,
            told,
        )
        return False
    logger.info("%d layers compiled in %.1f s", len(layers), time.monotonic() - started)
    return True


def trace(model: PreTrainedModel, rows: int, *, packed: bool, gradients: bool) -> None:
    """One forward pass, with its backward if gradients are asked for; the model is as before."""
    ids = torch.zeros(rows, TRACED_TOKENS, dtype=torch.int64)
    positions = torch.arange(TRACED_TOKENS).repeat(rows, 1)
    with torch.set_grad_enabled(gradients):
        mask = None if packed else torch.ones_like(ids)
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    if gradients:
        hidden.sum().backward()
        model.zero_grad(set_to_none=True)
