"""The checks of a run that need no worker, and its tokenized prompts."""

from collections.abc import Sequence

from hybridrl.controller.held_out_set import HeldOutSet
from hybridrl.controller.metrics import check_metrics
from hybridrl.core.errors import ConfigError
from hybridrl.data.mixture import prompt_cursor
from hybridrl.data.problem import Problem
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.prompts import tokenize
from hybridrl.launch.alignment import teacher_templates
from hybridrl.launch.lengths import check_lengths
from hybridrl.launch.preflight import (
    check_adapters,
    check_attention,
    check_end_of_turn,
    check_models,
    check_teachers,
    check_templates,
    check_token_ids,
)
from hybridrl.launch.served_teachers import check_served_teachers
from hybridrl.launch.set_prompts import (
    check_set_rewards,
    held_out_sets,
    warn_of_trained,
)
from hybridrl.models.arithmetic import on_gpu
from hybridrl.models.loading import head_rows, load_tokenizer
from hybridrl.objectives.user_code import check_user_code
from hybridrl.rewards.check import check_columns, check_judged, check_taken, loaded_rewards
from hybridrl.rewards.reward_model import check_reward_models
from hybridrl.rollout.engine_arguments import ArgumentRules, check_engine_arguments, check_installed
from hybridrl.run_dir.directory import check_usable
from hybridrl.runtime.ray_connection import starts_ray
from hybridrl.settings.choices import EvidenceKind
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.teacher_model import check_own_models
from hybridrl.tracking.user_sinks import check_sinks
from hybridrl.types import Prompt


def preflight(
    settings: RunSettings,
) -> tuple[list[Prompt], list[Prompt], list[HeldOutSet]]:
    """Run every check that needs no worker and is not made by the settings themselves.

    Returns:
        The training and the held-out prompts, and the named sets.

    Raises:
        ConfigError, DataError, RunDirectoryError: one sentence about the first check that fails.
    """
    check_metrics(settings)
    check_sinks(settings.tracking)
    check_usable(settings)
    check_user_code(settings)
    if starts_ray(settings.cluster):  # the nodes of a cluster have packages of their own
        check_installed()
    check_engine_arguments(settings.rollout.engine)
    for name in settings.teachers_in_use:
        arguments = settings.teachers[name].engine or {}
        check_engine_arguments(arguments, ArgumentRules.of_teacher(name))
    with loaded_rewards(settings.reward, settings.deadlines.start_s) as rewards:
        prompts, heldout = prepare_prompts(settings)
        sets = held_out_sets(settings)
        check_routes(settings, prompts, heldout, sets)
        if rewards is not None:
            check_columns(rewards, settings.reward, prompts, heldout)
            check_set_rewards(rewards, settings.reward, sets)
    warn_of_trained(sets, prompts)
    return prompts, heldout, sets


def check_routes(
    settings: RunSettings,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    sets: Sequence[HeldOutSet],
) -> None:
    """Refuse a route of a teacher or reward function that takes no row, and a row that is sampled
    but judged by no reward function.

    Raises:
        ConfigError: names the first such route or row.
    """
    for name in settings.scored_teachers:
        check_taken(f"teachers.{name}", settings.teachers[name].route, prompts)
    in_sets = [prompt for held_out in sets for prompt in held_out.prompts]
    for name, function in settings.reward.functions.items():
        check_taken(f"reward.functions.{name}", function.route, [*prompts, *heldout, *in_sets])
    sampled = prompts if settings.algorithm.data_fraction < 1 else []
    check_judged(settings.reward, [*sampled, *heldout])


def prepare_prompts(settings: RunSettings) -> tuple[list[Prompt], list[Prompt]]:
    """Tokenized training and held-out prompts.

    Raises:
        ConfigError: a model cannot be used (check_models, check_token_ids), a teacher in use or a
            reward model does not share the student's vocabulary, or a teacher does not share its
            chat template; or as load_problems, check_lengths and tokenize.
        DataError: as load_problems, tokenize and prompt_cursor.
    """
    check_attention(settings, "cuda" if on_gpu(settings) else "cpu")
    check_models(settings)
    check_adapters(settings)
    check_own_models(settings)
    model = settings.model
    tokenizer = load_tokenizer(model.path, model.revision, eos=model.eos)
    teachers = check_teachers(settings, tokenizer)
    check_reward_models(settings.reward, tokenizer.get_vocab())
    templates = teacher_templates(settings, teachers)
    rows = head_rows(model.path, model.revision)
    kinds = {settings.evidence_kind(name) for name in settings.scored_teachers}
    if EvidenceKind.support in kinds and settings.algorithm.topk.k > rows:
        raise ConfigError(
            f"algorithm.topk.k={settings.algorithm.topk.k}: model.path={model.path} has "
            f"{rows} tokens; lower it"
        )
    train_problems, heldout_problems = load_problems(settings.data, settings.run.seed)
    check_lengths(settings, tokenizer, [*train_problems, *heldout_problems], templates)
    rollout = settings.rollout
    length = rollout.sequence_limit
    room = length - rollout.response_limit
    use_responses = settings.algorithm.data_fraction > 0
    check_responses(settings, train_problems)
    check_templates(settings, tokenizer, teachers, train_problems)
    check_end_of_turn(settings, tokenizer, train_problems)
    train_prompts, heldout_prompts = (
        tokenize(
            problems,
            tokenizer,
            settings.data,
            room,
            length,
            responses=use_responses,
            eos=None if model.eos is None else tokenizer.eos_token_id,
            teachers=templates,
        )
        for problems in (train_problems, heldout_problems)
    )
    prompt_cursor(train_prompts, settings.run.seed, settings.data.weights)  # refuses empty sources
    check_token_ids(settings, tokenizer, [*train_prompts, *heldout_prompts])
    check_served_teachers(settings, tokenizer, train_problems, train_prompts)
    return train_prompts, heldout_prompts


def check_responses(settings: RunSettings, problems: Sequence[Problem]) -> None:
    """Refuse data without the responses that algorithm.data_fraction needs: one per prompt, or a
    chosen and a rejected one.

    Raises:
        ConfigError: a problem has another number of responses; names the first by its row.
    """
    if not settings.algorithm.data_fraction:
        return
    needed = settings.algorithm.responses_per_prompt
    what = {1: "one response", 2: "a chosen and a rejected response"}[needed]
    option = {1: "solution", 2: "pair"}[needed]
    for problem in problems:
        if len(problem.responses) != needed:
            raise ConfigError(
                f"algorithm.data_fraction={settings.algorithm.data_fraction}: needs {what} for "
                f"each prompt, but {problem.row} has {len(problem.responses)}; give data that has "
                f"them, or on countdown +data.options.responses={option}"
            )
