"""The program as a user runs it: `hybridrl train` from the shell and from Python, resumed,
exported, served, and submitted as a Ray job.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridrl.core.free_port import free_port
from hybridrl.models.tiny import tiny_tokenizer
from hybridrl.run_dir.checkpoint import read_checkpoint
from hybridrl.tracking.jsonl import read_metrics
from hybridrl.tracking.machine_metrics import OF_THE_MACHINE
from hybridrl.weights.fragments import MASTER, FragmentReader
from tests.support.graph import tiny_overrides

pytestmark = pytest.mark.graph

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent.parent


def shell(
    *command: str, env: dict[str, str] | None = None, cwd: Path = ROOT, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=cwd
    )


def train(*overrides: str) -> subprocess.CompletedProcess[str]:
    return shell("hybridrl", "train", *overrides)


def lasting(row: dict[str, float]) -> dict[str, float]:
    """A row of metrics without those that a clock measured."""
    return {key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)}


CANARY = "canary-"
CANARIES = {
    name: f"{CANARY}{name.lower()}"
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "DATABASE_PASSWORD",
        "JUDGE_API_KEY",
    )
}
WATCH = """
import os
from pathlib import Path

def watch(completions, api_key):
    seen = [*os.environ.values(), Path("/proc/self/environ").read_text()]
    return [float(not any("canary-" in value for value in seen))] * len(completions)
"""
"""A reward function that is only measured. It gives 1 if its process has no secret except for the
one that an option passes to it.
"""

TRACKER = """
import json
from pathlib import Path

class Tracker:
    def __init__(self, file):
        self.path = Path(file)
    def start(self, info):
        self.path.write_text("")
    def log(self, metrics):
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\\n")
    def samples(self, rows):
        with self.path.with_suffix(".samples").open("a") as file:
            file.write(f"{len(rows)} of step {rows[0].step}\\n")
    def close(self, exit_code):
        self.path.with_suffix(".end").write_text(str(exit_code))
"""
WATCHED = "watch.py:watch"
FROM_PYTHON = """
import dataclasses, json, os, signal, sys
from pathlib import Path
import ray
import hybridrl
from hybridrl.core.errors import Preempted, RewardError

sys.path.insert(0, sys.argv[1])
import watch

folder, *overrides = sys.argv[2:]
other = [
    f"run.dir={folder}/other", "train.steps=1", "run.seed=7", "train.lr=3e-2", "algorithm.gamma=0",
    "algorithm.divergence=forward_kl", "algorithm.reward_weight=3", "train.samples_per_prompt=2",
    "algorithm.temperature=0.7",
]
rows = []

def on_step(step, metrics):
    rows.append([step, metrics])
    if step == 2:
        raise hybridrl.StopTraining

def stop_the_process(step, metrics):
    os.kill(os.getpid(), signal.SIGTERM)

pids = []
with hybridrl.WarmWorkers() as warm:
    for job, stops in (
        (other, stop_the_process),
        ([f"run.dir={folder}/run"], on_step),
        (
            [
                f"run.dir={folder}/continued",
                f"run.resume_from={folder}/run/checkpoints/step_000002",
            ],
            None,
        ),
    ):
        try:
            result = hybridrl.train(
                [*overrides, *job], on_step=stops, rewards={"watch": watch.watch}, warm=warm
            )
        except Preempted as error:
            Path(folder, "stopped.txt").write_text(str(error))
        else:
            Path(result.run_dir.parent, f"{result.run_dir.name}.json").write_text(
                json.dumps(dataclasses.asdict(result), default=str)
            )
        groups = warm._kept.workers.groups
        pids.append({group.group.name: group.group.pids() for group in groups})
    Path(folder, "broken.py").write_text("def broken(completions, **columns): raise ValueError")
    broken = f"+reward.functions.broken={{function:{folder}/broken.py:broken}}"
    try:
        hybridrl.train(
            [*overrides, f"run.dir={folder}/failed", "reward.on_error=fail", broken],
            rewards={"watch": watch.watch},
            warm=warm,
        )
    except RewardError:
        pids.append({"ray": ray.is_initialized(), "kept": warm.run_dir})
