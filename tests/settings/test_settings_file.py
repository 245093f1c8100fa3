"""Settings from a file, from a run's own config.yaml, and the checks of --dry-run."""

import json
from pathlib import Path

import pytest

from hybridrl import __version__
from hybridrl.cli import hydra_flags, main
from hybridrl.core.errors import ConfigError, RunDirectoryError
from hybridrl.run_dir.directory import describe_directory
from hybridrl.settings.compose import load_config, to_yaml
from hybridrl.settings.run import RunSettings
from hybridrl.settings.settings_file import continued_run, load_settings, own_file, saved_config
from tests.run_dir.test_directory import start

QUICKSTART = ["experiment=quickstart", "run.dir=x"]


def write(folder: Path, text: str) -> Path:
    """Write a settings file; returns its path."""
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def composed(path: Path, *overrides: str) -> RunSettings:
    with own_file(path) as base:
        return load_config([*base, *overrides])


def test_a_file_of_settings_equals_the_same_overrides(tmp_path: Path):
    text = "experiment: quickstart\nalgorithm: grpo\ntrain: {lr: 2.0e-4}\nrun: {dir: x}\n"
    path = write(tmp_path, text)
    assert composed(path) == load_config([*QUICKSTART, "algorithm=grpo", "train.lr=2e-4"])


def test_overrides_of_the_command_line_take_precedence_over_the_file(tmp_path: Path):
    path = write(tmp_path, "experiment: quickstart\nalgorithm: grpo\ntrain: {lr: 2.0e-4}\n")
    expected = load_config([*QUICKSTART, "algorithm=opd", "train.lr=0.5"])
    assert composed(path, "run.dir=x", "algorithm=opd", "train.lr=0.5") == expected


def test_a_file_may_name_teachers_and_rewards_of_its_own_and_read_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("STUDENT", "some/where")
    text = "model: {path: '${oc.env:STUDENT}'}\nteachers: {big: {path: other}}\nrun: {dir: x}\n"
    rollout = "algorithm: opd\nrollout: {max_new_tokens: 16, max_model_len: 64}\n"
    settings = composed(write(tmp_path, text + rollout + "data: {task: countdown}\n"))
    assert settings.model.path == "some/where" and settings.teachers["big"].path == "other"


def test_a_file_with_a_defaults_list_is_passed_to_hydra(tmp_path: Path):
    text = "defaults: [quickstart, {override /algorithm: opd}, _self_]\nrun: {dir: x}\n"
    path = write(tmp_path, text)
    assert composed(path) == load_config([*QUICKSTART, "algorithm=opd"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1, 2]", "must be a mapping of settings"),
        ("train: {lr: 1", "is not a YAML file of settings"),
        ("\x00", "is not a YAML file of settings"),
        ("[" * 3000, "is nested too deeply; write fewer levels"),
        ("algorithm: grop", "algorithm: grop: no such choice; did you mean grpo?"),
        (
            "experiment: quickstart\ntrain: {stepz: 3}\nrun: {dir: x}",
            "train.stepz: no such setting",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, text: str, sentence: str
):
    with pytest.raises(ConfigError) as raised:
        composed(write(tmp_path, text))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_saved_config_loads_to_the_same_settings(tmp_path: Path):
    settings = load_config([*QUICKSTART, "algorithm=dpo", "data.system_prompt=null"])
    path = write(tmp_path, to_yaml(settings))
    with saved_config(path) as base:
        assert load_config(base) == settings
        assert load_config([*base, "train.steps=7"]).train.steps == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {path: '${oc.env:HOME}'}", "model.path: holds a reference ${...}"),
        ("data: {options: {a: ['x${oc.env:HOME}']}}", "data.options.a: holds a reference"),
        ("hydra: {searchpath: ['file:///tmp']}", "hydra is not a setting"),
        ("defaults: [quickstart]", "defaults is not a setting"),
    ],
)
def test_a_saved_config_is_data_and_cannot_configure_hydra(
    tmp_path: Path, text: str, sentence: str
):
    with pytest.raises(ConfigError) as raised, saved_config(write(tmp_path, text)):
        pass
    assert sentence in str(raised.value)


