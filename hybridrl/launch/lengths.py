"""Proposals for rollout.max_new_tokens and rollout.max_model_len, from the data and the model."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError
from hybridrl.data.chat import ChatTemplate
from hybridrl.data.problem import Problem
from hybridrl.data.prompts import tokenize
from hybridrl.models.limits import most_positions
from hybridrl.models.loading import model_config
from hybridrl.settings.run import RunSettings

LEAST = 256
"""The fewest new tokens to propose, if the model has room: it may think before a short answer."""
STEP = 64
"""Proposals are multiples of this number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The numbers of tokens that the data needs, special ones included."""

    prompt: int  # of the longest prompt
    row: str  # the row of the data that has the longest prompt
    whole: int  # of the longest prompt with its response
    answer: int  # of the longest response or reference answer; 0: the data has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Proposed settings."""

    max_new_tokens: int
    max_model_len: int
    drop_too_long: bool  # some rows are too long for the model


def check_lengths(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    teachers: Mapping[str, ChatTemplate] | None = None,
) -> None:
    """Refuse settings in which one of the two lengths is missing, with a proposal for both.

    Args:
        teachers: as in tokenize.

    Raises:
        ConfigError: one is missing; proposes values for both.
        DataError: as tokenize.
    """
    given = {
        "rollout.max_new_tokens": settings.rollout.max_new_tokens,
        "rollout.max_model_len": settings.rollout.max_model_len,
    }
    missing = [key for key, value in given.items() if value is None]
    if not missing:
        return
    model = settings.model
    needs = measure(settings, tokenizer, problems, teachers)
    positions = most_positions(model_config(model.path, model.revision))
    lengths = propose(needs, positions, *given.values())
    proposed = {
        "rollout.max_new_tokens": lengths.max_new_tokens,
        "rollout.max_model_len": lengths.max_model_len,
    }
    changed = [f"{key}={value}" for key, value in proposed.items() if value != given[key]]
    if lengths.drop_too_long:
        changed.append("data.drop_too_long=true")
    answers = (
        f"the longest answer {needs.answer}" if needs.answer else "there are no reference answers"
    )
    limit = "no limit to its length" if positions == math.inf else f"{positions:.0f} positions"
    raise ConfigError(
        f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: the longest "
        f"prompt has {needs.prompt} tokens ({needs.row}), {answers}, and model.path={model.path} "
        f"has {limit}; for example {' '.join(changed)}"
    )


def measure(
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    teachers: Mapping[str, ChatTemplate] | None = None,
) -> Needs:
    """The lengths that the problems need; there must be at least one problem."""
    use_responses = settings.algorithm.data_fraction > 0
    prompts = tokenize(
        problems,
        tokenizer,
        settings.data,
        sys.maxsize,
        responses=use_responses,
        teachers=teachers,
    )
    responses = [max(map(len, prompt.responses), default=0) for prompt in prompts]
    answers = [
        len(tokenizer(prompt.answer, add_special_tokens=False)["input_ids"]) + 1  # its end token
        for prompt in prompts
        if prompt.answer is not None
    ]
    longest = max(range(len(prompts)), key=lambda i: prompts[i].most_tokens)
    return Needs(
        prompt=prompts[longest].most_tokens,
        row=problems[longest].row,
        whole=max(p.most_tokens + r for p, r in zip(prompts, responses, strict=True)),
        answer=max([*responses, *answers]),
    )


def propose(
    needs: Needs, positions: float, max_new_tokens: int | None, max_model_len: int | None
) -> Lengths:
    """Lengths that hold every row and twice the longest answer, as far as the model has positions.

    Args:
        positions: those of the model; infinity: it has no limit.
        max_new_tokens: the setting; None: propose it. A value that leaves no room for a prompt is
            replaced by a proposal.
        max_model_len: the setting; None: propose it.
    """
    limit = positions if max_model_len is None else min(positions, max_model_len)
    if max_new_tokens is not None and max_new_tokens >= limit:
        max_new_tokens = None
    new = max_new_tokens or _rounded_up(max(2 * needs.answer, LEAST))
    if needs.prompt + new > limit and max_new_tokens is None:
        new = min(new, max(int(limit) - needs.prompt, needs.answer, 1))
    fits = needs.prompt + new <= limit
    if not fits and max_new_tokens is None:
        new = max(min(new, int(limit) // 2), 1)
    enough = _rounded_up(max(needs.prompt + new, needs.whole))
    length = int(min(enough, limit)) if max_model_len is None else max_model_len
    return Lengths(max_new_tokens=new, max_model_len=length, drop_too_long=not fits)


def _rounded_up(tokens: int) -> int:
    return math.ceil(tokens / STEP) * STEP
