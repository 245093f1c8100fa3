"""Every configuration that the oracle checks, and the bias that is declared for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hybridrl.oracle.exact import Target
from hybridrl.settings.choices import Correction, Divergence, SupportSource


class Kind(StrEnum):
    """How the mean of a gradient estimate compares with the gradient that it estimates."""

    exact = "exact"  # equal, and no token's gradient depends on which tokens were drawn
    unbiased = "unbiased"  # equal in expectation
    biased = "biased"  # by design


class World(StrEnum):
    """The language model whose sequences are enumerated."""

    fixed = "fixed"  # --vocab tokens, --horizon steps
    ended = "ended"  # 4 tokens, one of which ends a sequence, at most 4 steps
    tiny = "tiny"  # 3 tokens, 2 steps: all groups of K sequences can be listed


class Value(StrEnum):
    """The outputs of the value head."""

    unrelated = "unrelated"  # random
    exact = "exact"  # the mean return of each prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table: a configuration, and what is declared for it."""

    method: str  # a file of conf/algorithm
    options: tuple[str, ...] = ()  # overrides; those under `algorithm` without that prefix
    target: Target = Target.objective
    kind: Kind = Kind.unbiased
    bias: float = 0.0  # the relative bias of Kind.biased with --seed 0 --vocab 5 --horizon 3
    world: World = World.fixed
    group_size: int = 1
    sampler_distance: float = 0.0  # as in mdp.make_mdp; if not 0, the run's settings are pipelined
    learned: float = 0.0  # as in mdp.make_mdp
    moved: float = 0.0  # as in mdp.make_mdp; if not 0, the run's settings have 2 updates per batch
    value: Value = Value.unrelated

    @property
    def label(self) -> str:
        """The column `option` of the table."""
        marks = {
            f"sampler {self.sampler_distance} away": self.sampler_distance > 0,
            f"{self.learned:.0%} learned": self.learned > 0,
            f"2nd update {self.moved} away": self.moved > 0,
            "exact values": self.value is Value.exact,
            f"K={self.group_size}": self.group_size > 1,
            f"[{self.world}]": self.world is not World.fixed,
        }
        shown = [mark for mark, is_shown in marks.items() if is_shown]
        return " ".join([*self.options, *shown]) or "as it is"


PLAIN = ("baseline=none", "normalizer=constant", "reward_weight.value=2")
"""The settings of rows of method hybrid, with which lengths do not matter and no siblings are
needed.
"""
TOLERANCE = 6e-4
"""Largest difference of a bias from the declared one, which has three decimals."""
SEMI = Target.semi_gradient


def cases(vocabulary: int) -> list[Case]:
    """All cases; the presets come first.

    Args:
        vocabulary: tokens of the model without an end token.
    """
    return [
        *methods(),
        *divergences(),
        *supports(vocabulary),
        *returns(),
        *groups(),
        *off_policy(),
        *distances(),
        *second_updates(),
        *lengths(),
        *teachers(),
    ]


def biased(method: str, bias: float, *options: str, **where: Any) -> Case:
    """A case that is declared biased by `bias`; `where` are further fields of Case."""
    return Case(method=method, options=options, kind=Kind.biased, bias=bias, **where)


def methods() -> Iterator[Case]:
    """Each online preset, with K siblings if it compares them, nearly always without options."""
    tiny: dict[str, Any] = {"world": World.tiny}
    for imitates in ("word_kd", "dagger", "gkd", "opd_full"):
        yield Case(method=imitates, target=SEMI, kind=Kind.exact)
    for samples in ("sft", "seqkd", "opd", "g_opd"):
        yield Case(method=samples, target=SEMI)
    yield biased("minillm", 0.318)
    yield biased("mopd", 0.212, target=SEMI, group_size=4, **tiny)
    yield Case(
        method="hybrid", options=("baseline=leave_one_out",), target=SEMI, group_size=3, **tiny
    )
    yield Case(method="hybrid_rising", target=SEMI, group_size=3, **tiny)
    yield Case(method="reinforce_kl", group_size=3, **tiny)
    yield biased("reinforce_pp", 1.152, group_size=2, **tiny)
    yield Case(method="raft")
    yield Case(method="rloo", group_size=3, **tiny)
    yield biased("grpo", 0.679, target=SEMI, group_size=4, **tiny)
    yield biased("dr_grpo", 0.25, group_size=4, **tiny)
    yield biased("dapo", 0.640, "overlong_buffer=1", group_size=4, **tiny)
    yield biased("ppo", 0.200)
    yield Case(method="ppo", options=("value.gae_lambda=1",))
    yield Case(method="ppo", value=Value.exact)


