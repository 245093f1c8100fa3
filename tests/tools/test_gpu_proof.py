"""tools/gpu_proof on CPUs: which steps run, which checks pass and fail, and what is written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_checks import __main__ as command
from gpu_checks import graph, head_pass, head_speed, learner_cases, part_process, products, steps
from gpu_checks import planned as planned_rows
from gpu_checks.check import Check, Verdict, figure, holds, not_run, within
from gpu_checks.ground import Ground
from gpu_checks.head_pass import ON_CPU, near_teacher, written_formula
from gpu_checks.page import page
from gpu_checks.proof import PartResult, Proof, StepResult, earlier_steps, store
from gpu_checks.rounding import of_gradient, of_sums
from gpu_checks.steps import Part, missing

from hybridrl.kernels import head
from hybridrl.kernels.rows import RowResult, row_work
from hybridrl.runtime.workers import teams
from hybridrl.settings.compose import load_config

ROOT = Path(__file__).parent.parent.parent
PART = Part(name="p", title="a part", run="m:f", packages=("torch",))


def ground(folder: Path, device: str = "cpu") -> Ground:
    return Ground(device=device, folder=str(folder))


# -- verdicts --------------------------------------------------------------------------------------


def test_a_check_passes_within_its_limits_and_fails_outside_of_them_or_if_it_is_not_a_number():
    def verdict(value: float) -> Verdict:
        return within("x", value, low=0.8, high=1.2, reason="a fifth").verdict

    assert [verdict(v) for v in (0.79, 0.8, 1.2, 1.21, float("nan"))] == [
        "fail",
        "pass",
        "pass",
        "fail",
        "fail",
    ]
    assert within("x", float("inf"), low=1.0, reason="").value is None  # JSON has no infinity
    assert holds("x", False, "").verdict is Verdict.failed


def test_the_limits_follow_from_the_epsilon_of_the_dtype_and_the_number_of_terms():
    assert of_sums(1024) == 4 * 2**-23 * 32
    assert of_gradient(torch.bfloat16, 1024) == 2**-7 + 4 * 2**-23 * 32
    assert of_sums(2**22) == 2**-10  # the epsilon of TF32


# -- broken numbers are caught ---------------------------------------------------------------------


def test_every_form_of_evidence_is_within_its_limits_on_this_machine():
    assert len(head_pass.FORMS) == 8
    for form in ("hidden states of two teachers", "support, tail_bucket"):
        for dtype in (torch.float32, torch.bfloat16):
            gradient, value = head_pass.largest_errors(form, ON_CPU, dtype, "cpu")
            assert gradient < of_gradient(dtype, 1031) and value < of_sums(1031), form


def test_a_gradient_that_is_a_thousandth_too_large_fails_in_float32(monkeypatch):
    """In fp64 the gradient stays right, as if only the GPU's own kernel were wrong."""

    def broken(rule, forms, logits, dtype):
        work = row_work(rule, forms, logits, dtype)

        def scaled(*tensors) -> RowResult:
            result = work(*tensors)
            wrong = result.gradient * (1.001 if dtype is torch.float32 else 1.0)
            return result._replace(gradient=wrong)

        return scaled

    monkeypatch.setattr(head, "row_work", broken)
    gradient, value = head_pass.largest_errors("hidden states", ON_CPU, torch.float32, "cpu")
    assert gradient == pytest.approx(1e-3, rel=0.01)
    assert gradient > of_gradient(torch.float32, 1031) and value < of_sums(1031)


def test_a_pass_that_is_wrong_in_every_dtype_fails_against_the_written_formula(monkeypatch):
    assert written_formula().verdict is Verdict.passed
    right = head.row_work

    def broken(*arguments):
        work = right(*arguments)
        return lambda *tensors: (r := work(*tensors))._replace(gradient=r.gradient * 1.001)

    monkeypatch.setattr(head, "row_work", broken)
    check = written_formula()
    assert check.verdict is Verdict.failed and check.value == pytest.approx(1e-3, rel=0.01)


