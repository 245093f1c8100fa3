"""One run per directory: which settings and inputs may change when it continues, and the errors for
those that may not.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from hybridrl.controller.evaluation import judges_of, summary
from hybridrl.core.errors import CheckpointError, ConfigError, RunDirectoryError
from hybridrl.kernels.products import Processor
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.launch.run_result import ExitReason, run_result
from hybridrl.launch.teacher_levels import (
    TEACHER_LEVELS,
    conditions_of,
    files_of,
    read_levels,
    same_levels,
    write_levels,
)
from hybridrl.models import arithmetic
from hybridrl.run_dir import contents
from hybridrl.run_dir.checkpoint import Checkpointer, RunState, SettingsFile
from hybridrl.run_dir.contents import CACHED_FROM, digest
from hybridrl.run_dir.directory import (
    check_inputs,
    describe_directory,
    earlier_settings,
    find_checkpoint,
    read_settings,
    run_directory,
)
from hybridrl.run_dir.directory import settings_of as read_settings_of_checkpoint
from hybridrl.run_dir.inputs import digests, pinned
from hybridrl.run_dir.setting_changes import FREE, changes, flat
from hybridrl.settings.choices import Products, Resume
from hybridrl.settings.compose import load_config
from hybridrl.settings.rewards import RewardFunctionConfig
from hybridrl.settings.run import RunConfig, RunSettings
from hybridrl.settings.settings_file import load_settings
from hybridrl.tracking.jsonl import JsonlSink
from hybridrl.types import FinishReason, Prompt, Rewards, RunInfo, Sample
from tests.support.graph import save_tiny

STATE = RunState(
    step=10, weight_version=10, optimizer_steps=10, parts={}, metrics={}, trackers={"wandb": "one"}
)
CONSTANT_WEIGHT = "algorithm.reward_weight={kind: constant, end: null}"
CONSTANT = ["train.lr_end=null", CONSTANT_WEIGHT]


def settings_of(run_dir: Path, *overrides: str) -> RunSettings:
    return load_config([f"run.dir={run_dir}", "experiment=quickstart", *overrides])


def start(settings: RunSettings, *, step: int | None = 10) -> Path:
    """Write the files of a run with `settings`: config.yaml, and a checkpoint unless `step` is
    None.
    """
    with run_directory(settings) as run_dir:
        find_checkpoint(settings, run_dir, {})
        if step is not None:
            Checkpointer(run_dir, settings.checkpoint).save(replace(STATE, step=step), [])
    return run_dir


def resume(settings: RunSettings) -> int | None:
    """The step after which a run with `settings` would continue; None: it would begin anew."""
    with run_directory(settings) as run_dir:
        checkpoint = find_checkpoint(settings, run_dir, {})
    return checkpoint.state.step if checkpoint else None


# -- what may change -------------------------------------------------------------------------------


def test_the_same_command_continues(tmp_path: Path):
    start(settings_of(tmp_path))
    assert resume(settings_of(tmp_path)) == 10


def test_where_how_fast_and_how_often_may_change(tmp_path: Path):
    start(settings_of(tmp_path))
    free = [
        "cluster.device=cpu",
        "cluster.spread=true",
        "deadlines.sync_s=7",
        "tracking.wandb=disabled",
        "tracking.tags=[a]",
        "checkpoint.every=1",
        "checkpoint.keep=3",
        "scorer.replicas=2",
        "run.resume=required",
        "checkpoint.best=eval/accuracy",
        "checkpoint.best_mode=min",
        "run.resume_from=/elsewhere",
        "eval.every=1",
        "eval.samples=1",
        "eval.teacher=false",
        "rollout.engines=2",
        "rollout.tensor_parallel=2",
        "rollout.groups_per_chunk=2",
        "rollout.max_num_seqs=1",
        "rollout.kv_cache_bytes=null",
        "rollout.gpu_memory_utilization=0.5",
        "rollout.enforce_eager=false",
        "rollout.weight_transfer=object_store",
        "rollout.max_logprob_gap=1",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "learner.offload=optimizer",
        "model.attention=sdpa",
        "learner.gradient_checkpointing=true",
        "reward.workers=2",
        "reward.processes=2",
        "reward.timeout_s=1",
        "reward.max_error_rate=0.5",
        "train.max_tokens_per_micro_batch=1",
        "train.head_chunk=1",
    ]
    assert resume(settings_of(tmp_path, *free)) == 10
    assert read_settings(tmp_path) == settings_of(tmp_path, *free), (
        "config.yaml says how the run goes on"
    )


def test_every_free_name_is_a_setting_or_a_section():
    keys = flat(asdict(load_config(["run.dir=x", "experiment=quickstart"])))
    assert [
        name for name in FREE if not any(f"{key}.".startswith(f"{name}.") for key in keys)
    ] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=2e-3", "train.lr: 0.001 -> 0.002"),
        ("run.seed=1", "run.seed: 0 -> 1"),
        ("model.path=/m", "model.path: builtin:countdown-student -> /m"),
        ("algorithm.gamma=1", "algorithm.gamma: 0.0 -> 1.0"),
        ("algorithm.baseline=none", "algorithm.baseline: leave_one_out -> none"),
        ("+data.options.num_numbers=4", "data.options.num_numbers: (not set) -> 4"),
        ("data.num_heldout=8", "data.num_heldout: 512 -> 8"),
        ("eval.greedy=false", "eval.greedy: True -> False"),
        ("rollout.max_new_tokens=8", "rollout.max_new_tokens: 16 -> 8"),
        ("reward.on_error=value", "reward.on_error: drop_group -> value"),
        ("+teachers.main.weight=2", "teachers.main.weight: 1.0 -> 2.0"),
        ("train.betas=[0.8,0.9]", "train.betas: [0.9, 0.95] -> [0.8, 0.9]"),
    ],
)
def test_what_decides_what_is_learned_may_not(tmp_path: Path, override: str, expected: str):
    start(settings_of(tmp_path))
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(RunDirectoryError) as caught:
        resume(settings_of(tmp_path, override))
    key = expected.partition(":")[0]
    assert str(caught.value) == (
        f"run.dir={tmp_path}: holds a run with other settings: {expected}; "
        f"choose another run.dir, or continue that run with them by run.allow_changes=[{key}]"
    )
    assert (tmp_path / "config.yaml").read_bytes() == before, (
        "the settings of the run that is there are kept"
    )
    assert resume(settings_of(tmp_path)) == 10, "and the lock is given back"


def test_a_held_out_set_may_be_added_and_left_out_and_its_own_settings_may_not_change():
    def with_sets(*overrides: str) -> RunSettings:
        return load_config(["experiment=quickstart", "run.dir=here", *overrides])

    easy = "+eval.sets.easy={task: countdown, samples: 2}"
    hard = "+eval.sets.hard={task: countdown}"
    assert not changes(with_sets(easy), with_sets(easy, hard))
    assert not changes(with_sets(easy, hard), with_sets(hard))
    assert changes(with_sets(easy), with_sets(easy, "eval.sets.easy.samples=3")) == {
        "eval.sets.easy.samples": (2, 3)
    }


def test_a_change_that_is_named_is_allowed_and_then_the_runs_own(tmp_path: Path):
    start(settings_of(tmp_path))
    changed = ["train.lr=2e-3", "algorithm.gamma=1", "algorithm.baseline=none"]
    with pytest.raises(
        RunDirectoryError,
        match=r"settings: algorithm\.gamma: 0\.0 -> 1\.0, algorithm\.baseline: \S+ -> none; ",
    ):
        resume(settings_of(tmp_path, *changed, "run.allow_changes=[train.lr]"))
    assert (
        resume(settings_of(tmp_path, *changed, "run.allow_changes=[train.lr,algorithm]")) == 10
    ), "a section names all in it"
    assert resume(settings_of(tmp_path, *changed)) == 10


def test_a_change_is_allowed_once_and_the_next_command_must_name_it_again(tmp_path: Path):
    start(settings_of(tmp_path))
    allowed = settings_of(tmp_path, "train.lr=2e-3", "run.allow_changes=[train.lr]")
    assert resume(allowed) == 10
    Checkpointer(tmp_path, allowed.checkpoint).save(
        replace(STATE, step=12), [SettingsFile(allowed)]
    )
    continued = load_settings([f"run.dir={tmp_path}"])
    assert (continued.train.lr, continued.run.allow_changes) == (2e-3, [])
    with pytest.raises(RunDirectoryError, match=r"train\.lr: 0\.002 -> 0\.003; .*=\[train\.lr\]"):
        resume(load_settings([f"run.dir={tmp_path}", "train.lr=3e-3"]))
    own = read_settings_of_checkpoint(tmp_path / "checkpoints" / "step_000012")
    assert (own.train.lr, own.run.allow_changes) == (2e-3, [])


def test_a_name_allows_no_setting_that_only_begins_like_it(tmp_path: Path):
    start(settings_of(tmp_path))
    with pytest.raises(RunDirectoryError, match=r"train\.lr_warmup_steps: 10 -> 0"):
        resume(settings_of(tmp_path, "train.lr_warmup_steps=0", "run.allow_changes=[train.lr]"))


def test_a_run_can_be_prolonged_where_no_schedule_is_stretched(tmp_path: Path):
    start(settings_of(tmp_path, *CONSTANT))
    assert resume(settings_of(tmp_path, *CONSTANT, "train.steps=400")) == 10


@pytest.mark.parametrize(
    ("stretched", "names"),
    [
        (["train.lr_end=0", CONSTANT_WEIGHT], "train.lr_end"),
        (["train.lr_end=null"], "algorithm.reward_weight"),
        ([*CONSTANT, "+teachers.main.schedule={kind: cosine, end: 0}"], "teachers.main.schedule"),
        (
            [*CONSTANT, "+reward.functions.countdown.schedule={kind: linear, end: 0}"],
            "reward.functions.countdown.schedule",
        ),
    ],
)
def test_other_steps_are_another_schedule_where_one_is_stretched_over_them(
    tmp_path: Path, stretched: list[str], names: str
):
    start(settings_of(tmp_path, *stretched))
    with pytest.raises(RunDirectoryError) as caught:
        resume(settings_of(tmp_path, *stretched, "train.steps=400"))
    assert f"train.steps: 250 -> 400 (train.steps stretches {names});" in str(caught.value)
    assert (
        resume(
            settings_of(tmp_path, *stretched, "train.steps=400", "run.allow_changes=[train.steps]")
        )
        == 10
    )


def test_a_schedule_of_its_own_length_is_not_stretched(tmp_path: Path):
    fixed = ["train.lr_end=null", "algorithm.reward_weight.steps=100"]
    start(settings_of(tmp_path, *fixed))
    assert resume(settings_of(tmp_path, *fixed, "train.steps=400")) == 10


def test_changes_are_told_by_dotted_key_with_both_values(tmp_path: Path):
    old = settings_of(tmp_path)
    new = settings_of(tmp_path, "~teachers.main", "algorithm=rloo", "train.lr_warmup_steps=3")
    changed = changes(old, new)
    assert changed["train.lr_warmup_steps"] == (10, 3) and changed["teachers.main.path"] == (
        "builtin:countdown-teacher",
        "(not set)",
    )
    assert not changes(new, new)


def test_a_run_that_died_before_its_first_checkpoint_may_start_again_with_anything(tmp_path: Path):
    start(settings_of(tmp_path), step=None)
    assert resume(settings_of(tmp_path, "train.lr=2e-3")) is None
    assert read_settings(tmp_path).train.lr == 2e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read (No such file"),
        ("run: [", "not YAML"),
        ("{trian: 3}", "no such setting"),
    ],
)
def test_a_run_whose_settings_cannot_be_read_is_not_continued(
    tmp_path: Path, text: str | None, says: str
):
    start(settings_of(tmp_path))
    (tmp_path / "config.yaml").unlink()
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunDirectoryError) as caught:
        resume(settings_of(tmp_path))
    assert (
        f"{tmp_path / 'config.yaml'}: " in str(caught.value)
        and says in str(caught.value)
        and "\n" not in str(caught.value)
    )


@pytest.mark.parametrize(
    "leave",
    [
        lambda run_dir: (run_dir / "metrics.jsonl").touch(),
        lambda run_dir: start(settings_of(run_dir)),
    ],
)
def test_resume_never_wants_a_directory_without_a_run(
    tmp_path: Path, leave: Callable[[Path], object]
):
    assert resume(settings_of(tmp_path, "run.resume=never")) is None
    leave(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"holds a run and run\.resume=never"):
        resume(settings_of(tmp_path, "run.resume=never"))


def test_resume_required_wants_a_checkpoint(tmp_path: Path):
    settings = settings_of(tmp_path, "run.resume=required")
    assert settings.run.resume is Resume.required
    with pytest.raises(CheckpointError, match=r"run\.resume=required: no checkpoint in "):
        resume(settings)


def test_a_directory_belongs_to_one_run_at_a_time_and_the_second_is_told_who_has_it(tmp_path: Path):
    who = f"is locked by another run, process {os.getpid()} on {socket.gethostname()};"
    with run_directory(settings_of(tmp_path)), pytest.raises(RunDirectoryError, match=who):
        resume(settings_of(tmp_path))
    assert resume(settings_of(tmp_path)) is None


HOLD = """
import os, signal, sys
from pathlib import Path
from hybridrl.settings.compose import load_config
from hybridrl.run_dir.directory import run_directory
with run_directory(load_config([f"run.dir={sys.argv[1]}", "experiment=quickstart"])):
    print("held", flush=True)
    signal.pause()
