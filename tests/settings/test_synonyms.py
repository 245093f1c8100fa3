"""Names of TRL, verl and OpenRLHF lead to our names, short forms are accepted, and text is
quoted.
"""

import subprocess
from pathlib import Path

import pytest

from hybridrl.cli import main
from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.choices import ScheduleKind
from hybridrl.settings.compose import conf_dir, from_yaml, known_keys, load_config, quoted, to_yaml
from hybridrl.settings.models import TeacherConfig
from hybridrl.settings.settings_file import own_file
from hybridrl.settings.synonyms import SYNONYMS, markdown, synonym_of

BASE = ["run.dir=here", "experiment=quickstart"]


def refusal(*overrides: str) -> str:
    """The error message about the overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, *overrides])
    return str(caught.value)


# -- names of other systems ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("train.learning_rate", "train.lr"),
        ("actor_rollout_ref.actor.optim.lr", "train.lr"),
        ("lr", "train.lr"),
        ("rollout.n", "train.samples_per_prompt"),
        ("train.num_generations", "train.samples_per_prompt"),
        ("algorithm.kl_ctrl.kl_coef", "algorithm.imitation_weight"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "train.updates_per_batch"),
        ("trainer.save_freq", "checkpoint.every"),
        ("algorithm.clip_range", "algorithm.ratio.low"),
        ("data.max_prompt_length", "rollout.max_model_len"),
        ("data.max_response_length", "rollout.max_new_tokens"),
        ("trainer.nnodes", "learner.ranks"),
        ("max_new_tokens", "rollout.max_new_tokens"),
        ("actor_rollout_ref.model.lora_rank", "lora.rank"),
        ("model.lora_alpha", "lora.alpha"),
    ],
)
def test_a_setting_of_another_system_is_refused_with_ours(theirs: str, ours: str):
    for plus in ("", "+"):
        message = refusal(f"{plus}{theirs}=8")
        assert f"{theirs}=8: no such setting; did you mean {ours}?" in message
        assert "\n" not in message


@pytest.mark.parametrize("theirs", ["load_in_4bit", "rollout.top_p", "optim"])
def test_an_unsupported_setting_is_refused_with_the_reason(theirs: str):
    synonym = synonym_of(theirs)
    assert synonym is not None
    assert refusal(f"+{theirs}=8") == f"{theirs}=8: not supported: {synonym.note}"


def test_every_row_leads_to_a_setting_that_exists_from_one_that_does_not():
    keys = set(known_keys())
    entries = {
        "teachers.NAME.path",
        "reward.functions.NAME.function",
        "reward.functions.NAME.weight",
    }
    assert {s.ours for s in SYNONYMS if s.ours} - keys <= entries
    assert [s for s in SYNONYMS if not s.names or not (s.ours or s.note)] == []
    assert keys & {name for s in SYNONYMS for name in s.names} == set()


def test_the_table_in_the_readme_is_the_table_that_is_used():
    text = (conf_dir() / "README.md").read_text()
    _, _, rest = text.partition("<!-- made by python -m hybridrl.settings.synonyms -->\n")
    assert rest.partition("<!-- end of the table -->")[0] == markdown()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--learning_rate=1e-5",
            "no such setting; did you mean train.lr?; a setting is written KEY=VALUE",
        ),
        ("--lora-rank", "no such setting; did you mean lora.rank?"),
        ("--load-in-4bit", "not supported: weights are not quantised"),
        ("--lr", "no such setting; did you mean train.lr?"),
        ("--train.lr=3", "a setting is written without dashes: train.lr=3"),
    ],
)
def test_a_setting_that_is_written_as_a_flag_is_refused_with_the_right_form(
    flag: str, message: str, capsys: pytest.CaptureFixture
):
    assert main(["train", *BASE, flag, *([] if "=" in flag else ["8"])]) == 2
    assert capsys.readouterr().err.startswith(f"hybridrl: {flag}: {message}")


# -- short forms -----------------------------------------------------------------------------------


def test_a_number_is_a_constant_schedule_and_replaces_that_of_a_preset():
    settings = load_config(
        [
            *BASE,
            "algorithm.reward_weight=2",
            "algorithm.imitation_weight=0.5",
            "+reward.functions.countdown.schedule=0.25",
            "+teachers.main.schedule=3",
        ]
    )
    assert settings.algorithm.reward_weight == ScheduleConfig(kind=ScheduleKind.constant, value=2)
    assert settings.algorithm.imitation_weight == ScheduleConfig(value=0.5)
    assert settings.reward.functions["countdown"].schedule == ScheduleConfig(value=0.25)
    assert settings.teachers["main"].schedule == ScheduleConfig(value=3)
    assert from_yaml(to_yaml(settings)) == settings


def test_a_teacher_a_reward_and_a_list_of_one_can_be_a_single_word():
    settings = load_config(
        [
            *BASE,
            "+teachers.ref=initial",
            "teachers.main=/models/b",
            "+reward.functions.mine=rewards.py:score",
            "tracking.tags=a",
            "run.allow_changes=train.lr",
        ]
    )
    assert settings.teachers == {
        "main": TeacherConfig(path="/models/b"),
        "ref": TeacherConfig(path=None),
    }
    assert settings.reward.functions["mine"].function == "rewards.py:score"
    assert settings.tracking.tags == ["a"] and settings.run.allow_changes == ["train.lr"]


@pytest.mark.parametrize(
    ("override", "right"),
    [
        (
            "algorithm.reward_weight=true",
            "algorithm.reward_weight=0.5 or 'algorithm.reward_weight={",
        ),
        ("algorithm.reward_weight=null", "algorithm.reward_weight=0.5 or"),
        ("+reward.functions.countdown.schedule=fast", "reward.functions.countdown.schedule=0.5 or"),
        ("+reward.functions.mine=3", "reward.functions.mine=FILE.py:FUNCTION or"),
        ("reward.functions=a.py:f", "+reward.functions.NAME=FILE.py:FUNCTION or"),
        ("teachers=/models/b", "+teachers.NAME=PATH, +teachers.NAME=initial"),
        ("teachers.b=/models/b", "write +teachers.b=/models/b to add it"),
        ("data.options=3", "+data.options.NAME=VALUE or 'data.options={NAME: VALUE}'"),
        ("algorithm.topk=4", "a section, not a value; set algorithm.topk.NAME="),
        ("eval.every=5,10", "write a list as eval.every=[5,10]"),
    ],
)
def test_a_value_of_the_wrong_form_names_its_key_and_shows_the_right_one(override: str, right: str):
    message = refusal(override)
    key = override.lstrip("+").partition("=")[0]
    assert message.startswith(f"{key}=") and right in message
    assert "\n" not in message and len(message) < 240


def test_short_forms_work_in_a_users_own_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "experiment: quickstart\nalgorithm: {reward_weight: 2}\nteachers: {ref: initial}\n"
        "reward: {functions: {mine: 'rewards.py:score'}}\ntracking: {tags: a}\n"
    )
    with own_file(file) as base:
        settings = load_config([*base, "run.dir=here"])
    assert settings.algorithm.reward_weight == ScheduleConfig(value=2)
    assert settings.teachers["ref"] == TeacherConfig()
    assert settings.reward.functions["mine"].function == "rewards.py:score"
    assert settings.tracking.tags == ["a"]


# -- text ------------------------------------------------------------------------------------------


TEXTS = [
    "Be brief, please",
    "Don't guess",
    "{prompt} Think.",
    "{prompt}",
    "~/x",
    "Sch\u00f6n",
    'Say "hi", or don\'t',
    "50% [x] (y)",
    "a=b; c#d",
    "price $5, `date`, \\n and \\",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_hydra_cannot_read_is_shown_in_quotes_that_work_in_a_shell(text: str):
    word = quoted(f"data.system_prompt={text}")
    message = refusal(f"data.system_prompt={text}")
    assert message.endswith(f"as {word}") and message.startswith(f"data.system_prompt={text}: ")
    shell = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert load_config([*BASE, shell.stdout.decode()]).data.system_prompt == text


@pytest.mark.parametrize(
    "override", ["+data.options={a: <x>}", "+data.options.keys=[<x>]", "train.betas=[0.9"]
)
def test_in_a_list_or_mapping_the_texts_are_to_be_quoted(override: str):
    assert refusal(override).endswith("""'...{NAME: "TEXT"}' or '...["TEXT"]'""")


def test_an_override_without_a_value_is_not_shown_in_quotes():
    assert refusal("train.lr") == "train.lr: not KEY=VALUE as Hydra reads it"
