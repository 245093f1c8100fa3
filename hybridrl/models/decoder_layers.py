"""Speeds up decoder layers on the CPU: wide products, plain attention and compiled layers.

Between its matrix products a layer of transformers makes some fifty passes over its activations.
Compilation (torch.compile with its C++ backend) reduces them to a few; the products do not change.
"""

import logging
import time

import torch
from transformers import PreTrainedModel

from hybridrl.core.compiler import has_compiler
from hybridrl.kernels.products import widen_products
from hybridrl.models.adapters import without_adapters
from hybridrl.models.model_internals import attention_of, discard_compiled, wrapped_layers
from hybridrl.settings.choices import Products

logger = logging.getLogger(__name__)

PLAIN_ATTENTION_TOKENS = 1024
"""Longest row for which attention is computed by plain matrix products."""

COMPILE_FROM = 256
"""The smallest hidden size for which layers are compiled.

Compiling SmolLM2 takes 46 s once; torch caches the result on disk, and each later start takes 8 to
10 s.
"""

MOST_GRAPHS = 16
"""Limit on the graphs of all layers together.

Two kinds of layers, each with and without gradients, and for one row and for several, need 8
graphs; passes without adapters need 4 more.
"""

TRACED_TOKENS = 61
"""Length of the sequences with which graphs are traced; it differs from every size of a model."""


def set_products(model: PreTrainedModel, products: Products, device: torch.device) -> None:
    """If `products` is float32, make the linear layers of a bfloat16 model compute their products
    in float32 on a CPU.

    Args:
        device: on which the model will run.
    """
    is_narrow = model.dtype is torch.bfloat16
    if products is Products.float32 and is_narrow and device.type == "cpu":
        widen_products(model)


def attends_plainly(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a learner should compute attention by plain matrix products.

    In bf16, torch's fused kernel for CPUs takes four times as long for 84 tokens, forward and
    backward, and 1.6 times as long for 512. It is used for rows so long that the scores of all
    pairs of tokens would take much memory.

    Args:
        tokens: length of the longest row.
    """
    return (
        model.device.type == "cpu"
        and model.dtype is torch.bfloat16
        and tokens <= PLAIN_ATTENTION_TOKENS
    )


def compile_layers(
    model: PreTrainedModel, *, tokens: int, packed: bool, learns: bool, bare: bool = False
) -> bool:
    """Compile the layers, with plain attention, if that is faster.

    The graphs work for every number of sequences and tokens. They are traced here with fixed sizes.
    If they were traced with the first batch, their rounding could depend on it, and a resumed run
    has another first batch.

    Args:
        tokens: length of the longest row.
        packed: sequences follow each other in one row, without a mask; otherwise they are padded,
            with a mask.
        learns: also compile for passes with gradients.
        bare: also compile for forward passes without the adapters, which are always padded.

    Returns:
        Whether the layers are compiled. Layers that cannot be a single graph, such as those that
        choose among experts, are not.
    """
    layers = wrapped_layers(model)
    config = model.config.get_text_config()
    is_large = attends_plainly(model, tokens) and config.hidden_size >= COMPILE_FROM
    if not (layers and is_large and has_compiler()):
        return False
    start = time.monotonic()
    attention = attention_of(config)
    model.set_attn_implementation("eager")
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=True, recompile_limit=MOST_GRAPHS)
    try:
        for rows in (1,) if packed else (2, 1):  # torch makes a separate graph for one row
            for gradients in (True, False) if learns else (False,):
                trace(model, rows, packed=packed, gradients=gradients)
        if bare:
            with without_adapters(model):
                for rows in (2, 1):
                    trace(model, rows, packed=False, gradients=False)
    except Exception as error:  # compilers raise errors of any type; the layers run uncompiled
        for layer in layers:
            discard_compiled(layer)
        if attention is not None:
            model.set_attn_implementation(attention)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning(
            "%s: its layers run without compilation, which failed: %s",
            type(model).__name__,
            reason,
        )
        return False
    logger.info("%d layers compiled in %.1f s", len(layers), time.monotonic() - start)
    return True


def trace(model: PreTrainedModel, rows: int, *, packed: bool, gradients: bool) -> None:
    """Run a forward pass and, if `gradients`, a backward pass; the model is not changed."""
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
