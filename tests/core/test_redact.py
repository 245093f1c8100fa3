"""Secrets are masked in everything that a run writes and withheld from processes.

Names that come with data or a model are never used as paths or called.
"""

import base64
import html
import json
import logging
import os
import pickle
import stat
import subprocess
import sys
import urllib.parse
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest

from hybridrl.cli import main
from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, DataError
from hybridrl.data.countdown_puzzles import Countdown
from hybridrl.data.problem_sources import load_problems
from hybridrl.data.prompts import tokenize
from hybridrl.launch.session import run_info
from hybridrl.launch.teacher_levels import conditions_of
from hybridrl.models.loading import load_output_head, load_tokenizer
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.rewards.child import RewardCall
from hybridrl.rewards.load import BUILT_IN
from hybridrl.rewards.pool import RewardPool
from hybridrl.rewards.signature import signature_of
from hybridrl.run_dir.setting_changes import changes
from hybridrl.runtime.ray_connection import private_token
from hybridrl.runtime.worker_env import worker_env
from hybridrl.settings.compose import check_secrets, from_yaml, known_keys, load_config, to_yaml
from hybridrl.settings.run import DataConfig
from hybridrl.settings.settings_file import saved_config
from tests.support.graph import save_tiny
from tests.support.logged_secrets import CANARY

BASE = ["experiment=quickstart", "run.dir=here"]
JUDGE = [
    "+reward.functions.judge={function: f.py:f, weight: 0, options: {api_key: "
    "'${oc.env:JUDGE_API_KEY}', url: 'https://host/x'}}"
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "JUDGE_API_KEY",
    ):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.setenv("PLAIN", "plain-value")


# -- names and values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HF_TOKENS",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "PGPASSWORD",
        "SMTP_PASS",
        "OPENAI_APIKEY",
        "SESSION_COOKIE",
        "my_key",
        "githubToken",
    ],
)
def test_a_variable_is_a_secret_by_its_name(name: str):
    assert redact.variable_is_secret(name, CANARY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", CANARY),
        ("PWD", CANARY),
        ("KEYBOARD", CANARY),
        ("NUM_TOKENS", "123456789"),
        ("RAY_AUTH_TOKEN_PATH", CANARY),
        ("GOOGLE_CREDENTIALS_FILE", CANARY),
        ("S3_KEY_PREFIX", "/data/production"),
        ("S3_KEY_PREFIX", "runs-8f3a2b1c/production"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/secrets/gcp-key.json"),
        ("DB_PASSWORD", "/run/secrets/db_password"),
        ("TOKEN_URI", "https://auth.example.com/oauth/token"),
        ("OPENAI_API_KEY", "not-needed"),
        ("PARTITION_KEY", "created_at"),
        ("PAD_TOKEN", "<|endoftext|>"),
    ],
)
def test_a_variable_with_an_ordinary_name_or_a_plain_value_is_no_secret(name: str, value: str):
    assert not redact.variable_is_secret(name, value)


@pytest.mark.parametrize(
    "value",
    [
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "/9j/4AAQSkZJRgABAQAAAQABAAD",  # base64 may begin with a slash
        "AKIAIOSFODNN7EXAMPLE",
        "aBcDeFgHiJkLmNoPqRsT",
        "XK42-PQ17-ZZ09",
        "12345678",
        "1234-5678-9012-3456",
        "01+23/45-67",
        "abcdefghijklmnop",
    ],
)
def test_a_generated_key_is_never_plain(value: str):
    assert not redact.is_plain(value)


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("options.api_key", True),
        ("api-key", True),
        ("apiKey", True),
        ("judge.token", True),
        ("hf_token", True),
        ("client_secret", True),
        ("db_password", True),
        ("eos_token", False),
        ("pad_token", False),
        ("answer_key", False),
        ("num_tokens", False),
        ("algorithm.token_weight", False),
        ("options.github_token", True),
        ("options.openai_key", True),
        ("options.judge_token", True),
        ("a.options.headers.Authorization", True),
        ("options.pat", True),
        ("options.pass", True),
        ("options.smtpPass", True),
        ("options.cookie", True),
        ("options.keys", True),
        ("options.credentials.value", True),
        ("options.max_tokens", False),
        ("options.tokenizer", False),
        ("options.eos_token", False),
        ("options.answer_key", False),
        ("options.think_token", False),
        ("options.keywords", False),
        ("options.pass_rate", False),
        ("functions.secret_judge.weight", False),
    ],
)
def test_a_setting_is_a_secret_by_its_key(key: str, secret: bool):
    assert redact.setting_is_secret(key, CANARY) is secret


