"""Aligns a teacher with a student that has another end token or another chat template.

model.eos and teachers.NAME.eos name the end tokens; with teachers.NAME.chat_template=own a teacher
reads each conversation through its own template. Without these settings a difference is refused.
"""

from collections.abc import Iterator, Mapping

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import ConfigError
from hybridrl.data.chat import ChatTemplate
from hybridrl.settings.choices import TemplateOf
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.context import end_tokens


def check_ends(
    settings: RunSettings,
    student: PreTrainedTokenizerBase,
    name: str,
    source: str,
    teacher_eos: int | None,
) -> None:
    """Refuse a teacher that ends a response with another token than the student, unless
    teachers.NAME.eos aligns the two tokens.

    Args:
        student: the student's tokenizer, with model.eos as its end token.
        name: the teacher's name.
        source: the setting with the teacher's tokenizer, e.g. "teachers.main.path=/models/teacher".
        teacher_eos: the end token of the teacher's tokenizer, an id of the student's; None: none.

    Raises:
        ConfigError: the tokens differ; names both and the settings that align them. Or as
            end_tokens.
    """
    if settings.teachers[name].eos is not None:
        end_tokens(settings, name)
        return
    if teacher_eos == student.eos_token_id:
        return
    own = described(student, teacher_eos)
    remedy = (
        f"set teachers.{name}.eos to the token with which it ends a response"
        if teacher_eos is None
        else f"set model.eos={teacher_eos} to end the student's responses as the teacher's, or "
        f"teachers.{name}.eos={teacher_eos} to score the student's end token by the teacher's "
        "probability of its own end token"
    )
    raise ConfigError(
        f"{source}: its end token is {own}, that of model.path={settings.model.path} is "
        f"{described(student, student.eos_token_id)}, and a student cannot learn from it where to "
        f"stop; {remedy}"
    )


def described(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str:
    """A token for a message. Example: "'<eos>' (id 2)"."""
    if token_id is None:
        return "none"
    return f"{tokenizer.convert_ids_to_tokens(token_id)!r} (id {token_id})"


def check_begins(
    settings: RunSettings,
    student: PreTrainedTokenizerBase,
    name: str,
    source: str,
    teacher: PreTrainedTokenizerBase,
) -> None:
    """Refuse a teacher that begins a text with another token than the student, unless it reads
    prompts by its own chat template.

    Args:
        student, name, source: as in check_ends.
        teacher: the teacher's tokenizer.

    Raises:
        ConfigError: the tokens differ; names both and the setting that aligns them.
    """
    if teacher.bos_token_id == student.bos_token_id or reads_own_prompts(settings, name):
        return
    raise ConfigError(
        f"{source}: it begins a text with "
        f"{described(teacher, teacher.bos_token_id)}, model.path={settings.model.path} with "
        f"{described(student, student.bos_token_id)}; choose a teacher that begins it in the "
        f"same way, or set teachers.{name}.chat_template=own to have it read its own prompts"
    )


def reads_own_prompts(settings: RunSettings, name: str) -> bool:
    """Whether a teacher reads prompts by its own chat template."""
    return settings.teachers[name].chat_template is TemplateOf.own


def teacher_templates(
    settings: RunSettings, tokenizers: Mapping[str, PreTrainedTokenizerBase]
) -> dict[str, ChatTemplate]:
    """The chat template of each teacher in use that reads prompts by its own, by teacher.

    Args:
        tokenizers: those of the teachers that have a path, by name.

    Raises:
        ConfigError: a teacher has no chat template, or its template does not read an argument.
    """
    return {
        name: teacher_template(settings, name, tokenizers[name])
        for name in settings.teachers_in_use
        if reads_own_prompts(settings, name)
    }


def teacher_template(
    settings: RunSettings, name: str, tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate:
    """The chat template of a teacher that reads prompts by its own.

    Raises:
        ConfigError: it has none, or the template does not read an argument.
    """
    teacher = settings.teachers[name]
    path = f"teachers.{name}.path={teacher.path}"
    if not tokenizer.chat_template:
        raise ConfigError(
            f"teachers.{name}.chat_template=own: the tokenizer of {path} has no chat template; "
            f"set teachers.{name}.chat_template=student"
        )
    template = ChatTemplate(
        tokenizer,
        teacher.chat_template_kwargs,
        name=f"the chat template of {path}",
        section=f"teachers.{name}",
    )
    template.check_arguments()
    return template


def alignment(settings: RunSettings, student: PreTrainedTokenizerBase) -> Iterator[str]:
    """Clauses about the end tokens and the prompts of student and teachers.

    Example: "responses end with '<eos>' (id 2)", "teacher main's '<pad>' (id 0) counts for it",
    "teacher main reads prompts by its own chat template"

    Args:
        student: the student's tokenizer, with model.eos as its end token.
    """
    yield f"responses end with {described(student, student.eos_token_id)}"
    for name in settings.teachers_in_use:
        ends = end_tokens(settings, name)
        if ends is not None:
            yield f"teacher {name}'s {described(student, ends.teacher)} counts for it"
        if reads_own_prompts(settings, name):
            yield f"teacher {name} reads prompts by its own chat template"
