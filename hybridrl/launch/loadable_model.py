"""A model that a command names, and the settings that belong to it.

    runs/a                            the newest checkpoint of a run; --step N or best: another one
    runs/a --teacher main             the teacher of a run
    runs/a/checkpoints/step_000040    one checkpoint
    runs/a/export/step_000040         an export, with the settings of its run
    /models/x, OWNER/NAME, builtin:NAME  any value of model.path, with the default settings or,
                                      by --settings, with those of a run or a file

All of these become a folder that vLLM loads. The adapters of a run are merged into its weights.
"""

import logging
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.data.problem import Problem
from hybridrl.data.prompts import tokenize
from hybridrl.launch.alignment import reads_own_prompts, teacher_template
from hybridrl.launch.export import BEST, best_folder, export_checkpoint
from hybridrl.launch.lengths import check_lengths
from hybridrl.launch.preflight import check_head_size, check_model
from hybridrl.models.arithmetic import on_gpu
from hybridrl.models.loading import load_tokenizer, resolve
from hybridrl.rollout.engine_arguments import (
    check_engine_arguments,
    check_installed,
    sampling_by,
)
from hybridrl.run_dir.checkpoint import (
    CHECKPOINTS,
    CONFIG,
    MANIFEST,
    STEP_FOLDER,
    Checkpointer,
    step_folders,
    step_of,
)
from hybridrl.run_dir.directory import EXPORT, read_settings
from hybridrl.run_dir.inputs import pinned
from hybridrl.runtime.ray_connection import starts_ray
from hybridrl.settings.compose import load_config, one_sentence
from hybridrl.settings.hydra_internals import parsed
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.settings.settings_file import own_file, saved_config
from hybridrl.types import Prompt
from hybridrl.weights.hugging_face import TEMPLATE

log = logging.getLogger(__name__)

NO_RUN = ("algorithm=sft", "run.dir=unused")
"""The base of the settings of a model that belongs to no run: a method without teacher and reward,
as nothing is trained.
"""

NO_MODEL = "unused"
"""The value of model.path in settings that belong to no model."""


def model_parser(verb: str, description: str) -> ArgumentParser:
    """A parser for the arguments of a verb about a model: source, overrides, step, teacher and
    settings. Use parse_intermixed_args, so that overrides may stand before and after the options.
    """
    parser = ArgumentParser(prog=f"hybridrl {verb}", description=description)
    parser.add_argument(
        "source",
        metavar="RUN_OR_MODEL",
        help="a run, one of its checkpoints or exports, or a value of model.path",
    )
    parser.add_argument("--step", metavar="N|best", help="which checkpoint of the run")
    parser.add_argument(
        "--teacher", metavar="NAME", help="use this teacher of the run instead of the student"
    )
    parser.add_argument(
        "--settings",
        metavar="RUN|FILE",
        help="run or file with the settings, for a model that belongs to no run",
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="see conf/SETTINGS.md")
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the model of a command is."""

    run_dir: Path | None  # None: it belongs to no run
    step: str | None  # a step of the run, or BEST; None: the newest one, or the one in `folder`
    folder: str | None  # a value of model.path; None: the model is a checkpoint of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadableModel:
    """A model as a folder, with its settings.

    Example: of the run runs/a, name is "runs/a, step 40", and settings.model.path is
    "/.../runs/a/export/step_000040".
    """

    name: str
    settings: RunSettings
    """The settings of the run with the overrides of the command. model.path is the folder of the
    student, and there are no adapters.
    """
    teacher: str | None  # None: it is the student
    run_dir: Path | None  # None: it belongs to no run
    step: int | None  # of the checkpoint; None: the model is no checkpoint of a run

    @property
    def config(self) -> ModelConfig:
        """The model that an engine loads."""
        if self.teacher is None:
            return self.settings.model
        return self.settings.teacher_model(self.teacher)

    @property
    def setting(self) -> str:
        """The setting that names the model, for messages."""
        return "model.path" if self.teacher is None else self.settings.model_setting(self.teacher)

    @property
    def device(self) -> str:
        """The device on which the engines are expected to run: cpu or cuda."""
        return "cuda" if on_gpu(self.settings) else "cpu"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of prompts and responses: the student's, also for a teacher."""
        model = self.settings.model
        return load_tokenizer(model.path, model.revision, eos=model.eos)

    def prompts(self, problems: Sequence[Problem]) -> list[Prompt]:
        """The prompts as the model reads them in its run: rendered, tokenized and checked.

        Raises:
            ConfigError: a length is not set, with a proposal; or as tokenize.
            DataError: as tokenize.
        """
        tokenizer = self.tokenizer()
        templates = {}
        if self.teacher is not None and reads_own_prompts(self.settings, self.teacher):
            own = load_tokenizer(self.config.path, self.config.revision, setting=self.setting)
            templates = {self.teacher: teacher_template(self.settings, self.teacher, own)}
        check_lengths(self.settings, tokenizer, problems, templates)
        rollout = self.settings.rollout
        return tokenize(
            problems,
            tokenizer,
            self.settings.data,
            rollout.sequence_limit - rollout.response_limit,
            responses=False,
            teachers=templates,
        )

    def check(self) -> None:
        """Refuse a model that the engines cannot load, before any of them starts.

        Raises:
            ConfigError: names the setting.
        """
        model = self.config
        if starts_ray(self.settings.cluster):
            check_installed()
        check_engine_arguments(self.settings.rollout.engine)
        check_model(
            self.setting,
            model.path,
            model.revision,
            self.settings.rollout.max_model_len,
            weights_of_engine=True,
        )
        if self.device == "cpu":
            check_head_size(self.setting, model)


