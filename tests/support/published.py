"""The losses as their papers define them, written out one response at a time for torch's autograd,
without any code of the package.

p is the student, q the teacher or reference, mu the sampler, and y a drawn token. Rewards and
advantages have the sign of the papers: larger is better. Losses are minimised. `.detach()` marks
terms through which a paper takes no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response of T tokens, and the outputs of the models for it, with a vocabulary of V
    tokens. Only `logits` and `values` require gradients.
    """

    group: int
    by_student: bool
    reward: float
    domain: str
    ids: Tensor  # [T] int64
    logits: Tensor  # [T, V] logits of the student before each token
    values: Tensor  # [T] outputs of the student's value head
    mu: Tensor  # [T] log mu(y)
    teachers: dict[str, Tensor]  # [T, V] logits of each teacher by name

    @property
    def logp(self) -> Tensor:  # [T, V]
        return torch.log_softmax(self.logits, -1)

    @property
    def lp(self) -> Tensor:  # [T]
        return self.drawn(self.logp)

    def logq(self, teacher: str = "main") -> Tensor:  # [T, V]
        return torch.log_softmax(self.teachers[teacher], -1).detach()

    def lq(self, teacher: str = "main") -> Tensor:  # [T]
        return self.drawn(self.logq(teacher))

    def drawn(self, rows: Tensor) -> Tensor:
        return rows.gather(1, self.ids[:, None])[:, 0]


Answers = Sequence[Answer]
Loss = Callable[[Answers], Tensor]


# -- means -----------------------------------------------------------------------------------------


def token_mean(answers: Answers, loss: Callable[[Answer], Tensor]) -> Tensor:
    """The mean of a loss [T] over all tokens of the batch."""
    return sum(loss(a).sum() for a in answers) / sum(len(a.ids) for a in answers)


def sequence_mean(answers: Answers, loss: Callable[[Answer], Tensor]) -> Tensor:
    """The mean over responses of the mean over tokens: 1/N sum_i 1/|y_i| sum_t."""
    return sum(loss(a).mean() for a in answers) / len(answers)


def siblings(answers: Answers, answer: Answer) -> list[Answer]:
    return [a for a in answers if a.group == answer.group]


