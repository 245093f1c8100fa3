"""What a run reads from outside besides its settings, by digest: whoever continues it must find the
same.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hybridrl.core.files import sha256
from hybridrl.core.imported_files import imported_files
from hybridrl.models.loading import HUB_FILES, resolve
from hybridrl.models.revisions import newest_commit
from hybridrl.run_dir.contents import digest_of_files
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

DATA = "data"
IMPORTS = "imports"
MODEL_FILES = (*HUB_FILES, "value_head/*.safetensors", "additional_chat_templates/*.jinja")
"""What is read of a model's folder."""


def digests(
    settings: RunSettings, prompts: Sequence[Prompt], heldout: Sequence[Prompt]
) -> dict[str, str]:
    """A digest of each thing that is read, by the setting that names it: all prompts as the model
    and the rewards see them, each file with code of the user's, the modules that it imports, and the
    files of each model in use.

    Raises:
        ConfigError: a model is not there.
        OSError: a file cannot be read.
    """
    data = hashlib.sha256()
    for prompt in prompts:
        data.update(described(prompt, prompt.responses).encode())
    for prompt in heldout:  # their responses are only measured, nothing is learned from them
        data.update(described(prompt, ()).encode())
    return {DATA: data.hexdigest()} | file_digests(settings) | model_digests(settings)


def file_digests(settings: RunSettings) -> dict[str, str]:
    """Of each Python file of the user's that the run executes, and of the modules it imports."""
    found = {}
    for key, named in user_files(settings).items():
        path = Path(named.rpartition(":")[0])
        if path.is_file():
            found[key] = sha256(path)
            modules = imported_files(path)
            if modules:
                home = path.resolve().parent
                listed = [(os.path.relpath(module, home), module) for module in modules]
                found[f"{key}.{IMPORTS}"] = digest_of_files(listed)
    return found


def user_files(settings: RunSettings) -> dict[str, str]:
    """file.py:name of what a user's files add, or a built-in name, by the setting that names it."""
    algorithm = settings.algorithm
    own = {
        "algorithm.advantage": algorithm.advantage,
        "algorithm.token_weight": algorithm.token_weight,
        "algorithm.pair.loss": algorithm.pair.loss,
    }
    rewards = {
        f"reward.functions.{name}": function.function
        for name, function in settings.reward.functions.items()
    }
    teachers = {
        f"teachers.{name}.model": settings.teachers[name].model for name in settings.teachers_in_use
    }
    return rewards | {k: name for k, name in (own | teachers).items() if name is not None}


def model_digests(settings: RunSettings) -> dict[str, str]:
    found = {}
    for key, (path, revision) in models_in_use(settings).items():
        folder = resolve(path, revision, setting=key)
        files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
        found[key] = digest_of_files((str(file.relative_to(folder)), file) for file in files)
    return found


def models_in_use(settings: RunSettings) -> dict[str, tuple[str, str | None]]:
    """(path, revision) of each model that the run loads, by the setting that names it."""
    models = {"model.path": (settings.model.path, settings.model.revision)}
    for name in settings.teachers_in_use:
        teacher = settings.teachers[name]
        if teacher.path is not None:
            models[f"teachers.{name}.path"] = (teacher.path, teacher.revision)
    for name, function in settings.reward.functions.items():
        if function.function == "reward_model":
            models[f"reward.functions.{name}.options.path"] = (function.options["path"], None)
    return models


def pinned(settings: RunSettings, earlier: RunSettings | None) -> RunSettings:
    """With the commit in the place of each revision that is left to the hub, so that every worker,
    every restart and every continuation loads the same one.

    Args:
        earlier: settings of the run that is to be continued, whose commits are kept; None: a new
            run.
    """
    model = settings.model
    if model.revision is None:
        known = earlier is not None and earlier.model.path == model.path
        commit = earlier.model.revision if known else newest_commit(model.path)
        model = replace(model, revision=commit)
    teachers = dict(settings.teachers)
    for name in settings.teachers_in_use:
        teacher = teachers[name]
        if teacher.path is not None and teacher.revision is None:
            before = earlier.teachers.get(name) if earlier is not None else None
            known = before is not None and before.path == teacher.path
            commit = before.revision if known else newest_commit(teacher.path)
            teachers[name] = replace(teacher, revision=commit)
    return replace(settings, model=model, teachers=teachers)


def described(prompt: Prompt, responses: tuple[tuple[int, ...], ...]) -> str:
    """What the model and the rewards see of a prompt. The form is that of the first version, whose
    runs can be continued.
    """
    return (
        f"Prompt(uid={prompt.uid!r}, input_ids={prompt.input_ids!r}, text={prompt.text!r}, "
        f"columns={prompt.columns!r}, responses={responses!r})"
    )