def find_model(
    source: str,
    overrides: Sequence[str] = (),
    *,
    step: str | None = None,
    teacher: str | None = None,
    settings_of: str | None = None,
) -> LoadableModel:
    """The model that a command names. A checkpoint without an export is exported into its run.

    Args:
        source: one of the forms at the top of this file.
        overrides: KEY=VALUE, on top of the settings that belong to the model.
        step: the step of a checkpoint, or BEST; None: the newest.
        teacher: name of a teacher of the run; None: the student.
        settings_of: a run or a YAML file with the settings of a model that belongs to no run; None:
            the defaults.

    Raises:
        ConfigError: `source` is no model, or an option does not fit it; or as load_config.
        CheckpointError: the run has no checkpoint yet, none of that step, or a damaged one.
        RunDirectoryError: the settings of the run cannot be read.
    """
    place = located(source, step, teacher, settings_of)
    settings = load_settings_of(place, overrides, settings_of)
    run_dir = place.run_dir
    if run_dir is None and settings_of is not None and is_run(Path(settings_of).expanduser()):
        run_dir = Path(settings_of).expanduser()
    if run_dir is not None:
        settings = with_kept_template(settings, run_dir, overrides)
    number = None
    name = source
    if teacher is not None:
        check_teacher(settings, teacher, source)
        name = f"{source}, teacher {teacher}"
        engine = settings.teachers[teacher].engine
        if engine is not None:
            settings = replace(settings, rollout=sampling_by(engine, settings.rollout))
    else:
        folder = place.folder
        if place.run_dir is not None:
            chosen = (
                Path(folder).absolute() if folder else run_model_folder(place.run_dir, place.step)
            )
            number = exported_step(chosen)
            name = f"{place.run_dir}, {export_label(chosen)}"
            folder = str(chosen)
        assert folder is not None, "a place has a run or a folder"
        settings = of_folder(settings, folder, overrides, is_students=place.run_dir is not None)
    return LoadableModel(
        name=name,
        settings=pinned(settings, None),
        teacher=teacher,
        run_dir=place.run_dir,
        step=number,
    )