def divergences() -> Iterator[Case]:
    """Dense terms over the whole vocabulary, and their estimates from the drawn token."""
    yield Case(method="opd_full", options=("support=sampled",), target=SEMI)
    for divergence in (Divergence.forward_kl, Divergence.jsd):
        yield Case(
            method="opd_full", options=(f"divergence={divergence}",), target=SEMI, kind=Kind.exact
        )
        yield Case(
            method="opd_full", options=(f"divergence={divergence}", "support=sampled"), target=SEMI
        )
    for beta in (0.1, 0.9):
        yield Case(
            method="opd_full",
            options=("divergence=jsd", f"jsd_beta={beta}"),
            target=SEMI,
            kind=Kind.exact,
        )
    yield Case(method="opd_full", options=("teacher_signal=logits",), target=SEMI, kind=Kind.exact)
    yield Case(method="hybrid", options=("gamma=1", "temperature=0.7"))
    yield Case(method="hybrid", options=("data_fraction=0.3", "nll_weight=1"), target=SEMI)


BIASED = (Correction.tail_bucket, Correction.truncate, Correction.renormalize)
BIAS_OF_SUPPORT = {
    (Divergence.reverse_kl, SupportSource.sampler): (0.814, 0.986, 0.885),
    (Divergence.reverse_kl, SupportSource.teacher): (0.334, 1.269, 1.241),
    (Divergence.forward_kl, SupportSource.sampler): (0.859, 1.077, 1.074),
    (Divergence.forward_kl, SupportSource.teacher): (0.062, 0.119, 0.853),
    (Divergence.jsd, SupportSource.sampler): (0.868, 0.822, 1.088),
    (Divergence.jsd, SupportSource.teacher): (0.129, 0.597, 1.157),
}
"""Biases for two tokens out of five, relative to the full divergence, in the order of BIASED."""


def supports(vocabulary: int) -> Iterator[Case]:
    """Dense terms over K tokens.

    `unbiased` is unbiased for the full divergence; the other corrections are exact for their own
    divergence and biased for the full one.
    """
    for (divergence, source), biases in BIAS_OF_SUPPORT.items():
        options = (f"divergence={divergence}", "support=topk", "topk.k=2", f"topk.source={source}")
        yield Case(method="opd_full", options=options, target=SEMI)
        for correction, bias in zip(BIASED, biases, strict=True):
            yield Case(
                method="opd_full",
                options=(*options, f"topk.correction={correction}"),
                target=Target.support,
                kind=Kind.exact,
            )
            yield biased("opd_full", bias, *options, f"topk.correction={correction}", target=SEMI)
    for correction, outside in zip(BIASED, (1, 0, 0), strict=True):
        nearly_all = (
            "support=topk",
            f"topk.k={vocabulary - outside}",
            f"topk.correction={correction}",
        )
        yield Case(method="opd_full", options=nearly_all, target=SEMI, kind=Kind.exact)
    yield biased(
        "opd_full", 1.0, "support=topk", "topk.k=1", "topk.correction=renormalize", target=SEMI
    )


