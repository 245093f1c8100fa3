"""The commit of the user's working directory."""

import subprocess

LIMIT_S = 5.0
"""After this many seconds the commit counts as unknown; a network file system may be slow."""


def git_commit() -> str | None:
    """The 40 digits of the commit that is checked out in the working directory, with "-dirty"
    appended where tracked files differ from it.

    None outside of a repository, in one without a commit, and where git is missing, refuses or
    takes too long.
    """
    command = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() or None