Path(folder, "pids.json").write_text(json.dumps(pids))
Path(folder, "rows.json").write_text(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("train")
    (folder / "watch.py").write_text(WATCH)
    sizes = [
        "train.steps=4",
        "checkpoint.every=2",
        "eval.every=2",
        "learner.ranks=2",
        "learner.zero_stage=3",
        "rollout.engines=2",
    ]
    key = "${oc.env:JUDGE_API_KEY,none}"
    watch = f"{{function:{folder}/watch.py:watch,weight:0,options:{{api_key:'{key}'}}}}"
    return [*tiny_overrides(folder), *sizes, f"+reward.functions.watch={watch}"]


@pytest.fixture(scope="module")
def uninterrupted(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of four steps without a break, with all trackers, two ranks of ZeRO-3
    and two engines.
    """
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    (run_dir.parent / "tracker.py").write_text(TRACKER)
    tracker = f"{{sink:{run_dir.parent}/tracker.py:Tracker,options:{{file:{run_dir.parent}/rows}}}}"
    done = shell(
        "hybridrl",
        "train",
        *overrides,
        f"run.dir={run_dir}",
        "tracking.wandb=offline",
        f"+tracking.sinks.own={tracker}",
        "eval.teacher=true",
        env=CANARIES,
    )
    (run_dir.parent / "printed.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(
        r"held-out accuracy \d+\.\d% -> \d+\.\d% \(teacher main \d+\.\d%\)", done.stdout
    )
    return run_dir


@pytest.fixture(scope="module")
def resumed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the same run in two parts. The first two steps are made from Python, which
    passes the file of the reward function `watch` and stops the run; the others are made by the
    command, with engines and a learner that take turns.

    The first part is the second job of a sweep in one process, after a job with other settings. The
    third job, `continued`, has its directory beside this one and makes the other two steps as well.
    """
    run_dir = tmp_path_factory.mktemp("resumed") / "run"
    [watch] = [Path(o.partition("{function:")[2].split(":")[0]) for o in overrides if WATCHED in o]
    python = (sys.executable, "-c", FROM_PYTHON, str(watch.parent), str(run_dir.parent))
    elsewhere = [override.replace(WATCHED, "absent.py:watch") for override in overrides]
    first = shell(*python, *elsewhere, timeout_s=540)  # three short runs, and one that fails
    assert first.returncode == 0, first.stderr[-3000:]
    assert (
        "on_step ended the run after step 2 of 4; the same command goes on from step_000002"
        in first.stdout
    )
    turns = ("cluster.colocate=true", "cluster.take_turns=true")
    done = train(*overrides, f"run.dir={run_dir}", *turns)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continues after step 2 of 4" in done.stdout
    return run_dir


def test_a_run_leaves_the_promised_files(uninterrupted):
    names = {str(p.relative_to(uninterrupted)) for p in uninterrupted.rglob("*") if p.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "report.png",
        "checkpoints/step_000004/manifest.json",
        "checkpoints/step_000004/state.json",
        "checkpoints/step_000004/learner-rank00000-of-00002.safetensors",
        "ledger.jsonl",
        "checkpoints/step_000004/learner-rank00001-of-00002.safetensors",
        "export/step_000004/config.json",
        "export/step_000004/model.safetensors",
        "samples/step_000000.jsonl",
        "samples/step_000004.jsonl",
        "samples/tokens_000001.jsonl",
        "samples/tokens_000004.jsonl",
        "logs/learner-1.log",
        "logs/rollout-1.log",
    } <= names
    assert any(name.startswith("wandb/") and name.endswith(".wandb") for name in names)
    assert read_checkpoint(uninterrupted / "checkpoints" / "step_000004").state.trackers["wandb"]
    assert not any(".unfinished" in name for name in names)


def test_no_secret_of_the_environment_is_in_anything_that_a_run_leaves_or_prints(uninterrupted):
    files = [path for path in uninterrupted.parent.rglob("*") if path.is_file()]
    assert (
        any(path.suffix == ".wandb" for path in files)
        and uninterrupted.parent / "printed.txt" in files
    )
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert "api_key: '***'" in (uninterrupted / "config.yaml").read_text()


def test_the_children_that_run_reward_functions_see_no_secret(uninterrupted):
    assert [row["reward/watch/mean"] for row in read_metrics(uninterrupted)[1:]] == [1.0] * 4


def test_every_step_is_in_the_metrics_once_and_the_teacher_is_measured(uninterrupted):
    rows = read_metrics(uninterrupted)
    assert [row["train/step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [("eval/accuracy" in row) for row in rows] == [True, False, True, False, True]
    assert "eval/accuracy_teacher/main" in rows[0]
    assert all(row["controller/materialized_bytes"] == 0 for row in rows[1:])


def test_engines_and_ranks_that_divide_the_parameters_agree_on_the_log_probs(uninterrupted):
    rows = read_metrics(uninterrupted)[1:]
    assert all(row["policy/logprob_gap"] < 1e-5 for row in rows), "nats, mean over all tokens"
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert all(0 < row["reward/countdown/mean"] < 1 for row in rows)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(uninterrupted, resumed):
    assert [lasting(row) for row in read_metrics(resumed)][1:] == [
        lasting(row) for row in read_metrics(uninterrupted)
    ][1:]
    files = [
        f"checkpoints/step_000004/learner-rank0000{rank}-of-00002.safetensors" for rank in (0, 1)
    ]
    assert all(
        (resumed / name).read_bytes() == (uninterrupted / name).read_bytes()
        for name in (*files, "ledger.jsonl")
    )


def test_on_step_receives_each_step_with_its_row(resumed):
    rows = json.loads((resumed.parent / "rows.json").read_text())
    assert rows == [[step, read_metrics(resumed)[step]] for step in (1, 2)]


def test_a_run_that_took_turns_says_how_long_they_took(resumed):
    """Its steps equal those of a run without turns bit by bit (the test above)."""
    turns = [row.get("time/turn_s") for row in read_metrics(resumed)]
    assert turns[:3] == [None] * 3 and all(seconds > 0 for seconds in turns[3:])
    log = (resumed / "logs" / "rollout-0.log").read_text()
    assert "sleep mode is not supported on CPU" in log, "vLLM was asked"


def test_a_job_that_continues_with_the_workers_of_another_one_is_equal_bit_by_bit(
    uninterrupted, resumed
):
    continued = resumed.parent / "continued"
    assert [lasting(row) for row in read_metrics(continued)][1:] == [
        lasting(row) for row in read_metrics(uninterrupted)
    ][1:]
    for name in (
        "checkpoints/step_000004/learner-rank00000-of-00002.safetensors",
        "checkpoints/step_000004/learner-rank00001-of-00002.safetensors",
        "export/step_000004/model.safetensors",
    ):
        assert (continued / name).read_bytes() == (uninterrupted / name).read_bytes()


def test_the_workers_of_a_sweep_stay_but_for_those_that_run_rewards_and_each_job_has_its_logs(
    resumed,
):
    first, second, third, _ = json.loads((resumed.parent / "pids.json").read_text())
    stay = {"learner": 2, "rollout": 2, "scorer-main": 1}
    assert {name: len(pids) for name, pids in first.items() if pids == second[name]} == stay
    assert {name: len(pids) for name, pids in first.items() if pids == third[name]} == stay
    logs = [
        {path.name for path in (resumed.parent / job / "logs").glob("*.log")}
        for job in ("other", "run", "continued")
    ]
    assert logs[0] == logs[1] == logs[2] and "learner-1.log" in logs[2]


def test_a_signal_after_the_last_step_of_a_job_lets_no_other_begin_and_the_job_is_finished(resumed):
    stopped = (resumed.parent / "stopped.txt").read_text()
    assert stopped == "ended by SIGTERM; run the same command again to continue"
    assert (resumed.parent / "other" / "export" / "step_000001" / "model.safetensors").exists()
    assert (resumed.parent / "other" / "report.html").exists()


def test_after_a_job_that_fails_no_worker_is_kept(resumed):
    """The failed job had the workers of the previous job."""
    *_, failed = json.loads((resumed.parent / "pids.json").read_text())
    assert failed == {"ray": False, "kept": None}
    printed = (resumed.parent / "failed" / "logs" / "console.log").read_text()
    assert "workers ready after" in printed and "new ones start" not in printed


def test_a_run_from_python_returns_its_last_row_and_the_paths_of_what_it_left(resumed):
    result = json.loads((resumed.parent / "run.json").read_text())
    assert result["metrics"] == read_metrics(resumed)[2]
    assert result["accuracy_after"] == result["metrics"]["eval/accuracy"]
    assert {key: result[key] for key in ("exit_reason", "run_dir")} == {
        "exit_reason": "stopped",
        "run_dir": str(resumed),
    }
    assert {key: result[key] for key in ("checkpoint", "export", "report")} == {
        "checkpoint": str(resumed / "checkpoints" / "step_000002"),
        "export": str(resumed / "export" / "step_000002"),
        "report": str(resumed / "report.html"),
    }


def test_a_tracker_in_a_users_file_receives_every_row_and_sample_and_the_end(uninterrupted):
    rows = uninterrupted.parent / "rows"
    assert [json.loads(line) for line in rows.read_text().splitlines()] == read_metrics(
        uninterrupted
    )
    samples = rows.with_suffix(".samples").read_text().splitlines()
    assert [line.partition(" of ")[2] for line in samples] == ["step 0", "step 2", "step 4"]
    assert rows.with_suffix(".end").read_text() == "0"


def test_a_finished_run_is_not_trained_again(uninterrupted, overrides):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = train(*overrides, f"run.dir={uninterrupted}", "run.resume=never")
    assert done.returncode == 1 and "holds a run and run.resume=never" in done.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_bad_setting_ends_in_one_sentence_before_any_actor_starts(tmp_path):
    done = train("experiment=quickstart", f"run.dir={tmp_path / 'x'}", "train.stepz=3")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "hybridrl: train.stepz=3: no such setting; did you mean train.steps?\n",
    )
    assert not (tmp_path / "x").exists()


def test_the_flags_of_hydra_print_the_settings_and_the_help_and_write_nothing(tmp_path):
    job = shell(
        "hybridrl",
        "train",
        "experiment=quickstart",
        f"run.dir={tmp_path}",
        "train.steps=7",
        "--cfg",
        "job",
        cwd=tmp_path,
    )
    assert (
        job.returncode == 0
        and "steps: 7" in job.stdout
        and "path: builtin:countdown-student" in job.stdout
    )
    listing = shell("hybridrl", "train", "--help", cwd=tmp_path)
    assert (
        listing.returncode == 0
        and "quickstart" in listing.stdout
        and "max_new_tokens" in listing.stdout
    )
    assert not list(tmp_path.iterdir()), "neither flag writes anything"


def greedy_by_hand(run_dir: Path, prompt: list[int], tokens: int) -> list[int]:
    """Greedy decoding with the learner's fp32 master weights, without a KV cache and without the
    export.
    """
    reader = FragmentReader(run_dir / "checkpoints" / "step_000004")
    state = {name: reader.whole(MASTER, name) for name in reader.shapes}
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "step_000004")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}, "a tied head is not saved"
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + tokens and (
            len(ids) == len(prompt) or ids[-1] != model.config.eos_token_id
        ):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@contextmanager
def served(run_dir: Path, template: Path, log: Path) -> Iterator[str]:
    """Run `hybridrl serve RUN` as a user does, with a chat template, which the tokenizer lacks."""
    port = free_port()
    command = [str(BIN / "hybridrl"), "serve", str(run_dir), "--port", str(port)]
    command += ["--", "--chat-template", str(template)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_up(f"http://127.0.0.1:{port}", server, log, deadline_s=180)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def wait_until_up(url: str, server: subprocess.Popen, log: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)


def answer(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def test_a_served_run_answers_chats_and_completions_with_the_learners_greedy_output(
    uninterrupted, tmp_path
):
    tokenizer = tiny_tokenizer()
    texts = ("3 7 9=24:", "1 2 10=7:", "4 4 5=21:")
    prompts = [tokenizer(text).input_ids for text in texts]
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    with served(uninterrupted, template, tmp_path / "serve.log") as url:
        common = {"model": "step_000004", "temperature": 0, "max_tokens": 12}
        common["return_token_ids"] = True
        choices = answer(f"{url}/v1/completions", {**common, "prompt": prompts})["choices"]
        messages = [{"role": "user", "content": texts[0]}]
        chat = answer(f"{url}/v1/chat/completions", {**common, "messages": messages})["choices"]
    by_hand = [greedy_by_hand(uninterrupted, prompt, 12) for prompt in prompts]
    assert [choice["token_ids"] for choice in choices] == by_hand
    assert chat[0]["token_ids"] == by_hand[0]
    expected = tokenizer.decode(by_hand[0], skip_special_tokens=True)
    assert chat[0]["message"]["content"] == expected


@pytest.fixture
def two_nodes(tmp_path) -> Iterator[dict[str, str]]:
    """Start a cluster with tokens by the shipped scripts; yields the environment of its users."""
    home = tmp_path / "home"
    home.mkdir()
    ports = [str(free_port(range(first, first + 200))) for first in (20_000, 20_200, 20_400)]
    sessions = Path(mkdtemp(prefix="ray-"))  # short: the path of a Unix socket holds 107 bytes
    env = {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(sessions),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }
    small = ("--num-cpus", "1", "--object-store-memory", "200000000")
    head = shell(
        "cluster/head.sh",
        "--port",
        ports[0],
        "--dashboard-port",
        ports[1],
        "--dashboard-agent-listen-port",
        ports[2],
        *small,
        env=env,
    )
    assert head.returncode == 0, head.stdout + head.stderr
    worker = shell("cluster/worker.sh", f"127.0.0.1:{ports[0]}", *small, env=env)
    assert worker.returncode == 0, worker.stdout + worker.stderr
    yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    shell("pkill", "-9", "-f", str(sessions))
    shutil.rmtree(sessions, ignore_errors=True)


def raylet_of(log: Path) -> int:
    """The pid of the raylet of the node on which the worker with this log runs: its parent."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "fd" / "1").resolve() == log.resolve():
                status = (process / "stat").read_text().rpartition(")")[2].split()
                parents[int(process.name)] = int(status[1])
    (raylet,) = set(parents.values()) - set(parents)
    return raylet


def test_a_job_on_two_nodes_with_tokens_is_stopped_saves_what_it_learned_and_is_submitted_again(
    two_nodes, overrides, tmp_path
):
    """The second job has the settings of the first one and another, with which it refuses to
    continue from the checkpoint. A run that continues is tested by `resumed` above.
    """
    run_dir = tmp_path / "job"
    spread = ["cluster.spread=true", "cluster.threads_per_worker=1", "rollout.engines=1"]
    submit = ["hybridrl", "submit", "--program", str(BIN / "hybridrl"), "--no-wait"]
    one_rank = ["learner.ranks=1", "learner.zero_stage=1"]
    divided = "++teachers.main.devices=2"
    settings = [*overrides, *spread, *one_rank, divided, f"run.dir={run_dir}", "train.steps=1000"]
    begun = shell(*submit, "--id", "first", *settings, env=two_nodes)
    assert begun.returncode == 0, begun.stdout[-3000:] + begun.stderr[-1000:]
    assert "hybridrl jobs first follows it" in begun.stdout
    end = time.monotonic() + 300
    while len(read_metrics(run_dir)) < 3:
        assert time.monotonic() < end, shell("ray", "job", "logs", "first", env=two_nodes).stdout[
            -3000:
        ]
        time.sleep(0.5)
    ranks = [raylet_of(run_dir / "logs" / f"scorer-main-{i}.log") for i in range(2)]
    assert ranks[0] != ranks[1], "the ranks of the divided teacher are on different nodes"
    stopped = shell("hybridrl", "jobs", "first", "--stop", env=two_nodes)
    assert stopped.returncode == 0, stopped.stderr[-1000:]
    followed = shell("hybridrl", "jobs", "first", env=two_nodes)
    assert followed.returncode == 75, followed.stdout[-3000:] + followed.stderr[-1000:]
    assert "job first: stopped, exit status 75" in followed.stdout
    printed = re.findall(r"^step +(\d+)/", followed.stdout, re.MULTILINE)
    assert printed and len(printed) == len(set(printed)), "no line comes twice"
    last = int(read_metrics(run_dir)[-1]["train/step"])
    assert (
        last >= 2
        and read_checkpoint(run_dir / "checkpoints" / f"step_{last:06d}").state.step == last
    )

    never = "run.resume=never"
    again = shell(*submit, "--id", "second", "--resume", "first", never, env=two_nodes)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-1000:]
    ended = shell("hybridrl", "jobs", "second", env=two_nodes)
    assert ended.returncode == 1, ended.stdout[-3000:] + ended.stderr[-1000:]
    assert "holds a run and run.resume=never" in ended.stdout
    assert "job second: failed, exit status 1" in ended.stdout
    listed = shell("hybridrl", "jobs", env=two_nodes).stdout.splitlines()
    rows = [line.split("  ", 3) for line in listed]
    assert [row[:2] for row in rows] == [["second", "failed"], ["first", "stopped"]]
    assert rows[0][3] == f"{rows[1][3]} {never}"
    refused = shell("hybridrl", "jobs", env={**two_nodes, "RAY_AUTH_TOKEN": "not-the-token"})
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
