"""What the objective takes for granted of models, teachers and engines, checked instead of
believed.

Before anything starts: the folder of each model is whole and the model reads sequences as long as
the run's and every token of the data; each teacher has the student's tokens and special tokens, and
writes a conversation the same way. Before the first step: each scorer gives the same answer twice.
That the engines compute what the learner does is asked after every sync (controller.engine_probe).
That teachers score at the sampler's temperature holds by construction: both read
algorithm.temperature.
"""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError, ContractError, DataError
from hybridrl.data.chat import ChatTemplate, split_prefill
from hybridrl.data.conversation import Conversation, conversation, is_templated
from hybridrl.data.problem import Problem
from hybridrl.data.tokens import closed, encode
from hybridrl.launch.teacher_levels import teachers_to_measure
from hybridrl.models.limits import CPU_HEAD_SIZES, most_positions, unserved_head_size
from hybridrl.models.loading import (
    head_rows,
    is_on_hub,
    load_outline,
    load_tokenizer,
    model_config,
    stop_token_ids,
)
from hybridrl.objectives import make_objective
from hybridrl.runtime.calls import gather
from hybridrl.runtime.workers import Workers
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.route import takes
from hybridrl.types import Prompt, TokenScores

log = logging.getLogger(__name__)

SHOWN = 3  # differing tokens that an error names
PROBE_TOKENS = 8
PROBE_PROMPTS = 4


def models_in_use(settings: RunSettings) -> dict[str, tuple[str, str | None]]:
    """Path and revision of every model that a worker of this run loads, by the setting that names
    it.
    """
    models = {"model.path": (settings.model.path, settings.model.revision)}
    for name in settings.teachers_in_use:
        teacher = settings.teacher_model(name)
        models[settings.model_setting(name)] = (teacher.path, teacher.revision)
    for name, function in settings.reward.functions.items():
        if function.function == "reward_model":
            models[f"reward.functions.{name}.options.path"] = (function.options["path"], None)
    return models


def check_models(settings: RunSettings) -> None:
    """Refuse a model that could not be loaded whole, or not read what the run will give it. Reads
    no weights, only their headers.

    Raises:
        ConfigError: as load_outline; or the model has fewer positions than rollout.max_model_len,
            or is a reward model with fewer rows than the student, which could draw tokens that the
            reward model cannot read.
    """
    length = settings.rollout.max_model_len  # None: check_lengths refuses it, and proposes one
    rows = head_rows(settings.model.path, settings.model.revision)
    for setting, (path, revision) in models_in_use(settings).items():
        config = model_config(path, revision, setting=setting)
        if not is_on_hub(
            path
        ):  # weights from the hub are downloaded where they are used, and checked there
            load_outline(path, revision, setting=setting)
        if length is not None and length > (positions := most_positions(config)):
            raise ConfigError(
                f"rollout.max_model_len={length}: {setting}={path} reads at most {positions:g} "
                "tokens; lower it to that"
            )
        if (
            setting.startswith("reward.")
            and (its_rows := config.get_text_config().vocab_size) < rows
        ):
            raise ConfigError(
                f"{setting}={path}: has {its_rows} rows of embeddings, "
                f"model.path={settings.model.path} has {rows}, so the student could draw tokens "
                "that it cannot read; train the reward model from a model with as many rows"
            )


def check_engines(settings: RunSettings, device: str) -> None:
    """Refuse a model that an engine of this run would have to serve and cannot.

    Args:
        device: cpu or cuda, where the engines will run.

    Raises:
        ConfigError: the size of its attention heads is none that vLLM's CPU engine has a kernel
            for.
    """
    if device != "cpu":
        return
    served = {"model.path": settings.model}
    for name in {*teachers_to_measure(settings), *settings.teachers_in_use}:
        served[settings.model_setting(name)] = settings.teacher_model(name)
    for setting, model in served.items():
        size = unserved_head_size(model_config(model.path, model.revision, setting=setting))
        if size is not None:
            raise ConfigError(
                f"{setting}={model.path}: its attention heads have {size} numbers each, which the "
                "engine cannot serve on a CPU; choose a model with heads of "
                f"{', '.join(map(str, CPU_HEAD_SIZES))}, or run on a GPU"
            )


