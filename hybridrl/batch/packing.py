"""Whether a model keeps sequences apart that stand one after the other in one row
(train.packing).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.micro_batch import MicroBatch, sequence
from hybridrl.core.errors import ConfigError
from hybridrl.kernels.token_columns import TokenColumns

TOKENS = 6  # of each sequence
FACTOR = 10  # by how much rounding may differ between two measurements
CHANGED = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Nats that the tokens of a neighbour may move a log-prob by: none, but for experts that multiply
other numbers of rows together.
"""
MOVED = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
"""Nats that the place in a row may move a log-prob by: rows of another length are summed in another
order.
"""


def check_packing(
    logprobs: Callable[[Sequence[MicroBatch]], Tensor],
    *,
    vocabulary: int,
    dtype: torch.dtype,
    model: str,
) -> None:
    """Refuse a model whose second sequence in a row depends on the first: some of its layers do not
    look at position_ids, as those of OPT and all that carry a state along the row.

    The second sequence must not change with the tokens of the first, nor against being read alone.
    What the first one changes by when the second does is rounding, for nothing stands before it,
    and is the measure of what rounding does here.

    Args:
        logprobs: [R] float32 of the response tokens of packed sequences, by the model as it will
            train.
        vocabulary: number of tokens.
        dtype: of the forward pass.
        model: its type, for the error.

    Raises:
        ConfigError: it does.
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
    """TOKENS tokens from `first` on; all but the first one are its response."""
    ids = np.arange(first, first + TOKENS, dtype=np.int32) % vocabulary
    response = torch.from_numpy(ids[1:].astype(np.int64))
    return sequence(
        ids,
        response_at=np.arange(1, TOKENS),
        columns=TokenColumns.unlearned(response, torch.zeros(TOKENS - 1)),
    )
