"""The models that a command can name: runs, their checkpoints, exports and teachers, and
folders.
"""

import shutil
from pathlib import Path

import pytest

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.launch.evaluating import folder_of, problem_sets
from hybridrl.launch.export import export_checkpoint
from hybridrl.launch.generating import FROM_FILE
from hybridrl.launch.loadable_model import find_model, model_folder, of_folder
from hybridrl.models.loading import resolve
from hybridrl.run_dir.directory import find_checkpoint, run_directory
from hybridrl.settings.compose import load_config
from tests.run_dir.test_directory import settings_of
from tests.test_cli import save_checkpoint, save_steps


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 10, 20 (the best) and 30."""
    run_dir = tmp_path_factory.mktemp("model") / "run"
    save_steps(run_dir)
    return run_dir


def test_a_run_is_its_newest_checkpoint_with_its_own_settings(run: Path):
    model = find_model(str(run), ["rollout.max_new_tokens=7"])
    assert (model.step, model.teacher, model.name) == (30, None, f"{run}, step 30")
    assert model.config.path == str(run / "export" / "step_000030")
    assert model.settings.rollout.max_new_tokens == 7, "of the command"
    assert list(model.settings.teachers) == ["main"], "of the run"


def test_a_step_the_best_one_a_checkpoint_and_an_export_are_found_in_their_run(run: Path):
    assert find_model(str(run), step="10").step == 10
    assert find_model(str(run), step="best").step == 20
    assert find_model(str(run / "checkpoints" / "step_000020")).step == 20
    export_checkpoint(run, step="10")
    exported = find_model(str(run / "export" / "step_000010"))
    assert exported.step == 10 and list(exported.settings.teachers) == ["main"]


def test_a_teacher_is_loaded_with_the_settings_of_its_run(run: Path):
    model = find_model(str(run), teacher="main")
    assert model.step is None and model.teacher == "main"
    assert model.config.path == model.settings.teachers["main"].path
    assert model.settings.model.path == "builtin:countdown-student", "its tokenizer decodes"
    assert model_folder(str(run), teacher="main") == resolve(model.config.path)


def test_a_model_of_no_run_has_the_default_settings_or_those_of_a_run(run: Path):
    student = "builtin:countdown-student"
    bare = find_model(student, ["generate.samples=3"])
    assert (bare.run_dir, bare.config.path, bare.settings.generate.samples) == (None, student, 3)
    assert bare.settings.teachers == {} and bare.settings.rollout.max_new_tokens is None
    assert bare.device == "cpu"
    assert find_model(student, ["cluster.device=cuda"]).device == "cuda"
    as_in_run = find_model(student, settings_of=str(run))
    assert as_in_run.config.path == student and as_in_run.settings.rollout.max_new_tokens


def test_an_end_token_is_that_of_the_command_or_of_the_model_of_the_settings():
    """The end token of the settings is not used for another model, which may not have it."""
    student = "builtin:countdown-student"
    assert find_model(student, ["model.eos=3"]).settings.model.eos == "3"
    settings = load_config(["experiment=quickstart", "run.dir=x", "model.eos=3"])
    for folder, eos in ((student, "3"), ("builtin:countdown-teacher", None)):
        assert of_folder(settings, folder, [], is_students=False).model.eos == eos
    other = of_folder(settings, "builtin:countdown-teacher", ["model.eos=3"], is_students=False)
    assert other.model.eos == "3"


def test_the_folder_of_the_settings_has_their_end_token_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Another model uses its own end token, and a line of the log says so."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "other"):
        shutil.copytree(resolve("builtin:countdown-student"), tmp_path / name)
    settings = load_config(
        ["experiment=quickstart", "run.dir=x", "model.path=base/", "model.eos=3"]
    )
    for folder in ("base", "./base", str(tmp_path / "base")):
        assert of_folder(settings, folder, [], is_students=False).model.eos == "3"
    assert caplog.text == ""
    assert of_folder(settings, "other", [], is_students=False).model.eos is None
    assert "model.eos=3 belongs to model.path=base/ and not to other" in caplog.text


def test_each_export_of_a_step_has_results_of_its_own(run: Path):
    """The name of an export may also lack a step."""
    names = ("step_000010-bfloat16", "final")
    for name in names:
        export_checkpoint(run, run / "export" / name, step="10")
    models = [find_model(str(run / "export" / name)) for name in names]
    assert [model.step for model in models] == [10, None]
    assert [model.name for model in models] == [f"{run}, {name}" for name in names]
    assert [folder_of(model, None) for model in models] == [run / "evals" / name for name in names]
    newest = find_model(str(run))
    assert folder_of(newest, None) == run / "evals" / "step_000030"


def test_a_teacher_with_an_engine_of_its_own_is_sampled_by_one_like_it(run: Path):
    engine = "++teachers.main.engine={max_num_seqs: 3}"
    drawn = "++teachers.main.evidence=drawn"
    model = find_model(str(run), [engine, drawn], teacher="main")
    assert model.settings.rollout.max_num_seqs == 3


def test_for_the_prompts_of_a_file_the_data_sources_of_a_run_are_left_out(tmp_path: Path):
    """The held-out problems of the run, in contrast, come from its sources."""
    run_dir = tmp_path / "run"
    sources = "+data.sources={a: {task: countdown, weight: 3}, b: {task: countdown}}"
    save_checkpoint(run_dir, sources, "data.num_train=4", "data.num_heldout=2")
    model = find_model(str(run_dir))
    assert model.settings.data.weights == {"a": 3.0, "b": 1.0}
    [heldout] = problem_sets(model, [])
    assert [p.uid for p in heldout.prompts] == [
        f"{name}/heldout-00000{i}" for i in range(2) for name in "ab"
    ]
    of_file = find_model(str(run_dir), [*FROM_FILE, "data.columns={prompt: question}"])
    assert of_file.settings.data.sources == {}
    assert of_file.settings.data.columns["prompt"] == "question"


def test_for_the_prompts_of_a_file_the_generator_of_a_run_is_left_out(tmp_path: Path):
    run_dir = tmp_path / "run"
    generator = ["data.task=reasoning_gym", "data.dataset=chain_sum"]
    reward = ["+reward.functions.gym=reasoning_gym", "~reward.functions.countdown"]
    save_checkpoint(run_dir, *generator, *reward, "data.options={}")
    assert find_model(str(run_dir)).settings.data.dataset == "chain_sum"
    assert find_model(str(run_dir), FROM_FILE).settings.data.task == "records"


def test_the_settings_of_a_run_with_adapters_have_none_as_its_export_is_merged(run: Path):
    config = run / "config.yaml"
    before = config.read_text()
    try:
        config.write_text(before.replace("  rank: null", "  rank: 4"))
        assert "rank: 4" in config.read_text()
        assert find_model(str(run), step="10").settings.lora.rank is None
    finally:
        config.write_text(before)


@pytest.mark.parametrize(
    ("source", "options", "error", "words"),
    [
        ("RUN", {"step": "11"}, CheckpointError, "no checkpoint of that step, only of 10, 20, 30"),
        ("RUN", {"step": "x"}, ConfigError, "--step x: must be the number of a step, or best"),
        ("RUN", {"teacher": "x"}, ConfigError, "has no such teacher; it has main"),
        ("RUN", {"teacher": "main", "step": "10"}, ConfigError, "a teacher is frozen"),
        ("RUN", {"settings_of": "f.yaml"}, ConfigError, "has the settings of its run"),
        ("RUN", {"overrides": ["model.path=x"]}, ConfigError, "model.path: is the model that"),
        ("RUN/checkpoints/step_000010", {"step": "10"}, ConfigError, "is one checkpoint"),
        ("EMPTY", {}, ConfigError, r"is neither a run \(no config\.yaml\) nor a model \(no "),
        ("RUN/checkpoints", {}, ConfigError, "name a run, one of its checkpoints or exports, or"),
        ("EMPTY/x", {}, ConfigError, "there is no such folder"),
        ("builtin:countdown-student", {"step": "1"}, ConfigError, "is not a run, and only the"),
        ("builtin:countdown-student", {"teacher": "a"}, ConfigError, "is not a run, and only a"),
    ],
)
def test_what_is_no_model_or_does_not_fit_is_refused_in_one_sentence(
    source: str, options: dict, error: type[Exception], words: str, run: Path, tmp_path: Path
):
    source = source.replace("RUN", str(run)).replace("EMPTY", str(tmp_path))
    with pytest.raises(error, match=words) as caught:
        find_model(source, options.pop("overrides", ()), **options)
    assert "\n" not in str(caught.value)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path):
    settings = settings_of(tmp_path / "run")
    with run_directory(settings) as run_dir:
        find_checkpoint(settings, run_dir, {})
    with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
        find_model(str(tmp_path / "run"))


def test_a_checkpoint_outside_of_its_run_is_refused(tmp_path: Path):
    save_checkpoint(tmp_path / "run")
    moved = tmp_path / "step_000010"
    (tmp_path / "run" / "checkpoints" / "step_000010").rename(moved)
    with pytest.raises(ConfigError, match="a checkpoint outside of its run"):
        find_model(str(moved))
