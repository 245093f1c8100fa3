"""Digests of a run's inputs other than its settings; they must be equal when the run continues."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hybridrl.core.files import sha256
from hybridrl.core.imported_files import imported_files
from hybridrl.models.arithmetic import with_arithmetic
from hybridrl.models.loading import HUB_FILES, resolve
from hybridrl.models.revisions import newest_commit
from hybridrl.run_dir.contents import digest_of_files
from hybridrl.settings.models import ModelConfig, TeacherConfig
from hybridrl.settings.run import RunSettings
from hybridrl.types import Prompt

DATA = "data"
SETS = "eval.sets"
IMPORTS = "imports"
NO_SETS: Mapping[str, Sequence[Prompt]] = {}
MODEL_FILES = (*HUB_FILES, "value_head/*.safetensors", "additional_chat_templates/*.jinja")
"""The files that are read in the folder of a model."""


def digests(
    settings: RunSettings,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    sets: Mapping[str, Sequence[Prompt]] = NO_SETS,
) -> dict[str, str]:
    """The digest of each input, by the setting that names it.

    The inputs are all prompts as the model and the rewards see them, each file with the user's own
    code and the modules that it imports, and the files of each model in use.

    Args:
        sets: the prompts of held-out sets, by their names.

    Raises:
        ConfigError: a model does not exist.
        OSError: a file cannot be read.
    """
    data = hashlib.sha256()
    for prompt in prompts:
        data.update(described(prompt, prompt.responses).encode())
    for prompt in heldout:  # without their responses, which do not affect training
        data.update(described(prompt, ()).encode())
    of_sets = {}
    for name, of_set in sets.items():
        whole = hashlib.sha256()
        for prompt in of_set:
            whole.update(described(prompt, prompt.responses).encode())
        of_sets[f"{SETS}.{name}"] = whole.hexdigest()
    return {DATA: data.hexdigest()} | of_sets | file_digests(settings) | model_digests(settings)


def file_digests(settings: RunSettings) -> dict[str, str]:
    """The digests of the user's chat template, of the user's Python files that the run executes,
    and of the modules that these import.
    """
    digest_of = {}
    template = settings.data.chat_template_file
    if template is not None:
        digest_of["data.chat_template_file"] = sha256(Path(template))
    for key, reference in user_files(settings).items():
        path = Path(reference.rpartition(":")[0])
        if path.is_file():
            digest_of[key] = sha256(path)
            modules = imported_files(path)
            if modules:
                home = path.resolve().parent
                files = [(os.path.relpath(module, home), module) for module in modules]
                digest_of[f"{key}.{IMPORTS}"] = digest_of_files(files)
    return digest_of


def user_files(settings: RunSettings) -> dict[str, str]:
    """For each setting that may name a user's code: file.py:name, or the name of a built-in."""
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
    """The digest of the files of each model that the run loads."""
    digest_of = {}
    for key, (path, revision) in models_in_use(settings).items():
        folder = resolve(path, revision, setting=key)
        files = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
        digest_of[key] = digest_of_files((str(file.relative_to(folder)), file) for file in files)
    return digest_of


def of_teacher(inputs: Mapping[str, str], name: str) -> dict[str, str]:
    """The entries of `inputs` on which a teacher's log-probs depend: those of its own files, and of
    the student's start model, because a teacher may be that model.
    """
    return {
        key: digest
        for key, digest in inputs.items()
        if key == "model.path" or key.startswith(f"teachers.{name}.")
    }


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
    """The settings with a commit for each model on the hub that is named without a revision, and
    with a dtype in place of `auto`.

    Thus every worker, every restart and every continuation of the run loads the same files and
    computes the same.

    Args:
        earlier: settings of the run that is continued, whose commits and choices are used again;
            None: a new run.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    model = settings.model
    if model.revision is None:
        commit = commit_of(model.path, earlier.model if earlier else None)
        model = replace(model, revision=commit)
    teachers = dict(settings.teachers)
    for name in settings.teachers_in_use:
        teacher = teachers[name]
        if teacher.path is not None and teacher.revision is None:
            commit = commit_of(teacher.path, earlier.teachers.get(name) if earlier else None)
            teachers[name] = replace(teacher, revision=commit)
    return with_arithmetic(replace(settings, model=model, teachers=teachers), earlier)


def commit_of(path: str, earlier: ModelConfig | TeacherConfig | None) -> str | None:
    """The commit of a model: that of the earlier run if it loads the same model, otherwise the
    newest.
    """
    if earlier is not None and earlier.path == path:
        return earlier.revision
    return newest_commit(path)


def described(prompt: Prompt, responses: tuple[tuple[int, ...], ...]) -> str:
    """A text with all that the model and the rewards see of a prompt.

    Its form must not change: otherwise no run of an earlier version could be continued.
    """
    return (
        f"Prompt(uid={prompt.uid!r}, input_ids={prompt.input_ids!r}, text={prompt.text!r}, "
        f"columns={prompt.columns!r}, responses={responses!r})"
    )
