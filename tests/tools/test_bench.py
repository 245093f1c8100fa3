"""Each verb of tools/bench runs with its smallest sizes, and writes the expected keys."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from benchmarks import machine, start, watched
from benchmarks.__main__ import main
from benchmarks.stage import settings_of

from hybridrl.runtime.cluster import Cluster
from tests.support.importable import importable_benchmarks

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    """Start a Ray that all verbs share: each verb uses a Ray to which its process is connected."""
    with importable_benchmarks(), Cluster(settings_of()):
        yield


def arguments_for(tmp_path: Path, *arguments: str) -> list[str]:
    """Arguments of `tools/bench` with which it also writes its JSON and its picture."""
    files = ["--json", str(tmp_path / "results.json"), "--picture", str(tmp_path / "results.png")]
    return [*arguments, *files]


def written(tmp_path: Path) -> dict:
    """The JSON that `tools/bench` wrote; its picture must exist too."""
    assert (tmp_path / "results.png").stat().st_size > 1000
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"cpu", "cores", "commit"} <= results["machine"].keys()
    return results


def bench(tmp_path: Path, *arguments: str) -> dict:
    """Run `tools/bench ARGUMENTS` in this process; returns the JSON that it writes."""
    assert main(arguments_for(tmp_path, *arguments)) == 0
    return written(tmp_path)


def bench_alone(tmp_path: Path, *arguments: str) -> dict:
    """Run the command `tools/bench ARGUMENTS`, which starts its own Ray; returns its JSON."""
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'tools'}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-m", "benchmarks", *arguments_for(tmp_path, *arguments)]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return written(tmp_path)


@pytest.mark.graph
def test_the_pipeline_bench_compares_three_schedules_and_loses_no_prompt(tmp_path, one_ray):
    """The bench itself asserts that every prompt is trained on once, or will be drawn again."""
    results = bench(
        tmp_path,
        "pipeline",
        "--steps",
        "1",
        "--tail-steps",
        "1",
        "--scale",
        "0.05",
        "--real-steps",
        "0",
    )
    assert [row["late"] for row in results["tail"]] == [0, pytest.approx(4 / 20)]
    rows = results["waits"]
    assert len(rows) == 4
    assert all(
        {"phases", "sync", "sum", "streamed", "pipelined", "limit", "ratio"} == row.keys()
        for row in rows.values()
    )


@pytest.mark.graph
def test_the_dispatch_bench_counts_the_bytes_in_the_driver_and_finds_none(tmp_path, one_ray):
    results = bench(tmp_path, "dispatch", "--shrink", "32", "--store-gb", "0.2", "--repeats", "1")
    rows = results["rows"]
    assert {row["tokens"] for row in rows} >= {1024, 2048, 32768}
    assert all(row["driver_bytes"] == 0 and row["bytes"] > 0 for row in rows)
    assert any(row["materialising_s"] is not None for row in rows)


@pytest.mark.graph
def test_the_overhead_bench_grows_engines_groups_and_tokens(tmp_path, one_ray):
    sizes = ["--most-engines", "4", "--most-groups", "16", "--repeats", "1"]
    results = bench(tmp_path, "overhead", "--parts", "controller", "scaling", *sizes)
    assert [row["engines"] for row in results["scaling"]["engines"]] == [1, 4]
    assert {"step_s", "busy_s", "share"} == results["controller"]["one chunk"].keys()


@pytest.mark.graph
def test_the_overhead_bench_runs_the_same_requests_and_micro_batches_bare(tmp_path, one_ray):
    """The bench itself asserts that a bare engine in fp32 samples the same number of tokens."""
    results = bench(
        tmp_path,
        "overhead",
        "--parts",
        "generation",
        "learner",
        "--models",
        "tiny",
        "--repeats",
        "1",
    )
    generation = results["generation"]["tiny"]
    assert generation["share"] > 0 and generation["tokens"]["ours"] == generation["tokens"]["bare"]
    assert results["learner"]["tiny"]["tokens"] == 96 * 4 * 16


@pytest.mark.graph
def test_the_sync_bench_takes_the_way_of_the_weights_apart(tmp_path, one_ray):
    row = bench(tmp_path, "sync", "--models", "tiny fp32", "--repeats", "1")["models"]["tiny fp32"]
    assert {"total", "engine", "pack", "memcpy", "digest", "own_load"} == row["median"].keys()
    assert row["bytes"] > 3_000_000


@pytest.mark.graph
def test_the_evidence_bench_finds_narrower_states_worse_than_bfloat16(tmp_path, one_ray):
    tiny = ["--model", "builtin:countdown-student", "--noise", "0.1", "--mb", "1", "--repeats", "1"]
    results = bench(tmp_path, "evidence", *tiny)
    (student,) = results["students"]
    errors = student["errors"]
    assert 0 < errors["bfloat16"] < errors["int8"] < 1 and errors["bfloat16"] < errors["fp8"] < 1
    width = results["width"]
    assert results["bytes"] == {"bfloat16": 2 * width, "int8": width + 4, "fp8": width + 4}
    assert results["edge_gb_s"] > 0


@pytest.mark.graph
def test_the_start_bench_measures_each_worker_alone_and_all_together(tmp_path, one_ray):
    """It measures one import, because each takes seconds, and two workers alone. For the other
    modules it is enough that they exist; the other workers start together with all.
    """
    chosen = ["--imports", "driver", "--workers", "reward", "learner"]
    results = bench(tmp_path, "start", "--repeats", "1", *chosen)
    assert results["imports_s"].keys() == {"driver"} and results["imports_s"]["driver"] > 0
    assert start.MODULES.keys() == {"driver", "engine", "learner", "scorer", "reward"}
    assert all(importlib.util.find_spec(module) for module in start.MODULES.values())
    assert list(results["starts_s"]) == ["reward", "learner", "all together"]
    assert start.STARTS.keys() == {"engine", "learner", "scorer", "reward", "all together"}
    assert all(s > 0 for (s,) in results["starts_s"].values()) and results["ratio"] > 0


def test_all_workers_together_are_compared_with_the_slowest_alone():
    """The medians are 2 s, 4 s and 6 s."""
    alone = {"reward": [1.0, 2.0, 9.0], "learner": [4.0, 3.0, 5.0]}
    assert start.together_over_slowest({**alone, start.TOGETHER: [8.0, 6.0, 5.0]}) == 6 / 4


@pytest.mark.graph
def test_the_scale_bench_gives_the_same_calls_whether_workers_have_a_process_each_or_share(
    tmp_path, one_ray
):
    """There are 3 calls for each of 18 chunks; each of 4 engines loads weights, samples a probe and
    answers a ping; each of 2 ranks learns, packs and checks the probe. A slow step has more pings.
    """
    sizes = ["--engines", "4", "--scorers", "1", "--ranks", "2", "--groups", "18"]
    small = ["--base-groups", "18", "--processes", "7", "--few", "4", "--repeats", "1"]
    results = bench(tmp_path, "scale", *sizes, *small, "--parts", "agreement", "whole")
    assert [results[way]["processes"] for way in ("processes", "shared", "step")] == [7, 4, 4]
    pings = [results[way]["calls"] - 72 for way in ("processes", "shared", "step")]
    assert all(number >= 0 and number % 4 == 0 for number in pings)
    assert results["step"]["flight_bytes"] == results["shared"]["flight_bytes"] > 0


@pytest.mark.graph
def test_the_tree_bench_finds_one_copy_on_each_node_both_ways(tmp_path):
    """It starts several nodes, so it cannot share a Ray and is run as a command. In Ray any node
    with a copy may send it to others, so the number of copies that a node sends is not fixed.
    """
    sizes = ["--nodes", "4", "--engines-per-node", "1", "--mb", "2", "--repeats", "1"]
    rows = bench_alone(tmp_path, "tree", *sizes)["rows"]
    assert len(rows) == 2
    for row in rows:
        assert row["received"] == [1, 1, 1, 0] and sum(row["sent"]) == 3


@pytest.mark.graph
def test_the_checkpoint_bench_saves_twelve_bytes_a_parameter_both_ways(tmp_path, one_ray):
    results = bench(tmp_path, "checkpoint", "--models", "tiny", "--repeats", "1")
    row = results["rows"]["tiny"]
    parameters = 782_336
    assert 12 * parameters < row["bytes"] < 12.1 * parameters
    assert {"foreground_s", "hold_s", "background_s", "update_s"} <= row.keys()
    one, eight = results["estimates"]
    assert one["bytes"] == eight["bytes"] == 12 * 7_615_616_512
    assert one["hold_s"] == pytest.approx(8 * eight["hold_s"])


def test_a_command_that_takes_too_long_ends_with_its_children_though_they_ignore_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shell that ignores SIGTERM, as its child then does too."""
    monkeypatch.setattr(watched, "END_S", 0.1)
    script = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; wait"
    with pytest.raises(RuntimeError, match="still running after 1 s"):
        watched.run(["sh", "-c", script], limit_s=1)
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_a_commit_is_marked_as_changed_by_code_and_not_by_what_the_tools_wrote(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True)

    results = tmp_path / "tools" / "experiments" / "runs.jsonl"
    results.parent.mkdir(parents=True)
    code = tmp_path / "code.py"
    for path in (results, code):
        path.write_text("1\n")
    assert machine.commit(tmp_path) == "unknown"
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    clean = machine.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    results.write_text("2\n")
    assert machine.commit(tmp_path) == clean
    code.write_text("2\n")
    assert machine.commit(tmp_path) == f"{clean}+"
