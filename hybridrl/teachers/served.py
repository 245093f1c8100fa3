"""A scorer of a teacher that runs on a server."""

import asyncio
import logging
from collections.abc import Sequence

from hybridrl.core.errors import ServerError
from hybridrl.kernels.head import HeadRule
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.reported import ReportedScorer
from hybridrl.teachers.score_client import ScoreClient, ServedModel, ServedScores

log = logging.getLogger(__name__)


class ServedScorer(ReportedScorer):
    """A scorer that sends requests to the servers of one teacher, and has no weights.

    One server scores a whole chunk. If it fails, the next one scores the chunk and all later ones.

    Raises:
        ServerError: from `score`, if no server answers; it names the settings and the addresses.
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
        self.current = 0  # the server that answered last
        super().__init__(settings, teacher=teacher, evidence=evidence, rule=rule)

    def configure(self, settings: RunSettings, evidence: Evidence, rule: HeadRule) -> None:
        super().configure(settings, evidence, rule)
        self.config = settings.teachers[self.teacher]
        self.current = min(self.current, len(addresses(self.teacher, self.config)) - 1)
        model = self.config.served.model or self.config.url
        self.identity = f"served {model} {rule.temperature}"
        self.source = f"teachers.{self.teacher}.url={self.config.url}"

    def answers(self, sequences: Sequence[Sequence[int]]) -> list[ServedScores]:
        """The scores of sequences of token ids, all by the first server that answers.

        Raises:
            ServerError: every server fails or refuses the sequences.
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
    """The scores of sequences by one server, with its `top` most likely tokens at each position.

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
        ServerError: the server has no model of the name served.model; or no name is set, and it
            does not have exactly one.
    """
    models = await client.models()
    name = config.served.model
    found = [model for model in models if name in (None, model.name)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(model.name for model in models) or "none"
    wanted = f"served.model={name}" if name else "one model"
    raise ServerError(
        f"{client.name}: has the models {listed}, but {wanted} is expected; set served.model to "
        "one of them"
    )
