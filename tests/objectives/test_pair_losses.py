"""Pair losses: closed-form derivatives against autograd, population minimisers, and extreme values,
which must not overflow.
"""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairScores
from hybridrl.ops.preference import MAX_LOG_RATIO, bradley_terry
from hybridrl.settings.algorithm import PairConfig
from hybridrl.settings.built_in import PAIR_LOSSES
from hybridrl.settings.choices import Reference

OPTIONS = PairConfig(
    beta=0.7,
    target=0.4,
    nll_weight=0.0,
    average=False,
    clamp=None,
    reference=Reference.rejected,
)
LOG_PROB_LOSSES = [loss for loss in PAIR_LOSSES if loss != "bradley_terry"]
DIL = ["dil_lsif", "dil_ukl", "dil_bce"]

ARM_REWARDS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
ARM_REFERENCE = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=torch.float64)
LABEL_NOISE = (0.0, 0.1, 0.25, 0.5)


def pair(
    chosen: float,
    rejected: float,
    *,
    dtype: torch.dtype = torch.float64,
    chosen_len: int = 1,
    rejected_len: int = 1,
) -> PairScores:
    """One pair with reference log-probs 0, so that each s is the given value over the length."""

    def one(x):
        return torch.tensor([x], dtype=dtype)

    return PairScores(
        chosen_logp=one(chosen),
        rejected_logp=one(rejected),
        chosen_ref=one(0.0),
        rejected_ref=one(0.0),
        chosen_len=torch.tensor([chosen_len]),
        rejected_len=torch.tensor([rejected_len]),
    )


def gradient(name: str, scores: PairScores, pair: PairConfig) -> PairGradient:
    """The loss of that name and its derivatives for the pairs."""
    return PAIR_LOSSES[name].load()().gradient(scores, pair)


def random_pairs(num: int = 64) -> PairScores:
    """Random pairs of responses with 1 to 9 tokens; log-ratios are a few nats, of both signs."""
    g = torch.Generator().manual_seed(5)

    def draw(scale):
        return -scale * torch.rand(num, generator=g, dtype=torch.float64)

    return PairScores(
        chosen_logp=draw(6),
        rejected_logp=draw(6),
        chosen_ref=draw(6),
        rejected_ref=draw(6),
        chosen_len=torch.randint(1, 10, (num,), generator=g),
        rejected_len=torch.randint(1, 10, (num,), generator=g),
    )


