"""generate, eval and chat with real engines: interrupted, continued, and compared."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridrl.controller.answering import Decoding
from hybridrl.controller.preemption import Preemption
from hybridrl.controller.set_statistics import statistics_of
from hybridrl.core.errors import ConfigError, Preempted
from hybridrl.data.problem_sources import load_problems
from hybridrl.launch.answer_jobs import AnswerJob, conditions_of, write_answers
from hybridrl.launch.evaluating import problem_sets
from hybridrl.launch.loadable_model import LoadableModel, find_model
from hybridrl.launch.model_engines import ModelEngines, started_engines
from hybridrl.run_dir.answer_file import opened, read_rows
from tests.test_cli import save_checkpoint

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadableModel:
    """The newest checkpoint of a run on Countdown, with settings for waves of four prompts."""
    run_dir = tmp_path_factory.mktemp("commands") / "run"
    drawn = "+eval.sets.drawn={task:countdown,num_problems:6,samples:4}"
    save_checkpoint(run_dir, "data.num_heldout=10", drawn)
    return find_model(str(run_dir), ["generate.wave=4", "rollout.engines=2"])


@pytest.fixture(scope="module")
def engines(
    model: LoadableModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelEngines]:
    log_dir = str(tmp_path_factory.mktemp("logs"))
    with started_engines(model, log_dir, print, judged=True) as running:
        yield running


def job_of(model: LoadableModel, out: Path, temperature: float = 1.0) -> AnswerJob:
    _, heldout = load_problems(model.settings.data, 0)
    decoding = Decoding(samples=2, temperature=temperature, seed=7)
    return AnswerJob(name="job", prompts=model.prompts(heldout), decoding=decoding, out=out)


def written(
    engines: ModelEngines, model: LoadableModel, job: AnswerJob, stop: str | None = None
) -> bytes:
    """Run a job as one command; returns the content of its file.

    Args:
        stop: a signal that arrives before the first answers; None: no signal arrives.
    """
    preemption = Preemption()
    preemption.started()
    preemption.signal_name = stop
    with opened(job.out, conditions_of(model, job)) as file:
        write_answers(engines, model, job, file, preemption, print)
        file.put_in_order([prompt.uid for prompt in job.prompts])
    return job.out.read_bytes()


def test_an_interrupted_job_is_continued_to_the_same_file_as_an_uninterrupted_one(
    engines: ModelEngines, model: LoadableModel, tmp_path: Path
):
    whole = written(engines, model, job_of(model, tmp_path / "whole.jsonl"))
    job = job_of(model, tmp_path / "part.jsonl")
    with pytest.raises(Preempted, match="Ctrl-C"):
        written(engines, model, job, stop="Ctrl-C")
    assert 0 < len(list(read_rows(job.out))) < 10, "some answers are retained"
    assert written(engines, model, job) == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["uid"] for row in rows] == [f"heldout-{i:06d}" for i in range(10)]
    first = rows[0]
    assert len(first["responses"]) == len(first["lengths"]) == 2
    assert first["columns"]["target"] and set(first["rewards"]["countdown"]) <= {0.0, 1.0}


def test_an_engine_that_fails_is_replaced_and_its_wave_is_sampled_again(
    engines: ModelEngines, model: LoadableModel, tmp_path: Path
):
    whole = written(engines, model, job_of(model, tmp_path / "whole.jsonl"))
    os.kill(engines.rollout.group.pids()[0], signal.SIGKILL)
    assert written(engines, model, job_of(model, tmp_path / "again.jsonl")) == whole
    assert engines.rollout.group.epochs == [1, 0], "the first engine was replaced"


def test_the_held_out_problems_are_answered_greedily_and_judged(
    engines: ModelEngines, model: LoadableModel, tmp_path: Path
):
    [heldout] = problem_sets(model, ["heldout"])
    assert heldout.decoding.temperature == 0 and len(heldout.prompts) == 10
    job = AnswerJob(
        name=heldout.name,
        prompts=heldout.prompts,
        decoding=heldout.decoding,
        out=tmp_path / "heldout.jsonl",
    )
    written(engines, model, job)
    of_set = statistics_of(read_rows(job.out))
    assert (of_set.problems, of_set.samples, of_set.failed) == (10, 1, 0.0)
    assert of_set.average == of_set.passed, "of one response each, worth 0 or 1"


def test_a_named_set_is_answered_as_often_as_it_says_and_unknown_names_are_refused(
    engines: ModelEngines, model: LoadableModel, tmp_path: Path
):
    heldout, drawn = problem_sets(model, [])
    assert (heldout.name, drawn.name) == ("heldout", "drawn")
    assert (drawn.decoding.samples, drawn.decoding.temperature) == (4, 1.0)
    job = AnswerJob(
        name=drawn.name,
        prompts=drawn.prompts,
        decoding=drawn.decoding,
        out=tmp_path / "drawn.jsonl",
    )
    written(engines, model, job)
    of_set = statistics_of(read_rows(job.out), drawn.reward)
    assert (of_set.problems, of_set.samples, list(of_set.pass_at)) == (6, 4, [1, 2, 4])
    assert of_set.average == pytest.approx(of_set.pass_at[1]), "rewards are 0 or 1"
    for names, sentence in {
        ("darwn",): "darwn: there is no such set; the settings have heldout, drawn",
        ("drawn", "drawn"): "drawn: is named twice; name each set once",
    }.items():
        with pytest.raises(ConfigError) as caught:
            problem_sets(model, names)
        assert str(caught.value) == sentence


def test_a_conversation_gets_the_answer_that_the_engines_of_a_run_give(
    engines: ModelEngines, model: LoadableModel, tmp_path: Path
):
    job = job_of(model, tmp_path / "greedy.jsonl", temperature=0.0)
    written(engines, model, job)
    row = next(read_rows(job.out))
    command = [sys.executable, "-m", "hybridrl.cli", "chat", str(model.run_dir)]
    done = subprocess.run(
        [*command, "generate.temperature=0"],
        input=f"{row['prompt']}\n/system x\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[1].startswith(f"{model.run_dir}, step 10; /reset")
    assert lines[3] == row["responses"][0]
    assert "no chat template" in lines[4]
    assert done.stderr == "", "the pages that vLLM logs are held back"
