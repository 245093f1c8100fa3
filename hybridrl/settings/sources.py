"""Settings of the sources of problems: the single source of data.*, or each of data.sources."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from hybridrl.core.errors import ConfigError

GENERATORS = ("countdown", "reasoning_gym")
"""Tasks that generate their problems."""

RECORDS = ("jsonl", "records")
"""Names of the task that reads rows from data.path."""

ROW_KEYS = ("prompt", "completion", "messages", "chosen", "rejected")
"""Keys of a row besides the columns for the rewards; hybridrl/data/schema.py explains them."""


@dataclass(kw_only=True, slots=True)
class ProblemsConfig:
    """Where problems come from: the rows at a path, or a generator."""

    task: str | None = None
    """countdown or reasoning_gym, whose problems are generated; null: the rows at path"""
    path: str | None = None
    """training rows, as data.path"""
    heldout_path: str | None = None
    """held-out rows, as data.path; null: this source has none"""
    columns: dict[str, Any] = field(default_factory=lambda: {key: key for key in ROW_KEYS})
    """the row's key for each name, as data.columns"""
    revision: str | None = None
    """hub revision of both paths; null: the newest"""
    dataset: str | None = None
    """reasoning_gym: name of the generator, e.g. chain_sum"""
    options: dict[str, Any] = field(default_factory=dict)
    """options of the generator, as data.options"""

    @property
    def reads_rows(self) -> bool:
        """Whether the problems are rows at a path; otherwise they are generated."""
        return self.task not in GENERATORS

    @property
    def names_columns(self) -> bool:
        """Whether a key of a row is read under another name, or not at all."""
        return any(name != key for name, key in self.columns.items())

    def check_columns(self, key: str) -> None:
        """Check that columns name keys of rows.

        Args:
            key: the key of this section, e.g. "data".

        Raises:
            ConfigError: names the column.
        """
        for name, column in self.columns.items():
            if not (column is None or (isinstance(column, str) and column)):
                raise ConfigError(
                    f"{key}.columns.{name}={column!r}: must be the name of a key in the rows of "
                    f"{key}.path, or null to leave it out"
                )


@dataclass(kw_only=True, slots=True)
class SourceConfig(ProblemsConfig):
    weight: float = 1.0
    """its share of the prompts, relative to the weights of the other sources"""

    def check(self, key: str) -> None:
        """Check one of data.sources.

        Args:
            key: its dotted key, data.sources.NAME.

        Raises:
            ConfigError: one sentence about the first rule that is broken.
        """
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ConfigError(
                f"{key}.weight={self.weight}: must be positive and finite; leave a source out that "
                "is not to be used"
            )
        if self.task is not None and self.path is not None:
            raise ConfigError(
                f"{key}: has task={self.task} and path={self.path}; a task generates problems, a "
                "path has rows: leave one of them out"
            )
        if self.task is None and not self.path:
            raise ConfigError(
                f"{key}: has neither a path nor a task; write {key}.path=FILE, or "
                f"{key}.task={GENERATORS[0]}"
            )
        if self.task is not None and self.task not in GENERATORS:
            raise ConfigError(
                f"{key}.task={self.task}: must be {' or '.join(GENERATORS)}; to read rows, set "
                f"only {key}.path"
            )
        if self.task == "reasoning_gym" and not self.dataset:
            raise ConfigError(
                f"{key}.task=reasoning_gym: needs {key}.dataset, the generator's name, e.g. "
                "chain_sum"
            )
        self._check_unread(key)
        self.check_columns(key)

    def _check_unread(self, key: str) -> None:
        """Refuse settings that this kind of source does not read."""
        of_rows = {
            "heldout_path": self.heldout_path is not None,
            "columns": self.names_columns,
            "revision": self.revision is not None,
        }
        of_generators = {"dataset": self.dataset is not None, "options": bool(self.options)}
        for name, given in (of_generators if self.reads_rows else of_rows).items():
            if given:
                kind = f"the rows of {key}.path" if self.reads_rows else f"{key}.task={self.task}"
                raise ConfigError(
                    f"{key}.{name}={getattr(self, name)}: is not read with {kind}; leave it out"
                )


def check_source_names(names: list[str]) -> None:
    """Check that the names of data.sources are plain words, since they are parts of uids and of
    the names of metrics.

    Raises:
        ConfigError: names the first that is not.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_]+", str(name)):
            raise ConfigError(
                f"data.sources.{name}: the name of a source must be a plain word, of letters, "
                "digits and _; rename it"
            )
