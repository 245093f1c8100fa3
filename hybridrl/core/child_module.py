"""Runs a module of hybridrl as a program in a child process and reads its answer.

The module imports something that this process should not import, or needs an environment of its
own. It reads JSON from the standard input and prints JSON as its last line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping


class ChildFailed(Exception):
    """The child ended with an error; the message is the last line of its error output."""


def answer_of(module: str, given: object, *, timeout_s: float, variables: Mapping[str, str]) -> str:
    """The JSON that `python -m module` prints last, as text.

    Args:
        given: sent as JSON.
        variables: of the child's environment, on top of those of this process.

    Raises:
        TimeoutError: the child takes longer than `timeout_s`.
        ChildFailed: the child ended with an exit code other than 0.
    """
    # With -P, files of the working directory do not replace modules of the same name. The child
    # imports from the folders from which this process does, "" (the working directory) excepted.
    path = os.pathsep.join(filter(None, sys.path))
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "PYTHONPATH": path, **variables},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        raise ChildFailed(lines[-1] if lines else f"exit code {child.returncode}")
    return child.stdout.strip().rpartition("\n")[2]  # libraries may print too
