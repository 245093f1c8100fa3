"""Problems from a file with one JSON object a line.

    {"prompt": "What is 6 times 7?", "answer": "42"}
    {"prompt": [{"role": "user", "content": "What is 6 times 7?"}], "answer": "42"}

Keys other than `prompt` become columns, which the rewards may look at.
"""

import json
from pathlib import Path
from typing import Any

from hybridrl.data.problem import Problem
from hybridrl.errors import DataError


def load(path: str, split: str) -> list[Problem]:
    """Problems of one file; uids count its lines from 1, empty lines included, e.g. "train-000003".

    Raises:
        DataError: no such file, no rows, or a bad row, named as file:line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    problems = [_problem(line, f"{path}:{number}", f"{split}-{number:06d}") for number, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise DataError(f"{path}: holds no rows; needs one JSON object a line")
    return problems


def _problem(line: str, row: str, uid: str) -> Problem:
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise DataError(f"{row}: not JSON: {error}") from error
    if not isinstance(columns, dict):
        raise DataError(f"{row}: is a {type(columns).__name__}; needs an object with a `prompt` key")
    prompt = columns.pop("prompt", None)
    if not isinstance(prompt, str) and not _is_chat(prompt):
        raise DataError(f"{row}: `prompt` must be text or a list of messages with `role` and `content`, both text")
    return Problem(uid=uid, prompt=prompt, columns=columns, row=row)


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt)
    )
