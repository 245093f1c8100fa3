"""Checks of what the objective assumes about models, teachers and engines.

Before anything starts: each model is complete, and can read sequences as long as the run's and
every token of the data; each teacher has the student's tokens and special tokens, and formats a
conversation in the same way. Before the first step: each scorer, or the learner where it scores,
gives the same answer twice.

That the engines compute the same as the learner is checked after every sync
(controller.engine_probe). Teachers score at the temperature of the sampler by construction: both
read algorithm.temperature.
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError, ContractError, DataError
from hybridrl.data.chat import ChatTemplate, split_prefill
from hybridrl.data.conversation import Conversation, conversation, is_templated
from hybridrl.data.problem import Problem
from hybridrl.data.route import takes
from hybridrl.data.tokens import closed, encode
from hybridrl.launch.alignment import check_begins, check_ends, reads_own_prompts
from hybridrl.models.adapters import check_peft, target_names
from hybridrl.models.limits import CPU_HEAD_SIZES, most_positions, unserved_head_size
from hybridrl.models.loading import (
    head_rows,
    is_on_hub,
    is_quantised,
    load_layout,
    load_outline,
    load_tokenizer,
    model_config,
    stop_token_ids,
)
from hybridrl.models.model_internals import shards_every_layer
from hybridrl.objectives import make_objective
from hybridrl.runtime.calls import gather
from hybridrl.runtime.residency import Phase
from hybridrl.runtime.workers import Workers
from hybridrl.settings.choices import Attention
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt, TokenScores

log = logging.getLogger(__name__)

SHOWN = 3  # differing tokens that an error names
PROBE_TOKENS = 8
PROBE_PROMPTS = 4
ENGINE_GAP = 0.05
"""nats; largest mean |difference| between the log-probs of two answers of an engine."""
ENGINE_REMEDY = f"{ENGINE_GAP:g}; look for a kernel of vLLM that is not deterministic"


def models_in_use(settings: RunSettings) -> dict[str, tuple[str, str | None]]:
    """(path, revision) of every model that a run uses, by the setting that names it."""
    models = {"model.path": (settings.model.path, settings.model.revision)}
    for name in settings.teachers_in_use:
        teacher = settings.teacher_model(name)
        models[settings.model_setting(name)] = (teacher.path, teacher.revision)
    for name, function in settings.reward.functions.items():
        if function.function == "reward_model":
            models[f"reward.functions.{name}.options.path"] = (function.options["path"], None)
    return models


def check_models(settings: RunSettings) -> None:
    """Refuse a model that is incomplete, or cannot read the sequences of the run.

    Only the headers of the weights are read. Quantised weights, which only the engine of a teacher
    reads, are not checked, since quantisation gives them other names and shapes.

    Raises:
        ConfigError: as load_outline; or the model has fewer positions than rollout.max_model_len;
            or a reward model has fewer rows of embeddings than the student, which could then sample
            tokens that the reward model cannot read.
    """
    length = settings.rollout.max_model_len  # None: check_lengths refuses it with a proposal
    rows = head_rows(settings.model.path, settings.model.revision)
    in_engines = {
        f"teachers.{name}.path"
        for name, teacher in settings.teachers.items()
        if teacher.engine is not None
    }
    for setting, (path, revision) in models_in_use(settings).items():
        config = check_model(
            setting, path, revision, length, weights_of_engine=setting in in_engines
        )
        model_rows = config.get_text_config().vocab_size
        if setting.startswith("reward.") and model_rows < rows:
            raise ConfigError(
                f"{setting}={path}: has {model_rows} rows of embeddings, "
                f"model.path={settings.model.path} has {rows}, so the student could draw tokens "
                "that it cannot read; train the reward model from a model with as many rows"
            )


def check_model(
    setting: str,
    path: str,
    revision: str | None,
    max_model_len: int | None,
    *,
    weights_of_engine: bool = False,
) -> PreTrainedConfig:
    """Refuse a model that is incomplete or has too few positions; returns its config.

    Args:
        setting: the setting that names the model.
        max_model_len: rollout.max_model_len; None: it is not known yet.
        weights_of_engine: only an engine reads the weights, so that they may be quantised.

    Raises:
        ConfigError: as check_models.
    """
    config = model_config(path, revision, setting=setting)
    # Weights from the hub are downloaded for their digests, and the workers check them.
    if not is_on_hub(path) and not (weights_of_engine and is_quantised(config)):
        load_outline(path, revision, setting=setting)
    if max_model_len is not None and max_model_len > (positions := most_positions(config)):
        raise ConfigError(
            f"rollout.max_model_len={max_model_len}: {setting}={path} reads at most {positions:g} "
            "tokens; lower it to that"
        )
    return config


def check_adapters(settings: RunSettings) -> None:
    """Refuse adapters where the library is missing, or for layers that the student does not have.

    Raises:
        ConfigError: as models.adapters.check_peft and target_names.
    """
    if settings.lora.rank is not None:
        check_peft()
        model = settings.model
        target_names(load_layout(model.path, model.revision, setting="model.path"), settings.lora)


def check_engines(settings: RunSettings, device: str) -> None:
    """Refuse a model that the engines of this run cannot serve.

    Args:
        device: the device on which the engines will run, cpu or cuda.

    Raises:
        ConfigError: vLLM's CPU engine has no kernel for the size of its attention heads.
    """
    if device != "cpu":
        return
    served = {"model.path": settings.model}
    for name in {*settings.measured_teachers, *settings.teachers_in_use}:
        served[settings.model_setting(name)] = settings.teacher_model(name)
    for setting, model in served.items():
        check_head_size(setting, model)


def check_head_size(setting: str, model: ModelConfig) -> None:
    """Refuse a model that an engine cannot serve on a CPU.

    Raises:
        ConfigError: as check_engines.
    """
    size = unserved_head_size(model_config(model.path, model.revision, setting=setting))
    if size is not None:
        raise ConfigError(
            f"{setting}={model.path}: its attention heads have {size} numbers each, which the "
            "engine cannot serve on a CPU; choose a model with heads of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}, or run on a GPU"
        )


def check_attention(settings: RunSettings, device: str) -> None:
    """Refuse model.attention=flash_attention_2 where its kernel does not run.

    Args:
        settings: those of the run, with auto replaced by a dtype.
        device: the device on which the models will run or are expected to run, cpu or cuda.

    Raises:
        ConfigError: the device is a CPU, the package flash-attn is missing, or a model computes in
            float32.
    """
    if settings.model.attention is not Attention.flash_attention_2:
        return
    if device == "cpu":
        raise ConfigError(
            "model.attention=flash_attention_2: needs GPUs, and the models run on CPUs; set "
            "model.attention=auto"
        )
    if find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention=flash_attention_2: needs the package flash-attn, which is not "
            "installed; pip install flash-attn --no-build-isolation, or set model.attention=sdpa"
        )
    dtypes = {"model.dtype": settings.model.dtype} | {
        f"teachers.{name}.dtype": settings.teacher_model(name).dtype
        for name in settings.teachers_in_use
    }
    for setting, dtype in dtypes.items():
        if dtype == "float32":
            raise ConfigError(
                f"{setting}=float32: model.attention=flash_attention_2 computes only in bfloat16; "
                "set it to bfloat16, or model.attention=sdpa"
            )


def check_token_ids(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> None:
    """Refuse data with a token for which one of the models has no row of embeddings.

    A tokenizer may have more tokens than its model has rows: that of Gemma 3 has one for images.
    That is harmless as long as no prompt and no response contains such a token.

    Args:
        tokenizer: the student's.
        prompts: those of training and of evaluation.

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
        deficit = (
            f"{setting}={path}: its tokenizer has {size} tokens and the model {rows} rows "
            "of embeddings"
        )
        if (end := tokenizer.eos_token_id) is not None and end >= rows:
            raise ConfigError(
                f"{deficit}, none for the end token {tokenizer.eos_token!r}; {remedy}"
            )
        teacher = setting.removeprefix("teachers.").removesuffix(".path")
        for prompt in prompts:
            read = prompt.teacher_prompts.get(teacher, prompt.input_ids)
            largest = max(max(ids) for ids in (read, *prompt.responses))
            if largest >= rows:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise ConfigError(f"{deficit}, none for {token!r} in {prompt.uid}; {remedy}")
        log.warning("%s; no prompt contains one of the tokens without a row", deficit)