@pytest.mark.parametrize(
    "option",
    [
        "key=answer",
        "key=createdAt",
        "think_token='<think>'",
        "turn_token='<|im_start|>'",
        "api_key=EMPTY",
        "keys=[question,answer]",
        "pass=1",
        "auth=basic",
        "token=512",
    ],
)
def test_an_option_with_a_plain_value_is_accepted_and_written_as_it_is(option: str):
    settings = load_config([*BASE, f"+reward.functions.countdown.options.{option}"])
    [(name, value)] = settings.reward.functions["countdown"].options.items()
    assert from_yaml(to_yaml(settings)).reward.functions["countdown"].options == {name: value}


def ordinary_options() -> set[str]:
    """The option names of our reward functions and generators, and of a typical client of a
    judge.
    """
    rewards = {
        name for path in BUILT_IN.values() for name in signature_of(resolve_name(path)).accepted
    }
    return (
        rewards
        | {field.name for field in fields(Countdown)}
        | {"max_tokens", "max_completion_tokens", "top_k", "tokenizer", "key_fn"}
    )


def test_no_setting_of_ours_is_taken_for_a_secret():
    assert [key for key in known_keys() if redact.setting_is_secret(key, CANARY)] == []
    names = [*known_keys(), *ordinary_options()]
    assert [name for name in names if redact.setting_is_secret(f"options.{name}", CANARY)] == []


def test_values_and_the_users_of_urls_are_masked_wherever_they_occur(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("A_KEY", "12345678")
    monkeypatch.setenv("LONGER_KEY", "12345678-9")
    monkeypatch.setenv("SHORT_KEY", "batch")
    masked = redact.text("batch 12345678 and 12345678-9, https://me:pw@host/x")
    assert masked == "batch *** and ***, https://***@host/x"


PEM = "-----BEGIN KEY-----\nMIIEvgIBADANBgkqhkiG9w0B\nAQEFAASCBKgwggSkAgEAAoIB\n-----END KEY-----"


def form(value: str) -> dict[str, str]:
    """The value in the forms in which other programs write it, by the name of the form."""
    basic = base64.b64encode(f"user:{value}".encode()).decode()
    return {
        "repr": repr(value),
        "bytes": repr(value.encode()),
        "json": json.dumps(value),
        "json of bytes": json.dumps(value, ensure_ascii=False),
        "url": urllib.parse.quote(value, safe=""),
        "form": urllib.parse.urlencode({"a": value}),
        "html": html.escape(value),
        "basic": f"Basic {basic}",
        "longer name": base64.b64encode(f"longer:{value}:x".encode()).decode(),
        "longest name": base64.urlsafe_b64encode(f"longest:{value}".encode()).decode(),
    }


@pytest.mark.parametrize("how", list(form("")))
def test_a_secret_is_masked_in_each_form_in_which_it_may_be_written(
    how: str, monkeypatch: pytest.MonkeyPatch
):
    secret = 'c4n\'ry "x" <\u00fc>/+?&\n0123'
    monkeypatch.setenv("DB_PASSWORD", secret)
    masked = redact.text(f"before {form(secret)[how]} after")
    assert masked.startswith("before ") and masked.endswith(" after") and "***" in masked
    assert "4n" not in masked and "0123" not in masked and len(masked) < 30


def test_single_lines_of_a_key_are_masked_and_its_frame_is_not(monkeypatch: pytest.MonkeyPatch):
    for value in (PEM, PEM.replace("\n", "\\n")):
        monkeypatch.setenv("TLS_KEY", value)
        assert redact.text(f"line 2: {PEM.splitlines()[1]}.") == "line 2: ***."
        assert redact.text("-----BEGIN KEY-----") == "-----BEGIN KEY-----"


def test_the_password_of_a_url_and_the_fields_of_a_json_object_in_a_variable_are_masked(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("DATABASE_URL", "postgres://me:c4n%40ry-0123@db.example.com/x")
    monkeypatch.setenv("GCP_ACCOUNT", json.dumps({"project": "alpha", "private_key": PEM}))
    line = f"c4n@ry-0123, c4n%40ry-0123, {PEM.splitlines()[2]}, alpha"
    assert redact.text(line) == "***, ***, ***, alpha"


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("https://me:p@ss/w'or\"d@host/x", "https://***@host/x"),
        ("https://ghp_0123456789@github.com/x", "https://***@github.com/x"),
        ("pg://a:b1@h,pg://c:d@e/f@i", "pg://***@h,pg://***@i"),
        ('{"a":"https://x:y@h","b":"me@c"}', '{"a":"https://***@h","b":"me@c"}'),
        ("https://b/x?sv=1&sig=aB3%2Fd6gH9&se=2", "https://b/x?sv=1&sig=***&se=2"),
        ("s3://b/x?X-Amz-Signature=0a1b2c3d4e", "s3://b/x?X-Amz-Signature=***"),
        ("https://b/x?key=AIzaSyD4x9", "https://b/x?key=***"),
        ("Authorization: Bearer ab12cd34ef", "Authorization: ***"),
        ("('Cookie', 'id=ab12cd34; s=12')", "('Cookie', '***')"),
        ("x-api-key: ab12cd34ef, retry", "x-api-key: ***, retry"),
        ("{'api_key': 'ab12cd34ef', 'n': 2}", "{'api_key': '***', 'n': 2}"),
        ("password='a b c', next", "password='***', next"),
    ],
)
def test_a_text_whose_form_marks_a_secret_is_masked_whatever_its_value(line: str, masked: str):
    assert redact.text(line) == masked


