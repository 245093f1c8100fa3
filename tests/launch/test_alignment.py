"""A base model as student and an instruct model as teacher: which settings are refused, which align
the two, and the effect on data, run directory and export.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from hybridrl.core.errors import ConfigError, DataError
from hybridrl.launch.alignment import alignment
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.launch.teacher_levels import conditions_of
from hybridrl.models.loading import load_model, load_tokenizer, stop_token_ids
from hybridrl.run_dir.inputs import digests
from hybridrl.run_dir.setting_changes import changes
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt
from hybridrl.weights.hugging_face import export
from tests.support.pairs import END, EOS, TEMPLATE, TURN, instruct_tokenizer, pair_overrides
from tests.support.pairs import save_pair as save_models

ONE, TWO, THREE, EQUALS, BOS = 5, 6, 7, 21, 1
"""The tokens of "1", "2", "3" and "=", and the token that begins a text."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_models(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "12", "completion": "3"}\n')
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return tmp_path


def settings_of(folder: Path, *overrides: str) -> RunSettings:
    rows = folder / "rows.jsonl"
    data = ["data.task=records", f"data.path={rows}", f"data.heldout_path={rows}"]
    lengths = ["rollout.max_model_len=32", "rollout.max_new_tokens=8"]
    sizes = ["reward.functions={}", "algorithm=word_kd", "data.num_heldout=1"]
    return load_config([*pair_overrides(folder), *data, *lengths, *sizes, *overrides])


