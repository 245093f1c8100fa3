"""The memory of a forward and a backward pass over a model's body, from its config alone.

transformers' own modules run on tensors without memory, once with two layers and once with three;
each further layer adds what the third one did. So this code knows nothing about kinds of models.
Attention is the kernel that torch chooses on a CPU, which like FlashAttention keeps no scores.
"""

import logging
from copy import deepcopy
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybridrl.models.adapters import target_names
from hybridrl.models.loading import model_config
from hybridrl.models.model_internals import wrapped_layers
from hybridrl.planning.live_internals import LiveBytes, without_memory
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig

log = logging.getLogger(__name__)


class PassBytes(NamedTuple):
    """Bytes besides weights and their gradients."""

    kept: int  # after the forward pass, for the backward pass
    forward: int  # the peak of the forward pass
    peak: int  # the peak of both passes; without a backward pass that of the forward pass


class Pass(NamedTuple):
    """One pass over `sequences` sequences of `tokens` tokens each, padded."""

    sequences: int
    tokens: int
    learns: bool  # with a backward pass
    recomputes: bool = False  # layers are computed again in the backward pass
    plain_attention: bool = False  # by matrix products, which keep the scores of all pairs
    rank: int | None = None  # rank of the adapters, if only they train; None: all weights train
    targets: tuple[str, ...] = ()  # lora.targets


class Adapted(nn.Module):
    """A layer that computes what peft's layer with an adapter does. peft moves its parameters after
    it has made them, which tensors without memory do not allow.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        dtype = base.weight.dtype
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 2.0


def adapt(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Add adapters to the layers of the model, in place; only the adapters train then."""
    assert lora.rank is not None, "there are adapters"
    model.requires_grad_(False)
    names = target_names(model, lora)
    for module in list(model.base_model.modules()):
        for name, child in list(module.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child, lora.rank))


def pass_bytes(model: ModelConfig, setting: str, work: Pass) -> PassBytes:
    """The memory of a pass over the body of a model.

    Args:
        setting: how an error names the model.

    Raises:
        ConfigError: as model_config.
    """
    return _pass_bytes(model.path, model.revision, model.dtype, setting, work)


@lru_cache
def _pass_bytes(path: str, revision: str | None, dtype: str, setting: str, work: Pass) -> PassBytes:
    layers = model_config(path, revision, setting=setting).get_text_config().num_hidden_layers
    try:
        counts = (2, 3) if layers > 1 else (1, 1)
        few, more = (_run(path, revision, dtype, setting, work, count) for count in counts)
    except Exception as error:  # a module may need numbers, as a choice of experts does
        log.warning(
            "%s=%s: its activations cannot be planned and are left out: %s",
            setting,
            path,
            (str(error).splitlines() or [type(error).__name__])[0],
        )
        return PassBytes(0, 0, 0)
    further = layers - counts[0]
    return PassBytes(*(a + further * (b - a) for a, b in zip(few, more, strict=True)))


def _run(
    path: str, revision: str | None, dtype: str, setting: str, work: Pass, layers: int
) -> PassBytes:
    """The bytes of the same pass over the model with `layers` layers."""
    config = deepcopy(model_config(path, revision, setting=setting))
    config.get_text_config().num_hidden_layers = layers
    attention = {"attn_implementation": "eager"} if work.plain_attention else {}
    with without_memory():
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), **attention
        ).eval()
        if work.recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in wrapped_layers(model):
                layer.training = True
        if work.rank is not None:
            adapt(model, LoraConfig(rank=work.rank, targets=list(work.targets)))
        weights = list(model.parameters())
        for weight in weights:  # gradients of weights are planned by zero.py
            if not weight.requires_grad:
                continue
            weight.register_post_accumulate_grad_hook(lambda w: setattr(w, "grad", None))
        ids = torch.zeros(work.sequences, work.tokens, dtype=torch.int64)
        with LiveBytes(weights) as live, torch.set_grad_enabled(work.learns):
            hidden = model.base_model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.zeros_like(ids),
                use_cache=False,
            ).last_hidden_state
            kept = live.now
            forward = live.peak
            if work.learns:
                hidden.backward(torch.empty_like(hidden))
        return PassBytes(kept=kept, forward=forward, peak=live.peak)