def located(
    source: str, step: str | None, teacher: str | None, settings_of: str | None = None
) -> Place:
    """The place of a model, after a check that the options fit it.

    Raises:
        ConfigError: an option does not fit, a checkpoint lies outside of its run, or a folder is
            neither a run nor a model.
    """
    path = Path(source).expanduser()
    folder: str | None = None
    run_dir: Path | None = None
    if (path / MANIFEST).is_file() and STEP_FOLDER.fullmatch(path.name):
        run_dir = path.absolute().parent.parent
        if path.absolute().parent.name != CHECKPOINTS:
            raise ConfigError(
                f"{source}: is a checkpoint outside of its run; 'hybridrl export {source} FOLDER' "
                "writes it as a model, whose folder can be named here"
            )
        _refuse_step(source, step, "is one checkpoint; name its run instead")
        step = str(step_of(path))
    elif is_run(path):
        run_dir = path
    elif path.absolute().parent.name == EXPORT and is_run(path.absolute().parent.parent):
        run_dir = path.absolute().parent.parent
        folder = str(path)
        _refuse_step(source, step, "is one export; name its run")
    elif path.exists() and not (path / "config.json").is_file():
        raise ConfigError(
            f"{source}: is neither a run (no {CONFIG}) nor a model (no config.json); name a run, "
            "one of its checkpoints or exports, or a Hugging Face folder"
        )
    else:
        folder = str(path) if path.exists() else source
        _refuse_step(
            source,
            step,
            "is not a run, and only the checkpoints of a run have steps; leave it out",
        )
        if teacher is not None:
            raise ConfigError(
                f"--teacher {teacher}: {source} is not a run, and only a run has teachers; name a "
                "run, or the teacher's folder itself"
            )
    if run_dir is not None and settings_of is not None:
        raise ConfigError(
            f"--settings {settings_of}: {source} has the settings of its run; leave it out, or "
            "export the model to a folder of its own"
        )
    if step is not None and teacher is not None:
        raise ConfigError(f"--step {step}: a teacher is frozen and has no steps; leave it out")
    return Place(run_dir=run_dir, step=step, folder=folder)


def _refuse_step(source: str, step: str | None, reason: str) -> None:
    if step is not None:
        raise ConfigError(f"--step {step}: {source} {reason}")


def is_run(path: Path) -> bool:
    """Whether a folder holds a run: its settings, or a checkpoint."""
    return (path / CONFIG).is_file() or bool(step_folders(path))


def load_settings_of(
    place: Place, overrides: Sequence[str], settings_of: str | None
) -> RunSettings:
    """The settings of the model's run, of the run or file `settings_of`, or the defaults, with the
    overrides on top.

    Raises:
        ConfigError: a setting is wrong, or the overrides contain model.path.
    """
    with one_sentence(overrides):
        if any(override.key == "model.path" for override in parsed(list(overrides))):
            raise ConfigError("model.path: is the model that the command names; leave it out")
    with ExitStack() as stack:
        if place.run_dir is not None:
            base = stack.enter_context(saved_config(config_file(place.run_dir)))
        elif settings_of is None:
            base = [*NO_RUN, f"model.path={NO_MODEL}"]
        elif is_run(Path(settings_of).expanduser()):
            base = stack.enter_context(saved_config(config_file(Path(settings_of).expanduser())))
        else:
            base = stack.enter_context(own_file(Path(settings_of).expanduser()))
            base = ["run.dir=unused", f"model.path={NO_MODEL}", *base]
        settings = load_config([*base, *overrides])
    # The engines have no learner beside them.
    cluster = replace(settings.cluster, colocate=False, take_turns=False)
    return replace(settings, cluster=cluster, lora=LoraConfig())


def config_file(run_dir: Path) -> Path:
    """The settings of the last start of a run; without them, those of its newest checkpoint."""
    folders = [run_dir, *reversed(step_folders(run_dir))]
    files = [folder / CONFIG for folder in folders]
    return next((file for file in files if file.is_file()), files[0])


def with_kept_template(
    settings: RunSettings, run_dir: Path, overrides: Sequence[str]
) -> RunSettings:
    """The settings with the run's own copy of data.chat_template_file, unless the command names
    another file.
    """
    copy = run_dir.absolute() / TEMPLATE
    named = any(
        override.lstrip("+").startswith("data.chat_template_file=") for override in overrides
    )
    if named or settings.data.chat_template_file is None or not copy.is_file():
        return settings
    return replace(settings, data=replace(settings.data, chat_template_file=str(copy)))


