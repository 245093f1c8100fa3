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
    """A teacher that scores here, and the evidence that it sends."""

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
        """Bytes of its evidence about one response token, the ids of a support included."""
        width = self.width if isinstance(self.evidence, Hidden) else WIDE
        numbers = self.evidence.width(vocabulary, self.shape.hidden)
        return numbers * width + self.evidence.support * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacher:
    """A teacher that scores on a server and holds no memory here."""

    name: str
    evidence: Evidence

    def row_bytes(self, vocabulary: int) -> int:
        """As ScoredTeacher.row_bytes; all its evidence is log-probs in float32."""
        return self.evidence.width(vocabulary, 0) * WIDE + self.evidence.support * 4


class Load(NamedTuple):
    """The sequences and tokens of one forward pass."""

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
        # The data's own responses are limited only in the length of prompt and response together.
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
        """Whether engines and learner leave each other the GPUs that they share. False on a CPU,
        where the same calls move memory within the node.
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
        """The teachers with scorers of their own, which send the scores."""
        return [*(teacher for teacher in self.teachers if not teacher.shares_base), *self.served]

    @property
    def frozen(self) -> int:
        """Numbers of the student that do not train: with adapters all of them, else none."""
        return 0 if self.settings.lora.rank is None else self.student.parameters

    @property
    def sent(self) -> int:
        """Numbers that each engine receives in a step."""
        alone = self.settings.lora.travels_alone
        return self.trained if alone else self.student.parameters

    @property
    def trained_head(self) -> int:
        """Numbers of the output embedding if it trains; 0 with adapters, which do not change it."""
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
        """The most prompts of one step whose responses are the data's own."""
        return math.ceil(
            self.settings.algorithm.data_fraction * self.settings.train.prompts_per_step
        )

    @property
    def sequences(self) -> int:
        """Sequences of one step."""
        return self.settings.train.prompts_per_step * self.group

    @property
    def of_rank(self) -> int:
        """Sequences of one learner rank in one update, in whole groups."""
        prompts = self.settings.train.prompts_per_step // self.settings.train.updates_per_batch
        return math.ceil(prompts / self.settings.learner.ranks) * self.group

    @property
    def of_micro_batch(self) -> Load:
        """The load of one forward pass of a learner rank."""
        return self.load(self.settings.train.max_tokens_per_micro_batch, self.of_rank)

    @property
    def micro_batches(self) -> int:
        """Forward passes of a learner rank in one update, if all sequences have the full length."""
        budget = self.settings.train.max_tokens_per_micro_batch
        return math.ceil(self.of_rank / max(budget // self.tokens, 1))

    def of_scoring(self, devices: int) -> Load:
        """The load of one forward pass of a scorer replica on `devices` devices, which is given one
        chunk at a time.
        """
        budget = self.settings.scorer.max_tokens_per_micro_batch * devices
        return self.load(budget, self.of_chunk)

    def load(self, budget: int, sequences: int) -> Load:
        """The largest load of a forward pass over some of `sequences` sequences.

        It fills the budget of tokens, with shorter sequences where the longest would leave room in
        it. Prompts may be so short that nearly all tokens belong to responses.

        Example: a budget of 16384 tokens and sequences of at most 9216 with responses of 8192: two
        sequences of 8192 tokens, with up to 16384 response tokens.
        """
        tokens = min(max(budget, self.tokens), sequences * self.tokens)
        count = math.ceil(tokens / self.tokens)
        return Load(count, math.ceil(tokens / count), min(tokens, sequences * self.response))

    @property
    def groups_per_chunk(self) -> int:
        """Prompts of one chunk that an engine returns."""
        rollout = self.settings.rollout
        prompts = self.settings.train.prompts_per_step
        return chunk_size(prompts, rollout.groups_per_chunk, rollout.engines)

    @property
    def of_chunk(self) -> int:
        """Sequences of the largest chunk; a scorer or a reward worker is given one chunk at a time.
        The data's own responses of a step are a single chunk.
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
