"""Every line that depends on the device is executed by a test, or is listed with a reason."""

import ast
import builtins
from pathlib import Path

import pytest
from gpu_coverage import report
from gpu_coverage.lines import HIT, DeviceFunction, device_functions, instrumented, of_package
from gpu_coverage.report import WHOLE, Entry

ROOT = Path(__file__).parents[2]
SOURCE = """
class Engine:
    def start(self, device, sizes):
        "For cpu and cuda."
        fast = 2 if device == "cuda" else 1
        if device == "cuda" and sizes:
            return fast * sum(sizes)
        return fast

    def give_gpu(self, x):
        y = x
        return y

def other(x):
    return x if x else None
"""
LINES = (
    "fast = 2 if device == 'cuda' else 1",
    "if device == 'cuda' and sizes:",
    "2 [of 2 if device == 'cuda' else 1]",
    "1 [of 2 if device == 'cuda' else 1]",
    "sizes [of device == 'cuda' and sizes]",
    "return fast * sum(sizes)",
)


def test_the_report_of_the_lines_for_gpus_is_that_of_this_source():
    found = report.problems(of_package(ROOT / "hybridrl"), report.load())
    assert not found, (
        "run `tools/gpu_lines TESTS` with tests that execute these functions, and "
        "write the reason of each line that no test can execute into report.json:\n"
        + "\n".join(found)
    )


def test_the_lines_of_a_function_are_its_statements_and_the_operands_that_may_not_be_evaluated():
    start, give = device_functions(ast.parse(SOURCE))
    assert start.name == "Engine.start" and sorted(start.lines) == sorted(LINES)
    assert give == DeviceFunction("Engine.give_gpu", ("y = x", "return y"))


def test_what_is_written_differently_alone_has_the_same_digest():
    def digest(source: str) -> str:
        return device_functions(ast.parse(source))[0].digest

    same = SOURCE.replace("2 if", "(2)  if").replace("For", "Of").replace("return fast\n", "pass\n")
    assert digest(SOURCE) == digest(same) != digest(SOURCE.replace("fast *", "3 *"))


@pytest.mark.parametrize(
    ("device", "sizes", "result", "missing"),
    [
        ("cuda", [3, 4], 14, {LINES[3]}),
        ("cuda", [], 2, {LINES[3], LINES[5]}),
        ("cpu", [3], 1, {LINES[2], LINES[4], LINES[5]}),
    ],
)
def test_an_instrumented_function_computes_the_same_and_records_each_line_that_it_executes(
    device: str,
    sizes: list[int],
    result: int,
    missing: set[str],
    monkeypatch: pytest.MonkeyPatch,
):
    hits: set[str] = set()
    monkeypatch.setattr(builtins, HIT, hits.add, raising=False)
    scope: dict = {}
    exec(compile(instrumented(SOURCE, "p/e.py"), "e.py", "exec"), scope)
    assert scope["Engine"]().start(device, sizes) == result
    assert hits == {f"p/e.py\tEngine.start\t{line}" for line in set(LINES) - missing}


def function(*lines: str) -> dict[str, list[DeviceFunction]]:
    return {"p/e.py": [DeviceFunction("f", lines)]}


def executed(*lines: str) -> set[str]:
    return {f"p/e.py\tf\t{line}" for line in lines}


def test_a_new_line_that_no_test_executes_is_a_problem_until_it_has_a_reason():
    first = report.updated(function("a", "b"), {}, executed("a", "b"))
    assert report.problems(function("a", "b"), first) == []
    assert report.problems(function("a", "b", "c"), first) == ["p/e.py: f is new or was changed"]
    second = report.updated(function("a", "b", "c"), first, executed("a", "b"))
    assert report.problems(function("a", "b", "c"), second) == ["p/e.py: f: no test executes 'c'"]
    second["p/e.py"]["f"].not_executed["c"] = "needs two nodes"
    assert report.problems(function("a", "b", "c"), second) == []
    assert report.problems({}, second) == ["p/e.py: f depends on no device any more"]


def test_a_run_of_some_tests_adds_to_the_report_and_takes_nothing_away():
    first = report.updated(function("a", "b"), {}, executed("a"))
    second = report.updated(function("a", "b"), first, executed("b"))
    assert second["p/e.py"]["f"].not_executed == {}
    anew = report.updated(function("a", "b", "c"), second, executed("b"))
    assert set(anew["p/e.py"]["f"].not_executed) == {"a", "c"}, "the function was changed"


def test_a_reason_for_all_lines_ends_when_all_are_executed(tmp_path: Path):
    before = {"p/e.py": {"f": Entry("", 0, {WHOLE: "runs on the GPU itself"})}}
    left = report.updated(function("a", "b"), before, executed("a"))
    assert left["p/e.py"]["f"].not_executed == {WHOLE: "runs on the GPU itself"}
    report.save(left, tmp_path / "report.json")
    assert report.load(tmp_path / "report.json") == left
    done = report.updated(function("a", "b"), left, executed("a", "b"))
    assert done["p/e.py"]["f"].not_executed == {}
