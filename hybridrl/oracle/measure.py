"""Computes the exact mean and variance of an estimator's gradient over all possible samples."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridrl.oracle.estimator import Estimator, Rows
from hybridrl.oracle.exact import author
from hybridrl.settings.choices import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Mean and variance of a gradient, and whether it depends on the drawn tokens."""

    mean: Tensor  # [P, V] gradient per sequence at the student's logits
    variance: float  # per sequence: the trace of the covariance times the sequences of a batch
    # largest difference between the gradients of two tokens at their logits, after the same prefix
    token_spread: float


def measure(estimator: Estimator, shares: Mapping[Source, float], group_size: int) -> Measured:
    """Measure a gradient by a sum over all groups of K sequences, each group a global batch.

    Args:
        shares: the share of the batches by the source of their sequences; they sum to 1.
    """
    table = estimator.mdp.student
    mean = torch.zeros_like(table)
    squares = 0.0
    token_spread = 0.0
    weight = 0.0
    for source, share in shares.items():
        probability = estimator.mdp.probability(author(estimator.mdp, source))
        for members in pieces(estimator, group_size):
            rows = estimator.rows(members, source)
            chance = share * probability[members].prod(1)
            weight += float((rows.columns.token_weight * chance[rows.group]).sum())
            mean += table_gradient(estimator, rows, chance[rows.group])
            tokens = token_gradients(estimator, rows)
            each = torch.zeros(len(members), *table.shape, dtype=table.dtype).index_put_(
                (rows.group, rows.prefixes), tokens, True
            )
            squares += float((chance * each.square().sum((1, 2))).sum())
            per_weight = tokens / rows.columns.token_weight[:, None]
            token_spread = max(token_spread, spread(per_weight, rows.prefixes))
    scale = tokens_per_sequence(estimator, weight)
    variance = (squares - float(mean.square().sum())) * scale**2 * group_size
    return Measured(mean=mean * scale, variance=max(variance, 0.0), token_spread=token_spread)


def pieces(estimator: Estimator, group_size: int) -> list[Tensor]:
    """All K-tuples of sequences, in tensors [B, K] whose groups have the same number of tokens and
    so the same plan.

    If batches are standardised, each tuple is a tensor of its own.
    """
    lengths = estimator.mdp.lengths
    tuples = torch.cartesian_prod(*[torch.arange(len(lengths))] * group_size).reshape(
        -1, group_size
    )
    if estimator.objective.standardises:
        return list(tuples[:, None])
    tokens = lengths[tuples].sum(1)
    return [tuples[tokens == n] for n in tokens.unique()]


def table_gradient(estimator: Estimator, rows: Rows, chance: Tensor) -> Tensor:
    """[P, V] the sum of the tokens' gradients, each times the probability `chance` [R] of its
    group.

    With one-hot hidden states and the table as output head, the logits are entries of the table, so
    the gradient of the head is that of the table.
    """
    hidden = torch.eye(len(estimator.mdp.student), dtype=torch.float64)[rows.prefixes]
    lm_head = estimator.mdp.student.T.clone().requires_grad_()
    estimator.loss(
        hidden,
        lm_head,
        rows,
        rows.columns._replace(token_weight=rows.columns.token_weight * chance),
    ).backward()
    assert lm_head.grad is not None
    return lm_head.grad.T


def token_gradients(estimator: Estimator, rows: Rows) -> Tensor:
    """[R, V] the gradient of each token at its own logits.

    The logits are the hidden states, and the output head is the identity.
    """
    logits = estimator.mdp.student[rows.prefixes].requires_grad_()
    estimator.loss(
        logits, torch.eye(logits.shape[1], dtype=logits.dtype), rows, rows.columns
    ).backward()
    assert logits.grad is not None
    return logits.grad


def spread(gradients: Tensor, prefixes: Tensor) -> float:
    """The largest difference between gradients, rows of [R, V], of the same prefix [R]."""
    where = prefixes[:, None].expand_as(gradients)
    ends = [
        torch.zeros(int(prefixes.max()) + 1, gradients.shape[1], dtype=gradients.dtype)
        for _ in range(2)
    ]
    high, low = (
        e.scatter_reduce(0, where, gradients, way, include_self=False)
        for e, way in zip(ends, ("amax", "amin"), strict=True)
    )
    return float((high - low).max())


def tokens_per_sequence(estimator: Estimator, weight: float) -> float:
    """The factor that undoes the normaliser, in the mean if lengths vary.

    A user's token weight may have any scale, because a constant factor acts like a learning rate.

    Args:
        weight: the mean of the sum of a batch's token weights, which is 1 if they form a mean.
    """
    mdp = estimator.mdp
    algorithm = estimator.settings.algorithm
    length = float((mdp.probability(mdp.student) * mdp.lengths).sum())
    if algorithm.token_weight is not None:
        return length / weight
    if algorithm.normalizer == "constant":
        longest = estimator.settings.rollout.max_new_tokens
        assert longest is not None, "settings_of sets it"
        return float(longest)
    return length
