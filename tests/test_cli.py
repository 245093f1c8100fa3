"""The command line without Ray: help, bad settings, Hydra's flags, sweeps, and export."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from hybridrl.cli import exit_status, hydra_flags, main
from hybridrl.core.errors import Preempted
from hybridrl.core.json_lines import Appender
from hybridrl.models.loading import VALUE_HEAD, load_model, load_value_head
from hybridrl.run_dir.checkpoint import Checkpointer, read_checkpoint
from hybridrl.run_dir.directory import find_checkpoint, run_directory
from hybridrl.run_dir.ledger import Ledger
from hybridrl.run_dir.saved_file import seal
from hybridrl.settings.checkpointing import CheckpointConfig
from hybridrl.settings.compose import load_config, to_yaml
from hybridrl.settings.run import RunSettings
from hybridrl.tracking.jsonl import JsonlSink
from hybridrl.types import Files, RunInfo
from hybridrl.weights.fragments import MASTER, PARTS, Fragment, FragmentReader, write_fragments
from tests.run_dir.test_directory import STATE, settings_of, start

# -- export ----------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_with_equal_weights_in_the_models_dtype(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    trained = save_checkpoint(tmp_path, "model.dtype=bfloat16")
    assert main(["export", str(tmp_path)]) == 0
    folder = tmp_path / "export" / "step_000010"
    assert capsys.readouterr().out == f"{folder}\n"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16 and loaded.config.tie_word_embeddings
    weights = dict(loaded.named_parameters())
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name].bfloat16()) for name in trained)
    assert torch.equal(load_value_head(str(folder), setting="path"), torch.full((1, 128), 0.75))
    assert main(["export", str(tmp_path)]) == 0, "again replaces it"


class Learned:
    """A learner of one rank that holds `fragments`."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.fragments = fragments

    def state_bytes(self) -> int:
        return 0

    def begin_save(self, folder: str) -> Files:
        saved = [seal(write_fragments(Path(folder), 0, 1, self.fragments))]
        return lambda: saved


