"""An example in which imitation of the expert's data must be worse than imitation on the student's
own actions (arXiv 2606.30445, theorem 1).

Each of l contexts hides one bit. The expert plays a0, which the student cannot play, with
probability 1 - eps, and otherwise the action a1 or a2 that the bit names, with an error rate of
delta. The student plays a1 or a2, and is right if it follows the bit. Data reveals a bit only if
the expert played a1 or a2; the teacher's log-probs reveal it at every visit.
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
    """[3] the expert's probabilities of a0, of the action that the bit names, and of the other
    one.
    """
    return torch.tensor([1 - eps, eps * (1 - DELTA), eps * DELTA], dtype=torch.float64)


def follows_the_bit_after_one_look(eps: float) -> bool:
    """Whether the dense gradient moves an undecided student, which never plays a0, towards the
    action that the bit names.
    """
    student = torch.tensor([[-torch.inf, math.log(0.5), math.log(0.5)]], dtype=torch.float64)
    _, gradient = dense(student, expert(eps).log()[None], Measure())
    assert gradient[0, 0] == 0
    return bool(-gradient[0, 1] > 0 > -gradient[0, 2])


@cache
def gradient_of_data(right: int, wrong: int) -> float:
    """The gradient of the likelihood with respect to the logit of the bit's action, after `right`
    and `wrong` observations of a context.
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
    """The share of contexts in which maximum likelihood follows the bit, as an exact mean over all
    data. An undecided context counts as half right.
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
    """The same share with a teacher: contexts that the student has visited are right, the others
    count as half right.
    """
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
    hidden = (1 - eps / CONTEXTS) ** samples  # the chance that a context's bit was never observed
    assert 0.5 * hidden == pytest.approx(0.335, abs=5e-4)
    assert 1 - offline_value(eps, samples) == pytest.approx(0.5 * hidden, abs=0.02), (
        "delta 0.05 adds a little"
    )
    assert 1 - offline_value(eps, samples) > 0.5 * hidden
