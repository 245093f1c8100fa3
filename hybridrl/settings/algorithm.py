"""The objective's settings.

Named methods are files of these settings in conf/algorithm; no code depends on their names.
"""

from dataclasses import dataclass, field

from hybridrl.core.errors import ConfigError
from hybridrl.settings.built_in import (
    ADVANTAGES,
    NO_PAIRS,
    PAIR_LOSSES,
    TOKEN_WEIGHTS,
    check_own,
    check_word,
    is_own,
)
from hybridrl.settings.choices import (
    Correction,
    Divergence,
    EvidenceKind,
    Future,
    Ratio,
    RatioLevel,
    Reference,
    Scale,
    ScheduleKind,
    Support,
    SupportSource,
    TeacherSignal,
)


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """A weight as a function of the step t = 0, 1, ... or of a metric.

    A number in its place is a constant weight.
    """

    kind: ScheduleKind = ScheduleKind.constant
    """how the weight changes"""
    value: float = 1.0
    """the weight at t = 0"""
    end: float | None = None
    """the last value of linear, cosine and step; null only for constant and feedback"""
    steps: int | None = None
    """linear and cosine: the number of steps until the weight is `end` (a small one for a warm-up),
    null: train.steps; step: the step from which the weight is `end`
    """
    metric: str | None = None
    """feedback: the metric that the weight controls, e.g. kl/token or reward/mean"""
    target: float | None = None
    """feedback: the value at which the metric should stay"""
    gain: float = 0.1
    """feedback: each step multiplies the weight by 1 + gain * clip(metric/target - 1, -1, 1);
    negative if a larger weight raises the metric
    """
    low: float = 0.0
    """feedback: the smallest weight"""
    high: float | None = None
    """feedback: the largest weight; null: no bound"""

    def check(self, key: str) -> None:
        """Check the values together.

        Args:
            key: the dotted key of this schedule, for the message.

        Raises:
            ConfigError: names the setting.
        """
        needs_end = self.kind in (ScheduleKind.linear, ScheduleKind.cosine, ScheduleKind.step)
        if needs_end and self.end is None:
            raise ConfigError(
                f"{key}.kind={self.kind}: needs an end value; set {key}.end, or {key}.kind=constant"
            )
        self._check_unused(key)
        if self.kind is ScheduleKind.step and self.steps is None:
            raise ConfigError(
                f"{key}.kind=step: needs {key}.steps, the step from which the weight is {key}.end"
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(
                f"{key}.steps={self.steps}: must be at least 1, or null for train.steps"
            )
        if self.kind is not ScheduleKind.feedback:
            return
        if not self.metric or self.target is None or self.target == 0:
            raise ConfigError(
                f"{key}.kind=feedback: needs {key}.metric, e.g. kl/token, and a {key}.target that "
                "is not 0"
            )
        if not 0 < abs(self.gain) < 1:
            raise ConfigError(
                f"{key}.gain={self.gain}: must lie in (-1, 1) and not be 0, or one step could "
                "reverse the weight's sign"
            )
        if self.value <= 0 or self.low < 0 or (self.high is not None and self.high < self.low):
            raise ConfigError(
                f"{key}.value={self.value}, low={self.low}, high={self.high}: needs value > 0 and "
                "0 <= low <= high"
            )

    def _check_unused(self, key: str) -> None:
        """Refuse a value that this kind does not read. `end` and `steps` may remain from a preset
        whose kind was replaced, so `end` is refused only where the weight would always be 0.

        Raises:
            ConfigError: names the setting.
        """
        if self.kind is ScheduleKind.constant and self.value == 0 and self.end:
            raise ConfigError(
                f"{key}.end={self.end}: has no effect with {key}.kind=constant, so that the weight "
                f"would be 0; set {key}.kind to linear, cosine or step, or {key}.end=null"
            )
        if self.kind is ScheduleKind.feedback:
            return
        for name in ("metric", "target", "low", "high", "gain"):
            value = getattr(self, name)
            default = getattr(ScheduleConfig(), name)
            if value != default:
                raise ConfigError(
                    f"{key}.{name}={value}: has no effect with {key}.kind={self.kind}; set "
                    f"{key}.kind=feedback, or {key}.{name}={'null' if default is None else default}"
                )

    def is_zero(self) -> bool:
        return self.value == 0 and (self.kind is ScheduleKind.constant or not self.end)


LEAST_JSD_BETA = 1e-3
"""Smallest beta of the JSD.

The gradient of the JSD is proportional to beta, but the rounding error of its logarithms in float32
is not: the relative error is 6e-4 at 1e-3 and 0.03 to 0.3 at 1e-6, on random logits of 20 to 150000
tokens.
"""


@dataclass(kw_only=True, slots=True)
class TopKConfig:
    """The K tokens of support=topk."""

    k: int = 16
    """tokens of the vocabulary in the support"""
    source: SupportSource = SupportSource.sampler
    """which model chooses the K tokens"""
    correction: Correction = Correction.unbiased
    """how the tokens outside of the K are accounted for"""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(
                f"algorithm.topk.k={self.k}: must be at least 1; for no support at all set "
                "algorithm.support=sampled"
            )


@dataclass(kw_only=True, slots=True)
class RatioConfig:
    """The correction for a sampler that differs from the learner, and PPO's clip."""

    kind: Ratio = Ratio.none
    """the use of rho = p(y) / mu(y), learner over sampler, in the sparse term"""
    level: RatioLevel = RatioLevel.token
    """the unit over which the ratio is taken"""
    low: float = 0.0
    """truncate and mask: the smallest rho; clip: the lower bound of rho is 1 - low"""
    high: float | None = None
    """truncate and mask: the largest rho, null: no bound; clip: the upper bound of rho is 1 + high
    """
    sampler_high: float | None = 2.0
    """only with kind=clip and several updates per batch: each token is also weighted by p_old/mu,
    which corrects for a sampler that differs from the learner; this is the largest such weight,
    null: no bound
    """

    def __post_init__(self) -> None:
        if self.sampler_high is not None and not self.sampler_high > 0:
            raise ConfigError(
                f"algorithm.ratio.sampler_high={self.sampler_high}: must be positive, or null for "
                "no bound"
            )
        if self.low < 0 or (self.high is not None and self.high <= 0):
            raise ConfigError(
                f"algorithm.ratio.low={self.low}, high={self.high}: needs low >= 0 and high > 0 "
                "or null"
            )
        if self.kind is Ratio.clip and self.level is RatioLevel.sequence:
            raise ConfigError(
                "algorithm.ratio.kind=clip: works on tokens; set algorithm.ratio.level=token, or "
                "kind=truncate"
            )
        if self.kind is Ratio.clip and (not self.low or (self.high is None and self.low < 1)):
            raise ConfigError(
                f"algorithm.ratio.low={self.low}, high={self.high}: kind=clip bounds rho to "
                "[1 - low, 1 + high]; set both, e.g. 0.2"
            )
        bounded = self.kind in (Ratio.truncate, Ratio.mask)
        if bounded and self.high is not None and self.high < self.low:
            raise ConfigError(
                f"algorithm.ratio.low={self.low}, high={self.high}: with kind={self.kind} no "
                "ratio lies between them; needs low <= high"
            )


@dataclass(kw_only=True, slots=True)
class ValueConfig:
    """The value head of baseline=value."""

    gae_lambda: float = 0.95
    """generalised advantage estimation: 1 uses the whole return, 0 one step and the value after it;
    values between them trade bias for variance
    """
    loss_weight: float = 0.5
    """weight of the value head's squared error in the loss"""

    def __post_init__(self) -> None:
        if not 0 <= self.gae_lambda <= 1:
            raise ConfigError(f"algorithm.value.gae_lambda={self.gae_lambda}: must lie in [0, 1]")
        if self.loss_weight < 0:
            raise ConfigError(
                f"algorithm.value.loss_weight={self.loss_weight}: must not be negative, or the "
                "value head's error would be maximised"
            )


@dataclass(kw_only=True, slots=True)
class PairConfig:
    """A loss over two ranked responses of one prompt, in place of returns."""

    loss: str = NO_PAIRS
    """the loss over a chosen and a rejected response, or your own as file.py:Class
    (hybridrl/objectives/README.md); formulas in hybridrl/objectives/pair_losses
    """
    against: str | None = None
    """name in teachers.* of the model that is the reference of the log-ratios; null: the only
    teacher. A loss of your own that needs a reference must have it named here
    """
    beta: float = 0.1
    """scale of the log-ratio (dpo, simpo)"""
    target: float = 0.5
    """the target of the loss, see its file, e.g. tau of IPO, the margin of SLiC, gamma of SimPO"""
    nll_weight: float = 0.0
    """SLiC's regularisation: weight of the chosen response's negative log-likelihood"""
    average: bool = False
    """divide log-ratios by the number of tokens; summed log-ratios grow with length, so the DIL
    losses would then need a tuned scale
    """
    clamp: float | None = None
    """dil_*: log-ratio beyond which a term is replaced by its tangent; null: 20, for fp32"""
    reference: Reference = Reference.rejected
    """which responses stand in for samples of the reference model in DIL's second term"""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(
                f"algorithm.pair.beta={self.beta}: must be positive; 0 learns nothing and a "
                "negative one prefers the rejected response"
            )
        if self.target < 0:
            raise ConfigError(
                f"algorithm.pair.target={self.target}: with pair.loss={self.loss} it must not be "
                "negative"
            )
        if self.nll_weight < 0:
            raise ConfigError(
                f"algorithm.pair.nll_weight={self.nll_weight}: must not be negative, or the "
                "chosen response would become less likely"
            )
        if not is_own(self.loss):
            check_word(
                "algorithm.pair.loss",
                self.loss,
                {NO_PAIRS: None, **PAIR_LOSSES},
                "write one of those, or algorithm.pair.loss=path/to/file.py:Class",
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs a reference model.

        A built-in loss declares it; for a loss in a user's file, which is not read here, it is
        whether `against` is set.
        """
        if self.loss in PAIR_LOSSES:
            return bool(PAIR_LOSSES[self.loss].load().needs_reference)
        return is_own(self.loss) and self.against is not None


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """The objective J = E[ sum_t sum_i w_i D_i - lambda R ], which is minimised (arXiv 2512.23097).

    D_i is the divergence of the student from teacher i at token t, R the reward of the response.
    """

    divergence: Divergence = Divergence.reverse_kl
    """the divergence between the student p and a teacher q at each token"""
    jsd_beta: float = 0.5
    """beta of the JSD: near 0 it acts like the forward KL, near 1 like the reverse KL"""
    support: Support = Support.full
    """the tokens over which the dense term is summed"""
    topk: TopKConfig = field(default_factory=TopKConfig)
    teacher_signal: TeacherSignal = TeacherSignal.hidden
    """how a teacher's distribution over the full vocabulary reaches the learner"""
    log_ratio_clip: float | None = None
    """bound of |log p - log q| in the reverse KL, which biases the gradient; null: no bound"""
    imitation_weight: ScheduleConfig = field(default_factory=ScheduleConfig)
    """multiplies every teacher's weight; 0: pure reinforcement learning, no teacher is loaded"""
    reward_weight: ScheduleConfig = field(default_factory=ScheduleConfig)
    """lambda; 0: pure distillation, rewards are only reported"""
    gamma: float = 0.0
    """discount of FUTURE imitation costs, gamma^(k-t); the terminal reward is never discounted. 0:
    the sparse term has the reward alone, 1: exact gradient of J
    """
    future: Future = Future.sum
    """how the future imitation costs of a token are combined when gamma > 0"""
    baseline: str = "leave_one_out"
    """the value that is subtracted from the return of a token"""
    advantage: str | None = None
    """file.py:Class, your own advantage estimator in place of algorithm.baseline
    (hybridrl/objectives/README.md)
    """
    scale: Scale = Scale.none
    """the divisor of the sparse term"""
    ratio: RatioConfig = field(default_factory=RatioConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    overlong_buffer: int = 0
    """DAPO: the number of tokens before rollout.max_new_tokens over which the reward falls by 1; 0:
    no penalty
    """
    dynamic_sampling: int = 0
    """DAPO: the number of further waves of prompts that may replace groups whose rewards are all
    equal; 0: such groups are not replaced
    """
    nll_weight: float = 0.0
    """weight of -log p(y) on responses that the student did not sample"""
    teacher_fraction: float = 0.0
    """share of the prompts that the first teacher answers instead of the student (MiniLLM, SeqKD);
    a fraction of a prompt is carried to the next step. To learn from rewards and costs of its
    answers, set algorithm.ratio
    """
    data_fraction: float = 0.0
    """share of the prompts whose responses come from the data (SFT, GKD, preference pairs); a
    fraction of a prompt is carried to the next step
    """
    pair: PairConfig = field(default_factory=PairConfig)
    normalizer: str = "token_mean"
    """the divisor of the sum over tokens"""
    token_weight: str | None = None
    """file.py:function, your own token weight in place of algorithm.normalizer
    (hybridrl/objectives/README.md)
    """
    temperature: float = 1.0
    """temperature of student, teacher and sampler"""

    def __post_init__(self) -> None:
        self._check_words()
        if not 0 <= self.gamma <= 1:
            raise ConfigError(f"algorithm.gamma={self.gamma}: must lie in [0, 1]")
        if (
            self.gamma > 0
            and self.divergence is not Divergence.reverse_kl
            and not self.imitation_weight.is_zero()
        ):
            raise ConfigError(
                f"algorithm.gamma={self.gamma}: future costs are log p - log q, which only "
                "divergence=reverse_kl has; set algorithm.gamma=0"
            )
        if not self.temperature > 0:
            raise ConfigError(
                f"algorithm.temperature={self.temperature}: must be positive; for greedy decoding "
                "in evaluations set eval.greedy=true"
            )
        if not LEAST_JSD_BETA <= self.jsd_beta < 1:
            raise ConfigError(
                f"algorithm.jsd_beta={self.jsd_beta}: must lie in [{LEAST_JSD_BETA}, 1), below "
                "which float32 rounds the gradient away; the ends are divergence=forward_kl and "
                "reverse_kl"
            )
        for name in ("imitation_weight", "reward_weight"):
            schedule = getattr(self, name)
            for part, value in {"value": schedule.value, "end": schedule.end}.items():
                if value is not None and value < 0:
                    raise ConfigError(
                        f"algorithm.{name}.{part}={value}: must be at least 0; give a negative "
                        "weight to one of teachers.* or reward.functions.* instead"
                    )
        if self.log_ratio_clip is not None and not self.log_ratio_clip > 0:
            raise ConfigError(
                f"algorithm.log_ratio_clip={self.log_ratio_clip}: must be positive, or null for "
                "none"
            )
        if self.log_ratio_clip is not None and self.divergence is not Divergence.reverse_kl:
            raise ConfigError(
                f"algorithm.log_ratio_clip={self.log_ratio_clip}: bounds the reverse KL, and "
                f"algorithm.divergence={self.divergence}; leave it out, or set "
                "algorithm.divergence=reverse_kl"
            )
        for name in ("teacher_fraction", "data_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"algorithm.{name}={getattr(self, name)}: must be a share, in [0, 1]"
                )
        if self.teacher_fraction + self.data_fraction > 1:
            raise ConfigError(
                "algorithm.teacher_fraction + data_fraction = "
                f"{self.teacher_fraction + self.data_fraction}: must be at most 1, all prompts; "
                "lower one of them"
            )
        for name in ("overlong_buffer", "dynamic_sampling", "nll_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algorithm.{name}={getattr(self, name)}: must not be negative")

    def _check_words(self) -> None:
        """Check the settings that are a built-in word or a user's own file.py:Name."""
        own = "write one of those, or algorithm.{}=path/to/file.py:{} for your own"
        check_word(
            "algorithm.baseline", self.baseline, ADVANTAGES, own.format("advantage", "Class")
        )
        check_word(
            "algorithm.normalizer",
            self.normalizer,
            TOKEN_WEIGHTS,
            own.format("token_weight", "function"),
        )
        if self.advantage is not None:
            check_own("algorithm.advantage", self.advantage, "Class", ADVANTAGES, "baseline")
        if self.token_weight is not None:
            check_own(
                "algorithm.token_weight",
                self.token_weight,
                "function",
                TOKEN_WEIGHTS,
                "normalizer",
            )

    @property
    def ranks_pairs(self) -> bool:
        """Whether the run learns from ranked pairs of responses instead of returns."""
        return self.pair.loss != NO_PAIRS

    @property
    def responses_per_prompt(self) -> int:
        """Responses of a row of data: 2 for a pair loss, otherwise 1 to imitate."""
        return 2 if self.ranks_pairs else 1

    @property
    def evidence_kind(self) -> EvidenceKind:
        """The kind of evidence of a teacher whose setting `evidence` is null."""
        match self.support:
            case Support.full:
                by_hidden = self.teacher_signal is TeacherSignal.hidden
                return EvidenceKind.hidden if by_hidden else EvidenceKind.vocabulary
            case Support.topk:
                return EvidenceKind.support
            case Support.sampled:
                return EvidenceKind.drawn

    @property
    def learns_from_rewards(self) -> bool:
        return not self.reward_weight.is_zero()

    @property
    def imitates(self) -> bool:
        return not self.imitation_weight.is_zero()
