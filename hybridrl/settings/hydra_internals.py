"""The undocumented parts of Hydra and OmegaConf that hybridrl uses: the sentences of their errors,
and the parser of overrides.

Their errors have few types, so only their sentences tell what is wrong. The sentences are those of
the versions below. tests/settings/test_hydra_internals.py has the libraries raise each of them, and
fails when other versions are installed or when a sentence is not as described here.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Sweep
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

SEEN = {"hydra-core": "1.3", "omegaconf": "2.3"}
"""The versions that this file was written for and tested with."""


# -- errors ----------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """The first line of an error; the name of its type where it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_unknown_key(error: OmegaConfBaseException) -> bool:
    """Whether a key does not exist: "Key 'x' is not in struct", "Key 'x' not in 'RunSettings'"."""
    return isinstance(error, ConfigKeyError) or "not in" in str(error).splitlines()[0]


def adds_existing_key(error: Exception) -> bool:
    """Whether +KEY=VALUE adds a key that exists: "Could not append to config. An item is already
    at 'x'.".
    """
    return "Could not append" in str(error)


def is_unknown_choice(error: Exception) -> bool:
    """Whether a folder of conf/ has no such file: "Could not find 'algorithm/x'"."""
    return "Could not find" in first_line(error)


def unparsed_override(error: Exception) -> str | None:
    """The override that is not KEY=VALUE by Hydra's grammar; None: the error is another one."""
    return getattr(error, "override", None)


def is_unquoted_list(error: Exception) -> bool:
    """Whether a value has commas and the command is no sweep: "Ambiguous value for argument"."""
    return "Ambiguous value" in first_line(error)


# -- overrides -------------------------------------------------------------------------------------


class ParsedOverride:
    """KEY=VALUE as Hydra's grammar reads it."""

    def __init__(self, override: "Override") -> None:
        self._override = override

    @property
    def key(self) -> str:
        """The setting or folder of conf/, without + or ~."""
        return self._override.key_or_group

    @property
    def is_sweep(self) -> bool:
        """Whether it stands for several values, of which each job of a sweep gets one."""
        return self._override.is_sweep_override()

    @property
    def is_range(self) -> bool:
        """Whether it is a sweep over numbers, range(1,9) or interval(0,1)."""
        value = self.value()
        return isinstance(value, Sweep) and not isinstance(value, ChoiceSweep)

    def value(self) -> Any:
        """The value as a Python object; for a sweep, Hydra's Sweep."""
        return self._override.value()

    def choices(self) -> list[str] | None:
        """The overrides KEY=CHOICE of a sweep over choices, "a,b" or "choice(a,b)"; None: it is
        something else.
        """
        if not isinstance(self.value(), ChoiceSweep):
            return None
        key = self._override.get_key_element()
        return [f"{key}={choice}" for choice in self._override.sweep_string_iterator()]

    def points(self) -> list[str]:
        """The override of each job of a sweep over choices or a range; else the override itself.

        Raises:
            ValueError: it is a sweep over an interval, which has no points.
        """
        if not self.is_sweep:
            return [str(self._override.input_line)]
        if not self._override.is_discrete_sweep():
            raise ValueError("an interval has no list of values")
        key = self._override.get_key_element()
        return [f"{key}={value}" for value in self._override.sweep_string_iterator()]


def parsed(overrides: Sequence[str]) -> list[ParsedOverride]:
    """The overrides as Hydra's grammar reads them.

    Raises:
        HydraException: one of them is not KEY=VALUE; see unparsed_override.
    """
    return [ParsedOverride(o) for o in OverridesParser.create().parse_overrides(list(overrides))]
