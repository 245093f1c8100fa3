"""What a run reads from outside besides its settings, by digest: whoever continues it must find the same."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hybridrl.config import RunSettings
from hybridrl.durable import sha256
from hybridrl.types import Prompt

DATA = "data"


def digests(
    settings: RunSettings, prompts: Sequence[Prompt], heldout: Sequence[Prompt]
) -> dict[str, str]:
    """sha256 of all prompts as the model and the rewards see them, and of each file with a reward function, by settings' keys."""
    data = hashlib.sha256()
    for prompt in prompts:
        data.update(described(prompt, prompt.responses).encode())
    for prompt in heldout:  # their responses are only measured, nothing is learned from them
        data.update(described(prompt, ()).encode())
    files = {
        name: Path(function.function.rpartition(":")[0])
        for name, function in settings.reward.functions.items()
    }
    found = {
        f"reward.functions.{name}": sha256(path) for name, path in files.items() if path.is_file()
    }
    return {DATA: data.hexdigest()} | found


def described(prompt: Prompt, responses: tuple[tuple[int, ...], ...]) -> str:
    """What the model and the rewards see of a prompt. The form is that of the first version, whose runs can be continued."""
    return (
        f"Prompt(uid={prompt.uid!r}, input_ids={prompt.input_ids!r}, text={prompt.text!r}, "
        f"columns={prompt.columns!r}, responses={responses!r})"
    )
