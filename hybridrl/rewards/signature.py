"""The columns that a reward function accepts, and those that it requires."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The arguments of a reward function.

    Example: def f(completions, answer, strict=False) accepts all three and requires (completions,
    answer).
    """

    accepted: tuple[str, ...]
    required: tuple[str, ...]
    any_column: bool  # it has **kwargs

    def passed(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Those of the columns, lists [N], with which the function is called.

        A required column that is absent becomes N times None.
        """
        rows = len(columns["completions"])
        absent = {name: [None] * rows for name in self.required if name not in columns}
        return absent | {
            name: values
            for name, values in columns.items()
            if self.any_column or name in self.accepted
        }


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature of a function; load_reward has refused positional-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Signature(
        accepted=tuple(p.name for p in named),
        required=tuple(p.name for p in named if p.default is p.empty),
        any_column=any(p.kind is p.VAR_KEYWORD for p in parameters),
    )