def check_teachers(
    settings: RunSettings, student: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    """Refuse a teacher in use whose distribution is not over the student's tokens.

    Additional rows that pad its output head are harmless. Pad tokens may differ, as padding is
    always masked.

    Returns:
        The tokenizers of the teachers that have a path, by name.

    Raises:
        ConfigError: its tokenizer has other tokens; or begins or ends a text with another one, and
            no setting aligns them; or its output head has fewer rows than the student's.
    """
    tokenizers = {}
    model = settings.model
    for name in settings.scored_teachers:
        check_divisible(settings, name)
    for name in settings.teachers_in_use:
        path = settings.teachers[name].path
        revision = settings.teachers[name].revision
        source = f"teachers.{name}.path={path}"
        if path is None:  # the teacher is the student before training
            check_ends(settings, student, name, source, student.eos_token_id)
            continue
        tokenizers[name] = load_tokenizer(path, revision, setting=f"teachers.{name}.path")
        if difference := different_tokens(student, tokenizers[name]):
            raise ConfigError(
                f"teachers.{name}.path={path}: its vocabulary differs from that of "
                f"model.path={model.path}: {difference}; the same ids would stand for different "
                "tokens. Choose a teacher with the student's tokenizer"
            )
        check_begins(settings, student, name, source, tokenizers[name])
        check_ends(settings, student, name, source, tokenizers[name].eos_token_id)
        rows = head_rows(path, revision)
        needed = head_rows(model.path, model.revision)
        if rows < needed and name in settings.scored_teachers:
            raise ConfigError(
                f"teachers.{name}.path={path}: its output head has {rows} rows, that of "
                f"model.path={model.path} has {needed}, so the student could draw tokens for which "
                "the teacher has no probability. Choose a teacher with at least as many rows"
            )
    return tokenizers


def check_divisible(settings: RunSettings, teacher: str) -> None:
    """Refuse teachers.NAME.devices above 1 for a kind of model whose layers are not divided.

    Raises:
        ConfigError: transformers' plan does not name its layers.
    """
    devices = settings.teachers[teacher].devices
    if devices == 1:
        return
    model = settings.teacher_model(teacher)
    layout = load_layout(model.path, model.revision, setting=settings.model_setting(teacher))
    if not shards_every_layer(layout):
        raise ConfigError(
            f"teachers.{teacher}.devices={devices}: transformers has no plan for dividing the "
            f"layers of {type(layout).__name__}; set devices=1, or choose another teacher"
        )


def different_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> str:
    """The difference between two vocabularies, as a clause; empty if there is none."""
    student_ids = student.get_vocab()
    teacher_ids = teacher.get_vocab()
    differing = sorted(
        (t for t in student_ids | teacher_ids if student_ids.get(t) != teacher_ids.get(t)),
        key=lambda t: (student_ids.get(t, len(student_ids)), t),
    )
    shown = [
        f"{t!r} has id {teacher_ids.get(t, 'none')}, here {student_ids.get(t, 'none')}"
        for t in differing[:SHOWN]
    ]
    more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return ", ".join(shown) + more


def check_templates(
    settings: RunSettings,
    student: PreTrainedTokenizerBase,
    teachers: dict[str, PreTrainedTokenizerBase],
    problems: Sequence[Problem],
) -> None:
    """Refuse a teacher whose chat template formats a conversation of the data differently.

    The first conversation of each sequence of roles is compared, with tools and without. If
    data.chat_template_file is set, it is used for all models, so a different template of a teacher
    only causes a warning. A teacher without a template is accepted.

    Raises:
        ConfigError: names the teacher and the place where the two texts differ.
    """
    chats = first_conversations(settings, problems)
    template = ChatTemplate.of(student, settings.data)
    file = settings.data.chat_template_file
    source = f"data.chat_template_file={file}" if file else f"model.path={settings.model.path}"
    for chat in chats:
        text = chat.prompt_text(template)
        for name, teacher in teachers.items():
            if not teacher.chat_template or reads_own_prompts(settings, name):
                continue
            path = settings.teachers[name].path
            own_template = ChatTemplate(teacher, settings.data.chat_template_kwargs)
            difference = different_prompt(chat, own_template, text, source)
            if difference and file is None:
                raise ConfigError(
                    f"teachers.{name}.path={path}: {difference}; give both folders the same chat "
                    "template, name one for both by data.chat_template_file, or set "
                    f"teachers.{name}.chat_template=own to have the teacher read by its own"
                )
            if difference:
                log.warning(
                    "teachers.%s.path=%s: %s; it scores what data.chat_template_file writes",
                    name,
                    path,
                    difference,
                )


def first_conversations(settings: RunSettings, problems: Sequence[Problem]) -> list[Conversation]:
    """The first conversation of each sequence of roles in the data, with tools and without."""
    first: dict[tuple[object, ...], Conversation] = {}
    for problem in problems:
        if is_templated(problem, settings.data):
            chat = conversation(problem, settings.data)
            roles = tuple(message["role"] for message in chat.messages)
            first.setdefault((roles, bool(chat.tools)), chat)
    return list(first.values())


def different_prompt(chat: Conversation, template: ChatTemplate, text: str, source: str) -> str:
    """How a teacher's template formats a conversation differently, as a clause; empty if it does
    not.

    Args:
        template: the teacher's own.
        text: the prompt that the run uses.
        source: the setting with the template that wrote `text`.
    """
    try:
        own_text = chat.prompt_text(template)
    except DataError as error:
        return str(error)
    if own_text == text:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(text, own_text, strict=False)) if a != b),
        min(len(text), len(own_text)),
    )
    return (
        f"its chat template formats {chat.row} differently: {own_text[at : at + 40]!r} where "
        f"{source} has {text[at : at + 40]!r}"
    )


