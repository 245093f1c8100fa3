"""Checks the states of the controller's parts in a checkpoint, and loads them."""

from collections.abc import Mapping
from typing import Any

from hybridrl.core.errors import CheckpointError, DataError
from hybridrl.run_dir.checkpoint import Stateful


def check_complete(
    states: Mapping[str, dict[str, Any]], parts: Mapping[str, Stateful], folder: str
) -> None:
    """Check that a checkpoint has the state of every part.

    Args:
        states: in the checkpoint, by the name of the part.
        folder: that of the checkpoint, for the message.

    Raises:
        CheckpointError: the state of a part is missing.
    """
    if missing := parts.keys() - states.keys():
        raise CheckpointError(
            f"{folder}: has no state of {', '.join(sorted(missing))}, so another version of "
            "hybridrl wrote it; continue it with that version"
        )


def load_parts(
    states: Mapping[str, dict[str, Any]], parts: Mapping[str, Stateful], folder: str
) -> None:
    """Load the state of every part.

    Args:
        states, folder: as in `check_complete`.

    Raises:
        CheckpointError: a state has another form than the part expects.
        DataError: a state belongs to other prompts.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(states[name])
        except DataError:  # the state belongs to other prompts, as its message says
            raise
        except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: its state of {name} does not have the form that this version of "
                f"hybridrl writes ({error!r}); continue it with the version that wrote it"
            ) from error