"""


def test_the_lock_ends_with_its_process_even_when_that_is_killed_and_its_log_may_lie_beside_it(
    tmp_path: Path,
):
    """The log of the command itself is in the new directory before the run starts."""
    log = tmp_path / "train.log"
    with log.open("w") as file:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=file, stderr=file)
    try:
        end = time.monotonic() + 120
        while not log.read_text() and holder.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        assert log.read_text() == "held\n"
        with pytest.raises(
            RunDirectoryError, match=f"is locked by another run, process {holder.pid} on "
        ):
            resume(settings_of(tmp_path))
    finally:
        holder.kill()
        holder.wait(60)
    assert resume(settings_of(tmp_path)) is None


def test_a_removed_lock_file_lets_no_second_run_in(tmp_path: Path):
    with run_directory(settings_of(tmp_path)):
        (tmp_path / ".lock").unlink()
        with pytest.raises(
            RunDirectoryError, match=f"locked by another run, process {os.getpid()}"
        ):
            resume(settings_of(tmp_path))


def everything(folder: Path) -> dict[str, bytes | None]:
    """The content of every file under a folder, by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("where", ["", " ", "."])
def test_a_directory_with_files_that_was_never_a_run_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("database: mine\n")
    (tmp_path / "metrics.jsonl").write_text('{"rows": "of another program"}\n')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step_000001.jsonl").write_text("mine")
    before = everything(tmp_path)
    wanted = r"holds files \(config\.yaml, .*not from a run" if where == "." else "run.dir is empty"
    with pytest.raises((RunDirectoryError, ConfigError), match=wanted):
        resume(load_config([f"run.dir='{where}'", "experiment=quickstart"]))
    assert everything(tmp_path) == before