@pytest.mark.parametrize(
    "line",
    [
        "https://host:8080/x@v1",
        "git+https://github.com/owner/repo@v1.2",
        "http://[::1]:8265/x@y",
        "https://medium.com/@author/post",
        "https://host/x?sort_key=name&page=2",
        "Authorization: failed for this user",
        "options.key=answer",
        "train.max_tokens_per_micro_batch=16384, tokens_seen=123456789",
        "the key: value pairs of a token: one each",
    ],
)
def test_a_text_that_only_resembles_a_secret_is_not_changed(line: str):
    assert redact.text(line) == line


# -- what a run writes -----------------------------------------------------------------------------


def test_the_written_settings_and_those_sent_to_trackers_hold_no_secret(
    environment: None, tmp_path: Path
):
    settings = load_config([*BASE, *JUDGE])
    judge = settings.reward.functions["judge"]
    assert judge.options["api_key"] == f"{CANARY}-JUDGE_API_KEY", "the function itself receives it"
    options = {"api_key": "***", "url": "https://host/x"}
    assert from_yaml(to_yaml(settings)).reward.functions["judge"].options == options
    sent = run_info(settings, tmp_path, None).config["reward"]["functions"]["judge"]
    assert sent["options"] == options
    assert CANARY not in to_yaml(settings)
    assert changes(from_yaml(to_yaml(settings)), settings) == {}, "a resumed run has not changed"


