"""The student as one module of body and head, so that a sharded run gathers every parameter inside
a forward call.
"""

from enum import StrEnum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridrl.kernels.head import (
    HeadRule,
    HeadStats,
    chosen_logprobs,
    compared_sums,
    hybrid_head_loss,
)
from hybridrl.kernels.teacher_rows import Teacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.models.output_head import output_weight
from hybridrl.weights.library_internals import whole_shape


class Look(StrEnum):
    """What a forward pass computes."""

    learn = "learn"  # -> the loss, and HeadStats
    view = "view"  # -> log p(y) [R] and values [R], without a loss
    # -> [1 + len(COMPARED)] float64, of kernels.head.compared_sums, without a loss
    compare = "compare"


class OutputHead(nn.Module):
    """The output embedding (shared with the input embedding if the model ties them) and its
    passes.
    """

    def __init__(self, weight: nn.Parameter, rule: HeadRule) -> None:
        super().__init__()
        self.weight = weight
        self.rule = rule

    def forward(
        self, hidden: Tensor, teachers: tuple[Teacher, ...], columns: TokenColumns, look: Look
    ) -> tuple[Tensor, HeadStats | None]:
        match look:
            case Look.learn:
                return hybrid_head_loss(hidden, self.weight, teachers, columns, self.rule)
            case Look.view:
                ids = columns.token_ids[:, None]
                return chosen_logprobs(hidden, self.weight, ids, self.rule)[:, 0], None
            case Look.compare:
                return compared_sums(hidden, self.weight, teachers, columns, self.rule), None


class Student(nn.Module):
    """The module that DeepSpeed wraps: body, output head and value head in one forward call. Code
    outside never calls the submodules.
    """

    def __init__(self, model: PreTrainedModel, rule: HeadRule, *, with_value: bool) -> None:
        super().__init__()
        self.body = model.base_model
        self.head = OutputHead(output_weight(model), rule)
        self.value_head: nn.Linear | None = None  # None: the objective uses no values
        if with_value:
            # Under ZeRO 3 the weight is partitioned already and has no shape of its own.
            _, width = whole_shape(self.head.weight)
            self.value_head = nn.Linear(width, 1, bias=False, dtype=self.head.weight.dtype)
            nn.init.zeros_(self.value_head.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        hidden_rows: Tensor,
        teachers: tuple[Teacher, ...],
        columns: TokenColumns,
        look: Look | None = Look.learn,
    ) -> tuple[Tensor, HeadStats | Tensor | None]:
        """Run one micro-batch; the arguments are MicroBatch.arguments and `look`.

        Returns:
            What `look` says; if `look` is None, the hidden states [R, H] and None.
        """
        hidden = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, hidden_rows)
        if look is None:
            return rows, None
        values = (
            torch.zeros_like(columns.value_slope)
            if self.value_head is None
            else self.value_head(rows)[:, 0].to(columns.value_slope.dtype)
        )
        out, stats = self.head(rows, teachers, columns, look)
        if look is Look.view:
            return out, values
        if look is Look.learn and self.value_head is not None:
            out = out + (values * columns.value_slope).sum()
        return out, stats