def check_token_ids(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Refuse data with a token that some model has no row of embeddings for.

    A tokenizer may have more tokens than its model has rows, as that of Gemma 3 has one for images:
    that does no harm as long as no prompt and no response contains one of them.

    Args:
        tokenizer: the student's.
        prompts: of training and of evaluation.

    Raises:
        ConfigError: names the token, the prompt and the model.
    """
    for setting, (path, revision) in models_in_use(settings).items():
        rows = model_config(path, revision, setting=setting).get_text_config().vocab_size
        size = max(tokenizer.get_vocab().values()) + 1
        if size <= rows:
            continue
        remedy = (
            "add rows to the model (resize_token_embeddings) and save it, or use the "
            "tokenizer that it was trained with"
        )
        lacking = (
            f"{setting}={path}: its tokenizer has {size} tokens and the model {rows} rows "
            "of embeddings"
        )
        if (end := tokenizer.eos_token_id) is not None and end >= rows:
            raise ConfigError(
                f"{lacking}, none for the end token {tokenizer.eos_token!r}; {remedy}"
            )
        for prompt in prompts:
            largest = max(max(ids) for ids in (prompt.input_ids, *prompt.responses))
            if largest >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise ConfigError(f"{lacking}, none for {token!r} in {prompt.uid}; {remedy}")
        log.warning("%s; no prompt contains one of the tokens without a row", lacking)


def check_teachers(
    settings: RunSettings, student: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    """Refuse a teacher in use whose distribution is not over the student's tokens. Rows that only
    pad its head do no harm.

    Pad tokens may differ: no padding reaches a model unmasked.

    Returns:
        the tokenizers of those with a path, by name.

    Raises:
        ConfigError: its tokenizer has other tokens, or begins or ends a text with another one; or
            its output head lacks rows.
    """
    tokenizers, model = {}, settings.model
    for name in settings.teachers_in_use:
        path, revision = settings.teachers[name].path, settings.teachers[name].revision
        if path is None:  # the student itself
            continue
        tokenizers[name] = load_tokenizer(path, revision, setting=f"teachers.{name}.path")
        if difference := different_tokens(student, tokenizers[name]):
            raise ConfigError(
                f"teachers.{name}.path={path}: its vocabulary differs from that of "
                f"model.path={model.path}: {difference}; log-probs of the same ids would speak of "
                "different tokens. Choose a teacher with the student's tokenizer"
            )
        rows, needed = head_rows(path, revision), head_rows(model.path, model.revision)
        if rows < needed and name in settings.scored_teachers:
            raise ConfigError(
                f"teachers.{name}.path={path}: its output head has {rows} rows, that of "
                f"model.path={model.path} has {needed}, so the student could draw tokens of which "
                "the teacher has no probability. Choose a teacher with at least as many rows"
            )
    return tokenizers


def different_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """How two tokenizers differ, in words; empty where they do not."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(
        (t for t in ours | theirs if ours.get(t) != theirs.get(t)),
        key=lambda t: (ours.get(t, len(ours)), t),
    )
    if differing:
        told = [
            f"{t!r} has id {theirs.get(t, 'none')}, here {ours.get(t, 'none')}"
            for t in differing[:SHOWN]
        ]
        return ", ".join(told) + (
            f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        )
    for kind in ("bos_token_id", "eos_token_id"):
        if getattr(student, kind) != getattr(teacher, kind):
            return f"its {kind} is {getattr(teacher, kind)}, here {getattr(student, kind)}"
    return ""


def check_templates(
    settings: RunSettings,
    student: PreTrainedTokenizerBase,
    teachers: dict[str, PreTrainedTokenizerBase],
    problems: Sequence[Problem],
) -> None:
    """Refuse a teacher that would write a conversation of the data in another way; one without a
    template has no way.

    The first conversation of each sequence of roles is compared, with tools and without. A template
    that the settings name counts for all models, so a teacher whose own one differs from it is only
    warned of.

    Raises:
        ConfigError: names the teacher and where the two texts part.
    """
    compared: dict[tuple[object, ...], Conversation] = {}
    for problem in problems:
        if is_templated(problem, settings.data):
            chat = conversation(problem, settings.data)
            roles = tuple(message["role"] for message in chat.messages)
            compared.setdefault((roles, bool(chat.tools)), chat)
    template = ChatTemplate.of(student, settings.data)
    file = settings.data.chat_template_file
    source = f"data.chat_template_file={file}" if file else f"model.path={settings.model.path}"
    for chat in compared.values():
        ours = chat.prompt_text(template)
        for name, teacher in teachers.items():
            if not teacher.chat_template:
                continue
            path = settings.teachers[name].path
            own = ChatTemplate(teacher, settings.data.chat_template_kwargs)
            try:
                theirs = chat.prompt_text(own)
                refusal = ""
            except DataError as error:
                theirs = ""
                refusal = str(error)
            if theirs == ours:
                continue
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                min(len(ours), len(theirs)),
            )
            difference = refusal or (
                f"its chat template writes {chat.row} otherwise: {theirs[at : at + 40]!r} where "
                f"{source} has {ours[at : at + 40]!r}"
            )
            if file is None:
                raise ConfigError(
                    f"teachers.{name}.path={path}: {difference}; give both folders the same chat "
                    "template, or name one for both by data.chat_template_file"
                )
            log.warning(
                "teachers.%s.path=%s: %s; it scores what data.chat_template_file writes",
                name,
                path,
                difference,
            )


