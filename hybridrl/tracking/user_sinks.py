"""Loads the sinks of tracking.sinks: built-in trackers, and a user's own as `file.py:Class`.

A user's file runs in the driver. Each class has the methods of tracking/sink.py and is built with
the options of its entry.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.core.user_files import load_from_file
from hybridrl.settings.built_in import SINKS, check_word, is_own
from hybridrl.settings.choices import WandbMode
from hybridrl.settings.run import SinkConfig, TrackingConfig
from hybridrl.tracking.sink import Sink

METHODS = {
    "start": "info",
    "log": "metrics",
    "samples": "rows",
    "close": "exit_code",
}
"""The methods of a sink, each with the name of its argument."""

ROLLOUTS = "rollouts"
"""An optional further method of a sink."""


def check_sinks(config: TrackingConfig) -> None:
    """Load the class of each sink and compare it with the protocol; nothing is built.

    Raises:
        ConfigError: the file or class does not exist, the file raises, or the class lacks a method
            or does not take one of the options; or no sink takes the rollouts.
    """
    classes = [load_sink_class(name, entry) for name, entry in config.sinks.items()]
    taken = config.wandb is not WandbMode.disabled or any(hasattr(c, ROLLOUTS) for c in classes)
    if config.rollouts_every and not taken:
        raise ConfigError(
            f"tracking.rollouts_every={config.rollouts_every}: needs a tracker that takes them; "
            f"set tracking.wandb=offline, or give the class of a sink a method {ROLLOUTS}(self, "
            "rows)"
        )


def build_sinks(config: TrackingConfig) -> Mapping[str, Sink]:
    """The sinks by their settings, "tracking.sinks.NAME".

    Raises:
        ConfigError: as check_sinks, or building a sink raises.
    """
    sinks: dict[str, Sink] = {}
    for name, entry in config.sinks.items():
        sink_class = load_sink_class(name, entry)
        try:
            sinks[f"tracking.sinks.{name}"] = sink_class(**entry.options)
        except Exception as error:
            raise ConfigError(
                f"tracking.sinks.{name}.sink={entry.sink}: building it raised {described(error)}; "
                "correct the file or the options"
            ) from error
    return sinks


def load_sink_class(name: str, entry: SinkConfig) -> Callable[..., Sink]:
    """The class of `tracking.sinks.<name>`.

    Raises:
        ConfigError: as check_sinks.
    """
    setting = f"tracking.sinks.{name}.sink"
    field = f"{setting}={entry.sink}"
    if not is_own(entry.sink):
        check_word(setting, entry.sink, SINKS, "or write path/to/file.py:Class for your own")
        for package in SINKS[entry.sink].packages:
            if find_spec(package) is None:
                raise ConfigError(
                    f"{field}: needs the package {package}, which is not installed; "
                    f"pip install 'hybridrl[{entry.sink}]'"
                )
        built_in = SINKS[entry.sink].load()
        _check_options(name, entry, built_in)
        return built_in
    loaded = load_from_file(field, entry.sink, kind="class")
    if not isinstance(loaded, type):
        raise ConfigError(f"{field}: must be a class; name a class that the file defines")
    for method, argument in METHODS.items():
        _check_method(field, loaded, method, argument)
    if hasattr(loaded, ROLLOUTS):
        _check_method(field, loaded, ROLLOUTS, "rows")
    _check_options(name, entry, loaded)
    return loaded


def _check_method(field: str, sink_class: type, method: str, argument: str) -> None:
    remedy = f"write def {method}(self, {argument})"
    function = getattr(sink_class, method, None)
    if not callable(function):
        raise ConfigError(f"{field}: the class has no method {method}; {remedy}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"{field}: its method {method} is async, and it is called without await; {remedy}"
        )
    if not _takes(function, None, None):
        raise ConfigError(
            f"{field}: its method {method} must take one argument beside self; {remedy}"
        )


def _check_options(name: str, entry: SinkConfig, sink_class: type) -> None:
    parameters = inspect.signature(sink_class).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in entry.options:
        if not takes_any and option not in parameters:
            raise ConfigError(
                f"tracking.sinks.{name}.options.{option}: {entry.sink} takes no such argument; "
                "remove it"
            )
    if not _takes(sink_class, **entry.options):
        raise ConfigError(
            f"tracking.sinks.{name}.options={entry.options}: {entry.sink} cannot be built from "
            f"them; give each argument of {inspect.signature(sink_class)} that has no default"
        )


def _takes(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> bool:
    """Whether a call with these arguments fits the function's signature."""
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError:
        return False
    return True