def written_loss(name: str, scores: PairScores, options: PairConfig) -> Tensor:
    """[P] the losses by the published formulas, for autograd."""
    a, b = (scores.chosen_len, scores.rejected_len) if options.average else (1, 1)
    lw, ll = scores.chosen_logp / a, scores.rejected_logp / b
    sw, sl = lw - scores.chosen_ref / a, ll - scores.rejected_ref / b
    c = options.clamp or 20.0

    def line(f, df, s):
        return torch.where(
            s < c, f(s), f(torch.tensor(c).double()) + df(torch.tensor(c).double()) * (s - c)
        )

    mean = (
        (lambda f: 0.5 * (f(sw) + f(sl)))
        if options.reference is Reference.both
        else (lambda f: f(sl))
    )
    match name:
        case "dpo":
            loss = torch.log(1 + torch.exp(-options.beta * (sw - sl)))
        case "ipo":
            loss = (sw - sl - 1 / (2 * options.target)) ** 2
        case "slic":
            loss = torch.relu(options.target - lw + ll)
        case "simpo":
            loss = torch.log(1 + torch.exp(options.target - options.beta * (lw - ll)))
        case "dil_lsif":
            loss = -line(torch.exp, torch.exp, sw) + mean(
                lambda s: line(lambda u: torch.exp(2 * u) / 2, lambda u: torch.exp(2 * u), s)
            )
        case "dil_ukl":
            loss = -sw + mean(lambda s: line(torch.exp, torch.exp, s))
        case "dil_bce":
            at_chosen = line(
                lambda u: torch.log(1 + torch.exp(-u)), lambda u: -1 / (1 + torch.exp(u)), sw
            )
            loss = at_chosen + mean(
                lambda s: line(
                    lambda u: torch.log(1 + torch.exp(u)), lambda u: 1 / (1 + torch.exp(-u)), s
                )
            )
        case "bradley_terry":
            return torch.log(1 + torch.exp(scores.rejected_logp - scores.chosen_logp))
    return loss - options.nll_weight * lw


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("reference", Reference)
@pytest.mark.parametrize(("nll_weight", "clamp"), [(0.0, None), (0.3, 0.5)])
def test_derivatives_equal_autograd_of_the_written_formula(
    name: str, average: bool, reference: Reference, nll_weight: float, clamp: float | None
) -> None:
    options = replace(
        OPTIONS, average=average, reference=reference, nll_weight=nll_weight, clamp=clamp
    )
    scores = random_pairs()
    got = gradient(name, scores, options)
    leaves = [
        scores.chosen_logp.clone().requires_grad_(),
        scores.rejected_logp.clone().requires_grad_(),
    ]
    wanted = written_loss(
        name, replace(scores, chosen_logp=leaves[0], rejected_logp=leaves[1]), options
    )
    d_chosen, d_rejected = torch.autograd.grad(wanted.sum(), leaves)
    torch.testing.assert_close(got.loss, wanted.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(got.d_chosen, d_chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.d_rejected, d_rejected, rtol=0, atol=1e-10)


def test_each_formula_by_hand_at_equal_scores() -> None:
    zero, options = pair(0.0, 0.0), replace(OPTIONS, beta=2.0, target=0.25)
    rows = {name: gradient(name, zero, options) for name in PAIR_LOSSES}
    got = {
        name: (round(r.loss.item(), 4), round(r.d_chosen.item(), 4), round(r.d_rejected.item(), 4))
        for name, r in rows.items()
    }
    assert got == {
        "dpo": (0.6931, -1.0, 1.0),  # log 2, and beta / 2
        "ipo": (4.0, -4.0, 4.0),  # 1 / (2 tau) = 2
        "slic": (0.25, -1.0, 1.0),
        "simpo": (0.8259, -1.1244, 1.1244),  # log(1 + exp(0.25)), and 2 sigma(0.25)
        "dil_lsif": (-0.5, -1.0, 1.0),
        "dil_ukl": (1.0, -1.0, 1.0),
        "dil_bce": (1.3863, -0.5, 0.5),  # 2 log 2
        "bradley_terry": (0.6931, -0.5, 0.5),
    }


def test_bradley_terry_learns_from_the_difference_of_scores_alone() -> None:
    loss, d_chosen, d_rejected = bradley_terry(
        torch.tensor([1.0, 101.0]), torch.tensor([0.0, 100.0])
    )
    torch.testing.assert_close(loss, torch.tensor([0.3133, 0.3133]), rtol=0, atol=1e-4)
    torch.testing.assert_close(d_chosen, torch.tensor([-0.2689, -0.2689]), rtol=0, atol=1e-4)
    assert torch.equal(d_rejected, -d_chosen)


def minimiser(name: str, options: PairConfig) -> Tensor:
    """[4] the mean reward of the softmax policy that minimises the exact population loss, for each
    of LABEL_NOISE.

    A pair is two independent draws from the reference. The label `chosen` follows the Bradley-Terry
    probability of the rewards, and is flipped with the probability of the noise.
    """
    noise = torch.tensor(LABEL_NOISE, dtype=torch.float64)[:, None, None]
    better = torch.sigmoid(ARM_REWARDS[:, None] - ARM_REWARDS[None, :])
    weight = (
        ARM_REFERENCE[:, None]
        * ARM_REFERENCE[None, :]
        * ((1 - noise) * better + noise * better.T)
        * 2
    )  # [4, 5, 5] chosen, rejected
    ones, shape = torch.ones(weight.numel()), weight.shape
    reference = ARM_REFERENCE.log()
    logits = reference.expand(len(LABEL_NOISE), 5).clone()  # [4, 5]
    for _ in range(1500):
        logp = logits.log_softmax(-1)
        scores = PairScores(
            chosen_logp=logp[:, :, None].expand(shape).flatten(),
            rejected_logp=logp[:, None, :].expand(shape).flatten(),
            chosen_ref=reference[None, :, None].expand(shape).flatten(),
            rejected_ref=reference[None, None, :].expand(shape).flatten(),
            chosen_len=ones,
            rejected_len=ones,
        )
        g = gradient(name, scores, options)
        d_logp = (weight * g.d_chosen.view(shape)).sum(2) + (weight * g.d_rejected.view(shape)).sum(
            1
        )  # [4, 5]
        slope = d_logp - logp.exp() * d_logp.sum(-1, keepdim=True)
        logits = (
            logits - 0.3 * slope / logp.exp()
        )  # natural gradient, with which the logit of a vanishing arm falls steadily
    assert slope.abs().max() < 1e-5
    return logp.exp() @ ARM_REWARDS


@pytest.mark.parametrize(
    ("name", "expected_rewards"),
    [
        ("dil_lsif", (1.082, 0.782, 0.445, 0.0)),
        ("dil_ukl", (0.766, 0.634, 0.412, 0.0)),
        ("dil_bce", (0.694, 0.589, 0.398, 0.0)),
        ("dpo", (1.085, 0.781, 0.445, 0.0)),
    ],
)
def test_the_population_minimisers_of_the_bandit_earn_the_known_reward(
    name: str, expected_rewards: tuple[float, ...]
) -> None:
    wanted = torch.tensor(expected_rewards, dtype=torch.float64)
    torch.testing.assert_close(
        minimiser(name, replace(OPTIONS, beta=1.0)), wanted, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("name", DIL)
def test_with_both_responses_as_reference_every_dil_recovers_the_chosen_distribution(
    name: str,
) -> None:
    wanted = torch.tensor(
        (0.422, 0.338, 0.211, 0.0), dtype=torch.float64
    )  # the mean reward of SFT on the chosen responses
    torch.testing.assert_close(
        minimiser(name, replace(OPTIONS, reference=Reference.both)), wanted, rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_log_ratios_up_to_a_hundred_stay_finite_in_float32(name: str) -> None:
    grid = torch.arange(-100.0, 101.0, 10.0)
    chosen, rejected = (t.flatten() for t in torch.meshgrid(grid, grid, indexing="ij"))
    ones, zeros = torch.ones_like(chosen), torch.zeros_like(chosen)
    scores = PairScores(
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_ref=zeros,
        rejected_ref=zeros,
        chosen_len=ones,
        rejected_len=ones,
    )
    for reference in Reference:
        got = gradient(name, scores, replace(OPTIONS, reference=reference, nll_weight=0.1))
        for f in fields(PairGradient):
            values = getattr(got, f.name)
            assert values.shape == chosen.shape and torch.isfinite(values).all(), f.name
        assert torch.isfinite(got.d_chosen.square().sum()) and torch.isfinite(
            got.d_rejected.square().sum()
        )
        above = (chosen > MAX_LOG_RATIO) | (rejected > MAX_LOG_RATIO)
        assert torch.equal(got.clamped, above if name in DIL else torch.zeros_like(above))


@pytest.mark.parametrize("name", DIL)
def test_a_rejected_response_above_the_clamp_is_pushed_down_as_hard_as_at_it(
    name: str,
) -> None:
    options = replace(OPTIONS, clamp=2.0)
    at, above = (gradient(name, pair(0.0, s), options) for s in (2.0, 7.0))
    assert not at.clamped.item() and above.clamped.item()
    assert at.d_rejected.item() == above.d_rejected.item() > 0
    assert above.loss.item() == pytest.approx(at.loss.item() + 5 * at.d_rejected.item())


@pytest.mark.parametrize("name", LOG_PROB_LOSSES)
def test_lengths_matter_only_to_averages(name: str) -> None:
    scores = random_pairs()
    longer = replace(scores, chosen_len=scores.chosen_len + 3, rejected_len=scores.rejected_len * 7)
    summed = [gradient(name, s, OPTIONS) for s in (scores, longer)]
    averaged = [gradient(name, s, replace(OPTIONS, average=True)) for s in (scores, longer)]
    for f in fields(PairGradient):
        assert torch.equal(getattr(summed[0], f.name), getattr(summed[1], f.name)), f.name
    assert not torch.allclose(averaged[0].loss, averaged[1].loss)


@pytest.mark.parametrize("name", LOG_PROB_LOSSES)
def test_an_average_sees_a_repeated_response_as_the_same(name: str) -> None:
    options = replace(OPTIONS, average=True, nll_weight=0.2)
    once, twice = (
        gradient(name, pair(-3.0 * k, -4.0 * k, chosen_len=4 * k, rejected_len=5 * k), options)
        for k in (1, 2)
    )
    assert once.loss.item() == pytest.approx(twice.loss.item())
    assert once.margin.item() == pytest.approx(-0.75 + 0.8)
    assert (once.chosen_score.item(), once.rejected_score.item()) == pytest.approx((-0.75, -0.8))
    assert twice.d_chosen.item() == pytest.approx(
        once.d_chosen.item() / 2
    )  # per token, as the responses have twice as many tokens


@pytest.mark.parametrize("name", ["slic", "simpo", "bradley_terry"])
def test_losses_without_a_reference_model_do_not_read_its_log_probs(name: str) -> None:
    scores = random_pairs()
    a, b = (
        gradient(name, s, OPTIONS)
        for s in (scores, replace(scores, chosen_ref=scores.chosen_ref - 1))
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(a.d_chosen, b.d_chosen)


def test_pairs_do_not_touch_each_other() -> None:
    scores = random_pairs()
    for name in PAIR_LOSSES:
        whole = gradient(name, scores, OPTIONS)
        alone = gradient(
            name,
            PairScores(**{f.name: getattr(scores, f.name)[7:8] for f in fields(PairScores)}),
            OPTIONS,
        )
        assert torch.allclose(alone.loss, whole.loss[7:8]) and torch.allclose(
            alone.d_chosen, whole.d_chosen[7:8]
        ), name