def returns() -> Iterator[Case]:
    """The sparse term with different returns."""
    yield Case(method="hybrid", options=("gamma=0",), target=SEMI)
    for gamma, bias in ((0, 0.546), (0.25, 0.435), (0.5, 0.310), (0.75, 0.166), (0.9, 0.069)):
        yield biased("hybrid", bias, f"gamma={gamma}")
    yield Case(method="hybrid", options=("gamma=1",))
    yield Case(method="hybrid", options=("gamma=1", "support=sampled"))
    yield Case(method="hybrid", options=("gamma=1", "support=topk", "topk.k=2"))
    yield Case(
        method="hybrid", options=("gamma=1", "support=topk", "topk.k=2", "topk.source=teacher")
    )
    yield biased("hybrid", 0.256, "gamma=1", "future=mean")
    yield Case(method="hybrid", options=("gamma=1", "baseline=value", "value.gae_lambda=1"))
    yield Case(
        method="hybrid",
        options=("gamma=1", "baseline=value", "value.gae_lambda=0"),
        value=Value.exact,
    )
    yield biased("hybrid", 0.761, "gamma=1", "baseline=value", "value.gae_lambda=0")
    yield Case(method="hybrid", options=("overlong_buffer=2",), target=SEMI, world=World.ended)
    for bound, bias in ((0.5, 0.897), (1, 0.632), (2, 0.368)):
        yield biased("hybrid", bias, "gamma=1", f"log_ratio_clip={bound}", world=World.ended)


def groups() -> Iterator[Case]:
    """Baselines and scales that compare K siblings."""
    yield Case(
        method="hybrid",
        options=("gamma=1", "baseline=leave_one_out"),
        group_size=2,
        world=World.ended,
    )
    yield biased("hybrid", 0.222, "gamma=1", "baseline=group_mean", group_size=2, world=World.ended)
    yield Case(
        method="hybrid",
        options=("gamma=1", "support=sampled", "baseline=leave_one_out"),
        group_size=3,
        world=World.tiny,
    )
    for k in (2, 3, 4):
        yield biased("raft", 1 / k, "baseline=group_mean", group_size=k, world=World.tiny)
    yield biased("raft", 0.640, "scale=group_std", group_size=4, world=World.tiny)
    yield biased("raft", 0.414, "scale=batch", group_size=3, world=World.tiny)


def off_policy() -> Iterator[Case]:
    """A sampler whose logits differ by 0.5 N(0,1) from the student's.

    A ratio per token does not correct the distribution of prefixes, which is the sampler's.
    """
    away: dict[str, Any] = {"sampler_distance": 0.5, "world": World.ended}
    ratios = (
        ((), 0.575),
        (("kind=truncate",), 0.342),
        (("kind=truncate", "high=2"), 0.343),
        (("kind=mask", "low=0.5", "high=2"), 0.624),
        (("kind=clip", "low=0.2", "high=0.2"), 0.877),
        (("kind=truncate", "level=sequence", "high=2"), 0.120),
        (("kind=mask", "level=sequence", "low=0.5", "high=2"), 0.345),
    )
    for ratio, bias in ratios:
        options = [f"ratio.{option}" for option in ratio]
        yield biased("hybrid", bias, "gamma=1", "support=sampled", *options, **away)
    whole = ("ratio.kind=truncate", "ratio.level=sequence")
    yield Case(method="hybrid", options=("gamma=1", *whole), **away)
    yield Case(method="hybrid", options=("gamma=1", "support=sampled", *whole), **away)
    yield Case(method="hybrid", options=("gamma=1", "support=topk", "topk.k=2", *whole), **away)
    yield Case(
        method="hybrid", options=("gamma=1", "teacher_fraction=1", *whole), world=World.ended
    )
    yield Case(method="rloo", options=("normalizer=constant", *whole), group_size=2, **away)
    yield biased("rloo", 0.215, "normalizer=constant", "ratio.kind=truncate", group_size=2, **away)
    yield Case(method="opd", options=("normalizer=constant",), target=SEMI, **away)