def test_a_directory_with_a_run_in_it_or_with_nothing_to_lose_is_used(tmp_path: Path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".gitignore").write_text("*")
    start(settings_of(tmp_path))
    (tmp_path / "notes.txt").write_text("of the run's owner")
    for path in (tmp_path / ".lock", tmp_path / ".holder"):
        path.unlink()  # as in a copy without hidden files
    assert resume(settings_of(tmp_path)) == 10
    (tmp_path / ".holder").unlink()
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunDirectoryError, match="the settings of this run are unknown"):
        resume(settings_of(tmp_path))  # its checkpoint shows that it belongs to a run


def test_a_checkpoint_alone_continues_with_the_settings_saved_in_it(tmp_path: Path):
    settings = settings_of(tmp_path)
    Checkpointer(tmp_path, settings.checkpoint).save(STATE, [SettingsFile(settings)])
    with pytest.raises(RunDirectoryError, match=r"train\.lr: 0\.001 -> 0\.002"):
        resume(settings_of(tmp_path, "train.lr=2e-3"))
    assert resume(settings) == 10 and read_settings(tmp_path) == settings


def test_a_damaged_newest_checkpoint_is_set_aside_when_the_run_goes_on(tmp_path: Path):
    settings = settings_of(tmp_path)
    start(settings)
    start(settings, step=20)
    (tmp_path / "checkpoints" / "step_000020" / "state.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match="other settings"):
        resume(settings_of(tmp_path, "train.lr=1"))
    assert (tmp_path / "checkpoints" / "step_000020").is_dir(), "a refused start changes nothing"
    assert resume(settings) == 10
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[0] == "step_000010" and names[1].startswith("step_000020.damaged-")


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path):
    start(settings_of(tmp_path, *CONSTANT), step=10**9)
    with pytest.raises(RunDirectoryError, match=r"1000000000 steps are done, but train\.steps=250"):
        resume(settings_of(tmp_path, *CONSTANT))