def test_logits_that_are_rounded_to_bfloat16_fail_near_the_teacher():
    exact, rounded = (near_teacher(ON_CPU, torch.bfloat16, "cpu", exact=e) for e in (True, False))
    assert [exact.verdict, rounded.verdict] == ["pass", "fail"]
    assert rounded.value is not None and rounded.value > 2 * 2**-7


BROKEN_TRITON = """
import json
from gpu_checks import triton_rows as checks
from hybridrl.kernels import triton_rows as kernels

right = kernels.coefficients
def wrong(*arguments):
    factors = right(*arguments)
    return factors._replace(sparse=factors.sparse * 1.001)
kernels.coefficients = wrong
verdicts = {c.name: c.verdict for c in checks.rows(checks.Ground(device="cpu", folder="."))}
print(json.dumps(verdicts | {"differing": checks.differing_entries(5, 37, "cpu")}))
"""


def test_a_triton_kernel_with_a_wrong_number_fails_where_that_number_counts():
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_TRITON],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    verdicts = json.loads(done.stdout)
    assert verdicts["Triton rows, gradient, reverse_kl of 0"] == "fail"
    assert verdicts["Triton rows, values, forward_kl of 0"] == "fail"  # by its column sparse_sq
    assert verdicts["Triton rows past entry 2**31"] == "not run"
    assert verdicts["differing"] == 0


def test_products_that_round_their_sums_fail():
    """On a CPU all products round their sums, except for those of the logits."""
    checks = list(products.products_on("cpu", 64, 32, 48))
    assert [c.verdict for c in checks] == ["pass", "fail", "fail"]
    assert all(c.value > 1e-3 for c in checks[1:] if c.value is not None)


# -- time and memory -------------------------------------------------------------------------------


LIGER = "Liger JSDLoss + GRPOLoss bf16 hybrid"


def bench_result(seconds: float, extra: int) -> dict:
    rows = {"ours bf16 hybrid": seconds, "autograd bf16 hybrid": 1.0, LIGER: 0.9}
    return {
        "rows": 2048,
        "width": 10,
        "vocabulary": 1000,
        "failed": {"torch.compile": "OutOfMemoryError"},
        "variants": {n: {"seconds": [s], "extra_bytes": extra} for n, s in rows.items()},
    }


def test_a_pass_that_is_slow_or_large_fails_and_a_cpu_says_nothing_about_it(tmp_path):
    """The expected memory is 10 x 1024 x 1000 + 4 x 10 x 1000 = 10,280,000 bytes; a tenth more
    passes.
    """

    def verdicts(result: dict, device: str = "cuda") -> list[str]:
        return [c.verdict for c in head_speed.limits(result, 0.5, ground(tmp_path, device))]

    assert verdicts(bench_result(0.7, 11_300_000)) == ["pass"] * 4
    assert verdicts(bench_result(0.95, 11_300_000)) == ["fail", "pass", "fail", "pass"]
    assert verdicts(bench_result(1.1, 11_400_000)) == ["fail"] * 4
    assert verdicts(bench_result(1.1, 11_400_000), "cpu") == ["not run"]
    without = bench_result(0.7, 11_300_000)
    del without["variants"][LIGER]
    assert verdicts(without)[2] == "not run"
    shown = list(head_speed.figures(bench_result(0.7, 2**20)))
    assert [c.verdict for c in shown] == ["figure", "figure", "figure", "not run"]
    assert shown[3].reason == "OutOfMemoryError" and "1 MiB" in shown[0].reason


def test_a_variant_of_ours_that_could_not_be_measured_fails(tmp_path):
    result = bench_result(0.7, 0)
    del result["variants"]["ours bf16 hybrid"]
    result["failed"]["ours bf16 hybrid"] = "RuntimeError: no kernel"
    checks = list(head_speed.limits(result, 0.5, ground(tmp_path, "cuda")))
    assert {(c.verdict, c.reason) for c in checks} == {("fail", "RuntimeError: no kernel")}


