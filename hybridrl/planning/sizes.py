"""The models of a run, and how many sequences of which length each worker has at once."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from hybridrl.objectives import make_objective
from hybridrl.planning.model_shape import DTYPE_BYTES, ModelShape, model_shape, trained_numbers
from hybridrl.planning.zero import WIDE
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shares import chunk_size
from hybridrl.teachers.evidence import Evidence, Hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTeacher:
    """A teacher that scores, and what it sends."""

    name: str
    model: ModelConfig
    shape: ModelShape
    evidence: Evidence
    shares_base: bool  # the learner scores, by its own weights

    @property
    def width(self) -> int:
        """Bytes of a number in its dtype."""
        return DTYPE_BYTES[self.model.dtype]

    @property
    def reads_logits(self) -> bool:
        """Whether its scores need a pass over the vocabulary."""
        return not isinstance(self.evidence, Hidden) or self.evidence.drawn

    def row_bytes(self, vocabulary: int) -> int:
        """Bytes of its rows about one response token, the ids of a support included."""
        width = self.width if isinstance(self.evidence, Hidden) else WIDE
        numbers = self.evidence.width(vocabulary, self.shape.hidden)
        return numbers * width + self.evidence.support * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacher:
    """A teacher that a server scores with: it holds nothing here."""

    name: str
    evidence: Evidence

    def row_bytes(self, vocabulary: int) -> int:
        """As of ScoredTeacher; its rows are log-probs in float32."""
        return self.evidence.width(vocabulary, 0) * WIDE + self.evidence.support * 4


class Load(NamedTuple):
    """What one forward pass has at once."""

    sequences: int
    length: int  # tokens of each
    rows: int  # response tokens of all


class Sizes:
    """The models of a run, and how many sequences of which length each worker has at once.

    Args:
        on_cpu: models run on CPUs.

    Raises:
        ConfigError: a model's config cannot be read.
    """

    def __init__(self, settings: RunSettings, *, on_cpu: bool) -> None:
        self.settings = settings
        self.on_cpu = on_cpu
        self.student = model_shape(settings.model)
        trained = trained_numbers(settings)
        self.trained = trained.total  # numbers that train
        self.largest_trained = trained.largest  # of one parameter
        self.width = DTYPE_BYTES[settings.model.dtype]
        self.tokens = settings.rollout.sequence_limit
        # Of the data's own responses only the length with their prompt is limited.
        from_data = settings.algorithm.data_fraction > 0
        self.response = self.tokens - 1 if from_data else settings.rollout.response_limit
        self.needs = make_objective(settings).needs
        kinds = dict(zip(settings.scored_teachers, self.needs.evidence, strict=True))
        self.served = [
            ServedTeacher(name=name, evidence=kind)
            for name, kind in kinds.items()
            if settings.teachers[name].url is not None
        ]
        self.teachers = [
            ScoredTeacher(
                name=name,
                model=settings.teacher_model(name),
                shape=model_shape(settings.teacher_model(name), settings.model_setting(name)),
                evidence=kind,
                shares_base=settings.teachers[name].share_base,
            )
            for name, kind in kinds.items()
            if settings.teachers[name].model is None and settings.teachers[name].url is None
        ]

    @property
    def takes_turns(self) -> bool:
        """Whether engines and learner leave each other the GPUs that they share. On a CPU the same
        calls move memory from one part of the node to another.
        """
        return self.settings.cluster.take_turns and not self.on_cpu

    @property
    def scoring(self) -> list[ScoredTeacher | ServedTeacher]:
        """All teachers that score, here or on a server."""
        return [*self.teachers, *self.served]

    @property
    def shared(self) -> list[ScoredTeacher]:
        """The teachers that the learner scores for, by its own weights."""
        return [teacher for teacher in self.teachers if teacher.shares_base]

    @property
    def sending(self) -> list[ScoredTeacher | ServedTeacher]:
        """The teachers that have scorers, which send what they score."""
        return [*(teacher for teacher in self.teachers if not teacher.shares_base), *self.served]

    @property
    def frozen(self) -> int:
        """Numbers of the student that do not train: all of it, beside adapters."""
        return 0 if self.settings.lora.rank is None else self.student.parameters

    @property
    def sent(self) -> int:
        """Numbers that each engine receives in a step."""
        alone = self.settings.lora.travels_alone
        return self.trained if alone else self.student.parameters

    @property
    def trained_head(self) -> int:
        """Numbers of the output embedding, if it trains; adapters leave it as it is."""
        return self.student.head if self.settings.lora.rank is None else 0

    @property
    def group(self) -> int:
        """Sequences of one prompt."""
        algorithm = self.settings.algorithm
        if algorithm.data_fraction == 1:
            return algorithm.responses_per_prompt
        return self.settings.train.samples_per_prompt

    @property
    def by_data(self) -> int:
        """Prompts of one step whose responses are the data's own, at most."""
        return math.ceil(
            self.settings.algorithm.data_fraction * self.settings.train.prompts_per_step
        )

    @property
    def sequences(self) -> int:
        """Sequences of one step."""
        return self.settings.train.prompts_per_step * self.group

    @property
    def of_rank(self) -> int:
        """Sequences of one learner rank and update: whole groups."""
        prompts = self.settings.train.prompts_per_step // self.settings.train.updates_per_batch
        return math.ceil(prompts / self.settings.learner.ranks) * self.group

    @property
    def of_micro_batch(self) -> Load:
        """What one forward pass of a learner rank has."""
        return self.load(self.settings.train.max_tokens_per_micro_batch, self.of_rank)

    @property
    def micro_batches(self) -> int:
        """Forward passes of a learner rank and update, of the longest sequences."""
        budget = self.settings.train.max_tokens_per_micro_batch
        return math.ceil(self.of_rank / max(budget // self.tokens, 1))

    def of_scoring(self, devices: int) -> Load:
        """What one forward pass of a scorer replica with so many devices has. It is given one chunk
        at a time.
        """
        budget = self.settings.scorer.max_tokens_per_micro_batch * devices
        return self.load(budget, self.of_chunk)

    def load(self, budget: int, sequences: int) -> Load:
        """The most that one forward pass over some of `sequences` sequences has. Shorter ones fill
        its budget where the longest leave room in it, and their prompts may be short.

        Example: a budget of 16384 tokens and sequences of at most 9216 with responses of 8192: two
        of 8192, up to 16384 of them in responses.
        """
        tokens = min(max(budget, self.tokens), sequences * self.tokens)
        count = math.ceil(tokens / self.tokens)
        return Load(count, math.ceil(tokens / count), min(tokens, sequences * self.response))

    @property
    def groups_per_chunk(self) -> int:
        """Prompts of one chunk of an engine."""
        rollout = self.settings.rollout
        prompts = self.settings.train.prompts_per_step
        return chunk_size(prompts, rollout.groups_per_chunk, rollout.engines)

    @property
    def of_chunk(self) -> int:
        """Sequences of one chunk, which a scorer or a reward worker is given at a time. The data's
        own responses of a step are a single one.
        """
        algorithm = self.settings.algorithm
        sampled = self.groups_per_chunk * self.group if algorithm.data_fraction < 1 else 0
        return max(sampled, self.by_data * algorithm.responses_per_prompt)

    @property
    def chunks(self) -> int:
        """Chunks of one step."""
        sampled = self.settings.train.prompts_per_step - self.by_data
        return math.ceil(sampled / self.groups_per_chunk) + (self.by_data > 0)

    @property
    def of_decoding(self) -> int:
        """Sequences that one engine decodes at once."""
        rollout = self.settings.rollout
        return min(rollout.max_num_seqs, math.ceil(self.sequences / rollout.engines))
