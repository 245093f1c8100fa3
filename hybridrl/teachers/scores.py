"""Writes a teacher's evidence about a batch, token by token, into the columns that are sent."""

import numpy as np
import torch
from torch import Tensor

from hybridrl.batch.wire import numpy_dtype, to_wire
from hybridrl.kernels.head import HeadRule
from hybridrl.kernels.workspace import softmax_dtype
from hybridrl.teachers.evidence import Evidence, States
from hybridrl.types import RolloutBatch, TokenScores


def empty_scores(
    evidence: Evidence, teacher: str, batch: RolloutBatch, head: Tensor
) -> TokenScores:
    """The columns before any token is scored: log-probs and rows are 0, supports 0 ... K-1.

    Args:
        head: [V, H] the teacher's output embedding.
    """
    num_rows = int(batch.response_lengths.sum())
    vocabulary, hidden = head.shape
    width = evidence.width(vocabulary, hidden)
    return TokenScores(
        teacher=teacher,
        logprobs=np.zeros(len(batch.input_ids), numpy_dtype(softmax_dtype(head))),
        rows=np.zeros((num_rows, width), numpy_dtype(evidence.row_dtype(head.dtype))),
        support_ids=np.tile(np.arange(evidence.support, dtype=np.int32), (num_rows, 1)),
    )


def fill_scores(
    scores: TokenScores,
    evidence: Evidence,
    batch: RolloutBatch,
    hidden: Tensor,
    head: Tensor,
    rule: HeadRule,
    rows: np.ndarray,
    tokens: np.ndarray,
) -> None:
    """Write the evidence about R' response tokens into `scores`.

    Args:
        hidden: [R', H] the teacher's last hidden state before each token.
        head: [V, H] the teacher's output embedding.
        rows: [R'] int64, the tokens' indices among the batch's response tokens.
        tokens: [R'] int64, the tokens' indices among all tokens of the batch.
    """
    device = hidden.device
    states = States(
        hidden=hidden,
        head=head,
        rule=rule,
        token_ids=torch.from_numpy(batch.input_ids[tokens].astype(np.int64)).to(device),
        sampler_support=torch.from_numpy(batch.support_ids[rows].astype(np.int64)).to(device),
    )
    reading = evidence.read(states)
    scores.rows[rows] = to_wire(reading.rows.cpu())
    scores.support_ids[rows] = reading.support_ids.cpu().numpy()
    scores.logprobs[tokens] = reading.logprobs.cpu().numpy()
