"""The scorers of one teacher."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from hybridrl.kernels.head import HeadRule
from hybridrl.objectives import make_objective
from hybridrl.objectives.head_rule import head_rule
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.learner_group import free_port_at
from hybridrl.runtime.stateless_group import StatelessGroup
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.sharded_model import ReplicaRank
from hybridrl.types import Files, SavedFile


class ScoreCall(NamedTuple):
    """A call to score one chunk, under way."""

    header: Pending  # -> ScoreHeader
    scores: Pending  # -> TokenScores; only ever passed on by reference
    followers: tuple[Pending, ...] = ()  # of the other ranks of the replica; -> None


class ScorerGroup(StatelessGroup):
    """Distributes chunks over the replicas of one teacher in turn.

    A replica is one worker, or teachers.NAME.devices consecutive workers, which all get the same
    calls; the first of them sends the scores.

    consumes chunks under way / produces calls that start when their chunk is done / `score` waits
    for nothing.
    """

    worker = "hybridrl.teachers.scorer:Scorer"

    def __init__(
        self,
        settings: RunSettings,
        slots: Sequence[Slot],
        *,
        teacher: str,
        device: str,
        log_dir: str,
    ) -> None:
        self.teacher = teacher
        if settings.teachers[teacher].url is not None:
            self.worker = "hybridrl.teachers.served:ServedScorer"
        if settings.teachers[teacher].engine is not None:
            self.worker = "hybridrl.rollout.engine_scorer:EngineScorer"
        self.devices = settings.teachers[teacher].devices
        self.slots = slots
        self.start_s = settings.deadlines.start_s
        evidence, rule = scoring(settings, teacher)
        self.arguments: Mapping[str, object] = {
            "settings": settings,
            "teacher": teacher,
            "device": device,
            "evidence": evidence,
            "rule": rule,
        }
        replicas = [range(i, i + self.devices) for i in range(0, len(slots), self.devices)]
        super().__init__(
            settings,
            slots,
            name=f"scorer-{teacher}",
            arguments=[of_one for workers in replicas for of_one in self._arguments(workers)],
            log_dir=log_dir,
            unit=self.devices,
            renewed=self._arguments,
        )
        self.num_alone = 0  # number of calls of score_one

    def _arguments(self, workers: range) -> list[Mapping[str, object]]:
        """The constructor arguments of the workers of one replica. If it has several workers, they
        connect through a port that is free on the node of the first.
        """
        if self.devices == 1:
            return [self.arguments]
        master = free_port_at(self.slots[workers.start], self.start_s)
        return [
            {**self.arguments, "place": ReplicaRank(rank=rank, ranks=self.devices, master=master)}
            for rank in range(self.devices)
        ]

    @property
    def replicas(self) -> int:
        return self.group.size // self.devices

    @property
    def first_ranks(self) -> range:
        """The first worker of each replica."""
        return range(0, self.group.size, self.devices)

    def configure(self, settings: RunSettings) -> None:
        """Use other settings from now on; the workers get them only if they score with this
        teacher.
        """
        self.settings = settings
        if self.teacher in settings.scored_teachers:
            evidence, rule = scoring(settings, self.teacher)
            limit = settings.deadlines.start_s
            self.group.call_all("configure", settings, evidence, rule, deadline_s=limit)

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Serve another job as new scorers would, with nothing cached."""
        evidence, rule = scoring(settings, self.teacher)
        changed = {"settings": settings, "evidence": evidence, "rule": rule}
        self.arguments = {**self.arguments, **changed}
        self.group.begin_job(settings, log_dir, changed)
        self.configure(settings)

    def state_bytes(self) -> int:
        limit = self.settings.deadlines.save_s
        return sum(
            gather(
                [self.group.submit(i, "state_bytes", deadline_s=limit) for i in self.first_ranks]
            )
        )

    def begin_save(self, folder: str) -> Files:
        """Write the cached log-probs before this returns: with 4 bytes a token that takes too
        little time to be done in the background.
        """
        saved = self._replica_files("save_state", folder, self.first_ranks)
        return lambda: saved

    def load_state(self, folder: str) -> None:
        self._replica_files("load_state", folder, range(self.group.size))

    def _replica_files(self, method: str, folder: str, workers: range) -> list[SavedFile]:
        """Each worker writes or reads the files of its replica."""
        limit = self.settings.deadlines.save_s
        calls = [
            self.group.submit(i, method, folder, i // self.devices, self.replicas, deadline_s=limit)
            for i in workers
        ]
        return [file for files in gather(calls) for file in files]

    def score(self, chunks: Sequence[Chunk]) -> list[ScoreCall]:
        """Submit one call per chunk of a wave, which starts when the chunk is done. The first
        replica gets the first chunk.
        """
        return [self._score(i % self.replicas, chunk) for i, chunk in enumerate(chunks)]

    def score_one(self, chunk: Chunk) -> ScoreCall:
        """As `score`, for a single chunk; successive calls go to the replicas in turn."""
        self.num_alone += 1
        return self._score((self.num_alone - 1) % self.replicas, chunk)

    def _score(self, replica: int, chunk: Chunk) -> ScoreCall:
        # The deadline counts from the start of the wait for scores, when the chunks are done.
        limit = self.settings.deadlines.score_s
        first, *others = self.group.members(replica * self.devices)
        header, scores = self.group.submit_pair(first, "score", chunk.batch.ref, deadline_s=limit)
        followers = (
            self.group.submit(other, "follow", chunk.batch.ref, deadline_s=limit)
            for other in others
        )
        return ScoreCall(header, scores, tuple(followers))


def scoring(settings: RunSettings, teacher: str) -> tuple[Evidence, HeadRule]:
    """The evidence that a scored teacher sends for each token, and the rule of the head pass that
    reads it.
    """
    position = settings.scored_teachers.index(teacher)
    return make_objective(settings).needs.evidence[position], head_rule(settings)
