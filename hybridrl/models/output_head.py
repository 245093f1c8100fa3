"""The output embedding of a language model, and a check that logits = hidden states x embedding^T.

Training does not use the model's own logits: the head pass multiplies hidden states by the output
embedding in pieces. A model that does more than this product (a soft cap, a scale, a norm, a bias)
would be trained on other logits than it samples from, without any error. So every student and every
teacher is checked when it is loaded.
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
"""Largest logits of the three probe states: 0 reveals a bias, 1000 a soft cap, 1 and 1000 a scale.
"""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest difference of two logits as a share of the state's largest logit, well above rounding."""


def output_weight(model: PreTrainedModel, *, setting: str = "model.path") -> nn.Parameter:
    """The output embedding, [V, H], of a model whose logits are exactly hidden @ weight^T.

    The check runs only the part of the model after its last hidden states, so it costs three rows
    of logits. It draws no random numbers and reads no weight but the output embedding.

    Args:
        setting: how the error names the model, e.g. "teachers.main.path".

    Raises:
        ConfigError: the model has no body that returns hidden states, or its logits are not this
            product.
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
    """Whether the model computes hidden @ weight^T from hidden states that replace its own."""
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
    """[1, 3, H] in the dtype of the weight: multiples of one direction whose largest logits are
    LARGEST_LOGITS.
    """
    direction = torch.arange(1, weight.shape[1] + 1, device=weight.device).float().sin()
    largest = nn.functional.linear(direction.to(weight.dtype), weight).float().abs().max()
    lengths = torch.tensor(LARGEST_LOGITS, device=weight.device) / largest.clamp_min(1e-6)
    return (lengths[:, None] * direction).to(weight.dtype)[None]


class _BodyOutput(BaseModelOutputWithPast):
    """An output with last hidden states; any other field that a head may read, e.g. a cache, is
    None.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


@contextmanager
def _body_returns(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Make the body return `hidden` without running.

    Some models, such as OPT, call the decoder inside the body, so both are replaced.
    """
    bodies = {id(body): body for body in (model.base_model, model.get_decoder())}.values()
    output = _BodyOutput(last_hidden_state=hidden)
    before = [body.__dict__.get("forward") for body in bodies]
    for body in bodies:
        body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for body, forward in zip(bodies, before, strict=True):
            del body.forward
            if forward is not None:
                body.forward = forward