@pytest.mark.parametrize("value", ["can\"ary/01+23 45'67", "correct horse battery"])
def test_an_option_taken_from_a_variable_is_masked_even_if_it_consists_of_words(
    value: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUDGE_X", value)
    options = "+reward.functions.judge={function: f.py:f, options: {key: '${oc.env:JUDGE_X}'}}"
    settings = load_config([*BASE, options])
    judge = from_yaml(to_yaml(settings)).reward.functions["judge"]
    assert settings.reward.functions["judge"].options == {"key": value}
    assert judge.options == {"key": "***"} and redact.text(f"key {value!r}") == "key '***'"


def test_the_teachers_levels_name_the_judges_options_by_their_sha256(
    environment: None, monkeypatch: pytest.MonkeyPatch
):
    first = ["~reward.functions.countdown", *JUDGE]
    written = json.dumps(conditions_of(load_config([*BASE, *first]), []))
    assert "f.py:f" in written and CANARY not in written and "me:pw" not in written
    monkeypatch.setenv("JUDGE_API_KEY", f"{CANARY}-other")
    rewritten = json.dumps(conditions_of(load_config([*BASE, *first]), []))
    assert rewritten != written, "another key may mean another judge, so levels are measured anew"


def test_a_secret_that_is_masked_in_a_runs_saved_settings_must_be_given_once_more(
    environment: None, tmp_path: Path
):
    """This also holds for an address with a password, which earlier versions took from the
    command.
    """
    text = to_yaml(load_config([*BASE, *JUDGE])).replace("https://host/x", "https://***@host/x")
    (tmp_path / "config.yaml").write_text(text)
    key = "reward.functions.judge.options.api_key='${oc.env:JUDGE_API_KEY}'"
    with saved_config(tmp_path / "config.yaml") as base:
        with pytest.raises(ConfigError, match=r"options\.api_key=\*\*\*: a secret was masked here"):
            load_config(base)
        with pytest.raises(ConfigError, match=r"options\.url=https://\*\*\*@host/x: a secret"):
            load_config([*base, key])
        url = "reward.functions.judge.options.url=https://host/x"
        judge = load_config([*base, key, url]).reward.functions["judge"]
    assert judge.options["api_key"] == f"{CANARY}-JUDGE_API_KEY"


def test_paths_and_words_of_variables_named_like_secrets_stay_in_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "gcp-8f3a2b1c.json"
    file.touch()
    variables = {
        "S3_KEY_PREFIX": "/data/production",
        "GOOGLE_APPLICATION_CREDENTIALS": str(file),
        "POSTGRES_PASSWORD": "postgres",
        "CACHE_KEY": "countdown",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    paths = ["model.path=/data/production/m", f"+teachers.b.path={file}", "run.dir=/a/postgres"]
    settings = load_config([*BASE, *paths])
    assert from_yaml(to_yaml(settings)) == settings
    env = worker_env(1, "cpu", "float32", take_turns=True)
    assert env.keys().isdisjoint({"S3_KEY_PREFIX", "GOOGLE_APPLICATION_CREDENTIALS"})
    assert env["CACHE_KEY"] == "", "words are not masked, but a worker needs no variable named key"


def test_a_run_resumed_in_another_environment_finds_no_changed_setting(
    monkeypatch: pytest.MonkeyPatch,
):
    settings = load_config([*BASE, f"model.path=/data/{CANARY}/m"])
    plain = from_yaml(to_yaml(settings))
    monkeypatch.setenv("A_TOKEN", CANARY)
    masked = from_yaml(to_yaml(settings))
    assert (plain.model.path, masked.model.path) == (f"/data/{CANARY}/m", "/data/***/m")
    assert changes(plain, settings) == {} and changes(masked, settings) == {}
    monkeypatch.delenv("A_TOKEN")
    assert changes(masked, settings) == {}
    other = load_config([*BASE, "model.path=/data/other"])
    assert list(changes(masked, other)) == ["model.path"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {CANARY}"},
        [["Authorization", f"Bearer {CANARY}"], ["Accept", "json"]],
        [f"Authorization: Bearer {CANARY}"],
        [{"name": "Cookie", "value": f"id={CANARY}"}],
    ],
)
def test_authorisation_headers_are_refused_and_masked_in_every_shape(headers: object):
    options = {"options": {"headers": headers}}
    assert CANARY not in str(redact.tree(options)) and "***" in str(redact.tree(options))
    assert len(redact.secrets_in(options)) == 1
    with pytest.raises(ConfigError, match="a secret must not be written out"):
        check_secrets(options)


@pytest.mark.parametrize(
    "key",
    [
        "+data.options.api_key",
        "+reward.functions.countdown.options.client_secret",
        "+teachers.main.route.token",
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated_in_the_message(key: str):
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, f"{key}={CANARY}"])
    message = str(caught.value)
    assert message.startswith(f"{key[1:]}: a secret must not be written out")
    assert CANARY not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("password", "12345678"),
        ("github_token", CANARY),
        ("pat", "12345678.5"),
        ("keys.token", f"[{CANARY}]"),
    ],
)
def test_a_secret_option_is_refused_even_as_a_number_or_in_a_list(key: str, value: str):
    with pytest.raises(ConfigError, match=f"options.{key}: a secret must not be written out"):
        load_config([*BASE, f"+reward.functions.countdown.options.{key}={value}"])