def check_end_of_turn(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> None:
    """Warn where the chat template ends the assistant's turn with a token at which generation does
    not stop.

    A model that writes this token, as it learns to from given responses, would go on after its
    answer.

    Args:
        tokenizer: the student's.

    Raises:
        ConfigError: as stop_token_ids and ChatTemplate.of.
        DataError: as conversation.
    """
    problem = next((p for p in problems if is_templated(p, settings.data)), None)
    if problem is None:
        return
    template = ChatTemplate.of(tokenizer, settings.data)
    chat = conversation(problem, settings.data)
    before, _ = split_prefill(chat.messages)
    try:
        _, text = template.around_answer(before, chat.tools, chat.row, "")
    except DataError:  # a template that takes no answers shows no end of one
        return
    ids = encode(text, tokenizer, special_tokens=False)
    end = closed(ids, tokenizer, templated=True)[-1]
    model = settings.model
    stops = stop_token_ids(model.path, tokenizer, model.revision)
    if end is not None and end not in stops:
        log.warning(
            "%s ends the assistant's turn with %r, but generation with model.path=%s only stops "
            "at %s: responses run on to rollout.max_new_tokens; add %d to eos_token_id in the "
            "model's generation_config.json",
            template.name,
            tokenizer.decode([end]),
            model.path,
            ", ".join(repr(tokenizer.decode([stop])) for stop in sorted(stops)) or "no token",
            end,
        )


def check_running(settings: RunSettings, workers: Workers, prompts: Sequence[Prompt]) -> None:
    """Ask running scorers about responses to a few prompts. Costs one short generation and two
    scorings; what the engines compute is compared after every sync (controller.engine_probe).

    Raises:
        ContractError: a scorer gave two answers to the same batch.
    """
    asked = probe_prompts(settings, prompts)
    tokens = min(PROBE_TOKENS, settings.rollout.max_new_tokens)
    chunk, *_ = workers.rollout.probe(
        asked,
        num_tokens=tokens,
        temperature=0.0,
        support=make_objective(settings).needs.sampler_support,
    ).values()
    for scorer in workers.scorers:
        answers = [
            scorer.score([chunk] * scorer.group.size) for _ in range(2)
        ]  # one call per replica, twice
        once, again = (gather([scores for _, scores in answer]) for answer in answers)
        check_repeats(scorer.teacher, once, again)


def probe_prompts(settings: RunSettings, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first few prompts, and of each routed teacher the first that it is asked about."""
    routes = [settings.teachers[name].route for name in settings.scored_teachers]
    routed = [next((p for p in prompts if takes(route, p.columns)), prompts[0]) for route in routes]
    return list({p.uid: p for p in [*prompts[:PROBE_PROMPTS], *routed]}.values())


def check_repeats(teacher: str, once: Sequence[TokenScores], again: Sequence[TokenScores]) -> None:
    """Compare, bit by bit, two answers of each replica about the same batch.

    Raises:
        ContractError: names the first replica whose answers differ.
    """
    columns = ("logprobs", "rows", "support_ids")
    for replica, (a, b) in enumerate(zip(once, again, strict=True)):
        if any(getattr(a, column).tobytes() != getattr(b, column).tobytes() for column in columns):
            raise ContractError(
                f"scorer-{teacher}/{replica}: two scorings of the same batch differ, and a frozen "
                "teacher must be reproducible; look for a kernel or a device that is not "
                f"deterministic under teachers.{teacher}"
            )
