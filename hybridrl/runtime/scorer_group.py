"""The replicas of one teacher."""

from collections.abc import Sequence
from typing import NamedTuple

from hybridrl.kernels.head import HeadRule
from hybridrl.objectives import make_objective
from hybridrl.objectives.head_rule import head_rule
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.calls import Pending, gather
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.stateless_group import StatelessGroup
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.types import Files, SavedFile


class ScoreCall(NamedTuple):
    """A call to score one chunk, under way."""

    header: Pending  # -> ScoreHeader
    scores: Pending  # -> TokenScores; only ever passed on by reference


class ScorerGroup(StatelessGroup):
    """Hands chunks to the replicas of one teacher in turn.

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
        evidence, rule = scoring(settings, teacher)
        arguments = {
            "settings": settings,
            "teacher": teacher,
            "device": device,
            "evidence": evidence,
            "rule": rule,
        }
        super().__init__(
            settings, slots, name=f"scorer-{teacher}", arguments=arguments, log_dir=log_dir
        )

    def configure(self, settings: RunSettings) -> None:
        """Score by other settings from here on, if they score with this teacher at all."""
        self.settings = settings
        if self.teacher in settings.scored_teachers:
            evidence, rule = scoring(settings, self.teacher)
            limit = settings.deadlines.start_s
            self.group.call_all("configure", settings, evidence, rule, deadline_s=limit)

    def state_bytes(self) -> int:
        return sum(self.group.call_all("state_bytes", deadline_s=self.settings.deadlines.save_s))

    def begin_save(self, folder: str) -> Files:
        """Write the cached log-probs, 4 bytes a token, which takes too little time to do it beside
        the next step.
        """
        saved = self._each_replica("save_state", folder)
        return lambda: saved

    def load_state(self, folder: str) -> None:
        self._each_replica("load_state", folder)

    def _each_replica(self, method: str, folder: str) -> list[SavedFile]:
        """Each replica writes or reads its own files."""
        limit = self.settings.deadlines.save_s
        size = self.group.size
        written = gather(
            [self.group.submit(i, method, folder, i, size, deadline_s=limit) for i in range(size)]
        )
        return [file for files in written for file in files]

    def score(self, chunks: Sequence[Chunk]) -> list[ScoreCall]:
        """One call per chunk, which starts when the chunk is done."""
        # The deadline counts from when the scores are waited for, and then the chunks are done.
        limit = self.settings.deadlines.score_s
        return [
            ScoreCall(
                *self.group.submit_pair(
                    i % self.group.size, "score", chunk.batch.ref, deadline_s=limit
                )
            )
            for i, chunk in enumerate(chunks)
        ]


def scoring(settings: RunSettings, teacher: str) -> tuple[Evidence, HeadRule]:
    """The evidence that a scored teacher sends of each token, and the rule of the head pass that
    reads it.
    """
    position = settings.scored_teachers.index(teacher)
    return make_objective(settings).needs.evidence[position], head_rule(settings)
