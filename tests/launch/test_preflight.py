"""The checks of teachers and engines before the start: tokens, templates, reproducibility."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hybridrl.core.errors import ConfigError, ContractError
from hybridrl.launch.preflight import check_repeats, different_tokens, probe_prompts
from hybridrl.launch.preparation import preflight, prepare_prompts
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.settings.compose import load_config
from hybridrl.types import Prompt, TokenScores
from tests.support.graph import tiny_settings

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def permuted() -> PreTrainedTokenizerBase:
    """The tiny tokenizer with the ids of "1" and "2" exchanged, so that its size is unchanged."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def ended_otherwise() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


def padded_otherwise() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    return tokenizer


def templated(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def prepare(
    folder: Path, teacher: PreTrainedTokenizerBase, *overrides: str, template: str | None = None
) -> list[Prompt]:
    settings = tiny_settings(folder, *overrides)
    if template:
        templated(template).save_pretrained(settings.model.path)
    assert settings.teachers["main"].path
    teacher.save_pretrained(settings.teachers["main"].path)
    return prepare_prompts(settings)[0]


def refusal(
    folder: Path, teacher: PreTrainedTokenizerBase, *overrides: str, template: str | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(folder, teacher, *overrides, template=template)
    message = str(caught.value)
    assert message.startswith(f"teachers.main.path={folder / 'teacher'}: ") and "\n" not in message
    return message


# -- tokens ----------------------------------------------------------------------------------------


def test_a_permuted_vocabulary_of_the_same_size_is_refused_and_the_tokens_are_named(tmp_path: Path):
    vocabulary = tiny_tokenizer().get_vocab()
    expected = (
        f"'1' has id {vocabulary['2']}, here {vocabulary['1']}, "
        f"'2' has id {vocabulary['1']}, here {vocabulary['2']}; "
    )
    assert expected in refusal(tmp_path, permuted())


def test_many_differing_tokens_are_counted():
    teacher = tiny_tokenizer()
    teacher.add_tokens(["aa", "bb", "cc", "dd", "ee"])
    size = len(tiny_tokenizer())
    expected = (
        f"'aa' has id {size}, here none, 'bb' has id {size + 1}, here none, 'cc' has id "
        f"{size + 2}, here none, and 2 more"
    )
    assert different_tokens(tiny_tokenizer(), teacher) == expected


def test_another_end_token_is_refused_and_another_pad_token_is_not(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    assert (
        f"its end token is '<pad>' (id {tokenizer.pad_token_id}), that of model.path={tmp_path}/"
        f"student is '<eos>' (id {tokenizer.eos_token_id}), and"
    ) in refusal(tmp_path, ended_otherwise())
    assert len(prepare(tmp_path, padded_otherwise())) == 64


def test_a_head_padded_by_128_rows_is_tolerated(tmp_path: Path):
    settings = tiny_settings(tmp_path)
    teacher = settings.teachers["main"].path
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(model.config.vocab_size + 128)
    model.save_pretrained(teacher)
    assert len(prepare_prompts(settings)[0]) == 64


# -- chat templates --------------------------------------------------------------------------------


CHAT = (
    "data.chat_template=true",
    "data.task=records",
    "data.instruction='{prompt}'",
    "data.num_heldout=1",
)


@pytest.fixture
def rows(tmp_path: Path) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 2=3:"}\n')
    return [*CHAT, f"data.path={path}", f"data.heldout_path={path}"]


PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_teacher_that_writes_conversations_otherwise_is_refused_where_they_are_used(
    tmp_path: Path, rows: list[str]
):
    message = refusal(tmp_path, templated(PLAIN + "="), *rows, template=PLAIN)
    assert (
        "its chat template formats" in message
        and "rows.jsonl:1 differently: '=' where model.path=" in message
    )
    assert len(prepare(tmp_path, templated(PLAIN + "="), template=PLAIN)) == 64, (
        "text prompts do not pass through it"
    )


@pytest.mark.parametrize(
    "template", [PLAIN, "{% for m in messages %}{{ m['content'] }}{% endfor %}", None]
)
def test_a_template_that_writes_the_same_and_a_teacher_without_one_are_fine(
    tmp_path: Path, rows: list[str], template: str | None
):
    assert len(prepare(tmp_path, templated(template), *rows, template=PLAIN)) == 1


def test_a_teachers_template_that_raises_names_the_teacher(tmp_path: Path, rows: list[str]):
    assert "chat template refuses it" in refusal(
        tmp_path, templated("{{ raise_exception('no') }}"), *rows, template=PLAIN
    )


def test_a_teacher_that_differs_in_a_later_kind_of_conversation_is_refused(
    tmp_path: Path, rows: list[str]
):
    system = '{"prompt": [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}]}\n'
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(system)
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    message = refusal(tmp_path, templated(only_users), *rows, template=PLAIN)
    assert "rows.jsonl:2: the model's chat template leaves out the content of message 1" in message


def test_a_template_of_the_settings_counts_for_teachers_too_and_a_difference_is_logged(
    tmp_path: Path, rows: list[str], caplog: pytest.LogCaptureFixture
):
    own = tmp_path / "own.jinja"
    own.write_text(PLAIN + "=")
    rows = [*rows, f"data.chat_template_file={own}"]
    with caplog.at_level(logging.WARNING):
        (prompt,) = prepare(tmp_path, templated(PLAIN), *rows, template=PLAIN)
    assert prompt.text == "1 2=3:="
    assert f"where data.chat_template_file={own} has '='" in caplog.text


def test_arguments_reach_the_teachers_template_too(tmp_path: Path, rows: list[str]):
    template = PLAIN + "{{ '=' if short else '+' }}"
    rows = [*rows, "+data.chat_template_kwargs.short=true"]
    (prompt,) = prepare(tmp_path, templated(template), *rows, template=template)
    assert prompt.text == "1 2=3:="
    message = refusal(tmp_path, templated(PLAIN + "+"), *rows, template=template)
    assert "differently: '+' where" in message


@pytest.mark.parametrize(("end", "warned"), [("<pad>", True), ("<eos>", False), ("", False)])
def test_an_end_of_turn_at_which_generation_does_not_stop_is_logged(
    tmp_path: Path, rows: list[str], caplog: pytest.LogCaptureFixture, end: str, warned: bool
):
    ends = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    with caplog.at_level(logging.WARNING):
        prepare(tmp_path, templated(None), *rows, template=ends)
    assert (f"ends the assistant's turn with {end!r}" in caplog.text) == warned
    assert ("only stops at '<eos>': responses run on" in caplog.text) == warned


# -- running workers -------------------------------------------------------------------------------


def scores(logprob: float, row: float = 0.0, support: int = 0) -> TokenScores:
    return TokenScores(
        teacher="main",
        logprobs=np.array([0, logprob], np.float32),
        rows=np.array([[row]], np.float32),
        support_ids=np.array([[support]], np.int32),
    )


@pytest.mark.parametrize(
    "second", [scores(-0.50000006), scores(-0.5, row=1.0), scores(-0.5, support=1)]
)
def test_a_replica_that_answers_in_two_ways_is_named(second: TokenScores):
    check_repeats("main", [scores(-0.5)] * 2, [scores(-0.5)] * 2)
    with pytest.raises(
        ContractError, match=r"scorer-main/1: two scorings of the same batch differ"
    ):
        check_repeats("main", [scores(-0.5)] * 2, [scores(-0.5), second])


def test_the_probe_has_a_prompt_for_every_teacher_with_a_route():
    prompts = [
        Prompt(
            uid=f"p{i}", input_ids=(1,), text="", columns={"domain": "code" if i == 9 else "math"}
        )
        for i in range(12)
    ]
    teachers = {"a": SimpleNamespace(route={}), "b": SimpleNamespace(route={"domain": "code"})}
    settings = SimpleNamespace(scored_teachers=["a", "b"], teachers=teachers)
    assert [p.uid for p in probe_prompts(settings, prompts)] == ["p0", "p1", "p2", "p3", "p9"]


def test_the_arguments_of_the_engine_of_a_teacher_that_only_writes_are_checked_too():
    """`hybridrl eval --teacher` starts an engine with these arguments."""
    settings = load_config(
        [
            "run.dir=here",
            "experiment=quickstart",
            "algorithm=grpo",
            "algorithm.imitation_weight=0",
            "algorithm.teacher_fraction=0.5",
            "teachers.main.path=somewhere",
            "+teachers.main.engine={seed: 1}",
            "data.num_train=5",
        ]
    )
    assert settings.scored_teachers == []
    with pytest.raises(ConfigError, match=r"^teachers\.main\.engine\.seed: is decided by run\."):
        preflight(settings)
