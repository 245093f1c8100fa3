"""Container images: what their Dockerfiles install, the user that they run as, and the files
that are sent to the build.
"""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
IMAGES = {"cluster/Dockerfile.cpu": "tools/setup", "cluster/Dockerfile.gpu": "tools/setup --gpu"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instruction and its arguments in each line of a Dockerfile, with continued lines
    joined.
    """
    lines = (ROOT / name).read_text().splitlines()
    code = "\n".join(line for line in lines if line and not line.startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", code).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def arguments(name: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(name) if word == instruction]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_keeps_the_rules_of_hadolint(name: str) -> None:
    """The comments give the numbers of the linter's rules for these instructions; others are not
    used.
    """
    used = {word for word, _ in instructions(name)}
    assert used == {"FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD"}  # DL3020: no ADD
    [base] = arguments(name, "FROM")
    assert re.fullmatch(r"python:3\.12\.\d+-slim-\w+", base)  # DL3006, DL3007: an exact tag
    assert all(folder.startswith("/") for folder in arguments(name, "WORKDIR"))  # DL3000
    for command in arguments(name, "RUN"):
        assert not re.search(r"\b(sudo|cd|pip install|curl|\|)\b", command)  # DL3003, 3004, 3013
        if "apt-get" in command:
            assert command.startswith("apt-get update && apt-get install --yes")  # DL3009, DL3014
            assert "--no-install-recommends" in command  # DL3015
            assert "rm -rf /var/lib/apt/lists/*" in command  # DL3009
    [cmd] = arguments(name, "CMD")
    assert cmd.startswith("[")  # DL3025


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_user_without_rights_and_installs_from_its_lock(name: str) -> None:
    lines = instructions(name)
    setup = next(i for i, (_, rest) in enumerate(lines) if f"&& {IMAGES[name]} &&" in rest)
    assert arguments(name, "USER") == ["hybridrl"]  # DL3002
    assert lines.index(("USER", "hybridrl")) < setup
    # The packages are in their own layer, because the code is copied after their installation.
    assert lines.index(("COPY", "--chown=hybridrl . .")) > setup


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_copies_exists_and_is_in_the_build_context(name: str) -> None:
    for copy in arguments(name, "COPY"):
        owner, *sources, _ = copy.split()
        assert owner == "--chown=hybridrl"
        for source in sources:
            assert (ROOT / source).exists() and (source == "." or in_context(source)), source


def in_context(path: str) -> bool:
    """Whether .dockerignore admits a path: the last pattern that matches decides."""
    admitted = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if (
            line
            and not line.startswith("#")
            and (
                pattern == "*"
                or path == pattern
                or path.startswith(f"{pattern}/")
                or (pattern.startswith("**/") and fnmatch(f"/{path}", f"*/{pattern[3:]}*"))
            )
        ):
            admitted = line.startswith("!")
    return admitted


@pytest.mark.parametrize(
    ("path", "admitted"),
    [
        ("hybridrl/cli.py", True),
        ("conf/config.yaml", True),
        ("tools/setup", True),
        (".git/config", False),
        (".venv/bin/python", False),
        (".env", False),
        ("runs/a/config.yaml", False),
        ("auth_token", False),
        ("hybridrl/__pycache__/cli.pyc", False),
    ],
)
def test_the_build_context_holds_the_product_and_no_secret(path: str, admitted: bool) -> None:
    assert in_context(path) == admitted
    top = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert top == {"pyproject.toml", "README.md", "LICENSE", "cluster", "conf", "hybridrl", "tools"}