def of_folder(
    settings: RunSettings, folder: str, overrides: Sequence[str], *, is_students: bool
) -> RunSettings:
    """The settings with `folder` as the student. If that is another model than the settings name,
    their revision and end token are left out, unless the overrides set them.

    Args:
        is_students: the folder holds the model of the settings after training.

    Raises:
        ConfigError: there is no such model.
    """
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    is_same = settings.model.path == NO_MODEL or is_same_model(settings.model.path, folder)
    revision = None
    if not Path(folder).exists() and (is_same or "model.revision" in given):
        revision = settings.model.revision
    resolve(folder, revision, setting="RUN_OR_MODEL")
    keeps_eos = is_students or is_same or "model.eos" in given
    eos = settings.model.eos if keeps_eos else None
    if eos != settings.model.eos:
        log.warning(
            "model.eos=%s belongs to model.path=%s and not to %s, which ends at its own end token; "
            "add model.eos=... to choose another",
            settings.model.eos,
            settings.model.path,
            folder,
        )
    model = replace(settings.model, path=folder, revision=revision, eos=eos)
    return replace(settings, model=model)


def is_same_model(path: str, other: str) -> bool:
    """Whether two values of model.path are the same folder, or the same name on the hub."""
    if path == other:
        return True
    folders = (Path(path).expanduser(), Path(other).expanduser())
    return all(folder.is_dir() for folder in folders) and folders[0].samefile(folders[1])


def check_teacher(settings: RunSettings, teacher: str, source: str) -> None:
    """Refuse a teacher that no engine can load.

    Raises:
        ConfigError: the run has no such teacher, or it has no weights here.
    """
    if teacher not in settings.teachers:
        names = ", ".join(settings.teachers)
        remedy = f"it has {names}" if names else "it has none"
        raise ConfigError(f"--teacher {teacher}: {source} has no such teacher; {remedy}")
    entry = settings.teachers[teacher]
    if entry.model is not None:
        raise ConfigError(
            f"--teacher {teacher}: teachers.{teacher}.model={entry.model} scores responses and "
            "writes none; name another teacher"
        )
    if entry.url is not None and entry.path is None:
        raise ConfigError(
            f"--teacher {teacher}: is served at teachers.{teacher}.url={entry.url}; give "
            f"teachers.{teacher}.url=null and its folder as teachers.{teacher}.path"
        )


def run_model_folder(run_dir: Path, step: str | None) -> Path:
    """The absolute path of a run's checkpoint as a model folder; exports it first if necessary.

    Args:
        step: a number, or BEST by checkpoint.best; None: the newest of all checkpoints and exports.

    Raises:
        CheckpointError: there is none, none of that step, or it is damaged.
        ConfigError: `step` has no valid value.
    """
    saved = step_folders(run_dir)
    exported = {
        step_of(folder): folder
        for folder in (run_dir / EXPORT).glob("step_*")
        if STEP_FOLDER.fullmatch(folder.name)
    }
    if not saved and not exported:
        raise CheckpointError(
            f"{run_dir}: the run has no checkpoint yet; train until the first, see "
            "checkpoint.every, or name the model that it starts from"
        )
    number: int | None = None  # None: export_checkpoint finds or refuses it
    if step is None:
        number = max([*exported, *map(step_of, saved)])
    elif step == BEST and saved:
        config = read_settings(run_dir).checkpoint
        number = step_of(best_folder(Checkpointer(run_dir, config), saved))
    elif step.isascii() and step.isdecimal():
        number = int(step)
    if number in exported:
        return exported[number].absolute()
    return export_checkpoint(run_dir, step=step).absolute()


def exported_step(folder: Path) -> int | None:
    """The step in the name of an export; None: it has another name.

    Example: 40 of runs/a/export/step_000040-bfloat16.
    """
    match = STEP_FOLDER.match(folder.name)
    return int(match[1]) if match else None


def export_label(folder: Path) -> str:
    """An export as messages name it: "step 40" for step_000040, else the name of its folder."""
    step = STEP_FOLDER.fullmatch(folder.name)
    return f"step {int(step[1])}" if step else folder.name


def model_folder(source: str, *, step: str | None = None, teacher: str | None = None) -> Path:
    """The folder of the model that a command names, for a caller that needs none of its settings.

    Raises:
        ConfigError, CheckpointError, RunDirectoryError: as find_model.
    """
    if teacher is not None:
        model = find_model(source, step=step, teacher=teacher)
        return resolve(model.config.path, model.config.revision, setting=model.setting)
    place = located(source, step, teacher)
    if place.folder is not None:
        return resolve(place.folder, setting="RUN_OR_MODEL").absolute()
    assert place.run_dir is not None, "a place without a folder is a run"
    return run_model_folder(place.run_dir, place.step)
