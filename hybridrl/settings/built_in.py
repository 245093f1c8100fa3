"""The built-in advantage estimators, token weights, pair losses and trackers, by the words of
settings.

Each is a class or function in a file of its own, given here as an import path: settings are read
without torch, and only a process that uses one imports it. A user's own is given as `file.py:Name`
instead.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hybridrl.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """An import path inside of hybridrl, and its meaning for the page of settings."""

    place: str
    """module:name, where the module is relative to hybridrl"""
    meaning: str = ""
    """a clause for the page of settings"""
    packages: tuple[str, ...] = ()
    """packages that it imports and that an extra installs"""

    def load(self) -> Any:
        """The class or function itself."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(f"hybridrl.{module}"), name)


ADVANTAGES = {
    "none": BuiltIn("objectives.advantages.whole_return:WholeReturn"),
    "group_mean": BuiltIn(
        "objectives.advantages.group_mean:GroupMean",
        "mean of the K siblings at the same position, the sequence itself included",
    ),
    "leave_one_out": BuiltIn(
        "objectives.advantages.leave_one_out:LeaveOneOut",
        "mean of the K-1 others at the same position: unbiased",
    ),
    "value": BuiltIn(
        "objectives.advantages.generalised:GeneralisedAdvantage",
        "a learned value head with generalised advantage estimation (PPO)",
    ),
}

TOKEN_WEIGHTS = {
    "token_mean": BuiltIn(
        "objectives.token_weights.token_mean:token_mean",
        "divide by the global number of response tokens (DAPO)",
    ),
    "sequence_mean": BuiltIn(
        "objectives.token_weights.sequence_mean:sequence_mean",
        "mean over each response, over its siblings, over prompts: short ones weigh more (GRPO, "
        "GKD)",
    ),
    "constant": BuiltIn(
        "objectives.token_weights.constant:constant",
        "divide by sequences * max_new_tokens: unbiased at any batch size (Dr. GRPO)",
    ),
}

PAIR_LOSSES = {
    "dpo": BuiltIn("objectives.pair_losses.dpo:Dpo"),
    "ipo": BuiltIn("objectives.pair_losses.ipo:Ipo"),
    "slic": BuiltIn("objectives.pair_losses.slic:Slic"),
    "simpo": BuiltIn("objectives.pair_losses.simpo:Simpo"),
    "dil_lsif": BuiltIn("objectives.pair_losses.dil_lsif:DilLsif"),
    "dil_ukl": BuiltIn("objectives.pair_losses.dil_ukl:DilUkl"),
    "dil_bce": BuiltIn("objectives.pair_losses.dil_bce:DilBce"),
    "bradley_terry": BuiltIn(
        "objectives.pair_losses.bradley_terry:BradleyTerry",
        "trains a reward model: the value head's score of the whole response",
    ),
}

SINKS = {
    "tensorboard": BuiltIn(
        "tracking.tensorboard_sink:TensorBoardSink",
        "event files in the run directory",
        packages=("tensorboard",),
    ),
    "trackio": BuiltIn(
        "tracking.trackio_sink:TrackioSink",
        "a local database, or a Space of Hugging Face",
        packages=("trackio",),
    ),
    "mlflow": BuiltIn(
        "tracking.mlflow_sink:MlflowSink",
        "a tracking server, or a database in the run directory",
        packages=("mlflow", "sqlalchemy", "alembic"),
    ),
    "ray": BuiltIn(
        "runtime.prometheus_sink:PrometheusSink", "gauges on Ray's metrics ports, for Prometheus"
    ),
}
"""The packages of each are installed by the extra of the same name."""

NO_PAIRS = "none"
"""The word for no pair loss: the objective uses returns."""


def check_word(setting: str, value: str, words: Mapping[str, Any], otherwise: str) -> None:
    """Refuse a word that a setting does not accept.

    Args:
        otherwise: the remedy where no word is similar.

    Raises:
        ConfigError: names the words, or the one that was probably meant.
    """
    if value in words:
        return
    near = difflib.get_close_matches(value, words, n=1)
    remedy = f"did you mean {near[0]}?" if near else otherwise
    raise ConfigError(f"{setting}={value}: must be one of {', '.join(words)}; {remedy}")


def check_own(
    setting: str, value: str, kind: str, words: Mapping[str, Any], word_setting: str
) -> None:
    """Refuse a value that does not name something in a user's file; the file is not read.

    Args:
        kind: Class or function, for the example in the message.
        words: the built-in ones, which algorithm.<word_setting> accepts.

    Raises:
        ConfigError: it does not have the form file.py:Name.
    """
    if value in words:
        raise ConfigError(
            f"{setting}={value}: is built in; set algorithm.{word_setting}={value}, and leave "
            f"{setting} out"
        )
    if not is_own(value):
        raise ConfigError(
            f"{setting}={value}: must be the {kind.lower()} of a file of yours; write "
            f"{setting}=path/to/file.py:{kind}"
        )


def is_own(value: str) -> bool:
    """Whether a value has the form file.py:Name."""
    return re.search(r"\.py:\w+$", value) is not None
