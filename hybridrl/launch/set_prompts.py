"""The problems of named held-out sets, before and after tokenization."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from hybridrl.controller.evaluator import with_responses
from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data import records
from hybridrl.data.problem import Problem
from hybridrl.data.problem_sources import load_source
from hybridrl.data.prompts import tokenize
from hybridrl.launch.alignment import reads_own_prompts, teacher_template
from hybridrl.launch.preflight import check_token_ids
from hybridrl.models.loading import load_tokenizer
from hybridrl.rewards.check import check_columns, check_judge
from hybridrl.rewards.pool import RewardPool
from hybridrl.settings.rewards import RewardConfig
from hybridrl.settings.run import DataConfig, RunSettings
from hybridrl.types import Prompt

log = logging.getLogger(__name__)


def set_problems(settings: RunSettings, name: str) -> list[Problem]:
    """The problems of one set of eval.sets, whose uids begin with its name.

    Raises:
        ConfigError: an option that the generator refuses, or a package that is missing.
        DataError: a file or row that cannot be used.
    """
    held_out = settings.eval.sets[name]
    columns = held_out.columns or settings.data.columns
    try:
        if held_out.path:
            problems = records.load(held_out.path, name, held_out.revision, columns)
            return problems[: held_out.num_problems]
        assert held_out.task is not None, "check_sets checks it"
        data = DataConfig(
            task=held_out.task,
            dataset=held_out.dataset,
            options=held_out.options,
        )
        _, problems = load_source(data, settings.run.seed, 0, held_out.num_problems)
    except ConfigError as error:
        raise ConfigError(f"eval.sets.{name}, read as data.*: {error}") from error
    except DataError as error:
        raise DataError(f"eval.sets.{name}: {error}") from error
    return [replace(p, uid=f"{name}-{i:06d}") for i, p in enumerate(problems)]


def held_out_sets(settings: RunSettings) -> list[HeldOutSet]:
    """The sets of eval.sets, tokenized as the training prompts are.

    Raises:
        ConfigError, DataError: as set_problems, tokenize and check_token_ids; or nothing measures a
            set, since there is no reward function and its rows have no responses.
    """
    if not settings.eval.sets:
        return []
    model = settings.model
    tokenizer = load_tokenizer(model.path, model.revision, eos=model.eos)
    templates = {}
    for name in settings.teachers_in_use:
        if reads_own_prompts(settings, name):
            teacher = settings.teacher_model(name)
            setting = settings.model_setting(name)
            own = load_tokenizer(teacher.path, teacher.revision, setting=setting)
            templates[name] = teacher_template(settings, name, own)
    length = settings.rollout.sequence_limit
    sets = []
    for name, held_out in settings.eval.sets.items():
        problems = set_problems(settings, name)
        prompts = tokenize(
            problems,
            tokenizer,
            settings.data,
            length - settings.rollout.response_limit,
            length,
            responses=settings.algorithm.data_fraction > 0,
            eos=None if model.eos is None else tokenizer.eos_token_id,
            teachers=templates,
        )
        check_token_ids(settings, tokenizer, prompts)
        if not settings.reward.functions and not with_responses(settings, prompts):
            needed = settings.algorithm.responses_per_prompt
            raise ConfigError(
                f"eval.sets.{name}: nothing can be measured on it, because there is no reward "
                f"function, and the run learns from {needed} responses to each prompt but "
                f"{problems[0].row} has {len(problems[0].responses)}; give rows that have them"
            )
        sets.append(
            HeldOutSet(
                name=name,
                prompts=prompts,
                samples=held_out.samples,
                temperature=held_out.temperature_of(
                    greedy=settings.eval.greedy, sampled=settings.algorithm.temperature
                ),
                reward=held_out.reward,
            )
        )
    return sets


def check_set_rewards(pool: RewardPool, config: RewardConfig, sets: Sequence[HeldOutSet]) -> None:
    """Refuse a set that a reward function cannot judge.

    Raises:
        ConfigError: as check_columns and check_judge.
    """
    for held_out in sets:
        check_judge(f"eval.sets.{held_out.name}", held_out.reward, config, held_out.prompts)
        check_columns(pool, config, [], held_out.prompts, only=held_out.reward)


def prompts_by_set(sets: Sequence[HeldOutSet]) -> dict[str, Sequence[Prompt]]:
    """The prompts of each set, by its name."""
    return {held_out.name: held_out.prompts for held_out in sets}


def warn_of_trained(sets: Sequence[HeldOutSet], prompts: Sequence[Prompt]) -> None:
    """Log how many problems of each set are training prompts too.

    Args:
        prompts: those of training.
    """
    if not sets:
        return
    trained = {prompt.input_ids for prompt in prompts}
    for held_out in sets:
        shared = [prompt for prompt in held_out.prompts if prompt.input_ids in trained]
        if shared:
            log.warning(
                "eval.sets.%s: %d of %d prompts are training prompts too, %s the first; accuracy "
                "on them does not show what is learned beyond the training data: hold out other "
                "problems",
                held_out.name,
                len(shared),
                len(held_out.prompts),
                shared[0].uid,
            )
