"""A scorer whose teacher is run by a server."""

import asyncio
import logging
from collections.abc import Sequence

import numpy as np
import torch

from hybridrl.core.errors import ServerError
from hybridrl.kernels.head import HeadRule
from hybridrl.models.loading import head_rows
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.score_client import ScoreClient, ServedModel, ServedScores
from hybridrl.teachers.scorer import Scorer, response_tokens
from hybridrl.types import RolloutBatch, TokenScores

log = logging.getLogger(__name__)


class ServedScorer(Scorer):
    """One client of the server of one teacher; it holds no weights.

    A chunk is scored by one server as a whole. Where that is lost, the next one scores the chunk
    and those after it.

    Raises:
        ServerError: from `score`, if no server answers; names the settings and the addresses.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        teacher: str,
        device: str,
        evidence: Evidence,
        rule: HeadRule,
    ) -> None:
        self.teacher = teacher
        self.place = None  # the server has the devices
        rows = head_rows(settings.model.path, settings.model.revision)
        # [V, 0]: the columns have the widths of a teacher without an output embedding here.
        self.head = torch.empty(rows, 0)
        self.current = 0  # the server that answered last
        self.configure(settings, evidence, rule)

    def configure(self, settings: RunSettings, evidence: Evidence, rule: HeadRule) -> None:
        super().configure(settings, evidence, rule)
        self.config = settings.teachers[self.teacher]
        self.current = min(self.current, len(addresses(self.teacher, self.config)) - 1)
        model = self.config.served.model or self.config.url
        self.identity = f"served {model} {rule.temperature}"

    def _score_sequences(
        self, scores: TokenScores, batch: RolloutBatch, sequences: Sequence[int]
    ) -> None:
        if not sequences:
            return
        ids = [batch.trajectory(i).input_ids.tolist() for i in sequences]
        answers = self.answers(ids)
        self._check_tokens(answers)
        first_rows = np.concatenate([[0], np.cumsum(batch.response_lengths)])
        for i, answer in zip(sequences, answers, strict=True):
            tokens = response_tokens(batch, i)
            within = tokens - int(batch.offsets[i])
            rows = slice(int(first_rows[i]), int(first_rows[i + 1]))
            scores.logprobs[tokens] = answer.logprobs[within]
            scores.rows[rows] = answer.top_logprobs[within]
            scores.support_ids[rows] = answer.top_ids[within]
        self._remember(scores, batch, sequences)

    def _check_tokens(self, answers: Sequence[ServedScores]) -> None:
        """Refuse tokens of which the student has no probability.

        Raises:
            ServerError: rows that only pad the teacher's output head are among its most likely
                tokens.
        """
        largest = max(answer.top_ids.max(initial=-1) for answer in answers)
        if largest >= len(self.head):
            raise ServerError(
                f"teachers.{self.teacher}.url={self.config.url}: token {largest} is among the most "
                f"likely ones, and the student has {len(self.head)} tokens; lower algorithm.topk.k"
            )

    def answers(self, sequences: Sequence[Sequence[int]]) -> list[ServedScores]:
        """The scores of sequences of token ids, all by the first server that is not lost.

        Raises:
            ServerError: all are lost, or refuse the sequences.
        """
        servers = addresses(self.teacher, self.config)
        failures = []
        for step in range(len(servers)):
            at = (self.current + step) % len(servers)
            try:
                answers = asyncio.run(
                    score_with(servers[at], self.config, sequences, self.evidence.support)
                )
            except ServerError as error:
                log.warning("%s", error)
                failures.append(str(error))
                continue
            self.current = at
            return answers
        raise ServerError("; ".join(failures))


def addresses(teacher: str, config: TeacherConfig) -> list[tuple[str, str]]:
    """(setting, address) of each server of a teacher, in the order of preference."""
    assert config.url is not None, "only a teacher with an address is served"
    first = (f"teachers.{teacher}.url", config.url)
    return [first] + [(f"teachers.{teacher}.served.fallbacks", u) for u in config.served.fallbacks]


async def score_with(
    server: tuple[str, str], config: TeacherConfig, sequences: Sequence[Sequence[int]], top: int
) -> list[ServedScores]:
    """The scores of one server.

    Raises:
        ServerError: as ScoreClient.score and served_model.
    """
    setting, url = server
    async with ScoreClient(setting, url, config.api_key, config.served) as client:
        model = config.served.model or (await served_model(client, config)).name
        return await client.score(model, sequences, top)


async def served_model(client: ScoreClient, config: TeacherConfig) -> ServedModel:
    """The model that a server has for a teacher.

    Raises:
        ServerError: it has none of the name served.model; or no name is set, and it has several.
    """
    models = await client.models()
    name = config.served.model
    found = [model for model in models if name in (None, model.name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(model.name for model in models) or "none"
    wanted = f"served.model={name}" if name else "one model"
    raise ServerError(
        f"{client.name}: has the models {listed}, and {wanted} is expected; set served.model to "
        "one of them"
    )
