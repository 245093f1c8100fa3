"""`tools/gpu_lines [--anew] [PYTEST ARGUMENTS]`: see README.md."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu_coverage import report
from gpu_coverage.lines import of_package
from gpu_coverage.recording import FOLDER, PACKAGE, recorded

ROOT = Path(__file__).parents[2]
START = Path(__file__).parent / "start"
TESTS = [
    "tests/kernels",
    "tests/launch",
    "tests/models",
    "tests/planning",
    "tests/policy",
    "tests/rollout",
    "tests/runtime",
    "tests/settings",
    "tests/teachers",
    "tests/weights",
    "tests/test_cli.py",
    "tests/controller/test_rounding.py",
    "tests/controller/test_graph.py",
]
"""The default tests: together they execute every device-dependent line that any test executes."""


def main(arguments: list[str]) -> int:
    """Run tests, record the executed lines in the report, and print the report's problems.

    Args:
        arguments: arguments of pytest, by default TESTS, and `--anew`, which ignores the lines that
            earlier runs executed.

    Returns:
        The exit status: 0 if all tests passed and each line that no test executes has a reason.
    """
    anew = "--anew" in arguments
    chosen = [argument for argument in arguments if argument != "--anew"] or TESTS
    functions = of_package(ROOT / PACKAGE)
    with TemporaryDirectory(prefix="gpu-lines-") as folder:
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *chosen], cwd=ROOT, env=environment(folder)
        ).returncode
        executed = recorded(Path(folder))
    before = report.load()
    if anew:
        # A line counts as executed only if this run executed it; reasons stay.
        before = {
            file: {name: report.Entry("", 0, entry.not_executed) for name, entry in own.items()}
            for file, own in before.items()
        }
    after = report.updated(functions, before, executed)
    report.save(after)
    found = report.problems(functions, after)
    print("\n".join(found))
    return status or int(bool(found))


def environment(folder: str) -> dict[str, str]:
    """An environment in which every Python process records its executed lines in `folder`."""
    paths = [str(START), str(ROOT / "tools"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {FOLDER: folder, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