def check_end_of_turn(
    settings: RunSettings, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> None:
    """Warn if generation does not stop at the token that ends a turn in the chat template.

    A student that learns from the data's responses writes this token after its answer, and the
    engine would continue to sample. With model.eos nothing is checked: it names the token at which
    the engine stops and with which the data's responses end.

    Args:
        tokenizer: the student's.

    Raises:
        ConfigError: as stop_token_ids and ChatTemplate.of.
        DataError: as conversation.
    """
    problem = next((p for p in problems if is_templated(p, settings.data)), None)
    if problem is None or settings.model.eos is not None:
        return
    template = ChatTemplate.of(tokenizer, settings.data)
    chat = conversation(problem, settings.data)
    before, _ = split_prefill(chat.messages)
    try:
        _, text = template.around_answer(before, chat.tools, chat.row, "")
    except DataError:  # the template does not format answers, so its end of a turn is unknown
        return
    ids = encode(text, tokenizer, special_tokens=False)
    end = closed(ids, tokenizer, templated=True)[-1]
    model = settings.model
    stops = stop_token_ids(model.path, tokenizer, model.revision)
    if end is not None and end not in stops:
        log.warning(
            "%s ends the assistant's turn with %r, but generation with model.path=%s only stops "
            "at %s: responses run on to rollout.max_new_tokens; set model.eos=%d",
            template.name,
            tokenizer.decode([end]),
            model.path,
            ", ".join(repr(tokenizer.decode([stop])) for stop in sorted(stops)) or "no token",
            end,
        )


def check_running(settings: RunSettings, workers: Workers, prompts: Sequence[Prompt]) -> None:
    """Let each running scorer score the responses to a few prompts twice, and compare; likewise the
    learner where it scores.

    It costs one short generation and two scorings.

    Raises:
        ContractError: one of them gave two different answers for the same batch.
    """
    max_new_tokens = settings.rollout.max_new_tokens
    assert max_new_tokens is not None, "check_lengths refuses it"
    workers.enter(Phase.sample)
    chunk, *_ = workers.rollout.probe(
        probe_prompts(settings, prompts),
        num_tokens=min(PROBE_TOKENS, max_new_tokens),
        temperature=0.0,
        support=make_objective(settings).needs.sampler_support,
    ).values()
    for scorer in workers.scorers:
        # Each replica gets the same chunk, twice.
        answers = [scorer.score([chunk] * scorer.replicas) for _ in range(2)]
        gather([follower for answer in answers for call in answer for follower in call.followers])
        first, second = (gather([call.scores for call in answer]) for answer in answers)
        teacher = settings.teachers[scorer.teacher]
        if teacher.url is not None:
            limit = f"teachers.{scorer.teacher}.served.max_gap={teacher.served.max_gap:g}"
            remedy = "look for a model that changes on the server, or raise it"
            check_gaps(scorer.teacher, first, second, teacher.served.max_gap, f"{limit}; {remedy}")
        elif teacher.engine is not None:
            check_gaps(scorer.teacher, first, second, ENGINE_GAP, ENGINE_REMEDY)
        else:
            check_repeats(scorer.teacher, first, second)
    if settings.shared_teachers:
        of_ranks = [workers.learner.shared_scores(chunk) for _ in range(2)]
        for i, name in enumerate(settings.shared_teachers):
            first, second = ([scores[i] for scores in answer] for answer in of_ranks)
            check_repeats(name, first, second, scorer="learner")


def probe_prompts(settings: RunSettings, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompts, and for each routed teacher the first prompt that it scores."""
    routes = [settings.teachers[name].route for name in settings.scored_teachers]
    routed = [next((p for p in prompts if takes(route, p.columns)), prompts[0]) for route in routes]
    return list({p.uid: p for p in [*prompts[:PROBE_PROMPTS], *routed]}.values())


def check_repeats(
    teacher: str,
    first: Sequence[TokenScores],
    second: Sequence[TokenScores],
    scorer: str | None = None,
) -> None:
    """Compare the two answers of each replica for the same batch, bit by bit.

    Args:
        scorer: the name of the workers that answered; None: the teacher's own scorers.

    Raises:
        ContractError: names the first replica whose answers differ.
    """
    columns = ("logprobs", "rows", "support_ids")
    name = scorer or f"scorer-{teacher}"
    for replica, (a, b) in enumerate(zip(first, second, strict=True)):
        if any(getattr(a, column).tobytes() != getattr(b, column).tobytes() for column in columns):
            raise ContractError(
                f"{name}/{replica}: two scorings of the same batch differ, and a frozen "
                "teacher must be reproducible; look for a kernel or a device that is not "
                f"deterministic under teachers.{teacher}"
            )


def check_gaps(
    teacher: str,
    first: Sequence[TokenScores],
    second: Sequence[TokenScores],
    max_gap: float,
    limit: str,
) -> None:
    """Compare the drawn tokens' log-probs in two answers of each replica, for a teacher on a server
    or in an engine, where the batches of the two answers may differ.

    Args:
        max_gap: the largest mean |difference| over the tokens, in nats.
        limit: `max_gap` and the remedy, as the error states them.

    Raises:
        ContractError: names the first replica whose answers differ by more than `max_gap` nats.
    """
    for replica, (a, b) in enumerate(zip(first, second, strict=True)):
        scored = a.logprobs != 0
        gap = float(abs(a.logprobs - b.logprobs)[scored].mean()) if scored.any() else 0.0
        if gap > max_gap:
            raise ContractError(
                f"scorer-{teacher}/{replica}: two scorings of the same batch differ by {gap:.3g} "
                f"nats a token, above {limit}"
            )
