"""A2: the lower bound for offline imitation with one step, against online imitation.

There are l contexts, each with a hidden bit. The expert plays action 0 with probability 1 - eps,
the right one of actions 1 and 2 with probability eps (1 - delta), and the wrong one with
probability eps delta; actions 0 and the right one are rewarded. Students can only play 1 or 2, so
that the 2^l deterministic students are all far from the expert.
"""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes

from reproduction.experiment import Arm, Experiment, Judgement, Numbers, Runs, Setting, Verdict
from reproduction.lab import Lab

CONTEXTS = 32
DELTA = 0.05
RATES = (1.0, 0.3, 0.1, 0.03, 0.01)
SIZES = (32, 128, 512, 2048)
DECISIVE = 128


def offline_value(n: int, eps: float, contexts: int, delta: float) -> float:
    """The expected value of the best student given n samples of the expert.

    The best guess of a bit is the majority of the informative samples of its context, whose number
    is binomial with n draws and probability eps / contexts; without a majority it is right half of
    the time.
    """
    chance = eps / contexts
    value = 0.0
    for k in range(n + 1):
        log_weight = (
            math.lgamma(n + 1)
            - math.lgamma(k + 1)
            - math.lgamma(n - k + 1)
            + (k * math.log(chance) if k else 0.0)
            + ((n - k) * math.log1p(-chance) if n - k else 0.0)
        )
        weight = math.exp(log_weight)
        if weight < 1e-15:
            continue
        value += weight * majority(k, delta)
    return value


def majority(k: int, delta: float) -> float:
    """The probability that the majority of k informative samples is right."""
    total = 0.0
    for right in range(k + 1):
        chance = math.comb(k, right) * (1 - delta) ** right * delta ** (k - right)
        total += chance * (1.0 if 2 * right > k else 0.5 if 2 * right == k else 0.0)
    return total


def online_value(n: int, contexts: int) -> float:
    """The expected value after n samples of the student whose log-probability under the expert is
    known: one sample settles the bit of its context, whatever eps is.
    """
    missed = (1 - 1 / contexts) ** n
    return 1 - missed / 2


def measure(settings: Mapping[str, Setting], seed: int, _lab: Lab) -> Numbers:
    """Exact: the seed is not used."""
    contexts = int(settings["contexts"])
    eps = float(settings["eps"])
    numbers: dict[str, float] = {}
    for n in SIZES:
        if n > settings["largest"]:
            continue
        numbers[f"offline_{n}"] = offline_value(n, eps, contexts, float(settings["delta"]))
        numbers[f"online_{n}"] = online_value(n, contexts)
    return numbers


def arm(eps: float) -> Arm:
    settings = {"eps": eps, "contexts": CONTEXTS, "delta": DELTA, "largest": 2048}
    return Arm(name=f"eps={eps:g}", settings=settings, small={"largest": 128}, measure=measure)


def judge(runs: Runs) -> Judgement:
    def gap(eps: float, n: int) -> float:
        numbers = runs[f"eps={eps:g}"][0].numbers
        return numbers[f"online_{n}"] - numbers[f"offline_{n}"]

    rare = gap(0.01, DECISIVE)
    control = gap(1.0, DECISIVE)
    late = gap(0.01, 2048)
    parts = (rare >= 0.3, abs(control) <= 0.03, late >= 0.1)
    verdict = Verdict.undecided
    if all(parts):
        verdict = Verdict.confirmed
    elif rare <= 0.03:
        verdict = Verdict.refuted
    return Judgement(
        verdict=verdict,
        effect=f"online - offline value at n={DECISIVE}: {rare:.3f} (eps=0.01), {control:.3f} "
        "(eps=1)",
        reason=f"With 16 times the samples offline imitation at eps=0.01 still lacks {late:.3f}.",
    )


def draw(axes: Axes, runs: Runs) -> None:
    shades = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00")
    for colour, (name, of) in zip(shades, runs.items(), strict=False):
        offline = [of[0].numbers[f"offline_{n}"] for n in SIZES]
        axes.plot(SIZES, offline, "o-", color=colour, label=f"offline, {name}")
    online = [next(iter(runs.values()))[0].numbers[f"online_{n}"] for n in SIZES]
    axes.plot(SIZES, online, "k--", label="online, every eps")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("samples (of the expert offline, of the student online)")
    axes.set_ylabel("expected value")
    axes.legend(frameon=False, fontsize=9)


EXPERIMENT = Experiment(
    id="A2",
    title="Rare informative actions: offline against online imitation",
    claim="If no student can imitate the expert, every offline learner needs samples in proportion "
    "to 1/eps, the rarity of what can be imitated, while online imitation does not depend on eps; "
    "with an expert that can be imitated (eps=1) the two are equal.",
    source="arXiv 2606.30445, theorem 1, by an instance of our own with the same structure",
    design=f"{CONTEXTS} contexts, each with a hidden bit. The expert plays a neutral action with "
    "probability 1 - eps, and with probability eps one of two informative ones: the right one in "
    f"all but delta={DELTA:g} of these cases. The neutral and the right action are rewarded. A "
    "student can only play one of the two informative actions in each context, so none can imitate "
    "the expert. Offline it sees n actions of the expert, online the expert's probabilities of n "
    "actions of its own. The value is the expected reward. Both values are exact: a sum over the "
    "number of informative samples offline, a closed form online.",
    rule="Confirmed if online is above offline by at least 0.3 at n=128 and eps=0.01, by at least "
    "0.1 there at n=2048, and by at most 0.03 in absolute value at n=128 and eps=1. Refuted if the "
    "first difference is at most 0.03, otherwise undecided.",
    columns={f"{way}_{n}": f"{way}, n={n}" for n in SIZES for way in ("offline", "online")},
    arms=tuple(arm(eps) for eps in RATES),
    seeds=(0,),
    judge=judge,
    draw=draw,
    cuts="The rule tests that offline imitation lacks much where informative actions are rare, not "
    "that what it needs is in proportion to 1/eps. That online imitation does not depend on eps "
    "follows from the closed form.",
)