# -- what runs -------------------------------------------------------------------------------------


def test_a_part_is_not_run_where_something_is_missing_and_the_reason_names_it(
    tmp_path, monkeypatch
):
    cpu, gpu = (ground(tmp_path, device) for device in ("cpu", "cuda"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert missing(PART, gpu, gpus=1) is None
    assert missing(PART, cpu, gpus=0) is None
    four = replace(PART, gpus=4, on_cpu=False)
    assert missing(four, gpu, gpus=1) == "needs 4 GPUs, this machine has 1"
    assert missing(four, cpu, gpus=0) == "needs 4 GPUs; this is a run on a CPU"
    absent = replace(PART, packages=("torch", "no_such", "none_such"))
    assert missing(absent, gpu, gpus=1) == "needs the packages no_such, none_such"
    assert "RAY_ADDRESS" in str(missing(replace(PART, nodes=2), gpu, gpus=8))


def test_a_part_whose_process_ends_early_keeps_its_checks_and_fails(tmp_path, monkeypatch):
    """The first process prints one check and is then killed; the next one exceeds its time."""
    script = tmp_path / "python"
    line = 'CHECK {"name": "first", "verdict": "pass"}'
    monkeypatch.setattr(part_process.sys, "executable", str(script))

    def outcome(last: str, limit_s: float) -> list[Check]:
        script.write_text(f"#!/bin/sh\necho 'a library prints'\necho '{line}'\n{last}\n")
        script.chmod(0o755)
        return list(part_process.run_part(replace(PART, limit_s=limit_s), ground(tmp_path)))

    killed = outcome("echo 'CUDA error: it broke' >&2; kill -9 $$", 60.0)
    assert [c.verdict for c in killed] == ["pass", "fail"]
    assert "status -9, after first: CUDA error: it broke" in killed[1].reason
    late = outcome("sleep 60", 1.0)
    assert "after 1 s, after first" in late[1].reason
    assert [c.name for c in outcome("exit 0", 60.0)] == ["first"]


def test_a_machine_without_a_gpu_gets_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "this_machine", lambda: {"gpus": []})
    assert command.main(["1", "--out", str(tmp_path)]) == 2
    sentence = capsys.readouterr().err.strip()
    assert (
        sentence.count("\n") == 0 and "finds no GPU on this machine; with --device cpu" in sentence
    )
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["7"])
    assert "STEP 7: must be from 1 to" in capsys.readouterr().err


# -- what is written -------------------------------------------------------------------------------

MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "memory_gib": 24,
    "torch": "2.13.0",
    "gpus": [{"name": "A GPU", "memory_gib": 79.1, "capability": "9.0"}] * 2,
    "nvidia_smi": "A GPU, 580.1, 81559 MiB, 9.0\nA GPU, 580.1, 81559 MiB, 9.0",
}


def proof_of(*checks: Check, number: int = 1, device: str = "cuda") -> Proof:
    part = PartResult(name="p", title="a part", seconds=3.0, checks=checks)
    step = StepResult(number=number, title="a step", made="2026-01-01", parts=(part,))
    return Proof(device=device, machine=MACHINE, steps=(step,))


def test_the_page_names_the_device_the_driver_and_each_verdict_with_its_reason():
    checks = (
        within("one", 0.5, high=1.0, unit="x", reason="half | whole"),
        within("two", 2.0, low=0.5, high=1.0, reason="too much"),
        not_run("three", "needs 4 GPUs, this machine has 2"),
        figure("four", 12.34, "ms"),
    )
    proof = proof_of(*checks)
    text = "\n".join(page(proof))
    assert proof.failed
    assert text.startswith("# Proof of hybridrl on 2 x A GPU\n")
    assert "1 checks passed, 1 failed and 1 were not run." in text
    assert text.count("A GPU, 580.1") == 1 and "torch 2.13.0" in text
    assert "| pass | one | 0.5 x | at most 1 | half / whole |" in text
    assert "| **FAIL** | two | 2 | 0.5 to 1 | too much |" in text
    assert "| not run | three |  |  | needs 4 GPUs, this machine has 2 |" in text
    assert "| figure | four | 12.3 ms |  |  |" in text
    assert not proof_of(checks[0], checks[2]).failed
    on_cpu = "\n".join(page(proof_of(checks[0], device="cpu")))
    assert "Nothing here was run on a GPU" in on_cpu and "A GPU" not in on_cpu.splitlines()[0]