@pytest.mark.parametrize("value", [CANARY, f"'{CANARY}',b", "12345678,87654321"])
def test_a_sweep_with_a_secret_is_refused_before_hydra_writes_it_to_disk(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    judge = (
        f"+reward.functions.judge={{function: f.py:f, options: {{api_key: {value.split(',')[0]}}}}}"
    )
    for override in (f"+reward.functions.countdown.options.judge_token={value}", judge):
        assert main(["train", "-m", *BASE, "train.lr=1e-3,2e-3", override]) == 2
    output = "".join(capsys.readouterr())
    assert output.count("a secret must not be written out") == 2
    assert CANARY not in output and "1234" not in output
    assert list(tmp_path.iterdir()) == []


def test_an_option_taken_from_the_environment_is_masked_whatever_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JUDGE_X", f"{CANARY}-x")
    monkeypatch.setenv("SCRATCH_HERE", str(tmp_path))
    monkeypatch.setenv("JUDGE_MODEL", "large")
    options = (
        "{header: 'Bearer ${oc.env:JUDGE_X}', parts: ['${oc.env:JUDGE_X}'], "
        "cache: '${oc.env:SCRATCH_HERE}/c', model: '${oc.env:JUDGE_MODEL}'}"
    )
    settings = load_config(
        [
            *BASE,
            f"+reward.functions.judge={{function: f.py:f, weight: 0, options: {options}}}",
            f"run.dir={CANARY}-x/a",
        ]
    )
    judge = settings.reward.functions["judge"].options
    assert judge["header"] == f"Bearer {CANARY}-x", "the function itself receives it"
    written = from_yaml(to_yaml(settings))
    masked = {"header": "***", "parts": ["***"], "cache": f"{tmp_path}/c", "model": "large"}
    assert written.reward.functions["judge"].options == masked and written.run.dir == "***/a"
    assert changes(written, settings) == {}, "a resumed run has not changed"
    sent = pickle.loads(pickle.dumps(settings))
    secrets = redact.secrets_in({"settings": sent})
    assert set(secrets) == {f"Bearer {CANARY}-x", f"{CANARY}-x"}, "secret in a worker too"


@pytest.mark.parametrize(
    "flags", [["--cfg", "job"], ["--cfg", "job", "--resolve"], ["-c", "all", "--resolve"]]
)
def test_the_settings_that_hydra_prints_hold_no_secret(
    environment: None, flags: list[str], tmp_path: Path
):
    literal = f"+data.options.token={CANARY}"
    command = [
        sys.executable,
        "-m",
        "hybridrl.cli",
        "train",
        *BASE,
        *JUDGE,
        literal,
        f"+data.options.plain={CANARY}-HF_TOKEN",
        *flags,
    ]
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=path, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "api_key: " in process.stdout and CANARY not in process.stdout
    assert "token: '***'" in process.stdout and "plain: '***'" in process.stdout


def test_log_lines_tracebacks_and_error_sentences_hold_no_secret(
    environment: None, capsys: pytest.CaptureFixture, tmp_path: Path
):
    assert main(["train", *BASE, f"train.steps={CANARY}-HF_TOKEN"]) == 2
    assert main(["export", str(tmp_path / f"{CANARY}-HF_TOKEN")]) == 1
    try:
        raise ValueError(f"{CANARY}-DB_PASSWORD")
    except ValueError:
        logging.getLogger("a").exception("with %s", f"{CANARY}-HF_TOKEN")
    output = capsys.readouterr().err
    assert "with ***" in output and "ValueError: ***" in output and CANARY not in output


# -- processes -------------------------------------------------------------------------------------


def test_a_workers_environment_holds_only_the_secrets_that_it_needs(environment: None):
    env = worker_env(1, "cpu", "float32", take_turns=True)
    withheld = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "JUDGE_API_KEY")
    assert {env[name] for name in withheld} == {""}
    assert "HF_TOKEN" not in env and "PLAIN" not in env, "inherited"
    assert not any(CANARY in value for value in env.values()), "Ray's dashboard shows them"


def log_of_worker(program: str, folder: Path) -> str:
    """Run a program in a new process; returns what it writes to the log file, its argument."""
    root = Path(__file__).parent.parent.parent
    log = folder / "w.log"
    subprocess.run(
        [sys.executable, "-c", program, str(log)],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        check=True,
    )
    return log.read_text()


def test_a_worker_drops_its_nodes_secrets_and_logs_none(environment: None, tmp_path: Path):
    program = (
        "import sys; from hybridrl.runtime.host import build, log_of; "
        "log_of(sys.argv[1], {}); build('tests.support.logged_secrets:Failing', {})"
    )
    log = log_of_worker(program, tmp_path)
    assert "RuntimeError: HF_TOKEN=***, others ['HF_TOKEN']" in log and CANARY not in log


def test_a_worker_logs_neither_the_secrets_it_dropped_nor_those_of_its_settings(
    environment: None, tmp_path: Path
):
    program = (
        "import sys; from tests.support.logged_secrets import build_judge; build_judge(sys.argv[1])"
    )
    log = log_of_worker(program, tmp_path)
    assert log == "WARNING judge: *** refused, node had ***, https://judge:8000\n"