def distances() -> Iterator[Case]:
    """A sampler whose logits differ by 0.3 N(0,1) from a student on its way to the teacher.

    The costs of drawn tokens vanish at the teacher, so an error that does not vanish with them
    would dominate the gradient near it.
    """
    per_token = ("normalizer=constant", "ratio.kind=truncate")
    top_two = ("support=topk", "topk.k=2", *per_token)
    for learned, bias in ((0.0, 0.146), (0.5, 0.142), (0.9, 0.102), (0.99, 0.095)):
        where: dict[str, Any] = {
            "sampler_distance": 0.3,
            "learned": learned,
            "world": World.ended,
        }
        yield Case(method="opd", options=per_token, target=SEMI, **where)
        yield Case(method="opd_full", options=top_two, target=SEMI, **where)
        yield Case(method="opd", options=("gamma=1", *per_token, "ratio.level=sequence"), **where)
        yield biased("opd", bias, "gamma=1", *per_token, **where)
    near: dict[str, Any] = {"sampler_distance": 0.3, "learned": 0.9, "world": World.ended}
    for divergence in (Divergence.forward_kl, Divergence.jsd):
        yield Case(
            method="opd_full",
            options=(f"divergence={divergence}", *top_two),
            target=SEMI,
            **near,
        )


def second_updates() -> Iterator[Case]:
    """The second update of a batch: the first one has moved the student's logits by 0.2 N(0,1) from
    those of the old student. The sampler is near the old student.

    With ratio.kind=clip the ratio to the old student is clipped, and multiplied by the truncated
    ratio of the old student to the sampler. Without active bounds the product is the whole ratio.
    """
    away: dict[str, Any] = {"sampler_distance": 0.3, "moved": 0.2, "world": World.ended}
    constant = "normalizer=constant"
    unbounded = (constant, "ratio.kind=clip", "ratio.low=1", "ratio.sampler_high=null")
    whole = (constant, "ratio.kind=truncate", "ratio.level=sequence")
    yield Case(method="opd", options=unbounded, target=SEMI, **away)
    yield Case(method="opd", options=("gamma=1", *whole), **away)
    yield Case(method="raft", options=whole, **away)
    narrow = (constant, "ratio.kind=clip", "ratio.low=0.2", "ratio.high=0.2")
    for options, bias in ((unbounded, 0.217), (narrow, 0.798), ((constant,), 0.424)):
        yield biased("raft", bias, *options, **away)
    tiny = away | {"world": World.tiny}
    yield biased("ppo", 0.866, moved=0.2)
    yield biased("grpo", 0.759, target=SEMI, group_size=3, **tiny)
    yield biased("dapo", 0.230, "overlong_buffer=1", group_size=3, **tiny)


def lengths() -> Iterator[Case]:
    """Sequences of several lengths: the effect of the normaliser."""
    ended: dict[str, Any] = {"world": World.ended}
    yield Case(method="hybrid", options=("gamma=1", "normalizer=constant"), **ended)
    yield biased("hybrid", 0.170, "gamma=1", "normalizer=sequence_mean", **ended)
    yield biased("hybrid", 0.170, "gamma=1", "normalizer=token_mean", **ended)
    yield biased("hybrid", 0.079, "gamma=1", "normalizer=token_mean", group_size=2, **ended)


def teachers() -> Iterator[Case]:
    """A second teacher: with a positive or a negative weight; with only log-probs of drawn tokens
    while the first sends hidden states; or routed to other prompts.
    """
    for weight in (0.5, -0.2):
        second = f"+teachers.second={{path: null, weight: {weight}}}"
        yield Case(method="opd_full", options=(second,), target=SEMI, kind=Kind.exact)
        yield Case(method="hybrid", options=("gamma=1", second))
        yield Case(method="hybrid", options=("gamma=1", "support=sampled", second))
        yield Case(
            method="hybrid",
            options=("gamma=1", "support=topk", "topk.k=2", "topk.source=teacher", second),
        )
    drawn = "+teachers.second={path: null, weight: 0.5, evidence: drawn}"
    yield Case(method="opd_full", options=(drawn,), target=SEMI)
    yield Case(method="hybrid", options=("gamma=1", drawn))
    elsewhere = "+teachers.second={path: null, route: {domain: elsewhere}}"
    yield Case(method="mopd", options=("scale=none", elsewhere), target=SEMI)
