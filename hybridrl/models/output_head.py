"""The output embedding of a language model, and the proof that its logits are hidden states times
this matrix.

Training never forms the logits of the model itself: the head pass multiplies hidden states by the
output embedding in pieces. A model that does more than this product (a soft cap, a scale, a norm, a
bias) would train on other logits than those that it samples from, without any error. So every
student and every teacher is tried when it is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hybridrl.core.errors import ConfigError

LARGEST_LOGITS = (0.0, 1.0, 1000.0)
"""Of the three states that a model is tried with: a bias shows at 0, a soft cap far away from it, a
scale at both.
"""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest difference of two logits, as a share of the largest logit of the state: rounding stays
far below it.
"""


def output_weight(model: PreTrainedModel, *, setting: str = "model.path") -> nn.Parameter:
    """The output embedding, [V, H], of a model whose logits are exactly hidden @ weight^T.

    The check runs the model from its last hidden states on, so it costs three rows of logits. It
    draws no random numbers and needs no weight but the output embedding.

    Args:
        setting: what the error calls the model, e.g. "teachers.main.path".

    Raises:
        ConfigError: the model has no body that gives hidden states, or its logits are something
            else.
    """
    name = type(model).__name__
    remedy = "choose another causal language model"
    if model.base_model is model:
        raise ConfigError(
            f"{setting}: {name} does not separate its output embedding from the layers that give "
            f"hidden states, so the learner cannot compute its loss in pieces; {remedy}"
        )
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(f"{setting}: {name} has no output embedding without bias; {remedy}")
    if not _is_plain_product(model, head.weight.detach()):
        raise ConfigError(
            f"{setting}: the logits of {name} are not its last hidden states times its output "
            "embedding (it caps, scales or otherwise changes them), so the loss would be that of "
            f"another model; {remedy}"
        )
    return head.weight


@torch.no_grad()
def _is_plain_product(model: PreTrainedModel, weight: Tensor) -> bool:
    """Whether the model makes hidden @ weight^T of hidden states that are put in the place of its
    own.
    """
    hidden = _probe_states(weight)
    expected = nn.functional.linear(hidden, weight)[0].float()  # [3, V]
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=weight.device)
    with _body_returns(model, hidden):
        logits = model(input_ids=ids, use_cache=False).logits
    if logits.shape != (1, *expected.shape):
        return False
    gap = (logits[0].float() - expected).abs().amax(1)  # [3]
    return bool((gap <= TOLERANCE.get(weight.dtype, 2e-2) * expected.abs().amax(1)).all())


def _probe_states(weight: Tensor) -> Tensor:
    """[1, 3, H] in the dtype of the weight: one direction, so long that its largest logits are
    LARGEST_LOGITS.
    """
    direction = torch.arange(1, weight.shape[1] + 1, device=weight.device).float().sin()
    largest = nn.functional.linear(direction.to(weight.dtype), weight).float().abs().max()
    lengths = torch.tensor(LARGEST_LOGITS, device=weight.device) / largest.clamp_min(1e-6)
    return (lengths[:, None] * direction).to(weight.dtype)[None]


class _BodyOutput(BaseModelOutputWithPast):
    """Last hidden states; whatever else a head reads, such as router logits or a cache, is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@contextmanager
def _body_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Let the body give `hidden` without running. Some models, such as OPT, call the decoder inside
    of it.
    """
    bodies = {id(body): body for body in (model.base_model, model.get_decoder())}.values()
    before = [body.__dict__.get("forward") for body in bodies]
    for body in bodies:
        body.forward = lambda *_, **__: _BodyOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        for body, forward in zip(bodies, before, strict=True):
            del body.forward
            if forward is not None:
                body.forward = forward
