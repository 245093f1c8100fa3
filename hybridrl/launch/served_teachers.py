"""Checks of the servers that run teachers, before any worker starts.

Each server can be reached, has the model, reads sequences as long as the run's, reports log-probs
of the student's tokens, and gives the same answer twice; all servers of a teacher give the same
answer. That a scorer gives the same answer twice is checked again with the running scorers.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError, ServerError
from hybridrl.data.chat import ChatTemplate
from hybridrl.data.problem import Problem
from hybridrl.launch.alignment import check_begins, check_ends
from hybridrl.launch.preflight import (
    PROBE_PROMPTS,
    different_prompt,
    different_tokens,
    first_conversations,
)
from hybridrl.models.loading import head_rows, load_tokenizer
from hybridrl.objectives import make_objective
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.score_client import ScoreClient, ServedScores
from hybridrl.teachers.served import addresses, served_model
from hybridrl.types import Prompt

RETRY_S = 5.0
"""Upper limit of served.retry_s in these checks, so that a server that is down is reported soon."""
BLOCK = 4096
"""Tokens that a server decodes in one request."""
SHOWN = 30
"""Characters of a text that an error shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The data with which the servers of a run are tested."""

    sequences: tuple[tuple[int, ...], ...]  # prompts
    tokenizer: PreTrainedTokenizerBase  # the student's
    student: str  # the student's setting and path, for messages
    rows: int  # rows of the student's output head
    length: int  # tokens of the longest sequence


def check_served_teachers(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
) -> None:
    """Refuse a teacher whose servers cannot score for this run.

    Args:
        tokenizer: the student's.
        problems: the training problems.
        prompts: the same problems, tokenized.

    Raises:
        ConfigError: one sentence about the first fault, with the setting and the address.
    """
    probe = Probe(
        sequences=tuple(p.input_ids for p in prompts[:PROBE_PROMPTS]),
        tokenizer=tokenizer,
        student=f"model.path={settings.model.path}",
        rows=head_rows(settings.model.path, settings.model.revision),
        length=settings.rollout.sequence_limit,
    )
    evidence = make_objective(settings).needs.evidence
    for name, kind in zip(settings.scored_teachers, evidence, strict=True):
        if settings.teachers[name].url is not None:
            check_tokenizer(settings, name, probe, problems)
            check_servers_agree(name, settings.teachers[name], kind.support, probe)


def check_tokenizer(
    settings: RunSettings, name: str, probe: Probe, problems: Sequence[Problem]
) -> None:
    """Refuse a folder in served.tokenizer whose tokens are not the student's, or whose chat
    template formats a conversation of the data differently.

    Raises:
        ConfigError: the folder has no tokenizer; or names the first difference.
    """
    path = settings.teachers[name].served.tokenizer
    if path is None:
        return
    setting = f"teachers.{name}.served.tokenizer"
    tokenizer = load_tokenizer(path, setting=setting)
    if difference := different_tokens(probe.tokenizer, tokenizer):
        raise ConfigError(
            f"{setting}={path}: its vocabulary differs from that of {probe.student}: {difference}; "
            "serve a teacher with the student's tokenizer"
        )
    source = f"{setting}={path}"
    check_begins(settings, probe.tokenizer, name, source, tokenizer)
    check_ends(settings, probe.tokenizer, name, source, tokenizer.eos_token_id)
    if not tokenizer.chat_template or settings.data.chat_template_file is not None:
        return
    template = ChatTemplate.of(probe.tokenizer, settings.data)
    own_template = ChatTemplate(tokenizer, settings.data.chat_template_kwargs)
    for chat in first_conversations(settings, problems):
        text = chat.prompt_text(template)
        if difference := different_prompt(chat, own_template, text, probe.student):
            raise ConfigError(
                f"{setting}={path}: {difference}; give both the same chat template, or name one "
                "for both by data.chat_template_file"
            )


def check_servers_agree(name: str, config: TeacherConfig, top: int, probe: Probe) -> None:
    """Test each server of a teacher, and compare their log-probs of the first prompts.

    Args:
        top: K, the number of most likely tokens that the evidence needs.

    Raises:
        ConfigError: as check_served_teachers.
    """
    served = replace(config.served, retry_s=min(config.served.retry_s, RETRY_S))
    quick = replace(config, served=served)
    first: list[ServedScores] | None = None
    for setting, url in addresses(name, config):
        client = ScoreClient(setting, url, config.api_key, served)
        try:
            scores = asyncio.run(tested(client, quick, top, probe))
        except ServerError as error:
            raise ConfigError(
                f"{error}; correct the address or teachers.{name}.api_key, or start vLLM's server "
                "there"
            ) from error
        gap = mean_gap(first or scores, scores)
        first = first or scores
        if gap > served.max_gap:
            raise ConfigError(
                f"{setting}={url}: its log-probs of the first prompts differ from those of "
                f"teachers.{name}.url={config.url} by {gap:.3g} nats a token in the mean, above "
                f"teachers.{name}.served.max_gap={served.max_gap:g}; give both servers the same "
                "model and dtype"
            )


async def tested(
    client: ScoreClient, config: TeacherConfig, top: int, probe: Probe
) -> list[ServedScores]:
    """The log-probs of the probe's sequences, from a server that passes every test.

    Raises:
        ConfigError: the server fails a test.
        ServerError: it cannot be reached, does not have the model, or refuses a request.
    """
    async with client:
        model = await served_model(client, config)
        most = model.max_tokens
        if most is not None and most <= probe.length:
            raise ConfigError(
                f"{client.name}: reads at most {most} tokens, and rollout.max_model_len="
                f"{probe.length} needs {probe.length + 1}, one more for the token that it "
                "generates; start it with a larger --max-model-len, or lower rollout.max_model_len"
            )
        if config.served.tokenizer is None:
            await check_texts(client, model.name, probe)
        scores = await first_scores(client, model.name, top, probe)
        await check_rows(client, model.name, probe)
        again = await client.score(model.name, probe.sequences, top)
    gap = mean_gap(scores, again)
    if gap > config.served.max_gap:
        raise ConfigError(
            f"{client.name}: its log-probs of the same prompts differ by {gap:.3g} nats a token in "
            f"the mean between two requests, above served.max_gap={config.served.max_gap:g}; look "
            "for a model that changes meanwhile, or raise it"
        )
    return scores


async def first_scores(
    client: ScoreClient, model: str, top: int, probe: Probe
) -> list[ServedScores]:
    try:
        return await client.score(model, probe.sequences, top)
    except ServerError as error:
        if not top:
            raise
        raise ConfigError(
            f"{error}; if the number of log-probs is the cause, start it with --max-logprobs {top} "
            f"or more, or lower algorithm.topk.k={top}"
        ) from error


async def check_rows(client: ScoreClient, model: str, probe: Probe) -> None:
    """Refuse a model with fewer tokens than the student's output head has rows.

    Raises:
        ConfigError: the server refuses the student's last token.
    """
    try:
        await client.score(model, [[0, probe.rows - 1]], 0)
    except ServerError as error:
        raise ConfigError(
            f"{error}; {probe.student} has {probe.rows} rows in its output head, and could draw "
            "tokens that this teacher cannot read: choose a teacher with at least as many"
        ) from error


async def check_texts(client: ScoreClient, model: str, probe: Probe) -> None:
    """Refuse a server that decodes the student's tokens to other texts.

    Raises:
        ConfigError: names the tokens and the place where the two texts differ.
    """
    end = max(probe.tokenizer.get_vocab().values()) + 1
    for start in range(0, end, BLOCK):
        ids = list(range(start, min(start + BLOCK, end)))
        expected = str(probe.tokenizer.decode(ids))
        try:
            text = await client.detokenize(model, ids)
        except ServerError as error:
            raise ConfigError(
                f"{error}; where the server has no /detokenize, name a folder with its tokenizer "
                "by served.tokenizer"
            ) from error
        if text != expected:
            at = first_difference(text, expected)
            raise ConfigError(
                f"{client.name}: its tokens {start} to {ids[-1]} read "
                f"{text[at : at + SHOWN]!r} where those of {probe.student} read "
                f"{expected[at : at + SHOWN]!r}; serve a teacher with the student's tokenizer"
            )


def first_difference(one: str, other: str) -> int:
    """The index of the first character that differs; the shorter length if there is none."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def mean_gap(one: Sequence[ServedScores], other: Sequence[ServedScores]) -> float:
    """The mean |difference| of the log-probs of the same tokens, in nats."""
    differences = [abs(a.logprobs - b.logprobs)[1:] for a, b in zip(one, other, strict=True)]
    together = np.concatenate([np.zeros(0), *differences])
    return float(together.mean()) if len(together) else 0.0
