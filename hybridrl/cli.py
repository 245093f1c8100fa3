"""The command line: hybridrl train | report | export."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridrl.compose import conf_dir, load_config, register_schema, to_settings
from hybridrl.errors import HybridRLError

USAGE = """usage: hybridrl VERB ...

  hybridrl train experiment=quickstart run.dir=DIR [key=value ...]   train, or continue the run in DIR
  hybridrl train --help | --cfg job ... | -m key=a,b ...             as in any Hydra program
  hybridrl report DIR                                                write DIR/report.html and report.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 the command or a setting is wrong."""
    verb, *rest = arguments if arguments is not None else sys.argv[1:] or ["--help"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if verb == "train":
            return train_verb(rest)
        if verb == "report":
            return report_verb(rest)
    except HybridRLError as error:
        print(f"hybridrl: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(USAGE, end="", file=sys.stdout if verb in ("--help", "-h", "help") else sys.stderr)
    return 0 if verb in ("--help", "-h", "help") else 2


def train_verb(arguments: Sequence[str]) -> int:
    overrides = [a for a in arguments if not a.startswith("-")]
    if len(overrides) < len(arguments):
        return hydra_flags(arguments)
    return run_training(load_config(overrides))


def run_training(settings) -> int:
    from hybridrl.controller.run import train  # torch and ray load here, after the settings are known to be good

    quiet_environment()
    done = train(settings)
    teachers = ", ".join(f"{name} {level:.1%}" for name, level in done.teacher_accuracy.items())
    print(f"held-out accuracy {done.accuracy_before:.1%} -> {done.accuracy_after:.1%}" + (f" (teacher {teachers})" if teachers else ""))
    if done.export:
        print(f"model   {done.export}")
    print(f"report  {done.report}")
    return 0


def hydra_flags(arguments: Sequence[str]) -> int:
    """--help, --cfg, --info, --multirun and the rest are Hydra's own."""
    import hydra

    register_schema()
    status = []
    program = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
        lambda composed: status.append(run_training(to_settings(composed)))
    )
    sys.argv = ["hybridrl train", *arguments]
    program()
    return max(status, default=0)


def report_verb(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: hybridrl report RUN_DIR", file=sys.stderr)
        return 2
    from hybridrl.tracking.report import write_report

    print(write_report(Path(arguments[0])))
    return 0


def quiet_environment() -> None:
    """No usage statistics, no fork warnings; a user's own setting wins."""
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