def test_steps_of_an_earlier_call_stay_on_the_same_machine_and_are_replaced_by_number(tmp_path):
    first = proof_of(holds("a", True, ""), number=2)
    store(first, tmp_path)
    stored = json.loads((tmp_path / "proof.json").read_text())
    assert stored.keys() == {"schema", "device", "machine", "steps"}
    assert stored["steps"][0].keys() == {"number", "title", "made", "parts"}
    assert stored["steps"][0]["parts"][0].keys() == {"name", "title", "seconds", "checks"}
    check = stored["steps"][0]["parts"][0]["checks"][0]
    assert check.keys() == {"name", "verdict", "value", "low", "high", "unit", "reason"}
    assert tuple(earlier_steps(tmp_path, "cuda", MACHINE)) == first.steps
    assert list(earlier_steps(tmp_path, "cpu", MACHINE)) == []
    assert list(earlier_steps(tmp_path, "cuda", MACHINE | {"torch": "2.14.0"})) == []
    new = proof_of(holds("b", True, ""), number=1).steps[0]
    again = first.with_step(new).with_step(replace(new, made="2026-02-02"))
    assert [(step.number, step.made) for step in again.steps] == [
        (1, "2026-02-02"),
        (2, "2026-01-01"),
    ]


# -- learner and scorer ----------------------------------------------------------------------------

STEPPED = """
import json, sys
from gpu_checks.ground import Ground
from gpu_checks.learner import set_environment
set_environment("cpu", "float32")
from gpu_checks import learner_cases as cases

ground = Ground(device="cpu", folder=sys.argv[1])
expected = cases.reference_steps(ground)
case = cases.ON_GPU[2]
right = list(cases.case_checks(ground, "float32", case, expected))
cases.LR *= 1.01
wrong = list(cases.case_checks(ground, "float32", case, expected))
scorer = list(cases.scorer_checks(ground, "float32", "support"))
broken = cases.logprob_gap
cases.logprob_gap = lambda dtype: broken(dtype) / 1000
strict = list(cases.scorer_checks(ground, "float32", "support"))
print(json.dumps([[c.verdict for c in part] for part in (right, wrong, scorer, strict)]))
sys.stdout.flush()
import os
os._exit(0)
"""


