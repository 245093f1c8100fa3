"""Checks that a model keeps the packed sequences of one row apart (train.packing)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import MicroBatch, sequence
from hybridrl.core.errors import ConfigError
from hybridrl.kernels.token_columns import TokenColumns

TOKENS = 6  # of each sequence
FACTOR = 10  # how many times larger one measurement of rounding may be than another
CHANGED = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Nats by which other tokens in the neighbouring sequence may change a log-prob. The change is 0
except with experts, whose products then have another number of rows.
"""
MOVED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Nats by which the position in a row may change a log-prob, because rows of another length are
summed in another order.
"""


def check_packing(
    logprobs: Callable[[Sequence[MicroBatch]], Tensor],
    *,
    vocabulary: int,
    dtype: torch.dtype,
    model: str,
) -> None:
    """Refuse a model in which the second sequence of a row depends on the first. Layers that ignore
    position_ids (OPT's) or carry a state along the row cause this.

    The second sequence's log-probs must not change with the tokens of the first, nor differ from
    those of the sequence alone. The first sequence has nothing before it, so its changes are
    rounding alone, and they measure how large rounding is here.

    Args:
        logprobs: returns [R] float32 of the response tokens of packed sequences, by the model as it
            will train.
        vocabulary: number of tokens.
        dtype: of the forward pass.
        model: the name of its class, for the error.

    Raises:
        ConfigError: the second sequence depends on the first.
    """
    first, second, other = (_sequence(i * TOKENS + 1, vocabulary) for i in range(3))
    row = logprobs([first, second]).reshape(2, -1)  # [2, TOKENS - 1]
    alone = torch.stack([logprobs([first]), logprobs([second])])
    changed = torch.stack(
        [logprobs([first, other])[: TOKENS - 1], logprobs([other, second])[TOKENS - 1 :]]
    )
    for compared, allowed in ((changed, CHANGED[dtype]), (alone, MOVED[dtype])):
        noise, leak = (row - compared).abs().mean(1).tolist()
        if not leak <= max(FACTOR * noise, allowed):
            raise ConfigError(
                f"train.packing=true: {model} does not keep packed sequences apart: the log-probs "
                f"of one move by {leak:.2g} nats a token with the sequence before it, so each "
                "would be trained as a continuation of another; set train.packing=false"
            )


def _sequence(first: int, vocabulary: int) -> MicroBatch:
    """A sequence of TOKENS tokens from id `first` on; all but the first token are its response."""
    ids = np.arange(first, first + TOKENS, dtype=np.int32) % vocabulary
    response = torch.from_numpy(ids[1:].astype(np.int64))
    return sequence(
        ids,
        response_at=np.arange(1, TOKENS),
        columns=TokenColumns.unlearned(response, torch.zeros(TOKENS - 1)),
    )
