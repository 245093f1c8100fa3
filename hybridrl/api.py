"""hybridrl from Python: `hybridrl.train` runs what the command `hybridrl train` runs.

Nothing here imports torch or ray before the settings are known to be good.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridrl.core import redact
from hybridrl.core.errors import ConfigError
from hybridrl.rewards.callables import reward_files
from hybridrl.settings.compose import hydra_text
from hybridrl.settings.run import RunSettings
from hybridrl.settings.settings_file import load_settings

if TYPE_CHECKING:
    from hybridrl.controller.controller import OnStep
    from hybridrl.launch.run_result import RunResult
    from hybridrl.launch.warm_workers import WarmWorkers


def train(
    overrides: Sequence[str],
    *,
    config: str | Path | None = None,
    on_step: "OnStep | None" = None,
    rewards: Mapping[str, Callable[..., Any]] | None = None,
    warm: "WarmWorkers | None" = None,
) -> "RunResult":
    """Train, or continue the run in run.dir, as the command `hybridrl train` does.

        result = hybridrl.train(["experiment=quickstart", "run.dir=runs/a"])
        result.metrics["eval/accuracy"]

    The workers run in Ray: in the cluster at cluster.address or RAY_ADDRESS, in the Ray that this
    process is connected to, or in a private one that ends with the call. Progress is printed.

    SIGTERM, SIGHUP and Ctrl-C that arrive during the call, in the main thread, save what was
    learned and raise Preempted; the same call continues. A second Ctrl-C raises KeyboardInterrupt
    at once.

    Args:
        overrides: settings as on the command line, KEY=VALUE, for example "algorithm=grpo" or
            "+teachers.main=/models/teacher".
        config: a YAML file of settings, over which `overrides` take precedence; None: conf/ alone,
            or the settings of the run in run.dir where `overrides` choose no file of conf/.
        on_step: called in this process after each step with the number of steps done, from 1 on,
            and the step's row of metrics, as in metrics.jsonl. The call comes after the step was
            logged and, where a checkpoint is due, saved; training waits for it and ignores the
            return value. After a fault that returns the run to a checkpoint, the later steps are
            reported again. Raise hybridrl.StopTraining in it to end the run after this step: the
            run saves a checkpoint, exports its model and returns, with exit_reason "stopped". Any
            other exception is raised by this call after a checkpoint.
        rewards: reward functions by name: each sets reward.functions.NAME.function to the file
            that defines the function, which the workers load. A lambda, and a function that a
            notebook's cell or the running script defines, are refused. Weights and options are
            settings, for example "+reward.functions.NAME.weight=0.5". Evaluations measure accuracy
            by the first function; functions that the settings name precede these.
        warm: keeps the workers between several calls; None: they start and end with this call.
            With it, a stop signal after the last step also raises Preempted, so that no other job
            begins; the run is finished.

    Returns:
        the final metrics, and the paths of the run's report and model.

    Raises:
        ConfigError: a setting is wrong; nothing was started and nothing was written.
        Preempted: the run was ended by a signal and has saved what it could.
        HybridRLError: the run failed; one of the types in hybridrl.core.errors. Nothing is left
            running.
        Exception: the one that on_step raised; what was learned so far is saved, or a note says why
            not, and nothing is left running.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"{overrides}: must be a list of texts; write [{overrides!r}]")
    overrides = [*overrides, *reward_overrides(rewards or {})]
    settings = load_settings(overrides, None if config is None else Path(config))
    if not logging.getLogger().handlers:  # else the caller decides what becomes of log lines
        redact.log_warnings()
    return run_settings(settings, on_step, warm)


def reward_overrides(rewards: Mapping[str, Callable[..., Any]]) -> list[str]:
    """The settings that name the files of reward functions.

    Raises:
        ConfigError: workers could not load a function from a file.
    """
    return [
        f"++reward.functions.{name}.function={hydra_text(file)}"
        for name, file in reward_files(rewards).items()
    ]


def run_settings(
    settings: RunSettings,
    on_step: "OnStep | None" = None,
    warm: "WarmWorkers | None" = None,
) -> "RunResult":
    """Run or continue `settings`.

    Args:
        on_step, warm: as in `train`.

    Raises:
        HybridRLError: the run failed, for the reason in its message; nothing is left running.
        Exception: the one that on_step raised.
    """
    from hybridrl.launch.session import train as train_session  # loads torch and ray

    quiet_environment()
    return train_session(settings, on_step, warm)


def quiet_environment() -> None:
    """Switch off usage statistics and warnings about forks; a user's own setting wins."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }.items():
        os.environ.setdefault(name, value)
