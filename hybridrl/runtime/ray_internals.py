"""The details of Ray that hybridrl uses beyond its documented interface.

They were read in the version below. tests/runtime/test_ray_internals.py fails when another version
is installed or when one of these details is no longer as described here. Ray is not imported here,
since `hybridrl doctor` uses this file on machines without it.

- RAY_IGNORE_UNHANDLED_ERRORS, in the environment of the driver: errors that are never fetched are
  not reported.
- The records of `ray.nodes()` and of `placement_group_table()`, whose keys are not documented.
- The text of an error: its first lines are the same for every death of an actor, and the last line
  says what happened.
- The command line of a head's dashboard.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.exceptions import RayError, RayTaskError

VERSION = "2.60"

Record = Mapping[str, Any]
"""A node, as ray.nodes() lists it."""


def ignore_unfetched_errors() -> None:
    """Make Ray report no failed calls whose results this driver never fetches. Call it before
    ray.init.
    """
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")


# -- nodes -----------------------------------------------------------------------------------------


def node_id(record: Record) -> str:
    return record["NodeID"]


def node_address(record: Record) -> str:
    return record["NodeManagerAddress"]


def node_cpus(record: Record) -> int:
    """The node's number of CPUs as Ray counts them; 1 if Ray lists none."""
    return int(record["Resources"].get("CPU", 1))


def is_alive(record: Record) -> bool:
    return record["Alive"]


def nodes_of_bundles(table: Mapping[str, Any]) -> dict[int, str]:
    """The id of the node of each bundle of a placement group.

    Args:
        table: what placement_group_table(group) returns.
    """
    return {int(bundle): node for bundle, node in table["bundles_to_node_id"].items()}


# -- errors ----------------------------------------------------------------------------------------


def cause_of(error: "RayTaskError") -> BaseException:
    """The exception that the method of an actor raised."""
    return error.cause


def what_happened(error: "RayError") -> str:
    """The last line of an error's text, or its type if there is no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# -- processes -------------------------------------------------------------------------------------


def dashboard_address(command: Sequence[str]) -> tuple[str, int] | None:
    """(host, port) of a head's dashboard; None: the command is not that of a dashboard.

    Args:
        command: the words of a process's command line.
    """
    options = dict(
        word.removeprefix("--").split("=", 1)
        for word in command
        if word.startswith("--") and "=" in word
    )
    is_dashboard = any(word.endswith("ray/dashboard/dashboard.py") for word in command)
    if not is_dashboard or not options.get("port", "").isdecimal():
        return None
    return options.get("host", ""), int(options["port"])
