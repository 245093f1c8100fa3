"""The notebook tools/tour.ipynb is executed as a kernel would do it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybridrl.tracking.jsonl import read_metrics

NOTEBOOK = Path(__file__).parent.parent.parent / "tools" / "tour.ipynb"

WRITE_FILE = "%%writefile "

KERNEL = '''
import asyncio, json, sys

async def run(cells):
    """Within a running event loop, as in a kernel."""
    names = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), names)

sys.path.insert(0, "")
asyncio.run(run(json.load(sys.stdin)))
'''


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="ascii"))["cells"]


def executable(source: str) -> str:
    """A cell of the notebook as Python code, with the magic that writes a file replaced."""
    if not source.startswith(WRITE_FILE):
        return source
    first, _, text = source.partition("\n")
    return f"with open({first.removeprefix(WRITE_FILE)!r}, 'w') as file: file.write({text!r})"


def test_the_notebook_is_kept_without_what_a_machine_has_printed() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.graph
def test_each_cell_of_the_notebook_runs_and_its_reward_is_measured(tmp_path: Path) -> None:
    code = [executable("".join(cell["source"])) for cell in cells() if cell["cell_type"] == "code"]
    done = subprocess.run(
        [sys.executable, "-c", KERNEL],
        input=json.dumps(code),
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run_dir = tmp_path / "runs" / "tour"
    assert f"stopped {run_dir}/checkpoints/step_000006 {run_dir}/report.html" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("4 9 3=15:")
    rows = read_metrics(run_dir)
    assert [row["train/step"] for row in rows] == list(range(7))
    assert all(0 < row["reward/brief/mean"] <= 1 for row in rows[1:])
