"""Where imitation from the expert's data must lose to imitation on the student's own actions (arXiv
2606.30445, theorem 1).

l contexts hide one bit each. The expert plays a0 with probability 1 - eps, which the student
cannot, and otherwise the action a1 or a2 that the bit names, up to an error of delta. Either
student plays a1 or a2 and is right when it follows the bit. Data shows a bit only where the expert
played a1 or a2; a teacher's log-probs show it at every visit.
"""

import math
from functools import cache

import pytest
import torch

from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.ops.divergence import Measure, dense
from tests.support.batches import token_columns

CONTEXTS, DELTA = 32, 0.05


def expert(eps: float) -> torch.Tensor:
    """[3] the expert's probabilities of a0, of the action that the bit names, and of the other."""
    return torch.tensor([1 - eps, eps * (1 - DELTA), eps * DELTA], dtype=torch.float64)


def follows_the_bit_after_one_look(eps: float) -> bool:
    """Whether the dense gradient at an undecided student, who never plays a0, moves it to the
    action of the bit.
    """
    student = torch.tensor([[-torch.inf, math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    _, gradient = dense(student, expert(eps).log()[None], Measure())
    assert gradient[0, 0] == 0
    return bool(-gradient[0, 1] > 0 > -gradient[0, 2])


@cache
def gradient_of_data(right: int, wrong: int) -> float:
    """What `right` and `wrong` observations of a context add to the logit of the bit's action, by
    likelihood.
    """
    ids = torch.tensor([0] * right + [1] * wrong)
    one = torch.ones(len(ids), dtype=torch.float64)
    head = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    terms = token_columns(token_ids=ids, token_weight=one, sparse=-one, sampler_logprobs=0 * one)
    hybrid_head_loss(one[:, None], head, (), terms, HeadRule())[0].backward()
    return -float(head.grad[0, 0])


def binomial(n: int, k: int, p: float) -> float:
    return math.exp(
        math.lgamma(n + 1)
        - math.lgamma(k + 1)
        - math.lgamma(n - k + 1)
        + k * math.log(p)
        + (n - k) * math.log1p(-p)
    )


def offline_value(eps: float, samples: int) -> float:
    """Exact mean over data of the share of contexts where likelihood follows the bit; an undecided
    context is half right.
    """
    value = 0.0
    for seen in range(min(samples, 60) + 1):
        for right in range(seen + 1):
            push = gradient_of_data(right, seen - right) if seen else 0.0
            correct = 1.0 if push > 1e-9 else 0.5 if push > -1e-9 else 0.0
            value += (
                binomial(samples, seen, eps / CONTEXTS)
                * (binomial(seen, right, 1 - DELTA) if seen else 1.0)
                * correct
            )
    return value


def online_value(eps: float, samples: int) -> float:
    """A context that the student visited once is known; the others are half right."""
    assert follows_the_bit_after_one_look(eps)
    return 1 - 0.5 * (1 - 1 / CONTEXTS) ** samples


@pytest.mark.parametrize(
    ("eps", "samples", "offline", "online"),
    [
        (1.0, 128, 0.977, 0.991),
        (0.3, 128, 0.821, 0.991),
        (0.1, 128, 0.646, 0.992),
        (0.03, 128, 0.550, 0.991),
        (0.01, 128, 0.524, 0.991),
        (0.01, 2048, 0.711, 1.0),
    ],
)
def test_data_needs_more_samples_as_the_expert_leaves_the_students_class_and_own_samples_do_not(
    eps: float, samples: int, offline: float, online: float
):
    assert offline_value(eps, samples) == pytest.approx(offline, abs=0.007), (
        "the published values are simulated"
    )
    assert online_value(eps, samples) == pytest.approx(online, abs=0.001)


def test_without_an_error_of_the_expert_the_regret_of_data_has_its_closed_form():
    eps, samples = 0.1, 128
    hidden = (1 - eps / CONTEXTS) ** samples  # nothing seen of a context
    assert 0.5 * hidden == pytest.approx(0.335, abs=5e-4)
    assert 1 - offline_value(eps, samples) == pytest.approx(0.5 * hidden, abs=0.02), (
        "delta 0.05 adds a little"
    )
    assert 1 - offline_value(eps, samples) > 0.5 * hidden