def prompt_of(folder: Path, *overrides: str) -> Prompt:
    return prepare_prompts(settings_of(folder, *overrides))[0][0]


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        prepare_prompts(settings_of(folder, *overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the end token ---------------------------------------------------------------------------------


def test_the_pair_is_refused_and_the_sentence_names_the_settings_that_align_it(folder: Path):
    assert refusal(folder) == (
        f"teachers.main.path={folder}/teacher: its end token is '<end>' (id 23), that of "
        f"model.path={folder}/student is '<eos>' (id 2), and a student cannot learn from it where "
        "to stop; set model.eos=23 to end the student's responses as the teacher's, or "
        "teachers.main.eos=23 to score the student's end token by the teacher's probability of its "
        "own end token"
    )


@pytest.mark.parametrize(
    ("setting", "end"), [("model.eos=23", END), ("+teachers.main.eos=23", EOS)]
)
def test_each_of_the_two_settings_is_enough_and_decides_how_the_datas_responses_end(
    folder: Path, setting: str, end: int
):
    prompt = prompt_of(folder, setting)
    assert prompt.input_ids == (BOS, ONE, TWO)
    assert prompt.responses == ((THREE, end),)


def test_the_chosen_end_token_takes_the_place_of_the_templates_end_of_the_turn(folder: Path):
    chat = ["data.chat_template=true", f"data.chat_template_file={folder}/own.jinja"]
    of_template = prompt_of(folder, *chat, "+teachers.main.eos=23")
    assert of_template.responses == ((THREE, END),)
    chosen = prompt_of(folder, *chat, "+teachers.main.eos=23", "model.eos=2")
    assert chosen.responses == ((THREE, EOS),)
    assert chosen.input_ids == of_template.input_ids


def test_a_teacher_without_an_end_token_needs_one_by_the_settings(folder: Path):
    file = folder / "teacher" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    message = refusal(folder)
    assert "its end token is none, that of" in message
    assert message.endswith("set teachers.main.eos to the token with which it ends a response")
    assert prompt_of(folder, "+teachers.main.eos=23").responses == ((THREE, EOS),)


def test_an_unknown_end_token_of_the_student_is_refused(folder: Path):
    assert refusal(folder, "model.eos='<|im_end|>'").startswith(
        "model.eos=<|im_end|>: is not one of the tokenizer's special tokens, which no text contains"
    )


def test_a_response_that_holds_the_chosen_end_token_is_refused(folder: Path):
    (folder / "rows.jsonl").write_text('{"prompt": "12", "completion": "3<end>3"}\n')
    assert "holds the end token '<end>' before its end" in refusal(folder, "model.eos=23")
    assert prompt_of(folder, "+teachers.main.eos=23").responses == ((THREE, END, THREE, EOS),)


def test_vocabularies_that_differ_are_not_aligned_by_any_setting(folder: Path):
    tokenizer = instruct_tokenizer()
    tokenizer.add_tokens(["12"])
    tokenizer.save_pretrained(folder / "teacher")
    message = refusal(folder, "+teachers.main.eos=23", "+teachers.main.chat_template=own")
    assert "'12' has id 25, here none" in message
    assert message.endswith("Choose a teacher with the student's tokenizer")


def test_a_warning_names_the_end_of_the_turn_at_which_generation_does_not_stop(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    chat = ["data.chat_template=true", f"data.chat_template_file={folder}/own.jinja"]
    with caplog.at_level(logging.WARNING):
        prompt_of(folder, *chat, "+teachers.main.eos=23")
    assert "ends the assistant's turn with '<end>'" in caplog.text
    assert "set model.eos=23" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prompt_of(folder, *chat, "model.eos=23")
    assert "assistant's turn" not in caplog.text


# -- the chat template -----------------------------------------------------------------------------


def chat(text: Sequence[int], *, thinks: bool = False) -> tuple[int, ...]:
    """The tokens of a user's message in the form of the instruct model's template."""
    return (TURN, *text, END, TURN, *([] if thinks else [EQUALS]))


def test_a_base_model_with_the_instruct_models_template_reads_what_that_model_reads(folder: Path):
    own = ["data.chat_template=true", f"data.chat_template_file={folder}/own.jinja"]
    base = prompt_of(folder, *own, "model.eos=23")
    instruct = prompt_of(folder, "data.chat_template=true", f"model.path={folder}/teacher")
    assert base.text == instruct.text == "<turn>12<end><turn>="
    assert base.input_ids == instruct.input_ids == chat([ONE, TWO])
    assert base.responses == instruct.responses == ((THREE, END),)


def test_an_argument_of_the_template_changes_the_prompt(folder: Path):
    own = ["data.chat_template=true", f"data.chat_template_file={folder}/own.jinja"]
    thinking = "+data.chat_template_kwargs.enable_thinking=true"
    assert prompt_of(folder, *own, "model.eos=23", thinking).text == "<turn>12<end><turn>"


def test_a_teacher_reads_a_text_prompt_by_its_own_template(folder: Path):
    own = ["model.eos=23", "+teachers.main.chat_template=own"]
    prompt = prompt_of(folder, *own)
    assert prompt.input_ids == (BOS, ONE, TWO)
    assert prompt.teacher_prompts == {"main": chat([ONE, TWO])}
    thinking = "+teachers.main.chat_template_kwargs.enable_thinking=true"
    assert prompt_of(folder, *own, thinking).teacher_prompts == {
        "main": chat([ONE, TWO], thinks=True)
    }


def test_two_templates_that_differ_are_refused_unless_the_teacher_reads_by_its_own(folder: Path):
    other = instruct_tokenizer("<eos>", TEMPLATE.replace("<turn>", "+"))
    other.save_pretrained(folder / "student")
    chat_settings = ["data.chat_template=true", "model.eos=23"]
    message = refusal(folder, *chat_settings)
    assert "its chat template formats" in message
    assert message.endswith(
        "or set teachers.main.chat_template=own to have the teacher read by its own"
    )
    prompt = prompt_of(folder, *chat_settings, "+teachers.main.chat_template=own")
    assert prompt.text == "+12<end>+="
    assert prompt.teacher_prompts == {"main": chat([ONE, TWO])}


def test_another_beginning_of_a_text_is_refused_unless_the_teacher_has_its_own_prompts(
    folder: Path,
):
    tokenizer = instruct_tokenizer()
    tokenizer.bos_token = "<turn>"
    tokenizer.save_pretrained(folder / "teacher")
    message = refusal(folder, "model.eos=23")
    assert "begins a text with '<turn>' (id 24)" in message
    assert "set teachers.main.chat_template=own" in message
    own = ["model.eos=23", "+teachers.main.chat_template=own"]
    assert prompt_of(folder, *own).teacher_prompts == {"main": chat([ONE, TWO])}


def test_a_teachers_prompt_that_does_not_fit_is_refused_and_counts_in_the_proposed_lengths(
    folder: Path,
):
    own = ["model.eos=23", "+teachers.main.chat_template=own"]
    short = ["rollout.max_model_len=12", "rollout.max_new_tokens=8"]
    assert prompt_of(folder, "model.eos=23", *short)
    assert (
        "the prompt that teacher main reads by its own chat template has 6 tokens, which with the "
        "response do not fit into rollout.max_model_len"
    ) in refusal(folder, *own, *short)
    unset = ["rollout.max_model_len=null"]
    assert "the longest prompt has 6 tokens" in refusal(folder, *own, *unset)


def test_settings_of_a_teachers_template_without_a_template_are_refused(folder: Path):
    own = ["model.eos=23", "+teachers.main.chat_template=own"]
    assert refusal(folder, *own, "+teachers.main.chat_template_kwargs.thinking=true") == (
        "teachers.main.chat_template_kwargs.thinking: the chat template of teachers.main.path="
        f"{folder}/teacher does not read an argument of this name; correct the name, or leave it "
        "out"
    )
    instruct_tokenizer(template=None).save_pretrained(folder / "teacher")
    (folder / "teacher" / "chat_template.jinja").unlink(missing_ok=True)
    assert refusal(folder, *own) == (
        f"teachers.main.chat_template=own: the tokenizer of teachers.main.path={folder}/teacher "
        "has no chat template; set teachers.main.chat_template=student"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["teachers.main.path=null", "+teachers.main.chat_template=own"],
            "teachers.main.chat_template=own: needs teachers.main.path, whose template it would "
            "be; leave it out",
        ),
        (
            ["+teachers.main.chat_template_kwargs.enable_thinking=true"],
            "teachers.main.chat_template_kwargs={'enable_thinking': True}: are read only with "
            "teachers.main.chat_template=own; set it, or leave them out",
        ),
    ],
)
def test_a_template_that_cannot_be_read_is_refused_with_the_settings(
    folder: Path, overrides: list[str], message: str
):
    with pytest.raises(ConfigError) as caught:
        settings_of(folder, *overrides)
    assert str(caught.value) == message


# -- the run ---------------------------------------------------------------------------------------


def test_one_line_names_the_tokens_and_templates_that_are_aligned(folder: Path):
    settings = settings_of(folder, "+teachers.main.eos=23", "+teachers.main.chat_template=own")
    tokenizer = load_tokenizer(settings.model.path, eos=settings.model.eos)
    assert list(alignment(settings, tokenizer)) == [
        "responses end with '<eos>' (id 2)",
        "teacher main's '<end>' (id 23) counts for it",
        "teacher main reads prompts by its own chat template",
    ]


@pytest.mark.parametrize(
    "setting", ["model.eos=23", "+teachers.main.eos=23", "+teachers.main.chat_template=own"]
)
def test_a_run_is_not_continued_with_another_alignment(folder: Path, setting: str):
    name = setting.removeprefix("+").partition("=")[0]
    before = settings_of(folder)
    assert list(changes(before, settings_of(folder, setting))) == [name]
    assert changes(before, settings_of(folder)) == {}


def test_a_changed_template_file_changes_its_digest(folder: Path):
    file = folder / "own.jinja"
    settings = settings_of(folder, "model.eos=23", f"data.chat_template_file={file}")
    before = digests(settings, [], [])
    file.write_text(TEMPLATE + " ")
    after = digests(settings, [], [])
    assert [key for key in after if before[key] != after[key]] == ["data.chat_template_file"]


def test_a_teachers_engine_stops_at_its_own_end_token_and_its_level_depends_on_its_prompts(
    folder: Path,
):
    settings = settings_of(folder, "+teachers.main.eos=23")
    assert settings.teacher_model("main").eos == "23"
    assert settings_of(folder, "model.eos=23").teacher_model("main").eos is None
    initial = settings_of(folder, "teachers.main.path=null", "model.eos=23")
    assert initial.teacher_model("main").eos == "23"
    prompt = Prompt(uid="a", input_ids=(1,), text="", columns={})
    other = Prompt(uid="a", input_ids=(1,), text="", columns={}, teacher_prompts={"main": (2,)})
    digest = "heldout_sha256"
    assert conditions_of(settings, [prompt])[digest] != conditions_of(settings, [other])[digest]


@pytest.mark.parametrize("settings_file", [True, False])
def test_an_export_ends_its_responses_with_the_chosen_token(folder: Path, settings_file: bool):
    source = folder / "student"
    if not settings_file:
        (source / "generation_config.json").unlink()
    state = dict(load_model(str(source)).named_parameters())
    export(state, source, folder / "plain")
    export(state, source, folder / "chosen", eos="<end>")
    plain = AutoTokenizer.from_pretrained(folder / "plain")
    assert plain.eos_token == "<eos>"
    assert stop_token_ids(str(folder / "plain"), plain) == {EOS}
    chosen = AutoTokenizer.from_pretrained(folder / "chosen")
    assert chosen.eos_token == "<end>"
    assert chosen.get_vocab() == plain.get_vocab()
    assert GenerationConfig.from_pretrained(folder / "chosen").eos_token_id == [END, EOS]
