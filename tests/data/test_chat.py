"""Chat templates in the forms that models ship: the model reads and learns all texts of a row, or
there is an error.
"""

import json
import logging
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.marks import Marks
from hybridrl.data.problem import Problem
from hybridrl.data.prompts import tokenize
from hybridrl.data.records import load
from hybridrl.settings.run import DataConfig
from hybridrl.types import Prompt

# -- templates -------------------------------------------------------------------------------------

CHATML = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content | trim }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'user' %}[INST] {{ m.content }}[/INST]
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}
  {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
  {%- endif %}
{%- endfor %}"""

QWEN3 = """\
{%- if tools %}<|im_start|>system
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}
  {%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if '</think>' in content and not reasoning %}
      {%- set reasoning = content.split('</think>')[0].rstrip('\\n') %}
      {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last %}{{ '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}{% endif %}
    {{- content }}
    {%- for call in m.tool_calls %}
      {%- set f = call.function or call %}
      {{- '<tool_call>{"name": "' + f.name + '", "arguments": ' }}
      {{- f.arguments if f.arguments is string and quote is not defined else f.arguments | tojson }}
      {{- '}</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif m.role in ('user', 'system') %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
  {%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

OPENS_THINK = QWEN3.replace(
    "{{ '<|im_start|>assistant\\n' }}\n  {%- if enable",
    "{{ '<|im_start|>assistant\\n<think>\\n' }}\n  {%- if enable",
)
"""Later models of the family begin every assistant turn with <think>."""

R1 = """\
{{- bos_token }}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
  {%- elif m.role == 'assistant' %}
    {{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

R1_UNCUT = R1.replace(".split('</think>')[-1]", "")

SHORT_THINK = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ '<think></think>' if m.role == 'assistant' and '</think>' not in m.content }}
{{- m.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
"""This template opens a turn with <think> and a line break, but writes <think> without one."""

ENDS_TWICE = """\
{%- for m in messages %}
  {%- if m.role == 'assistant' %}<|assistant|>{% endif %}{{ m.content }}<|im_end|>{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"""
"""This template ends a turn with one token, and the conversation with another one."""

SPLITS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"

ROLELESS = "{% for m in messages %}{{ m.content }}|{% endfor %}"

USERS_ONLY = (
    "{% for m in messages if m.role == 'user' or m.role == 'assistant' %}{{ m.content "
    "}}|{% endfor %}"
)

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
)


def make_tokenizer(template: str | None, *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character and some special ones; it puts <s> before plain
    text.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: str) -> dict[str, Any]:
    return turn("user", content)


def bot(content: str, **more: Any) -> dict[str, Any]:
    return turn("assistant", content, **more)


def one(
    template: str | None,
    prompt: object,
    *responses: object,
    tools: tuple[dict[str, Any], ...] = (),
    eos: str = "</s>",
    tokenizer: PreTrainedTokenizerFast | None = None,
    **settings: Any,
) -> tuple[str, ...]:
    """The prompt and the responses, decoded from their tokens."""
    problem = Problem(
        uid="train-000003",
        prompt=prompt,  # type: ignore[arg-type]
        columns={},
        row="train.jsonl:3",
        responses=responses,  # type: ignore[arg-type]
        tools=tools,
    )
    tokenizer = tokenizer or make_tokenizer(template, eos=eos)
    (result,) = tokenize([problem], tokenizer, DataConfig(**settings), 10_000)
    return decoded(result, tokenizer)


def decoded(prompt: Prompt, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    sequences = (prompt.input_ids, *prompt.responses)
    return tuple(str(tokenizer.decode(list(ids))) for ids in sequences)


def refusal(template: str | None, prompt: object, *responses: object, **settings: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        one(template, prompt, *responses, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the response is what follows the prompt -------------------------------------------------------

OPENED = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
THOUGHT = "<think>a</think>4"


@pytest.mark.parametrize(
    ("template", "response", "prompt_text", "response_text"),
    [
        (CHATML, "4", OPENED, "4<|im_end|>"),
        (CHATML, THOUGHT, OPENED, "<think>a</think>4<|im_end|>"),
        (CHATML, "", OPENED, "<|im_end|>"),
        (LLAMA3, " 4\n", "<s><|user|>1+1?<|im_end|><|assistant|>", "4<|im_end|>"),
        (MISTRAL, "4", "<s>[INST] 1+1?[/INST]", " 4</s>"),
        (QWEN3, THOUGHT, OPENED, "<think>\na\n</think>\n\n4<|im_end|>"),
        (QWEN3, "<think>\na\n</think>\n\n4", OPENED, "<think>\na\n</think>\n\n4<|im_end|>"),
        (QWEN3, "4", OPENED, "<think>\n\n</think>\n\n4<|im_end|>"),
        (OPENS_THINK, THOUGHT, OPENED + "<think>\n", "a\n</think>\n\n4<|im_end|>"),
        (OPENS_THINK, "a</think>4", OPENED + "<think>\n", "a\n</think>\n\n4<|im_end|>"),
        (R1_UNCUT, THOUGHT, "<s><|user|>1+1?<|assistant|><think>\n", "a</think>4</s>"),
        (
            R1_UNCUT,
            "<think>\na</think>4",
            "<s><|user|>1+1?<|assistant|><think>\n",
            "a</think>4</s>",
        ),
        (R1, THOUGHT, "<s><|user|>1+1?<|assistant|><think>\n", "a</think>4</s>"),
        (R1, "a</think>4", "<s><|user|>1+1?<|assistant|><think>\n", "a</think>4</s>"),
        (SHORT_THINK, "4", OPENED + "<think>\n", "</think>4<|im_end|>"),
        (SHORT_THINK, THOUGHT, OPENED + "<think>\n", "a</think>4<|im_end|>"),
        (ENDS_TWICE, "4", "1+1?<|im_end|>\n<|assistant|>", "4<|im_end|>"),
        (ROLELESS, "4", "1+1?|", "4|</s>"),
    ],
)
def test_a_response_is_what_the_template_writes_after_the_prompt(
    template: str, response: str, prompt_text: str, response_text: str
) -> None:
    assert one(template, [user("1+1?")], response) == (prompt_text, response_text)


def test_responses_that_do_not_close_the_templates_opening_tag_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert one(R1, [user("1+1?")], "4", "a</think>4")[1] == "4</s>"
    warning = "<think>, which 1 given responses do not close, that of train.jsonl:3 first"
    assert warning in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        one(R1, [user("1+1?")], THOUGHT)
        one(SHORT_THINK, [user("1+1?")], "4")
        one(R1, [user("1+1?")])
    assert not caplog.records


def test_a_template_that_omits_the_thinking_of_a_response_is_refused() -> None:
    message = refusal(SPLITS, [user("1")], THOUGHT)
    assert message.startswith(
        "train.jsonl:3: the model's chat template leaves out the content of the response, role "
        "`assistant`"
    )
    assert one(SPLITS, [user("1")], "4") == ("1</s>", "4</s>")


def test_a_pair_of_responses_that_differ_only_in_their_thinking_stays_different() -> None:
    _, chosen, rejected = one(QWEN3, [user("1")], THOUGHT, "<think>b</think>4")
    assert chosen == "<think>\na\n</think>\n\n4<|im_end|>"
    assert rejected == "<think>\nb\n</think>\n\n4<|im_end|>"
    assert "leaves out" in refusal(SPLITS, [user("1")], THOUGHT, "<think>b</think>4")


def test_a_response_that_thinks_after_the_template_has_closed_the_thinking_is_refused() -> None:
    off = {"enable_thinking": False}
    message = refusal(QWEN3, [user("1")], THOUGHT, chat_template_kwargs=off)
    assert "opens the assistant's turn with" in message and "<think> once more" in message
    empty = "<think>\n\n</think>\n\n4"
    prompt, response = one(QWEN3, [user("1")], empty, chat_template_kwargs=off)
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert response == "4<|im_end|>"


def test_a_tag_that_the_template_opened_is_not_mistaken_for_one_that_a_user_wrote() -> None:
    assert one(ROLELESS.replace("|", ""), [user("Fill <b>")], "<b>4") == ("Fill <b>", "<b>4</s>")
    assert one(CHATML, [user("Use <b>.")], "<b>4</b><b>5</b>")[1] == "<b>4</b><b>5</b><|im_end|>"


# -- a prompt is complete --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "missing"),
    [
        (USERS_ONLY, [turn("system", "1"), user("12")], "message 1, role `system`: '1'"),
        (USERS_ONLY, [user("a"), bot("b"), turn("tool", "a")], "message 3, role `tool`: 'a'"),
        (
            USERS_ONLY,
            [turn("User", "1")],
            "chat templates do not know the role `User`; write `user`",
        ),
        (QWEN3, [turn("human", "1")], "message 1, role `human`: '1'"),
        (QWEN3, [turn("critic", "user"), user("1")], "message 1, role `critic`: 'user'"),
        (R1, [turn("system", "Be brief."), user("1")], "message 1, role `system`: 'Be brief.'"),
        (MISTRAL, [turn("system", "1"), user("2")], "Only user and assistant roles"),
        ("{{ messages[-1].content }}", [user("1"), bot("2"), user("3")], "message 1, role `user`"),
        ("{{ messages[0].content[:5] }}", [user("123456")], "message 1, role `user`: '123456'"),
        ("{% for m in messages %}{{ m.content.upper() }}{% endfor %}", [user("abc")], "'abc'"),
        (
            "{% for m in messages %}{{ m.content.replace(' ', '') }}{% endfor %}",
            [user("a b")],
            "'a b'",
        ),
        ("{{ messages[0].content.split('<b>')[0] }}", [user("1 <b>2</b> 3")], "'1 <b>2</b> 3'"),
        ("", [user("1")], "no chat template"),
        ("{# nothing #}", [user("1")], "message 1, role `user`: '1'"),
    ],
)
def test_a_text_that_a_template_omits_from_a_prompt_is_named(
    template: str, messages: list[dict[str, Any]], missing: str
) -> None:
    message = refusal(template, messages)
    assert missing in message and message.startswith("train.jsonl:3: ")


def test_a_dropped_system_prompt_and_a_users_own_template_are_named(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(USERS_ONLY)
    settings = {"system_prompt": "Think.", "chat_template_file": str(file), "chat_template": True}
    message = refusal(CHATML, "1", **settings)
    reason = f"data.chat_template_file={file} leaves out the content of message 1, role `system`"
    assert reason in message


def test_a_template_may_strip_a_text_or_escape_it_as_json() -> None:
    assert one(LLAMA3, [user("  1 \n")])[0] == "<s><|user|>1<|im_end|><|assistant|>"
    template = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}"
    assert one(template, [user('say "1"\n2')])[0] == '"say \\"1\\"\\n2"'


def test_a_template_that_depends_on_its_texts_is_checked_too() -> None:
    only_1 = (
        "{% for m in messages %}{% if m.content == '1' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert one(only_1, [user("1")])[0] == "1"
    assert "leaves out" in refusal(only_1, [user("1"), bot("2"), user("3")])


def test_earlier_turns_may_omit_their_thinking_and_nothing_else() -> None:
    messages = [user("1"), bot("<think>a</think>2"), user("3")]
    prompt, response = one(QWEN3, messages, "<think>b</think>4")
    assert prompt == (
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert response == "<think>\nb\n</think>\n\n4<|im_end|>"
    assert one(QWEN3, [user("1"), bot("2", reasoning_content="a"), user("3")])[0] == prompt
    omits = CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)")
    assert "message 2, role `assistant`: '2'" in refusal(omits, messages)


def test_marks_are_inside_of_the_outer_tags_and_white_space() -> None:
    marks = Marks()
    texts = [" 1\n", "<think>a</think>4", "<b> 1 </b>", "1<b>2</b>", "<b></b>", "", "[INST] 1"]
    marked = [marks.around(text, "") for text in texts]
    shown = ["".join("M" if ord(c) >= 0xF0000 else c for c in text) for text in marked]
    assert shown == [
        " M1M\n",
        "<think>Ma</think>4M",
        "<b> M1M </b>",
        "M1<b>2M</b>",
        "<b></b>",
        "",
        "[INST] M1M",
    ]


# -- tool calls, thinking, tools -------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
CALLED = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</tool_call>'
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[Problem]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(str(path), "train")


def test_a_tool_call_and_thinking_under_its_own_key_are_trained_on(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        {"messages": [user("1"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [user("1"), bot("4", reasoning_content="a", tool_calls=None)]},
        {"prompt": "1", "completion": [bot("", tool_calls=[CALL], reasoning_content="a")]},
    )
    tokenizer = make_tokenizer(QWEN3)
    prompts = tokenize(rows, tokenizer, DataConfig(chat_template=True), 10_000)
    assert [decoded(prompt, tokenizer)[1] for prompt in prompts] == [
        f"<think>\n\n</think>\n\n{CALLED}<|im_end|>",
        "<think>\na\n</think>\n\n4<|im_end|>",
        f"<think>\na\n</think>\n\n{CALLED}<|im_end|>",
    ]
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*leaves out the name in a tool call of the"
    ):
        tokenize(rows, make_tokenizer(CHATML), DataConfig(chat_template=True), 10_000)
    with pytest.raises(
        DataError, match=r"`reasoning_content` of the response, role `assistant`: 'a'"
    ):
        tokenize(rows[1:], make_tokenizer(CHATML), DataConfig(chat_template=True), 10_000)
    with pytest.raises(
        DataError, match=r"rows.jsonl:3: the response holds `reasoning_content`.*=true"
    ):
        tokenize(rows[2:], tokenizer, DataConfig(), 10_000)


def test_arguments_that_are_json_text_are_not_quoted_twice() -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1, "b": "x"}'}}
    assert CALLED in one(QWEN3, [user("1")], bot("", tool_calls=[call]))[1]
    message = refusal(
        QWEN3, [user("1")], bot("", tool_calls=[call]), chat_template_kwargs={"quote": True}
    )
    assert "the arguments in a tool call of the response" in message


def test_a_completion_of_several_messages_follows_the_rows_prompt(tmp_path: Path) -> None:
    turns = [bot("2"), user("3"), bot("4")]
    continued, complete, pair = rows_of(
        tmp_path,
        {"prompt": "1", "completion": turns},
        {"prompt": [user("1")], "completion": [user("1"), *turns]},
        {"prompt": [user("1")], "chosen": turns, "rejected": [*turns[:-1], bot("5")]},
    )
    assert [p.prompt for p in (continued, complete, pair)] == [[user("1"), bot("2"), user("3")]] * 3
    assert (continued.responses, pair.responses) == (("4",), ("4", "5"))
    for row in (
        {"prompt": "1", "completion": [user("2"), bot("3")]},
        {"prompt": [turn("system", "0")], "chosen": [user("1"), bot("2")], "rejected": "3"},
        {"prompt": "0", "messages": [user("1"), bot("2")]},
    ):
        with pytest.raises(
            DataError, match=r"rows.jsonl:1: .*conversation that does not contain `prom"
        ):
            rows_of(tmp_path, row)


def test_the_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    for tools in ([TOOL], json.dumps([TOOL])):
        (row,) = rows_of(tmp_path, {"prompt": [user("1")], "tools": tools})
        prompt = one(QWEN3, row.prompt, tools=row.tools)[0]
        assert f"<|im_start|>system\n{json.dumps(TOOL)}<|im_end|>" in prompt
        message = refusal(CHATML, row.prompt, tools=row.tools)
        assert "leaves out the name of a tool in `tools`: 'add'" in message
    assert "`tools` can only be written by a chat template" in refusal(QWEN3, "1", tools=row.tools)
    for malformed in ("hammer", {"a": 1}, ["hammer"]):
        with pytest.raises(DataError, match=r"rows.jsonl:1: `tools` "):
            rows_of(tmp_path, {"prompt": "1", "tools": malformed})
    empty, absent = rows_of(tmp_path, {"prompt": "1", "tools": []}, {"prompt": "1"})
    assert empty.tools == absent.tools == ()


def test_a_malformed_tool_call_is_named(tmp_path: Path) -> None:
    malformed: tuple[object, ...] = (
        "add",
        [{"function": "add"}],
        [{"function": {"arguments": {}}}],
        [1],
    )
    for calls in malformed:
        with pytest.raises(
            DataError, match=r"rows.jsonl:1: `messages`: `tool_calls` must be a list"
        ):
            rows_of(tmp_path, {"messages": [user("1"), bot("", tool_calls=calls)]})


# -- special tokens --------------------------------------------------------------------------------


def test_the_first_token_is_not_repeated_if_text_and_tokenizer_both_have_it() -> None:
    assert one(None, "<s>1", "2") == ("<s>1", "2</s>")
    assert one(None, "1", "2") == ("<s>1", "2</s>")
    assert one(LLAMA3, [user("1")])[0].count("<s>") == 1


def test_an_end_token_of_the_tokenizer_is_removed_from_prompts_and_not_repeated() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("1").input_ids[-1] == 2
    assert one(None, "1", "2", "", tokenizer=tokenizer) == ("<s>1", "2</s>", "</s>")


@pytest.mark.parametrize("response", ["4", "4</s>", "4</s></s>"])
def test_an_end_token_in_the_data_is_not_repeated(response: str) -> None:
    assert one(None, "1", response)[1] == "4</s>"
    assert one(MISTRAL, [user("1")], response)[1] == " 4</s>"


@pytest.mark.parametrize(
    ("template", "response"),
    [(None, "4</s>5"), (MISTRAL, "4</s>5"), (CHATML, "4<|im_end|>5"), (CHATML, "4</s>5")],
)
def test_an_end_token_within_a_response_is_refused(template: str | None, response: str) -> None:
    prompt = [user("1")] if template else "1"
    assert "before its end" in refusal(template, prompt, response)


# -- a prompt that ends with the assistant ---------------------------------------------------------


def test_a_prompt_that_ends_with_the_assistant_is_continued() -> None:
    prefilled = [user("1+1?"), bot("It is")]
    assert one(CHATML, prefilled, " 4") == (OPENED + "It is", " 4<|im_end|>")
    assert one(MISTRAL, prefilled, " 4") == ("<s>[INST] 1+1?[/INST] It is", " 4</s>")
    assert one(CHATML, prefilled) == (OPENED + "It is",)
    unthinking = OPENED + "<think>\n\n</think>\n\nIt is"
    assert one(QWEN3, prefilled, " 4") == (unthinking, " 4<|im_end|>")
    thinks = [user("1+1?"), bot("<think>\nIt is")]
    thought = (OPENED + "<think>\nIt is", " 2\n</think>\n\n4<|im_end|>")
    assert one(QWEN3, thinks, " 2</think>4") == thought
    assert one(OPENS_THINK, thinks, " 2</think>4")[0] == OPENED + "<think>\nIt is"
    assert one(OPENS_THINK, thinks, " 2</think>4")[1].startswith(" 2")


def test_a_prompt_that_ends_with_a_tool_call_or_with_thinking_cannot_be_continued() -> None:
    assert "cannot be continued" in refusal(QWEN3, [user("1"), bot("2", reasoning_content="a")])
    assert "cannot be continued" in refusal(QWEN3, [user("1"), bot("", tool_calls=[CALL])])
    assert "cannot be continued" in refusal(QWEN3, [bot("1")])


# -- system prompt and instruction -----------------------------------------------------------------


def test_a_second_system_message_is_refused() -> None:
    for role in ("system", "developer"):
        message = refusal(CHATML, [turn(role, "1"), user("2")], system_prompt="0")
        assert "data.system_prompt='0': train.jsonl:3 has a system message of its own" in message
    assert one(CHATML, [user("2")], system_prompt="0")[0].startswith("<|im_start|>system\n0<|")


def test_the_instruction_is_put_around_the_text_of_a_user() -> None:
    wrapped: dict[str, Any] = {"instruction": "Q: {prompt}"}
    assert "user\nQ: 1<|" in one(CHATML, [user("1"), bot("2")], **wrapped)[0]
    messages = [user("1"), bot("", tool_calls=[CALL]), turn("tool", "2")]
    prompt = one(QWEN3, messages, **wrapped)[0]
    assert "user\nQ: 1<|" in prompt and "user\n2<|" in prompt
    assert "no user message" in refusal(CHATML, [turn("system", "1")], **wrapped)


# -- settings of the template ----------------------------------------------------------------------


def test_arguments_reach_the_template_and_one_that_it_does_not_read_is_refused() -> None:
    off = {"enable_thinking": False}
    assert one(QWEN3, [user("1")], chat_template_kwargs=off)[0].endswith("</think>\n\n")
    reason = "data.chat_template_kwargs.enable_thinkng: the model's chat template does not read"
    misspelt = {"enable_thinkng": False}
    assert reason in refusal(QWEN3, [user("1")], chat_template_kwargs=misspelt)
    for name in ("messages", "tools", "add_generation_prompt", "tokenize", "max_length"):
        message = refusal(QWEN3, [user("1")], chat_template_kwargs={name: 1})
        assert "is set by hybridrl itself" in message


def test_a_template_file_replaces_the_models_template(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(MISTRAL)
    own: dict[str, Any] = {"chat_template_file": str(file)}
    assert one(CHATML, [user("1")], "2", **own) == ("<s>[INST] 1[/INST]", " 2</s>")
    assert one(None, "1", chat_template=True, **own) == ("<s>[INST] 1[/INST]",)
    file.write_bytes(b"\xff")
    assert f"data.chat_template_file={file}: cannot be read" in refusal(CHATML, [user("1")], **own)
    file.write_text(" ")
    assert "is empty" in refusal(CHATML, [user("1")], **own)


@pytest.mark.parametrize(
    "setting",
    [{"chat_template_kwargs": {"a": 1}}, {"chat_template_file": "a"}, {"system_prompt": "a"}],
)
def test_a_setting_of_the_template_is_refused_where_no_template_is_used(
    setting: dict[str, Any],
) -> None:
    assert f"data.{next(iter(setting))}: only has an effect" in refusal(CHATML, "1", **setting)