def save_checkpoint(run_dir: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Write a checkpoint in the learner's form, with other weights than the student's; returns
    them.
    """
    settings = settings_of(run_dir, *overrides)
    model = load_model("builtin:countdown-student")
    weights = {name: (p.detach() * 1.25).contiguous() for name, p in model.named_parameters()}
    parameters = {**weights, VALUE_HEAD: torch.full((1, 128), 0.75)}
    fragments = [
        Fragment(
            name=n,
            shape=tuple(t.shape),
            offset=0,
            tensors={part: t.flatten().clone() for part in PARTS},
        )
        for n, t in parameters.items()
    ]
    with run_directory(settings) as folder:
        find_checkpoint(settings, folder, {})
        Checkpointer(folder, CheckpointConfig()).save(STATE, [Learned(fragments)])
    return weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with a checkpoint of step 10, for tests that write nothing into it."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder)
    return folder


def test_the_newest_sound_checkpoint_is_exported_into_a_folder_of_ones_choice(tmp_path: Path):
    save_checkpoint(tmp_path / "run")
    folder = Checkpointer(tmp_path / "run", CheckpointConfig()).save(
        replace(STATE, step=20), [Learned([])]
    )
    (folder / "learner-rank00000-of-00001.safetensors").write_text("damaged")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.float32
    assert not (tmp_path / "run" / "export").exists()


def test_an_export_overwrites_nothing_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture):
    save_checkpoint(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 0, (
        "an empty folder is fine"
    )
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine")]) == 2
    assert (
        capsys.readouterr().err
        == f"hybridrl: {tmp_path / 'mine'}: exists and is not empty; name a new folder\n"
    )


def test_a_checkpoint_without_its_run_has_the_runs_template_or_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[-1]['content'] }}")
    save_checkpoint(tmp_path / "run", f"data.chat_template_file={own}")
    moved = (tmp_path / "run/checkpoints/step_000010").rename(tmp_path / "step_000010")
    (tmp_path / "run/config.yaml").rename(moved / "config.yaml")
    assert main(["export", str(moved), str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == own.read_text()
    own.unlink()
    capsys.readouterr()
    assert main(["export", str(moved), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith(
        f"hybridrl: data.chat_template_file={own}: does not exist, nor does "
    )
    assert not (tmp_path / "other").exists()


def save_steps(run_dir: Path) -> dict[int, torch.Tensor]:
    """Write a run with checkpoints of steps 10, 20 (the best) and 30; returns the norm weight of
    each.
    """
    save_checkpoint(run_dir, "checkpoint.best=eval/accuracy", "checkpoint.keep=9")
    reader = FragmentReader(run_dir / "checkpoints" / "step_000010")
    weights = {10: reader.whole(MASTER, "model.norm.weight")}
    for step, accuracy in ((20, 0.9), (30, 0.1)):
        whole = {name: reader.whole(MASTER, name) + step for name in reader.shapes}
        fragments = [
            Fragment(
                name=name,
                shape=tuple(t.shape),
                offset=0,
                tensors={part: t.flatten().clone() for part in PARTS},
            )
            for name, t in whole.items()
        ]
        state = replace(STATE, step=step, metrics={"eval/accuracy": accuracy})
        Checkpointer(run_dir, CheckpointConfig(keep=9)).save(state, [Learned(fragments)])
        weights[step] = whole["model.norm.weight"]
    return weights


@pytest.mark.parametrize(
    ("source", "options", "step", "name", "dtype"),
    [
        ("", [], 30, "step_000030", torch.float32),
        ("", ["--step", "10"], 10, "step_000010", torch.float32),
        ("", ["--step=best", "--dtype=bfloat16"], 20, "step_000020-bfloat16", torch.bfloat16),
        ("checkpoints/step_000020", [], 20, "step_000020", torch.float32),
    ],
)
def test_any_checkpoint_of_a_run_is_exported_in_any_dtype(
    source: str, options: list[str], step: int, name: str, dtype: torch.dtype, tmp_path: Path
):
    weights = save_steps(tmp_path)
    assert main(["export", str(tmp_path / source), *options]) == 0
    (folder,) = (tmp_path / "export").iterdir()
    assert folder.name == name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype
    assert torch.equal(loaded.model.norm.weight, weights[step].to(dtype))


@pytest.mark.parametrize(
    ("source", "options", "status", "sentence"),
    [
        ("", ["--step", "15"], 1, "holds no checkpoint of that step, only of 10"),
        ("", ["--step", "last"], 2, "--step last: must be the number of a step, or best"),
        ("", ["--step", "-1"], 2, "--step -1: must be the number of a step, or best"),
        ("", ["--step", "best"], 2, "no checkpoint.best, the metric to choose by; give one of its"),
        ("", ["--dtype", "int8"], 2, "--dtype int8: must be float32 or bfloat16"),
        ("", ["--dtpye", "float32"], 2, "unrecognized arguments: --dtpye"),
        ("checkpoints/step_000010", ["--step", "10"], 2, "is one checkpoint; give its run direct"),
    ],
)
def test_an_export_of_what_is_not_there_is_one_sentence(
    source: str,
    options: list[str],
    status: int,
    sentence: str,
    saved: Path,
    capsys: pytest.CaptureFixture,
):
    assert main(["export", str(saved / source), *options]) == status
    assert sentence in capsys.readouterr().err
    assert not (saved / "export").exists()


def test_nothing_to_export_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["export", str(tmp_path)]) == 1
    assert "config.yaml: cannot be read" in capsys.readouterr().err
    start(settings_of(tmp_path), step=None)
    assert main(["export", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().err
        == f"hybridrl: {tmp_path / 'checkpoints'}: no checkpoint to export; train until the "
        "first, see checkpoint.every\n"
    )
    assert main(["export"]) == main(["export", "a", "b", "c"]) == main(["export", "-x"]) == 2


# -- the command line ------------------------------------------------------------------------------


def hydra_job(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path, status: int = 0
) -> tuple[int, list[RunSettings]]:
    """The exit status of `hybridrl train ARGUMENTS`, and the settings of each job that it would
    run.
    """
    ran: list[RunSettings] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    return hydra_flags(
        ["experiment=quickstart", *arguments], lambda settings: ran.append(settings) or status
    ), ran


def test_the_jobs_of_a_sweep_each_have_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    status, ran = hydra_job(
        ["-m", "train.lr=1e-3,1e-4", "run.dir=runs/${hydra:job.num}"], monkeypatch, tmp_path
    )
    assert status == 0 and [(s.run.dir, s.train.lr) for s in ran] == [
        ("runs/0", 1e-3),
        ("runs/1", 1e-4),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["multirun"], "Hydra's own record, no log file"


def test_two_jobs_of_a_sweep_may_not_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    status, ran = hydra_job(["-m", "learner.ranks=1,2", "run.dir=x"], monkeypatch, tmp_path)
    assert (status, [s.learner.ranks for s in ran]) == (2, [1])
    assert (
        capsys.readouterr().err == "hybridrl: run.dir=x: an earlier job of the sweep uses this "
        "folder; set run.dir='runs/${hydra:job.num}'\n"
    )


def test_a_failed_job_of_a_sweep_does_not_stop_the_others_and_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    status, ran = hydra_job(
        ["-m", "train.lr=-1,1e-4", "run.dir=runs/${hydra:job.num}"], monkeypatch, tmp_path
    )
    assert (status, [s.train.lr for s in ran]) == (2, [1e-4])
    assert hydra_job(["-m", "run.dir=a,b"], monkeypatch, tmp_path, status=1)[0] == 1


@pytest.mark.parametrize(
    ("how", "status", "sentence"),
    [
        (
            Preempted("ended by SIGTERM; run the same command again to continue"),
            75,
            "ended by SIGTERM; run the same command again to continue",
        ),
        (KeyboardInterrupt(), 130, "ended at once by Ctrl-C; what was saved before is intact"),
    ],
)
def test_a_sweep_whose_job_was_told_to_end_starts_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    how: BaseException,
    status: int,
    sentence: str,
):
    ran: list[str] = []

    def interrupted(settings: RunSettings) -> int:
        ran.append(settings.run.dir)
        raise how

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        hydra_flags(["experiment=quickstart", "-m", "run.dir=a,b"], interrupted)
    assert (ended.value.code, ran) == (status, ["a"])
    assert capsys.readouterr().err == f"hybridrl: {sentence}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["-m", "run.dir=x", "train.stepz=3"],
            "train.stepz=3: no such setting; did you mean train.steps?",
        ),
        (["-m", "run.dir=x", "train.lr=-1"], "train.lr=-1.0: must be positive and finite"),
        (
            ["-m", "train.lr=1"],
            "run.dir is not set: it has no default; add run.dir=... to the command",
        ),
        (
            ["--cfg", "job", "train.stepz=3"],
            "train.stepz=3: no such setting; did you mean train.steps?",
        ),
    ],
)
def test_a_bad_setting_beside_a_hydra_flag_is_one_sentence_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    sentence: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert main(["train", "experiment=quickstart", *arguments]) == 2
    assert capsys.readouterr().err == f"hybridrl: {sentence}\n"


def test_help_names_every_verb_and_train_help_says_how_to_sweep(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    assert main([]) == main(["--help"]) == 0
    output = capsys.readouterr().out
    assert main(["fly"]) == 2
    verbs = capsys.readouterr().err.rstrip().rpartition("it must be one of ")[2].split(", ")
    assert len(verbs) == 12 and all(f"hybridrl {verb} " in output for verb in verbs)
    assert main(["export", "--help"]) == main(["report", "--help"]) == 0
    assert main(["trian"]) == 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit, match="0"):  # Hydra's own way to end
        main(["train", "--help"])
    assert "run.dir='runs/${hydra:job.num}'" in capsys.readouterr().out


def write_a_row(run_dir: Path) -> None:
    with closing_sink(run_dir) as sink:
        sink.log({"train/step": 2, "reward/mean": 0.5})


def write_a_line(run_dir: Path) -> None:
    with closing(Ledger(run_dir, first_step=1)) as ledger:
        ledger.record(2, ["train-000001@0"])


@contextmanager
def closing_sink(run_dir: Path) -> Iterator[JsonlSink]:
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(run_dir), name="x", total_steps=2, first_step=1, config={}))
    try:
        yield sink
    finally:
        sink.close(1)


@pytest.mark.parametrize(
    ("write", "name"), [(write_a_row, "metrics.jsonl"), (write_a_line, "ledger.jsonl")]
)
def test_a_file_that_cannot_grow_ends_the_run_in_one_sentence_and_the_checkpoint_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture, write: Callable[[Path], None], name: str
):
    checkpoint = Checkpointer(tmp_path, CheckpointConfig()).save(STATE, [])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run() -> int:
        write(tmp_path)
        return 0

    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20, before[1])
    )  # like a full disk, except for the error number
    try:
        status = exit_status(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert capsys.readouterr().err == (
        f"hybridrl: {tmp_path / name}: File too large; what was saved before is intact: fix this "
        "and run the same command again\n"
    )
    assert read_checkpoint(checkpoint).state == STATE
    assert exit_status(run) == 0, "the same command, once there is room"
    assert len((tmp_path / name).read_text().splitlines()) == 1, "the torn line is cut"


def test_a_full_disk_is_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    def run() -> int:
        with closing(Appender(Path("/dev/full"))) as full:
            full.append("a line")
        return 0

    assert exit_status(run) == 1
    assert capsys.readouterr().err.startswith("hybridrl: /dev/full: No space left on device; ")


def test_an_error_of_the_system_that_names_no_file_is_not_hidden():
    def run() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        exit_status(run)


def test_hydra_shows_the_settings_with_which_a_run_would_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    given = ["experiment=quickstart", "algorithm=opd_full", f"run.dir={tmp_path}", "train.lr=0.25"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(given)))
    arguments = ["train", f"run.dir={tmp_path}", "+teachers.main.weight=2", "--cfg", "job"]
    assert main(arguments) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["lr"] == 0.25
    assert shown["algorithm"]["support"] == "full"
    assert shown["teachers"]["main"]["weight"] == 2