SEES = """
import os
from pathlib import Path
def sees(completions):
    seen = repr(dict(os.environ)) + Path("/proc/self/environ").read_text()
    return [float(word in seen) for word in completions]
"""


def test_a_reward_process_starts_without_secrets_and_its_owner_retains_them(
    environment: None, tmp_path: Path
):
    (tmp_path / "sees.py").write_text(SEES)
    pool = RewardPool(
        {"sees": RewardCall(function=f"{tmp_path}/sees.py:sees", options={})},
        processes=1,
        timeout_s=10,
        max_timeouts=0.5,
    )
    names = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", CANARY]
    outcomes = pool.call("sees", {"completions": [*names, "plain-value"]})
    pool.close()
    assert outcomes == [0.0] * len(names) + [1.0]
    assert os.environ["HF_TOKEN"] == f"{CANARY}-HF_TOKEN"


def test_a_token_file_that_ray_creates_is_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    with private_token():
        assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    with private_token():
        token.write_text("t")
        token.chmod(0o644)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


# -- names and files that come with data and models ------------------------------------------------


def test_a_target_in_settings_data_or_a_model_is_never_called(tmp_path: Path):
    hit = tmp_path / "hit"
    call = {"_target_": "pathlib.Path.touch", "_args_": [str(hit)]}
    with pytest.raises(ConfigError, match=r"countdown takes num_numbers"):
        load_problems(
            load_config(
                [*BASE, f"+data.options={{_target_: pathlib.Path.touch, _args_: [{hit}]}}"]
            ).data,
            seed=0,
        )
    with pytest.raises(ConfigError, match=r"no such setting"):
        load_config([*BASE, "+train._target_=os.getcwd"])
    model = save_tiny(tmp_path / "model", 0)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        stored = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(stored | call))
    load_tokenizer(str(model))
    load_output_head(str(model), "float32")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 2=3:", **call}) + "\n")
    config = DataConfig(task="records", path=str(rows), heldout_path=str(rows))
    assert load_problems(config, seed=0)[0][0].columns == call, "a column like any other"
    assert not hit.exists()


@pytest.mark.parametrize("uid", ["../../x", "/etc/passwd", "a/../../b", "\u202e"])
def test_a_name_inside_of_a_row_is_neither_a_uid_nor_a_path(tmp_path: Path, uid: str):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 2=3:", "uid": uid, "id": uid}) + "\n")
    config = DataConfig(task="records", path=str(rows), heldout_path=str(rows))
    problem = load_problems(config, seed=0)[0][0]
    assert (problem.uid, problem.columns) == ("train-000001", {"uid": uid, "id": uid})


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "/other/model.safetensors"])
def test_the_index_of_a_model_cannot_point_outside_of_its_folder(tmp_path: Path, outside: str):
    model = save_tiny(tmp_path / "model", 0)
    save_tiny(tmp_path / "other", 1)
    outside = outside if outside.startswith("..") else f"{tmp_path}{outside}"
    index = {"weight_map": {"model.embed_tokens.weight": outside}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside of the folder"):
        load_output_head(str(model), "float32")


# -- unusable prompts: refused before anything starts, with the row's number -----------------------


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        (
            "9 " * 40,
            None,
            "the prompt has 81 tokens, rollout.max_model_len - rollout.max_new_tokens leaves room "
            "for 48",
        ),
        (" ", None, "the prompt is empty"),
        ([{"role": "user", "content": "1"}], None, "the model's tokenizer has no chat template"),
        (
            [{"role": "user", "content": "1"}],
            "{% for m in messages %}{{ m.content }",
            "the model's chat template refuses it",
        ),
        (
            [{"role": "user", "content": "1"}],
            "{{ messages[5].content.x }}",
            "the model's chat template refuses it",
        ),
        (
            [{"role": "user", "content": "1"}],
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "the model's chat template refuses it",
        ),
    ],
)
def test_a_row_that_the_model_cannot_read_is_named_by_its_number(
    tmp_path: Path, row: object, template: str | None, message: str
):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "rows.jsonl"
    prompts = ("1", row) if isinstance(row, str) else (row,)
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    config = DataConfig(task="records", path=str(path), heldout_path=str(path))
    number = 2 if isinstance(row, str) else 1
    with pytest.raises(DataError) as caught:
        tokenize(load_problems(config, seed=0)[0], tokenizer, config, max_prompt_tokens=48)
    assert str(caught.value).startswith(f"{path}:{number}: {message}")