# -- from somebody else ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.jsonl", "ledger.jsonl", "samples", "checkpoints", "export", ".lock"),
        *("logs/learner-0.log", "skipped/step_000001", "chat_template.jinja"),
    ],
)
def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path, name: str):
    run_dir = tmp_path / "run"
    outside = tmp_path / "outside"
    start(settings_of(run_dir), step=None)
    outside.mkdir()
    (outside / "step_000001.jsonl").write_text("mine")
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).symlink_to(outside)
    before = everything(outside)
    with pytest.raises(RunDirectoryError, match=f"{run_dir / name}: is a link"):
        resume(settings_of(run_dir))
    assert everything(outside) == before


def test_files_that_are_replaced_whole_take_the_place_of_a_link(tmp_path: Path):
    mine = tmp_path / "bashrc"
    mine.write_text("mine")
    run_dir = start(settings_of(tmp_path / "run"), step=None)
    for name in (".holder", ".config.yaml", "..holder"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(mine)
    assert resume(settings_of(run_dir)) is None
    assert mine.read_text() == "mine" and not (run_dir / ".holder").is_symlink()


def test_a_link_in_the_place_of_saved_settings_is_not_read(tmp_path: Path):
    start(settings_of(tmp_path))
    (tmp_path / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    (tmp_path / "config.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    with pytest.raises(RunDirectoryError, match=r"config\.yaml: is a link"):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {path: '${oc.env:HOME}'}", r"model\.path: holds a reference"),
        ("run: {dir: 'x${.seed}'}", r"run\.dir: holds a reference"),
        ("tracking: {tags: ['\\\\${oc.env:HOME}']}", r"tracking\.tags: holds a reference"),
        ("a: &a [1]\nb: *a", "a YAML alias"),
        ("a: " + "[" * 3000, "is not YAML"),
        ("when: 2020-99-99", "is not YAML"),
        ("- a", "is not a mapping of settings"),
    ],
)
def test_saved_settings_refer_to_nothing_outside_of_them(tmp_path: Path, text: str, says: str):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"config\.yaml: not settings .*{says}") as caught:
        read_settings(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\udcffb", "\x1b[2J"])
def test_a_name_that_no_message_can_show_is_refused_in_one_sentence(name: str):
    with pytest.raises(ConfigError, match=r"run\.dir=.*give it another name") as caught:
        RunConfig(dir=name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["$HOME", "_a", "a b", "\N{SNOWMAN}", "a,b=c", "${x}"])
def test_any_other_name_works(tmp_path: Path, name: str):
    settings = settings_of(tmp_path)
    settings = replace(settings, run=replace(settings.run, dir=str(tmp_path / name)))
    start(settings)
    assert resume(settings) == 10 and read_settings(tmp_path / name) == settings


def test_leftovers_of_a_killed_save_are_gone_when_the_run_goes_on(tmp_path: Path):
    start(settings_of(tmp_path))
    (tmp_path / "checkpoints" / ".unfinished-step_000012").mkdir()
    assert resume(settings_of(tmp_path)) == 10
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000010"]


# -- from a checkpoint of another run --------------------------------------------------------------


def test_a_new_directory_continues_the_checkpoint_it_is_given_with_the_rows_so_far(tmp_path: Path):
    old = tmp_path / "old"
    new = tmp_path / "new"
    start(settings_of(old))
    (old / "metrics.jsonl").write_text('{"train/step": 10}\n')
    (old / "ledger.jsonl").write_text('{"step": 10, "trained": ["a@0"], "passed_over": []}\n')
    start_from = f"run.resume_from={old / 'checkpoints' / 'step_000010'}"
    with run_directory(settings_of(new, start_from)) as run_dir:
        found = find_checkpoint(settings_of(new, start_from), run_dir, {})
    assert found.folder == old / "checkpoints" / "step_000010" and found.state == replace(
        STATE, trackers={}
    )
    assert [(new / name).read_text() for name in ("metrics.jsonl", "ledger.jsonl")] == [
        (old / name).read_text() for name in ("metrics.jsonl", "ledger.jsonl")
    ]
    start(settings_of(new, start_from), step=12)
    assert resume(settings_of(new, start_from)) == 12, "the same command goes on with the run's own"


def test_a_description_of_a_directory_says_and_refuses_what_a_run_in_it_would(tmp_path: Path):
    old = tmp_path / "old"
    new = tmp_path / "new"
    start(settings_of(old))
    named = old / "checkpoints" / "step_000010"
    start_from = f"run.resume_from={named}"
    assert describe_directory(settings_of(old), {}) == "continues after step 10"
    assert describe_directory(settings_of(new), {}) == "a new run"
    assert describe_directory(settings_of(new, start_from), {}) == (
        f"continues after step 10, from {named}"
    )
    with pytest.raises(CheckpointError, match=r"run\.resume=required: no checkpoint in"):
        describe_directory(settings_of(new, "run.resume=required"), {})
    with pytest.raises(RunDirectoryError, match=r"10 steps are done, but train\.steps=5"):
        describe_directory(
            settings_of(old, "train.steps=5", "run.allow_changes=[train,algorithm]"), {}
        )
    assert not new.exists()


def test_a_named_checkpoint_is_not_passed_over_when_it_is_damaged_or_of_other_settings(
    tmp_path: Path,
):
    old = tmp_path / "old"
    new = tmp_path / "new"
    start(settings_of(old), step=5)
    start(settings_of(old))
    start_from = f"run.resume_from={old / 'checkpoints' / 'step_000010'}"
    with pytest.raises(
        RunDirectoryError, match=r"step_000010: was made with other settings: train\.lr"
    ):
        resume(settings_of(new, start_from, "train.lr=2e-3"))
    assert not list(new.glob("*.jsonl")) and not (new / "config.yaml").exists(), (
        "refused, the new directory stays empty"
    )
    assert (
        resume(settings_of(new, start_from, "train.lr=2e-3", "run.allow_changes=[train.lr]")) == 10
    )
    (old / "checkpoints" / "step_000010" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step_000010/state\.json: missing"):
        resume(settings_of(new, start_from))
    with pytest.raises(CheckpointError, match=r"nowhere/manifest\.json: missing"):
        resume(settings_of(new, f"run.resume_from={tmp_path / 'nowhere'}"))


def test_a_checkpoint_that_was_copied_out_of_its_run_begins_another_one(tmp_path: Path):
    settings = settings_of(tmp_path / "old")
    start(settings)
    text = (tmp_path / "old" / "config.yaml").read_text()
    copied = tmp_path / "backup" / "step_000010"
    shutil.copytree(tmp_path / "old" / "checkpoints" / "step_000010", copied)
    (copied / "config.yaml").write_text(text)
    shutil.rmtree(tmp_path / "old")
    given = f"run.resume_from={copied}"
    refusal = rf"run\.resume_from={copied}: was made with other settings: train\.lr"
    with pytest.raises(RunDirectoryError, match=refusal):
        resume(settings_of(tmp_path / "new", given, "train.lr=2e-3"))
    assert resume(settings_of(tmp_path / "new", given)) == 10
    assert earlier_settings(settings_of(tmp_path / "other", given)) == settings


def test_exports_of_steps_that_are_done_anew_are_set_aside(tmp_path: Path):
    start(settings_of(tmp_path))
    for name in ("step_000005", "step_000010", "step_000020", "step_000020-bfloat16", "mine"):
        (tmp_path / "export" / name).mkdir(parents=True)
    assert resume(settings_of(tmp_path)) == 10
    left = sorted(path.name.partition(".")[0] for path in (tmp_path / "export").iterdir())
    kept = sorted(path.name for path in (tmp_path / "export").iterdir() if "." not in path.name)
    assert kept == ["mine", "step_000005", "step_000010"] and len(left) == 5
    shutil.rmtree(tmp_path / "checkpoints")
    assert resume(settings_of(tmp_path)) is None
    assert [p.name for p in (tmp_path / "export").iterdir() if "." not in p.name] == ["mine"]


# -- teachers --------------------------------------------------------------------------------------


HELDOUT = [
    Prompt(uid="heldout-0", input_ids=(1, 7, 11), text="3=", columns={"numbers": [3], "target": 3})
]


@pytest.mark.parametrize(
    "override",
    [
        "teachers.main.path=/other",
        "+teachers.main.dtype=bfloat16",
        "rollout.max_new_tokens=8",
        "rollout.max_model_len=40",
        "eval.greedy=false",
        "reward.functions.countdown.function=math",
        "+reward.functions.countdown.options.strict=true",
        "eval.teacher=false",
    ],
)
def test_a_teachers_level_is_used_again_only_as_it_was_measured(tmp_path: Path, override: str):
    settings = settings_of(tmp_path)
    target = tmp_path / TEACHER_LEVELS
    assert read_levels(target, conditions_of(settings, HELDOUT)) is None
    target.write_text(
        json.dumps(
            {
                "measured_with": conditions_of(settings, HELDOUT),
                "levels": {"eval/accuracy_teacher/main": 0.5},
            }
        )
    )
    changed = settings_of(tmp_path, "train.lr=1", "eval.every=1", "rollout.engines=2")
    assert read_levels(target, conditions_of(changed, HELDOUT)) == {
        "eval/accuracy_teacher/main": 0.5
    }
    assert read_levels(target, conditions_of(settings_of(tmp_path, override), HELDOUT)) is None
    other = [replace(HELDOUT[0], columns={"numbers": [3], "target": 4})]
    assert read_levels(target, conditions_of(settings, other)) is None


def test_levels_are_those_of_another_run_where_both_have_the_same_conditions(tmp_path: Path):
    settings = settings_of(tmp_path)
    levels = {"eval/accuracy_teacher/main": 0.5}
    write_levels(settings, HELDOUT, {"teachers.main.path": "1"}, tmp_path, levels)
    same = partial(same_levels, run_dir=tmp_path)
    other = settings_of(tmp_path, "train.lr=1")
    assert same(other, HELDOUT, {"teachers.main.path": "1", "data": "2"}) == levels
    assert same(other, HELDOUT, {"teachers.main.path": "9"}) is None
    other = settings_of(tmp_path, "run.seed=1")
    assert same(other, HELDOUT, {"teachers.main.path": "1"}) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"eval/accuracy_teacher/main": 0.5}'])
def test_a_level_of_unknown_origin_is_measured_again(tmp_path: Path, text: str):
    (tmp_path / TEACHER_LEVELS).write_text(text)
    assert (
        read_levels(tmp_path / TEACHER_LEVELS, conditions_of(settings_of(tmp_path), HELDOUT))
        is None
    )


def test_only_teachers_in_use_are_loaded_and_only_where_there_is_a_judge_are_they_measured(
    tmp_path: Path,
):
    def of(*overrides: str) -> tuple[list[str], list[str]]:
        settings = settings_of(tmp_path, *overrides)
        return settings.teachers_in_use, settings.measured_teachers

    assert of() == (["main"], ["main"])
    assert of("algorithm=rloo") == ([], [])
    writes = ("algorithm.teacher_fraction=0.5", "algorithm.ratio.kind=truncate")
    assert of("algorithm=rloo", *writes) == (["main"], ["main"])
    assert of("teachers.main.path=null") == (["main"], []), "it is the student before training"
    assert of("algorithm=opd_full", "~reward.functions.countdown") == (["main"], [])
    assert of("eval.teacher=false") == (["main"], [])


def padded(folder: Path, rows: int) -> Path:
    """Save a model with the countdown tokenizer, whose output head has `rows` rows."""
    save_tiny(folder, 0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    return folder


SMALL = ["data.num_train=4", "data.num_heldout=2"]


def test_a_teacher_with_a_shorter_head_is_refused_before_anything_starts(tmp_path: Path):
    student, short, long = (
        padded(tmp_path / name, rows)
        for name, rows in (("student", 24), ("short", 23), ("long", 32))
    )

    def prepare(teacher: Path, *overrides: str) -> list[Prompt]:
        return prepare_prompts(
            settings_of(
                tmp_path,
                f"model.path={student}",
                f"teachers.main.path={teacher}",
                *SMALL,
                *overrides,
            )
        )[0]

    with pytest.raises(ConfigError) as caught:
        prepare(short)
    assert str(caught.value).startswith(
        f"teachers.main.path={short}: its output head has 23 rows, that of model.path={student} "
        "has 24, "
    ) and "\n" not in str(caught.value)
    assert len(prepare(long)) == len(prepare(student)) == 4, "rows that only pad do no harm"
    assert len(prepare(short, "algorithm=rloo")) == 4, "rloo does not use the teacher"


def test_pure_reinforcement_learning_does_not_look_at_its_teachers(tmp_path: Path):
    overrides = ["teachers.main.path=/no/such/model", *SMALL]
    with pytest.raises(ConfigError, match=r"teachers\.main\.path=/no/such/model"):
        prepare_prompts(settings_of(tmp_path, *overrides))
    train, heldout = prepare_prompts(settings_of(tmp_path, "algorithm=rloo", *overrides))
    assert (len(train), len(heldout)) == (4, 2)


# -- evaluation ------------------------------------------------------------------------------------


def rewards_of(*parts: list[float]) -> Rewards:
    values = (
        np.array(parts, np.float32).reshape(len(parts), -1)
        if parts
        else np.zeros((0, 2), np.float32)
    )
    no = np.zeros(values.shape[1], bool)
    names = tuple(f"r{i}" for i in range(len(parts)))
    unread = np.full(len(no), np.nan, np.float32)
    return Rewards(
        uids=("a", "b"),
        values=values.sum(axis=0),
        part_names=names,
        parts=values,
        errors=no,
        keep=~no,
        compressed=unread,
        repeated=unread,
    )


SAMPLES = [
    Sample(step=0, uid="a", prompt="3=", response="3", reward=0.0, finish_reason=FinishReason.stop)
]


def test_accuracy_is_the_mean_of_the_first_reward_and_a_failed_call_is_not_a_wrong_answer():
    evaluation = summary(
        [rewards_of([1.0, 0.0], [5.0, 5.0]), rewards_of([1.0, np.nan], [5.0, 5.0])], SAMPLES
    )
    assert (
        evaluation.metrics["eval/accuracy"] == pytest.approx(2 / 3)
        and evaluation.metrics["eval/error_rate"] == 0.25
    )
    assert evaluation.metrics["eval/accuracy_stderr"] == pytest.approx(1 / 3)  # sqrt(1/3 / 3)
    assert evaluation.samples == tuple(SAMPLES)


def test_with_routes_each_problem_is_judged_by_the_first_function_that_takes_it():
    """Problems 1 and 2 of source a get 1 and 0, and problem 3 of b gets 0.5 from the second
    function; where a function does not apply, its value is NaN.
    """
    functions = {
        name: RewardFunctionConfig(function="math", route={"data_source": name}) for name in "ab"
    }
    prompts = [
        Prompt(uid=f"{name}/{i}", input_ids=(1,), text="", columns={"data_source": name})
        for i, name in enumerate("aab")
    ]
    judged = replace(
        rewards_of([1.0, 0.0, np.nan], [np.nan, np.nan, 0.5]), uids=("a/0", "a/1", "b/2")
    )
    metrics = summary([judged], SAMPLES, judges_of(prompts, functions)).metrics
    assert metrics["eval/accuracy"] == 0.5 and metrics["eval/error_rate"] == 0
    assert metrics["eval/accuracy_source/a"] == metrics["eval/accuracy_source/b"] == 0.5
    assert judges_of(prompts, {"all": RewardFunctionConfig(function="math"), **functions}) == {
        "a/0": 0,
        "a/1": 0,
        "b/2": 0,
    }


def test_without_a_reward_function_nothing_is_right_or_wrong():
    evaluation = summary([rewards_of(), rewards_of()], SAMPLES)
    assert (
        evaluation.metrics == {}
        and np.isnan(evaluation.samples[0].reward)
        and evaluation.samples[0].response == "3"
    )


def test_the_last_of_a_single_evaluation_is_not_given_as_what_was_learned(tmp_path: Path):
    """The run of three steps was ended by on_step after the first one."""
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(tmp_path), name="x", total_steps=3, first_step=0, config={}))
    sink.log({"train/step": 0, "eval/accuracy": 0.25})
    sink.log({"train/step": 1})
    assert accuracies(tmp_path) == (0.25, None)
    sink.log({"train/step": 2, "eval/accuracy": 0.5})
    sink.close(0)
    assert accuracies(tmp_path) == (0.25, 0.5)


def accuracies(run_dir: Path) -> tuple[float | None, float | None]:
    done = run_result(run_dir, None, ExitReason.stopped)
    return done.accuracy_before, done.accuracy_after


def test_a_run_without_accuracy_still_has_a_result(tmp_path: Path):
    sink = JsonlSink()
    sink.start(RunInfo(run_dir=str(tmp_path), name="x", total_steps=1, first_step=0, config={}))
    for step in (0, 1):
        sink.log({"train/step": step, "time/eval_s": 1.0})
    sink.close(0)
    done = run_result(tmp_path, None, ExitReason.finished)
    assert (done.accuracy_before, done.accuracy_after, done.teacher_accuracy) == (
        None,
        None,
        {},
    ) and done.report.is_file()
    assert done.metrics == {"train/step": 1, "time/eval_s": 1.0} and done.checkpoint is None


# -- what is read from outside ---------------------------------------------------------------------


def test_changed_prompts_and_a_changed_reward_file_are_refused_until_they_are_allowed(
    tmp_path: Path,
):
    file = tmp_path / "rewards.py"
    file.write_text("def score(completions): return [0.0] * len(completions)")
    overrides = [
        "experiment=quickstart",
        f"run.dir={tmp_path}",
        f"+reward.functions.mine.function={file}:score",
    ]
    settings = load_config(overrides)
    prompts = [Prompt(uid=uid, input_ids=(1, 2), text="", columns={"target": 3}) for uid in "ab"]
    before = digests(settings, prompts, [])
    models = {"model.path", "teachers.main.path"}
    assert before.keys() == {"data", "reward.functions.mine", *models}, (
        "a built-in reward is of this version"
    )
    check_inputs(settings, before, digests(settings, prompts, []))
    check_inputs(settings, {}, before)  # a checkpoint of an older version has none
    file.write_text("def score(completions): return [1.0] * len(completions)")
    other = [prompts[0], replace(prompts[1], columns={"target": 4})]
    with pytest.raises(RunDirectoryError) as caught:
        check_inputs(settings, before, digests(settings, other, []))
    assert str(caught.value) == (
        f"run.dir={tmp_path}: the prompts that data.* gives, the file of "
        "reward.functions.mine.function changed since the checkpoint; restore it, choose another "
        "run.dir, or continue that run with it by run.allow_changes=[data,reward.functions.mine]"
    )
    check_inputs(
        load_config([*overrides, "run.allow_changes=[data,reward.functions]"]),
        before,
        digests(settings, other, []),
    )


def test_a_run_that_is_refused_for_its_inputs_leaves_the_settings_on_file_as_they_were(
    tmp_path: Path,
):
    settings = settings_of(tmp_path)
    with run_directory(settings) as run_dir:
        find_checkpoint(settings, run_dir, {"data": "a"})
        Checkpointer(run_dir, settings.checkpoint).save(replace(STATE, inputs={"data": "a"}), [])
        changed = settings_of(tmp_path, "train.lr=2e-3", "run.allow_changes=[train.lr]")
        with pytest.raises(
            RunDirectoryError, match=r"the prompts that data\.\* gives changed since the checkpoint"
        ):
            find_checkpoint(changed, run_dir, {"data": "b"})
        assert read_settings(run_dir) == settings
        assert find_checkpoint(settings, run_dir, {"data": "a"}).state.step == 10


def refused(settings: RunSettings, before: dict[str, str]) -> str:
    """The error message about the present inputs; empty: they are accepted."""
    with pytest.raises(RunDirectoryError) as caught:
        check_inputs(settings, before, digests(settings, [], []))
    return str(caught.value).partition("; ")[0].removeprefix(f"run.dir={settings.run.dir}: ")


@pytest.mark.parametrize("key", ["model.path", "teachers.main.path"])
def test_another_model_under_the_same_name_is_refused_until_it_is_allowed(tmp_path: Path, key: str):
    """The files have the same names, sizes and even modification times."""
    student = save_tiny(tmp_path / "student", 0)
    teacher = save_tiny(tmp_path / "teacher", 1)
    overrides = [f"model.path={student}", f"teachers.main.path={teacher}"]
    settings = settings_of(tmp_path, *overrides)
    before = digests(settings, [], [])
    check_inputs(settings, before, digests(settings, [], []))
    weights = (student if key == "model.path" else teacher) / "model.safetensors"
    old = weights.stat()
    other = save_tiny(tmp_path / "other", 2) / "model.safetensors"
    assert other.stat().st_size == old.st_size
    weights.write_bytes(other.read_bytes())
    os.utime(weights, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert refused(settings, before) == f"the files of {key} changed since the checkpoint"
    allowed = settings_of(tmp_path, *overrides, f"run.allow_changes=[{key}]")
    check_inputs(allowed, before, digests(settings, [], []))


def test_of_a_model_every_file_that_is_loaded_counts_and_no_other(tmp_path: Path):
    student = save_tiny(tmp_path / "student", 0)
    settings = settings_of(tmp_path, f"model.path={student}")
    before = digests(settings, [], [])
    (student / "README.md").write_text("a word")
    check_inputs(settings, before, digests(settings, [], []))
    for name in ("chat_template.jinja", "value_head/model.safetensors", "added_tokens.json"):
        (student / name).parent.mkdir(exist_ok=True)
        (student / name).write_text("{}")
        assert refused(settings, before).startswith("the files of model.path changed"), name
        before = digests(settings, [], [])


def test_a_changed_reward_model_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path / "judge", 0)
    judge = "{function: reward_model, options: {path: %s}}" % folder  # noqa: UP031 (braces)
    settings = settings_of(tmp_path, f"+reward.functions.judge={judge}")
    before = digests(settings, [], [])
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    path = "reward.functions.judge.options.path"
    assert refused(settings, before) == f"the files of {path} changed since the checkpoint"


def test_a_large_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The test writes another digest into the cache, to see that it is used. A file that was
    replaced by a copy with the original's times counts as changed.
    """
    monkeypatch.setenv("HYBRIDRL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.safetensors"
    file.write_bytes(bytes(CACHED_FROM))
    os.utime(file, (1, 1))
    first = digest(file)
    assert not (tmp_path / "cache").exists(), "it may change again within the same time stamp"
    changed = file.stat().st_ctime
    monkeypatch.setattr(contents, "time", SimpleNamespace(time=lambda: changed + 2.5))
    assert digest(file) == first
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"digest": "kept"}))
    assert digest(file) == "kept"
    file.write_bytes(bytes(CACHED_FROM) + b"1")
    os.utime(file, (1, 1))
    second = digest(file)
    assert second not in ("kept", first), "the size is another one"
    entry.write_text("[1]")
    assert digest(file) == second


@pytest.mark.parametrize(
    ("preset", "setting"),
    [
        ("hybrid", "algorithm.advantage"),
        ("hybrid", "algorithm.token_weight"),
        ("dpo", "algorithm.pair.loss"),
    ],
)
def test_a_changed_file_of_an_estimator_weight_or_loss_is_refused(
    preset: str, setting: str, tmp_path: Path
):
    file = tmp_path / "mine.py"
    file.write_text("import near\n")
    (tmp_path / "near.py").write_text("x = 1")
    settings = settings_of(tmp_path, f"algorithm={preset}", f"{setting}={file}:Mine")
    before = digests(settings, [], [])
    check_inputs(settings, before, digests(settings, [], []))
    file.write_text("import near\ny = 2\n")
    assert refused(settings, before) == f"the file of {setting} changed since the checkpoint"
    file.write_text("import near\n")
    (tmp_path / "near.py").write_text("x = 2")
    what = f"a module that the file of {setting} imports changed since the checkpoint"
    assert refused(settings, before) == what


def test_a_changed_module_that_the_reward_file_imports_is_refused(tmp_path: Path):
    """This holds for modules in the same folder, indirect imports, modules of a package, and
    imports inside the function.
    """
    files = {
        "rewards.py": "import json, numpy, near\nfrom pack.inner import thing\n"
        "def score(completions):\n    import late\n    return [0.0]",
        "near.py": "import far",
        "far.py": "x = 1",
        "late.py": "x = 1",
        "pack/__init__.py": "from . import sibling",
        "pack/inner.py": "thing = 1",
        "pack/sibling.py": "x = 1",
        "unused.py": "x = 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    settings = settings_of(
        tmp_path, f"+reward.functions.mine.function={tmp_path / 'rewards.py'}:score"
    )
    before = digests(settings, [], [])
    (tmp_path / "unused.py").write_text("x = 2")
    check_inputs(settings, before, digests(settings, [], []))
    for name in files.keys() - {"rewards.py", "unused.py"}:
        (tmp_path / name).write_text(f"{files[name]}\ny = 2")
        what = "a module that the file of reward.functions.mine.function imports changed"
        assert refused(settings, before).startswith(what), name
        (tmp_path / name).write_text(files[name])
    check_inputs(settings, before, digests(settings, [], []))


def test_a_teacher_of_other_weights_under_the_same_name_is_measured_again(tmp_path: Path):
    teacher = save_tiny(tmp_path / "teacher", 1)
    settings = settings_of(tmp_path, f"teachers.main.path={teacher}")
    before = files_of(digests(settings, [], []))
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[::-1])
    assert files_of(digests(settings, [], [])) != before


def hub_snapshot(hub: Path, name: str, commit: str) -> None:
    """Write a model of the hub into the local cache, with `commit` as its newest revision."""
    model = hub / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    save_tiny(model / "snapshots" / commit, 0)


def test_a_name_on_the_hub_means_the_commit_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("me/student", "me/teacher"):
        hub_snapshot(tmp_path / "hub", name, "a" * 40)
    named = ["model.path=me/student", "teachers.main.path=me/teacher"]
    settings = settings_of(tmp_path / "run", *named)
    first = pinned(settings, earlier_settings(settings))
    assert (first.model.revision, first.teachers["main"].revision) == ("a" * 40, "a" * 40)
    start(first)
    for name in ("me/student", "me/teacher"):
        hub_snapshot(tmp_path / "hub", name, "b" * 40)
    assert pinned(settings, earlier_settings(settings)) == first, "the hub moved, the run does not"
    assert resume(pinned(settings, earlier_settings(settings))) == 10
    new = settings_of(
        tmp_path / "new", *named, f"run.resume_from={tmp_path}/run/checkpoints/step_000010"
    )
    assert pinned(new, earlier_settings(new)).model.revision == "a" * 40
    other = settings_of(tmp_path / "other", *named)
    assert pinned(other, earlier_settings(other)).model.revision == "b" * 40
    chosen = settings_of(tmp_path / "run", *named, f"model.revision={'b' * 40}")
    with pytest.raises(RunDirectoryError, match=r"model\.revision: a+ -> b+"):
        resume(pinned(chosen, earlier_settings(chosen)))


@pytest.mark.parametrize(
    ("slow", "choice"), [(Processor.intel_bf16, "float32"), (Processor.amx, "model")]
)
def test_a_run_keeps_the_products_that_its_first_processor_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Processor, choice: str
):
    monkeypatch.setattr(arithmetic, "processor", lambda: slow)
    settings = settings_of(tmp_path)
    assert settings.train.products is Products.auto
    first = pinned(settings, earlier_settings(settings))
    assert first.train.products == choice
    start(first)
    assert f"products: {choice}\n" in (tmp_path / "config.yaml").read_text()
    other = Processor.amx if slow is Processor.intel_bf16 else Processor.intel_bf16
    monkeypatch.setattr(arithmetic, "processor", lambda: other)  # the job moved to another machine
    again = pinned(settings, earlier_settings(settings))
    assert again.train.products == choice
    assert resume(again) == 10
    changed = settings_of(
        tmp_path, f"train.products={'model' if choice == 'float32' else 'float32'}"
    )
    with pytest.raises(RunDirectoryError, match=rf"train\.products: {choice} -> "):
        resume(pinned(changed, earlier_settings(changed)))


def test_products_on_gpus_are_those_of_the_model_whatever_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(arithmetic, "processor", lambda: Processor.without_bf16)
    settings = settings_of(tmp_path, "cluster.device=cuda")
    assert pinned(settings, None).train.products is Products.model


def test_a_run_of_a_version_that_knew_no_products_goes_on_as_it_was(tmp_path: Path):
    settings = settings_of(tmp_path)
    assert pinned(settings, settings).train.products is Products.auto, "which means the model's"


def test_folders_and_built_in_models_have_no_commit_and_an_old_run_keeps_none(tmp_path: Path):
    chosen = ("train.products=model", "model.dtype=float32", "learner.gradient_checkpointing=false")
    settings = settings_of(tmp_path, *chosen)
    assert pinned(settings, None) == settings
    named = settings_of(tmp_path, *chosen, "model.path=me/gone")
    assert pinned(named, None) == named, "loading it says that it cannot be had"
    assert pinned(named, named) == named