def test_the_learner_steps_and_resumes_as_the_reference_and_a_wrong_learning_rate_fails(tmp_path):
    """The learner uses ZeRO 3. A learning rate that is 1 % too large does not change the first
    loss, but later losses and the distance of the weights.
    """
    done = subprocess.run(
        [sys.executable, "-c", STEPPED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    right, wrong, scorer, strict = json.loads(done.stdout.splitlines()[-1])
    assert right == ["pass"] * 6
    assert wrong == ["fail"] * 3 + ["pass"] * 3
    assert scorer == ["pass"] * 2
    assert strict[0] == "fail"


def test_a_resumed_step_is_compared_only_where_a_step_repeats_itself():
    def verdicts(saved: str, straight: str, first: str, second: str) -> list[str]:
        again = [("w2", first), ("w2", second)]
        return [c.verdict for c in learner_cases.resume_checks("x", saved, straight, again)]

    assert verdicts("w2", "w3", "w3", "w3") == ["pass", "pass", "pass"]
    assert verdicts("w2", "w3", "other", "other") == ["pass", "pass", "fail"]
    assert verdicts("w2", "w3", "w3", "other") == ["pass", "fail", "not run"]
    assert verdicts("w1", "w3", "w3", "w3") == ["fail", "pass", "pass"]


def test_a_peak_a_quarter_off_the_plan_fails_and_bytes_must_be_exact(tmp_path):
    mib = 2**20

    def verdict(what: str, planned: int, seen: int, device: str = "cuda") -> str:
        return planned_rows.row_check("x", what, planned, seen, ground(tmp_path, device)).verdict

    assert verdict("peak", 1000 * mib, 850 * mib) == "pass"
    assert verdict("peak", 1000 * mib, 1250 * mib) == "fail"
    assert verdict("peak", 1000 * mib, 800 * mib) == "fail"
    assert verdict("peak", 100 * mib, 800 * mib) == "figure"  # too small to be judged on a GPU
    assert verdict("peak", 1000 * mib, 800 * mib, "cpu") == "figure"
    assert [verdict("weights", 100, seen) for seen in (100, 101)] == ["pass", "fail"]


def test_the_plan_is_compared_with_the_models_that_the_user_gives(tmp_path):
    given = replace(ground(tmp_path, "cuda"), model="builtin:countdown-student")
    cases = list(planned_rows.cases(given))
    assert [c.worker for c in cases] == ["learner"] * 5 + ["scorer"]
    settings = [c.settings for c in cases]
    assert [s.learner.zero_stage for s in settings[:5]] == [1, 2, 3, 1, 3]
    assert {s.teachers["main"].path for s in settings} == {"builtin:countdown-student"}
    assert {(s.model.dtype, s.learner.gradient_checkpointing) for s in settings} == {
        ("bfloat16", True)
    }
    learner, _ = planned_rows.cases(ground(tmp_path))
    assert (learner.device, learner.settings.model.dtype) == ("cpu", "float32")


# -- whole runs ------------------------------------------------------------------------------------


def run_of(rows: list[dict[str, float]], status: int = 0, transfer: str = "nccl") -> graph.Run:
    output = f"workers ready after 9 s on cuda, weights are sent by {transfer}; the longest\ndone\n"
    return graph.Run(name="r", status=status, output=output, rows=rows)


ROW = {
    "policy/logprob_gap": 0.01,
    "policy/probe_gap": 0.02,
    "policy/staleness_max": 0.0,
    "time/sync_s": 0.1,
    "time/step_s": 3.0,
}


def test_a_whole_run_fails_by_its_gaps_its_versions_its_sync_and_its_end():
    def failing(run: graph.Run, dtype: str = "bfloat16") -> list[str]:
        checks = graph.run_checks(run, 2, dtype, "nccl")
        return [c.name.removeprefix("r: ") for c in checks if c.verdict is Verdict.failed]

    gaps = [
        "learner against engine, sampled tokens",
        "learner against engine, right after each sync",
    ]
    assert failing(run_of([ROW, ROW])) == []
    assert failing(run_of([ROW, ROW]), "float32") == gaps
    assert failing(run_of([ROW, ROW], status=1)) == ["ends without an error"]
    assert failing(run_of([ROW])) == ["steps"]
    assert failing(run_of([], status=1)) == ["ends without an error", "steps"]
    assert failing(run_of([ROW, ROW], transfer="ipc")) == ["weights are sent by nccl"]
    late = ROW | {"policy/staleness_max": 1.0, "time/sync_s": 3.0}
    assert failing(run_of([late, late])) == [
        "versions between sampling and learning",
        "weight sync",
    ]
    broken = ROW | {"policy/probe_gap": float("nan")}
    assert failing(run_of([ROW, broken])) == gaps[1:]


def test_a_run_with_offloading_must_begin_with_the_loss_of_the_run_without(tmp_path):
    place = ground(tmp_path, "cuda")
    assert graph.same_first_loss(place, run_of([])).verdict is Verdict.not_run
    metrics = tmp_path / "runs" / "nccl" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text(
        '{"train/step": 0, "eval/accuracy": 0.5}\n{"train/step": 1, "train/loss": 2.0}\n'
    )
    verdicts = [
        graph.same_first_loss(place, run_of([{"train/loss": loss}])).verdict for loss in (2.1, 2.3)
    ]
    assert verdicts == ["pass", "fail"]


def test_a_whole_run_has_the_placement_and_the_transfer_that_its_step_checks():
    base = ("experiment=quickstart", "run.dir=X", "cluster.device=cuda")
    for offload in ("none", "optimizer", "parameters"):
        settings = load_config([*base, *graph.ON_SEVERAL, f"learner.offload={offload}"])
        assert settings.learner.offload == offload and settings.learner.zero_stage == 3
        assert settings.learner.ranks + settings.rollout.engines + settings.scorer.replicas == 4
        assert settings.rollout.weight_transfer == "nccl" and not settings.cluster.colocate
    assert load_config([*base, *graph.ON_SEVERAL, "cluster.spread=true"]).cluster.spread
    settings = load_config([*base, *graph.ON_SEVERAL, *graph.ONE_LOST])
    assert settings.learner.ranks + settings.rollout.engines + settings.scorer.replicas == 4
    assert settings.rollout.engines == 2, "one is left when the other dies"
    options = "+reward.functions.judge.options={path: rm, dtype: bfloat16}"
    for further in (graph.DIVIDED, graph.IN_ENGINE, (*graph.HAS_JUDGE, options)):
        settings = load_config([*base, *graph.ON_SEVERAL, *further])
        assert sum(team.size * team.gpus for team in teams(settings)) == 4
    alone = ("lora.sync=adapter", "rollout.weight_transfer=auto")
    settings = load_config([*base, *graph.ON_SEVERAL, *graph.ADAPTERS, *alone])
    assert settings.weight_transfer(on_cpu=False) == "object_store"
    assert load_config([*base, *graph.TRAINS_JUDGE]).checkpoint.export
    for transfer in ("object_store", "ipc"):
        more = f"rollout.weight_transfer={transfer}"
        settings = load_config([*base, *graph.ON_ONE_GPU, more])
        assert settings.rollout.weight_transfer == transfer and settings.cluster.colocate
        settings = load_config([*base, *graph.IN_TURNS, more])
        assert settings.rollout.weight_transfer == transfer and settings.cluster.take_turns


# -- with few packages -----------------------------------------------------------------------------

ALONE = """
import importlib.abc, importlib.metadata as metadata, re, sys

def closure(name, found):
    name = re.sub("[-_.]+", "-", name).lower()
    if name in found or name not in installed:
        return found
    found.add(name)
    for text in metadata.requires(name) or []:
        if "extra ==" not in text:
            closure(re.match(r"[\\w.-]+", text)[0], found)
    return found

installed = {re.sub("[-_.]+", "-", d.metadata["Name"]).lower() for d in metadata.distributions()}
present = set()
for name in ("torch", "triton", "transformers", "numpy"):
    closure(name, present)
absent = {
    top
    for top, owners in metadata.packages_distributions().items()
    if not {re.sub("[-_.]+", "-", o).lower() for o in owners} & present
}
assert {"ray", "vllm", "deepspeed", "hydra", "omegaconf", "wandb", "matplotlib"} <= absent

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
sys.argv = ["part"]
from gpu_checks.part_process import main
main([sys.argv_part, sys.argv_ground])
"""


@pytest.mark.parametrize("part", [part.name for part in steps.STEPS[0].parts])
def test_the_first_step_runs_where_only_torch_triton_and_transformers_are_installed(
    part: str, tmp_path: Path
):
    """No other package can be imported, not even hybridrl's own requirements."""
    script = ALONE.replace("sys.argv_part", repr(part)).replace(
        "sys.argv_ground", repr(ground(tmp_path).to_json())
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    checks = [part_process.read_check(x) for x in done.stdout.splitlines() if x[:6] == "CHECK "]
    assert checks and {c.verdict for c in checks} <= {"pass", "figure", "not run"}
