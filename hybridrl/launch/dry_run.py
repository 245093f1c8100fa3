"""`hybridrl train --dry-run`: all checks that need no worker, and a description of the run."""

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError
from hybridrl.data.mixture import prompts_of
from hybridrl.data.problem import source_of
from hybridrl.data.route import takes
from hybridrl.launch.alignment import alignment
from hybridrl.launch.planning_device import planned_device
from hybridrl.launch.preparation import preflight
from hybridrl.launch.set_prompts import prompts_by_set
from hybridrl.models.arithmetic import with_arithmetic
from hybridrl.models.loading import load_tokenizer
from hybridrl.models.reach import reach
from hybridrl.planning.advice import advice_lines
from hybridrl.planning.fit import check_fit
from hybridrl.planning.plan import make_plan, plan_lines
from hybridrl.run_dir.directory import describe_directory, earlier_settings
from hybridrl.run_dir.inputs import digests, pinned
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt


def describe(settings: RunSettings) -> Iterator[str]:
    """Lines about the models, the data, a step, the run directory, the first prompt and the plan.

    Raises:
        HybridRLError: as `train` before it starts anything.
    """
    settings = pinned(settings, earlier_settings(settings))
    prompts, heldout, sets = preflight(settings)
    directory = describe_directory(
        settings, digests(settings, prompts, heldout, prompts_by_set(sets))
    )
    yield "all checks passed; nothing was started, and no run was changed"
    model = settings.model
    yield f"model     {model.path}, {model.dtype}; {reached('model.path', model)}"
    for name in settings.teachers_in_use:
        teacher = settings.teacher_model(name)
        key = f"teachers.{name}.path"
        own_class = settings.teachers[name].model
        if own_class is not None:
            yield f"teacher   {name}: {own_class}"
            continue
        if (url := settings.teachers[name].url) is not None:
            yield f"teacher   {name}: {redact.text(url)}; it answers"
            continue
        where = ", in an engine" if settings.teachers[name].engine is not None else ""
        if name in settings.shared_teachers:
            where = ", the learner without its adapters"
        yield f"teacher   {name}: {teacher.path}, {teacher.dtype}{where}; {reached(key, teacher)}"
    tokenizer = load_tokenizer(model.path, model.revision, eos=model.eos)
    yield f"ends      {'; '.join(alignment(settings, tokenizer))}"
    yield f"rewards   {', '.join(settings.reward.functions) or 'none'}"
    yield f"data      {len(prompts)} training prompts, {len(heldout)} held out; {lengths(prompts)}"
    yield from source_lines(settings, prompts, heldout)
    for held_out in sets:
        sizes = f"{len(held_out.prompts)} problems x {held_out.samples} responses"
        yield f"set       {held_out.name}: {sizes}; {lengths(held_out.prompts)}"
    yield f"a step    {step_sizes(settings, len(prompts))}"
    yield f"run.dir   {settings.run.dir}: {directory}"
    firsts = [prompts_of(prompts, name)[0] for name in settings.data.sources] or prompts[:1]
    for prompt in firsts:
        yield from first_prompt(tokenizer, prompt)
    yield ""
    yield from plan_of(settings)


def source_lines(
    settings: RunSettings, prompts: Sequence[Prompt], heldout: Sequence[Prompt]
) -> Iterator[str]:
    """A line about each of data.sources: its share of a step, its prompts, the passes over them,
    and the reward functions that judge the responses.
    """
    drawn = settings.train.steps * settings.train.prompts_per_step
    total = sum(settings.data.weights.values())
    for name, weight in settings.data.weights.items():
        own = prompts_of(prompts, name)
        functions = [
            function
            for function, judge in settings.reward.functions.items()
            if any(takes(judge.route, prompt.columns) for prompt in own)
        ]
        yield (
            f"  {name:<7} {weight / total:.1%} of a step (weight {weight:g}): {len(own)} training "
            f"prompts, passed over {drawn * weight / total / len(own):.3g} times, "
            f"{len(prompts_of(heldout, name))} held out; {lengths(own)}; judged by "
            f"{', '.join(functions) or 'no reward function'}"
        )


def plan_of(settings: RunSettings) -> Iterator[str]:
    """Lines about where each worker runs, what it holds and sends, and how long a step takes.

    Raises:
        ConfigError: after the last line, where a device cannot hold its workers; or as make_plan.
    """
    settings = with_arithmetic(settings, None)
    device, device_bytes = planned_device(settings)
    plan = make_plan(settings, device=device, device_bytes=device_bytes)
    yield from plan_lines(plan)
    yield from advice_lines(plan)
    if settings.cluster.check_memory:
        check_fit(plan)


def reached(key: str, model: ModelConfig) -> str:
    """Where the files of a model are, as a clause.

    Raises:
        ConfigError: they do not exist, or may not be downloaded with the user's token.
    """
    source = reach(model.path, model.revision)
    if not source.reached:
        raise ConfigError(f"{key}={model.path}: {source.text}")
    return source.text


def lengths(prompts: Sequence[Prompt]) -> str:
    """The lengths of the prompts, and of the data's responses if there are any.

    Example: "prompts of 9 to 14 tokens (median 12)".
    """
    text = f"prompts of {_span([len(p.input_ids) for p in prompts])}"
    responses = [len(response) for p in prompts for response in p.responses]
    return f"{text}, given responses of {_span(responses)}" if responses else text


def _span(counts: Sequence[int]) -> str:
    return f"{min(counts)} to {max(counts)} tokens (median {np.median(counts):g})"


def step_sizes(settings: RunSettings, num_prompts: int) -> str:
    """The size of a step and the passes over the data.

    Example: "96 prompts x 4 responses = 384; 250 steps pass over the data 1.2 times, once in 208.3
    steps".
    """
    train = settings.train
    per_epoch = num_prompts / train.prompts_per_step
    size = f"{train.prompts_per_step} prompts"
    if settings.algorithm.data_fraction < 1:
        rollouts = train.prompts_per_step * train.samples_per_prompt
        size += f" x {train.samples_per_prompt} responses = {rollouts}"
    if settings.data.sources:  # each has a line of its own
        return size
    return (
        f"{size}; {train.steps} steps pass over the data {train.steps / per_epoch:.3g} times, "
        f"once in {per_epoch:.4g} steps"
    )


def first_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Iterator[str]:
    """A prompt and its responses, decoded from the tokens that the models read."""
    source = source_of(prompt.uid)
    of = f" of {source}" if source else ""
    yield f"prompt 1{of}, {len(prompt.input_ids)} tokens as the model sees them:"
    yield str(tokenizer.decode(list(prompt.input_ids)))
    for name, ids in prompt.teacher_prompts.items():
        yield f"the same as teacher {name} sees it, {len(ids)} tokens:"
        yield str(tokenizer.decode(list(ids)))
    for number, response in enumerate(prompt.responses, 1):
        yield f"response {number} of the data, {len(response)} tokens:"
        yield str(tokenizer.decode(list(response)))
