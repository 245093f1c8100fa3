"""Returns, baselines and advantages of the sparse term."""

import torch
from torch import Tensor


def future_cost(costs: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted imitation cost AFTER each token: S_t = gamma (c_{t+1} + S_{t+1}), 0 at the end.

    By the paper's convention (arXiv 2512.23097) exponents start at 1, so gamma=0 gives 0 and
    gamma=1 the whole future. Example: costs (1, 2, 4), gamma 0.5 -> (0.5*2 + 0.25*4, 0.5*4, 0) =
    (2, 2, 0).

    Args:
        costs: [N, T] c_t = log p(y_t) - log q(y_t), the weighted sum over teachers.
        mask: [N, T] bool, True on response tokens, which come first in each row.
        gamma: in [0, 1].

    Returns:
        [N, T], 0 where masked.
    """
    assert costs.ndim == 2 and costs.shape == mask.shape, (costs.shape, mask.shape)
    future = torch.zeros_like(costs)
    if gamma == 0:
        return future
    masked = torch.where(mask, costs, 0.0)
    for t in range(costs.shape[1] - 2, -1, -1):
        future[:, t] = gamma * (masked[:, t + 1] + future[:, t + 1])
    return torch.where(mask, future, 0.0)


def sibling_mean(returns: Tensor, group_size: int, *, leave_one_out: bool) -> Tensor:
    """The mean return, at the same position, of the K responses to a prompt.

    A response that has ended counts with its terminal return, so that all siblings count at every
    position. leave_one_out excludes the response itself, so the baseline of a token does not depend
    on anything that the token could change, and the gradient is unbiased (RLOO on the return,
    position by position). Example: one position, K=3, returns (3, 0, 6) -> leave-one-out (3, 4.5,
    1.5).

    Args:
        returns: [N, T], N a multiple of K, the responses to a prompt adjacent; rows are padded with
            their terminal return.
        group_size: K, at least 2 for leave_one_out.

    Returns:
        [N, T] the baseline of each entry.
    """
    assert returns.ndim == 2 and returns.shape[0] % group_size == 0, (returns.shape, group_size)
    assert group_size >= 2 or not leave_one_out, "leave-one-out needs a sibling"
    groups = returns.unflatten(0, (-1, group_size))  # [N/K, K, T]
    total = groups.sum(dim=1, keepdim=True)
    mean = (
        (total - groups) / (group_size - 1)
        if leave_one_out
        else (total / group_size).expand_as(groups)
    )
    return mean.flatten(0, 1)


def standard_scores(rewards: Tensor, group_size: int) -> Tensor:
    """(R - mean) / (std + 1e-6) within each group (GRPO, arXiv 2402.03300): [N] -> [N].

    std is the population standard deviation. The rewards must be float64, because the division
    would amplify the rounding errors of equal rewards. Example: rewards (1, 0, 0, 0), K=4 -> mean
    0.25, std 0.433: (1.732, -0.577, -0.577, -0.577).
    """
    assert rewards.ndim == 1 and rewards.shape[0] % group_size == 0, (rewards.shape, group_size)
    groups = rewards.unflatten(0, (-1, group_size))
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, correction=0, keepdim=True) + 1e-6)).flatten()


def generalised_advantage(
    returns: Tensor, values: Tensor, mask: Tensor, gae_lambda: float
) -> Tensor:
    """Generalised advantages of costs (GAE, arXiv 1506.02438).

    A_t = sum_k gae_lambda^k (g_{t+k} + v_{t+k+1} - v_{t+k}), with v = 0 after the end and the cost
    of a step g_t = G_t - G_{t+1}, so that any return can be used. gae_lambda = 1 gives the return
    minus its value, 0 bootstraps after one step. Example: returns (3, 1), values (2, 2), gae_lambda
    0 -> (3 - 1 + 2 - 2, 1 - 2) = (2, -1).

    Args:
        returns: [N, T] the cost G_t from each token to the end.
        values: [N, T] estimates of G_t.
        mask: [N, T] bool, True on response tokens, which come first in each row.
        gae_lambda: in [0, 1].

    Returns:
        [N, T], 0 where masked.
    """
    assert returns.shape == values.shape == mask.shape and returns.ndim == 2, (
        returns.shape,
        values.shape,
        mask.shape,
    )

    def ahead(x: Tensor) -> Tensor:
        """The masked x of the next position, 0 at the end."""
        return torch.nn.functional.pad(torch.where(mask, x, 0.0)[:, 1:], (0, 1))

    delta = torch.where(mask, returns - ahead(returns) + ahead(values) - values, 0.0)
    advantage = torch.zeros_like(delta)
    last = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        last = delta[:, t] + gae_lambda * last
        advantage[:, t] = last
    return advantage
