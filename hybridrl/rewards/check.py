"""Checks, before any worker starts, that the reward functions can be loaded and fit the data.

Each function is also called once, on the first prompt that has its columns, with a short text as
the response. If that fails, a warning is logged and the run goes on, since a function may refuse a
text that no trained model would write.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.json_lines import shortened
from hybridrl.data.problem import source_of
from hybridrl.data.route import takes
from hybridrl.rewards.pool import LOAD_S, Failure, FailureKind, RewardPool, reward_calls

if TYPE_CHECKING:  # child processes import this package and must not load Hydra or numpy
    from hybridrl.settings.rewards import RewardConfig
    from hybridrl.types import Prompt

logger = logging.getLogger(__name__)

STANDARD = ("completions", "prompts", "completion_ids", "prompt_ids")
"""Arguments that every function may have, besides the columns of the data."""

MOST_VALUES = 10
"""Largest number of a column's values that an error lists."""

TRIAL = "The answer is 42."

LISTS = "def score(completions: list[str], prompts: list[str], **columns: list) -> list[float]"
OTHER_FRAMEWORKS = {
    "solution_str": f"it scores one response at a time; write {LISTS}",
    "data_source": f"it scores one response at a time; write {LISTS}",
    "response": "responses are passed as the list `completions`",
    "responses": "responses are passed as the list `completions`",
    "completion": "responses are passed as the list `completions`",
    "prompt": "prompts are passed as the list `prompts`",
    "queries": "prompts are passed as the list `prompts`",
}
"""Arguments of other frameworks' functions, and what replaces them."""


@contextmanager
def loaded_rewards(config: "RewardConfig", load_s: float = LOAD_S) -> Iterator[RewardPool | None]:
    """A pool of one child with every configured function loaded; None if there are no functions.

    Args:
        load_s: time limit for loading them, deadlines.start_s.

    Raises:
        ConfigError: names the first function that cannot be loaded.
    """
    if not config.functions:
        yield None
        return
    pool = RewardPool(
        reward_calls(config),
        processes=1,
        timeout_s=config.timeout_s,
        max_timeouts=config.max_error_rate,
        load_s=load_s,
    )
    try:
        yield pool
    finally:
        pool.close()


def check_columns(
    pool: RewardPool,
    config: "RewardConfig",
    prompts: Sequence["Prompt"],
    heldout: Sequence["Prompt"],
    *,
    only: str | None = None,
) -> None:
    """Refuse a function whose required column is missing in the data, or that expects messages;
    each data source is checked with the prompts that the function's route takes.

    Args:
        only: the function that is checked; None: all of them.

    Raises:
        ConfigError: names the first such function.
    """
    for name, signature in pool.signatures.items():
        if only not in (None, name):
            continue
        route = config.functions[name].route
        for split in (prompts, heldout):
            for part in of_sources([p for p in split if takes(route, p.columns)]):
                _check_required(pool.describe(name), signature.required, part)
        taken = [p for p in prompts if takes(route, p.columns)]
        if taken:
            _try_out(pool, name, signature.required, taken)


def check_judged(config: "RewardConfig", prompts: Sequence["Prompt"]) -> None:
    """Refuse a prompt that no reward function scores, unless there is no function at all.

    If there are functions whose weight is not 0, one of these must score the prompt.

    Raises:
        ConfigError: names the first such prompt, with its columns.
    """
    weighted = {name: f for name, f in config.functions.items() if f.weight != 0}
    scoring = weighted or config.functions
    if not all(function.route for function in scoring.values()):
        return  # one of them takes every prompt
    for prompt in prompts if scoring else ():
        if not any(takes(function.route, prompt.columns) for function in scoring.values()):
            names = ", ".join(f"reward.functions.{name}.route" for name in scoring)
            columns = ", ".join(f"{k}: {shortened(v)}" for k, v in prompt.columns.items())
            raise ConfigError(
                f"{names}: no function takes {prompt.uid}, whose columns are {columns}, so nothing "
                "would score its responses; add a function with a route to it, or widen a route"
            )


