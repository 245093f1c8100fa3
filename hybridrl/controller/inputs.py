"""What a run reads from outside besides its settings, by digest: whoever continues it must find the same."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridrl.config import RunSettings
from hybridrl.controller.run_directory import within
from hybridrl.durable import sha256
from hybridrl.errors import RunDirectoryError
from hybridrl.types import Prompt

DATA = "data"


def digests(settings: RunSettings, prompts: Sequence[Prompt], heldout: Sequence[Prompt]) -> dict[str, str]:
    """sha256 of all prompts as the model and the rewards see them, and of each file with a reward function, by settings' keys."""
    data = hashlib.sha256()
    for prompt in (*prompts, *heldout):
        data.update(repr(prompt).encode())
    files = {name: Path(function.function.rpartition(":")[0]) for name, function in settings.reward.functions.items()}
    found = {f"reward.functions.{name}": sha256(path) for name, path in files.items() if path.is_file()}
    return {DATA: data.hexdigest()} | found


def check_inputs(settings: RunSettings, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to continue a run on other data or rewards: its cursor and its ledger would speak of prompts that are others now.

    Raises:
        RunDirectoryError: names what changed, and the remedies.
    """
    changed = [key for key in before.keys() & now.keys() if before[key] != now[key]]
    held = sorted(key for key in changed if not within(key, settings.run.allow_changes))
    if held:
        what = ", ".join("the prompts that data.* gives" if key == DATA else f"the file of {key}.function" for key in held)
        allow = ",".join([*settings.run.allow_changes, *held])
        raise RunDirectoryError(
            f"run.dir={settings.run.dir}: {what} changed since the checkpoint; restore it, choose another run.dir, or continue that run "
            f"with it by run.allow_changes=[{allow}]"
        )