# -- divergences of one response, [T] --------------------------------------------------------------


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jsd(a: Answer, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (2306.13649)."""
    p, q = a.logp, a.logq()
    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


# -- imitation -------------------------------------------------------------------------------------


def likelihood(answers: Answers) -> Tensor:
    """SFT; with answers of the teacher SeqKD (1606.07947)."""
    return token_mean(answers, lambda a: -a.lp)


def forward_kl(answers: Answers) -> Tensor:
    """Word-level KD (1606.07947, section 3.1) on data; DAgger-like on the student's own answers."""
    return token_mean(answers, lambda a: kl(a.logq(), a.logp))


def gkd(answers: Answers) -> Tensor:
    """(1 - l) E_data[D] + l E_student[D], where D is the mean JSD over the response and l = beta =
    0.5 (2306.13649).
    """
    of_student = [a for a in answers if a.by_student]
    of_data = [a for a in answers if not a.by_student]
    return 0.5 * sequence_mean(of_data, lambda a: jsd(a, 0.5)) + 0.5 * sequence_mean(
        of_student, lambda a: jsd(a, 0.5)
    )


def minillm(answers: Answers) -> Tensor:
    """The single-step term grad KL_t, and the long term -w_t R^norm_{t+1} grad log p(y_t), which
    has PPO's clip (2306.08543).

    R^norm_{t+1} = 1/(T-t-1) sum_{k>t} log q/p with t from 0, and w_t = p/mu of the drawn token. The
    single-step term has no w_t, because given the prefix it does not depend on the drawn token.
    """

    def loss(a: Answer) -> Tensor:
        gain = (a.lq() - a.lp).detach()
        size = len(gain)
        returns = torch.stack(
            [gain[t + 1 :].mean() if t + 1 < size else gain[0] * 0 for t in range(size)]
        )
        return kl(a.logp, a.logq()) + clipped(a, returns)

    return sequence_mean(answers, loss)


def opd(answers: Answers) -> Tensor:
    """-rho Adv with Adv = -(log mu - log q) of the drawn token and an unbounded rho = p/mu
    (Thinking Machines).
    """
    return token_mean(answers, lambda a: (a.lp - a.mu).exp() * (a.mu - a.lq()))


def opd_full(answers: Answers) -> Tensor:
    """KL(p || q) over the vocabulary at the student's prefixes."""
    return token_mean(answers, lambda a: kl(a.logp, a.logq()))


def mopd(answers: Answers) -> Tensor:
    """-1/|y| sum_t w_t A_t log p(y_t) with A_t = log q_domain/p + A_ORM, and w_t = p/mu inside
    [0.5, 2], else 0 (2601.02780).

    The p in A_t is the sampler's.
    """
    teacher_of = {"a": "main", "b": "second"}

    def loss(a: Answer) -> Tensor:
        rho = (a.lp - a.mu).exp().detach()
        w = torch.where((rho >= 0.5) & (rho <= 2.0), rho, 0.0)
        return -w * (a.lq(teacher_of[a.domain]) - a.mu + standard_score(answers, a)) * a.lp

    return sequence_mean(answers, loss)


def g_opd(answers: Answers) -> Tensor:
    """The cost (log p - log q) + (l - 1)(log p_ref - log q) times log p(y), with l = 1.25 and the
    initial student as p_ref (2602.12125).
    """

    def loss(a: Answer) -> Tensor:
        cost = (a.lp - a.lq()) + 0.25 * (a.lq("initial") - a.lq())
        return cost.detach() * a.lp

    return token_mean(answers, loss)


# -- imitation and reward --------------------------------------------------------------------------


def hybrid(weight: float, gamma: float) -> Loss:
    """grad KL(p_t || q_t) + G_{t+1} grad log p(y_t), G_{t+1} = sum_{k>t} gamma^(k-t) c_k - lambda R
    (2512.23097).

    The baseline is the mean G of the other answers to the prompt at the same position; the G of an
    answer that has already ended is -lambda R.
    """

    def future(a: Answer, t: int) -> float:
        cost = (a.lp - a.lq()).detach().tolist()
        return sum(gamma ** (k - t) * cost[k] for k in range(t + 1, len(cost))) - weight * a.reward

    def sparse(answers: Answers, a: Answer) -> Tensor:
        others = [b for b in siblings(answers, a) if b is not a]
        base = [sum(future(b, t) for b in others) / len(others) for t in range(len(a.ids))]
        return torch.tensor(
            [future(a, t) - base[t] for t in range(len(a.ids))], dtype=torch.float64
        )

    return lambda answers: token_mean(
        answers, lambda a: kl(a.logp, a.logq()) + sparse(answers, a) * a.lp
    )


# -- reward ----------------------------------------------------------------------------------------


def clipped(a: Answer, advantage: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), rho = p/mu (1707.06347)."""
    rho = (a.lp - a.mu).exp()
    return -torch.minimum(
        rho * advantage.detach(), rho.clamp(1 - low, 1 + high) * advantage.detach()
    )


def standard_score(
    answers: Answers, a: Answer, reward: Callable[[Answer], float] = lambda a: a.reward
) -> Tensor:
    """(R - mean) / (std + 1e-6) over the answer's group (2402.03300)."""
    group = torch.tensor([reward(b) for b in siblings(answers, a)], dtype=torch.float64)
    return (reward(a) - group.mean()) / ((group - group.mean()).square().mean().sqrt() + 1e-6)


def rloo(answers: Answers) -> Tensor:
    """-(R_i - mean R of the other answers) log p(y_i) (2402.14740), as a mean over all tokens of
    the batch.
    """

    def loss(a: Answer) -> Tensor:
        others = [b.reward for b in siblings(answers, a) if b is not a]
        return -(a.reward - sum(others) / len(others)) * a.lp

    return token_mean(answers, loss)


def raft(answers: Answers) -> Tensor:
    """-log p of the answers with reward 1 (2304.06767), divided by the tokens of all answers."""
    return sum(-a.lp.sum() for a in answers if a.reward == 1) / sum(len(a.ids) for a in answers)


def grpo(answers: Answers) -> Tensor:
    """The clipped surrogate of the group-relative advantage, plus beta k3 as a separate loss
    (2402.03300).
    """

    def loss(a: Answer) -> Tensor:
        log_ratio = a.lq() - a.lp
        return clipped(a, standard_score(answers, a).expand(len(a.ids))) + 0.04 * (
            log_ratio.exp() - log_ratio - 1
        )

    return sequence_mean(answers, loss)


def grpo_with_kl_in_the_clip(answers: Answers) -> Tensor:
    """GRPO with the k3 gradient, 1 - q/mu, inside the advantage, so that the ratio and its clip
    apply to it.
    """

    def loss(a: Answer) -> Tensor:
        return clipped(a, standard_score(answers, a) - 0.04 * (1 - (a.lq() - a.mu).exp()))

    return sequence_mean(answers, loss)


def dr_grpo(longest: int) -> Loss:
    """A = R - mean of the group, with the sum over tokens divided by a constant (2503.20783)."""

    def loss(answers: Answers) -> Tensor:
        def one(a: Answer) -> Tensor:
            group = [b.reward for b in siblings(answers, a)]
            return clipped(
                a,
                torch.tensor(a.reward - sum(group) / len(group), dtype=torch.float64).expand(
                    len(a.ids)
                ),
            )

        return sum(one(a).sum() for a in answers) / (len(answers) * longest)

    return loss


def dapo(longest: int, cache: int) -> Loss:
    """The surrogate clipped to [1 - 0.2, 1 + 0.28] as a mean over tokens, without groups of equal
    rewards, and with the soft over-length penalty (2503.14476).
    """

    def shaped(a: Answer) -> float:
        length = len(a.ids)
        if length <= longest - cache:
            return a.reward
        return a.reward + ((longest - cache - length) / cache if length <= longest else -1.0)

    def loss(answers: Answers) -> Tensor:
        used = [a for a in answers if len({b.reward for b in siblings(answers, a)}) > 1]
        return token_mean(
            used,
            lambda a: clipped(a, standard_score(used, a, shaped).expand(len(a.ids)), 0.2, 0.28),
        )

    return loss


def reinforce_pp(answers: Answers) -> Tensor:
    """The clipped surrogate with A_t = R - beta sum_{k>=t} log mu/q, normalised over all tokens of
    the batch to mean 0 and deviation 1 (2501.03262).
    """
    raw = [a.reward - 0.1 * (a.mu - a.lq()).flip(0).cumsum(0).flip(0) for a in answers]
    joined = torch.cat(raw)
    deviation = (joined - joined.mean()).square().mean().sqrt() + 1e-8
    parts = [
        clipped(a, (r - joined.mean()) / deviation).sum() for a, r in zip(answers, raw, strict=True)
    ]
    return sum(parts) / len(joined)


def ppo(answers: Answers) -> Tensor:
    """The clipped surrogate with GAE of r_t = -beta log p/q + 1[t = T] R, discount 1 and lambda
    0.95, and the value loss (1707.06347).

    The p inside the reward is the learner's before its update; the denominator of the ratio is the
    sampler. The value head predicts costs, so V is the negative of its output. The value loss is
    (V - V_target)^2 / 2 times 0.5.
    """

    def loss(a: Answer) -> Tensor:
        reward = -0.1 * (a.lp - a.lq()).detach()
        reward[-1] += a.reward
        value = -a.values
        old, advantage, last = value.detach(), torch.zeros_like(reward), 0.0
        for t in reversed(range(len(reward))):
            ahead = old[t + 1] if t + 1 < len(reward) else 0.0
            last = reward[t] + ahead - old[t] + 0.95 * last
            advantage[t] = last
        return clipped(a, advantage) + 0.5 * 0.5 * (value - (advantage + old)).square()

    return token_mean(answers, loss)


# -- pairs -----------------------------------------------------------------------------------------


def pairs(answers: Answers, loss: Callable[[Answer, Answer], Tensor]) -> Tensor:
    """The mean over prompts of the loss of their best and worst answers. A prompt with equal
    rewards is left out.
    """
    groups = [
        sorted(group, key=lambda a: -a.reward) for _, group in groupby(answers, lambda a: a.group)
    ]
    losses = [loss(g[0], g[-1]) for g in groups if g[0].reward > g[-1].reward]
    return sum(losses) / len(losses)


def nls(x: Tensor) -> Tensor:
    """-log sigma(x)"""
    return torch.log1p(torch.exp(-x))


def ratio(a: Answer) -> Tensor:
    """log p/p_ref, summed over the response."""
    return (a.lp - a.lq("initial")).sum()


def mean_ratio(a: Answer) -> Tensor:
    return (a.lp - a.lq("initial")).mean()


PAIRS: dict[str, Callable[[Answer, Answer], Tensor]] = {
    "dpo": lambda w, r: nls(0.1 * (ratio(w) - ratio(r))),
    "ipo": lambda w, r: (ratio(w) - ratio(r) - 1 / (2 * 0.1)).square(),
    "slic": lambda w, r: torch.relu(1.0 - w.lp.sum() + r.lp.sum()) - 0.1 * w.lp.sum(),
    "simpo": lambda w, r: nls(2.0 * (w.lp.mean() - r.lp.mean()) - 0.5),
    "dil_lsif": lambda w, r: -mean_ratio(w).exp() + 0.5 * (2 * mean_ratio(r)).exp(),
    "dil_ukl": lambda w, r: -mean_ratio(w) + mean_ratio(r).exp(),
    "dil_bce": lambda w, r: nls(mean_ratio(w)) + nls(-mean_ratio(r)),
    "reward_model": lambda w, r: nls(w.values[-1] - r.values[-1]),
}
"""The losses of a chosen response w and a rejected response r. Their papers are, in this order,
2305.18290, 2310.12036, 2305.10425, 2405.14734, 2503.05079 (three losses), Bradley and Terry.
"""