def check_judge(
    key: str, reward: str | None, config: "RewardConfig", prompts: Sequence["Prompt"]
) -> None:
    """Refuse problems of an evaluation set that its reward function does not take, or, if the set
    names no function, that no function takes.

    Args:
        key: of the set, e.g. "eval.sets.hard".
        reward: the function that the set names; None: the first function that takes a problem
            judges it.

    Raises:
        ConfigError: names the first such problem.
    """
    if reward is None:
        check_judged(config, prompts)
        return
    route = config.functions[reward].route
    for prompt in prompts:
        if not takes(route, prompt.columns):
            raise ConfigError(
                f"{key}.reward={reward}: reward.functions.{reward}.route={dict(route)} does not "
                f"take {prompt.uid}; leave such rows out, widen the route, or leave {key}.reward "
                "out, so that each row is judged by the function that takes it"
            )


def check_taken(key: str, route: Mapping[str, Any], prompts: Sequence["Prompt"]) -> None:
    """Refuse a route that takes none of the prompts.

    Args:
        key: the setting of the function or teacher, e.g. "teachers.main".

    Raises:
        ConfigError: names the route and the values that the data has.
    """
    if not prompts or any(takes(route, prompt.columns) for prompt in prompts):
        return
    values = {
        column: sorted({shortened(p.columns[column]) for p in prompts if column in p.columns})
        for column in route
    }
    has = "; ".join(
        f"the data's values of {column} are {', '.join(found[:MOST_VALUES])}"
        if found
        else f"no row has the column {column}"
        for column, found in values.items()
    )
    raise ConfigError(f"{key}.route={dict(route)}: matches no row of the data; {has}; correct it")


def of_sources(prompts: Sequence["Prompt"]) -> list[list["Prompt"]]:
    """The prompts of each data source; if there are no named sources, all of them as one part."""
    parts: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        parts.setdefault(source_of(prompt.uid), []).append(prompt)
    return list(parts.values())


def _check_required(field: str, required: Sequence[str], prompts: Sequence["Prompt"]) -> None:
    columns = dict.fromkeys(column for prompt in prompts for column in prompt.columns)
    for argument in required:
        if argument in STANDARD or argument in columns:
            continue
        first = prompts[0]
        source = source_of(first.uid)
        names = ", ".join(columns) or "none"
        data, key = ("the data", "data")
        if source is not None:
            data, key = (f"the data source {source}", f"data.sources.{source}")
        remedy = OTHER_FRAMEWORKS.get(
            argument,
            f"name the data's key for it with '+{key}.columns={{{argument}: KEY}}', set its value "
            "in the function's options, or give the argument a default",
        )
        raise ConfigError(
            f"{field}: its argument `{argument}` is not a column of {data}, whose columns are "
            f"{names} (as of {first.uid}, the first row); {remedy}"
        )


def _try_out(
    pool: RewardPool, name: str, required: Sequence[str], prompts: Sequence["Prompt"]
) -> None:
    needed = [column for column in required if column not in STANDARD]
    prompt = next((p for p in prompts if all(c in p.columns for c in needed)), prompts[0])
    outcome = pool.call(name, _columns(prompt, prompts=prompt.text, completions=TRIAL))[0]
    if not isinstance(outcome, Failure):
        return
    if outcome.kind is FailureKind.raised:
        question = [{"role": "user", "content": prompt.text}]
        answer = [{"role": "assistant", "content": TRIAL}]
        columns = _columns(prompt, prompts=question, completions=answer)
        if not isinstance(pool.call(name, columns)[0], Failure):
            raise ConfigError(
                f"{pool.describe(name)}: it reads lists of messages, and raised {outcome.text} on "
                "text; completions and prompts are texts here, also of conversations: write "
                "`completion`, not `completion[0]['content']`"
            )
    logger.warning(
        "reward.functions.%s failed on %s with the response %r: %s: %s; such responses are "
        "handled by reward.on_error",
        name,
        prompt.uid,
        TRIAL,
        outcome.kind,
        outcome.text,
    )


def _columns(prompt: "Prompt", *, prompts: Any, completions: Any) -> dict[str, list[Any]]:
    """The keyword arguments of a call for one sequence."""
    response = prompt.responses[0] if prompt.responses else prompt.input_ids[-1:]
    return {column: [value] for column, value in prompt.columns.items()} | {
        "prompts": [prompts],
        "completions": [completions],
        "completion_ids": [list(response)],
        "prompt_ids": [list(prompt.input_ids)],
    }