def test_a_command_continues_a_run_only_where_it_selects_no_file_of_conf(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("")
    directory = f"run.dir={tmp_path}"
    assert continued_run([directory, "train.steps=3"]) == tmp_path / "config.yaml"
    assert continued_run([directory, "algorithm=grpo"]) is None
    assert continued_run([directory, "experiment=quickstart"]) is None
    assert continued_run(["run.dir=elsewhere"]) is None and continued_run([]) is None


def test_run_dir_alone_continues_the_run_with_its_own_settings(tmp_path: Path):
    settings = load_config(["experiment=quickstart", f"run.dir={tmp_path}", "algorithm=opd"])
    start(settings, step=10)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    assert load_settings([f"run.dir={tmp_path}"]) == settings
    assert describe_directory(settings, {}) == "continues after step 10"
    with pytest.raises(RunDirectoryError, match=r"train\.lr: 0\.001 -> 0\.5"):
        describe_directory(load_settings([f"run.dir={tmp_path}", "train.lr=0.5"]), {})
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("directory", ["7", "20240501", "'${oc.env:STORE}/a'"])
def test_a_run_is_continued_whatever_the_form_of_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    settings = load_config(["experiment=quickstart", f"run.dir={directory}"])
    assert continued_run([f"run.dir={directory}"]) is None
    folder = Path(settings.run.dir)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(settings))
    assert load_settings([f"run.dir={directory}"]) == settings


def test_a_directory_of_a_variable_that_is_not_set_is_no_run_to_continue():
    assert continued_run(["run.dir=${oc.env:NO_SUCH_VARIABLE}/a"]) is None
    assert continued_run(["run.dir=null"]) is None


def test_the_command_that_began_a_run_continues_it_with_the_entries_that_it_added(tmp_path: Path):
    command = [
        f"run.dir={tmp_path}",
        "model.path=builtin:countdown-student",
        "data.task=countdown",
        "rollout.max_new_tokens=16",
        "rollout.max_model_len=64",
        "+teachers.big.path=builtin:countdown-teacher",
        "+reward.functions.mine=countdown",
        "++reward.functions.other={function: countdown, weight: 0.5}",
        "+eval.sets.small={task: countdown, num_problems: 3}",
    ]
    settings = load_settings(command)
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert load_settings(command) == settings
    assert load_settings([*command, "+train.steps=7"]).train.steps == 7
    with pytest.raises(ConfigError, match=r"there is a teachers\.big\.path already"):
        load_config([*command, "+teachers.big.path=x"])


def test_a_dry_run_shows_the_models_input_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "3 7=21:", "completion": "3*7"}, {"prompt": "2 2=4:", "completion": "2+2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "data.task=jsonl",
        "data.path=rows.jsonl",
        "data.heldout_path=rows.jsonl",
        "train.prompts_per_step=1",
        "train.samples_per_prompt=4",
        "train.steps=4",
        "~reward.functions.countdown",
    ]
    assert main(["train", *QUICKSTART, "algorithm=opd", *overrides, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1 prompts x 4 responses = 4; 4 steps pass over the data 2 times, once in 2 steps" in out
    assert "prompt 1, 8 tokens as the model sees them:\n<bos>3 7=21:\n" in out
    assert "of the data, 4 tokens" not in out, "opd uses no responses of the data"
    assert main(["train", *QUICKSTART, "algorithm=sft", *overrides, "--dry-run"]) == 0
    assert "response 1 of the data, 4 tokens:\n3*7<eos>\n" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_dry_run_of_a_wrong_setting_prints_its_sentence_and_returns_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert main(["train", *QUICKSTART, "train.stepz=3", "--dry-run"]) == 2
    sentence = "hybridrl: train.stepz=3: no such setting; did you mean train.steps?\n"
    assert capsys.readouterr().err == sentence
    assert main(["train", *QUICKSTART, "checkpoint.best=reward/men", "--dry-run"]) == 2
    assert "there is no such metric" in capsys.readouterr().err
    assert main(["train", "--config"]) == main(["train", "--config=a", "--config=b"]) == 2


def test_a_folder_of_settings_and_a_file_work_beside_hydras_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    (tmp_path / "mine/experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [quickstart, _self_]\ntrain: {steps: 3}\n"
    (tmp_path / "mine/experiment/short.yaml").write_text(text)
    runs: list[RunSettings] = []

    def record(settings: RunSettings) -> int:
        runs.append(settings)
        return 0

    arguments = ["--config-dir", str(tmp_path / "mine"), "experiment=short", "run.dir=x"]
    assert hydra_flags(arguments, record) == 0
    with own_file(write(tmp_path, "experiment: quickstart\ntrain: {steps: 4}\n")) as base:
        sweep = [*base, "-m", "run.dir=a,b"]
        assert hydra_flags(sweep, record) == 0
    assert [(s.run.dir, s.train.steps) for s in runs] == [("x", 3), ("a", 4), ("b", 4)]


def test_version_is_printed_and_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hybridrl {__version__}\n"
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "hybridrl: trian: no such verb; did you mean train?\n"
    assert main(["fly"]) == 2
    assert "no such verb; it must be one of train, plan, report" in capsys.readouterr().err
