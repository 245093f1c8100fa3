"""The student as one module: body and head, so that a sharded run gathers every parameter inside a forward call."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridrl.errors import ConfigError
from hybridrl.ops.head import HeadStats, TeacherRows, TokenTerms, hybrid_head_loss


class OutputHead(nn.Module):
    """Owns the output embedding (shared with the input embedding when the model ties them)."""

    def __init__(self, weight: nn.Parameter, temperature: float, chunk: int) -> None:
        super().__init__()
        self.weight, self.temperature, self.chunk = weight, temperature, chunk

    def forward(self, hidden: Tensor, teachers: tuple[TeacherRows, ...], terms: TokenTerms) -> tuple[Tensor, HeadStats]:
        return hybrid_head_loss(hidden, self.weight, teachers, terms, temperature=self.temperature, chunk=self.chunk)


class Student(nn.Module):
    """forward(tokens, what the objective asks) -> loss. Nothing outside calls the submodules."""

    def __init__(self, model: PreTrainedModel, temperature: float, chunk: int) -> None:
        super().__init__()
        self.body = model.base_model
        self.head = OutputHead(output_weight(model), temperature, chunk)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, hidden_rows: Tensor, teachers: tuple[TeacherRows, ...], terms: TokenTerms
    ) -> tuple[Tensor, HeadStats]:
        """input_ids, attention_mask [B, T]; hidden_rows [R] into the flattened [B*T] positions."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1).index_select(0, hidden_rows), teachers, terms)


def output_weight(model: PreTrainedModel) -> nn.Parameter:
    """[V, H] of a model whose logits are exactly hidden @ weight^T.

    Raises:
        ConfigError: for models that bend their logits after the head; their gradient would be another one.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ConfigError(f"model.path: {type(model).__name__} has no output embedding without bias; choose another causal language model")
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1.0):
            raise ConfigError(f"model.path: {type(model).__name__} changes its logits by {name}; such models are not supported")
    return head.weight


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
