"""Kills saves at each of their file operations: `python checkpoint_job.py FOLDER` kills one save at
its first operation, the next one at its second, and so on.

It does this for a new step and for a step that is saved already, and prints for both the steps that
a resumed run finds after each kill. An audit hook of Python counts the operations, so operations
that are added to the code later are counted too.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from hybridrl.run_dir.checkpoint import Checkpointer, read_checkpoint
from hybridrl.settings.checkpointing import CheckpointConfig
from tests.run_dir.test_checkpoint import STATE, Weights, save_steps

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
KILLED = 9


def found_after_kill(run_dir: Path, steps: tuple[int, ...], last: int) -> int | None:
    """Save `steps`, then save step 2 and kill this save at its operation number `last`.

    Returns:
        the step that a resumed run finds; None: the save has fewer operations.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    checkpointer = save_steps(run_dir, *steps, keep=1)
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == last:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        checkpointer.save(replace(STATE, step=2), [Weights()])
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED), status
    resumed = Checkpointer(run_dir, CheckpointConfig(keep=1))
    resumed.clean()
    assert not [p for p in resumed.root.iterdir() if p.name.startswith(".")]
    # Reading raises an error if a checkpoint is not complete.
    checkpoints = [read_checkpoint(folder) for folder in resumed.folders()]
    return checkpoints[-1].state.step if status else None


def main(folder: Path) -> None:
    found: dict[str, list[int]] = {}
    for case, steps in {"new": (1,), "again": (2,)}.items():
        found[case] = []
        while (step := found_after_kill(folder / case, steps, len(found[case]) + 1)) is not None:
            found[case].append(step)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
