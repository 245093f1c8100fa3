"""The cursor over several sources of prompts, which are drawn by their weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hybridrl.core.errors import DataError
from hybridrl.data.problem import source_of
from hybridrl.data.prompts import PromptSource, prompts_owed
from hybridrl.data.turns import Turns
from hybridrl.types import Prompt


class PromptMixture:
    """A cursor over several sources of prompts, each with an order and epochs of its own.

    The source of the next prompt depends on the weights alone (data.turns), so each step has the
    shares of the sources as exactly as whole prompts allow.

    Example: with the weights {"a": 3, "b": 1}, next_batch(4) gives two prompts of a, one of b, and
    one of a.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, weights: Mapping[str, float]) -> None:
        """
        Args:
            prompts: of all sources; their uids name the source (data.problem.source_of).
            seed: run.seed.
            weights: of the sources, by name.

        Raises:
            DataError: a source has no prompts.
        """
        self.prompts = prompts
        self.sources = {
            name: PromptSource(prompts_of(prompts, name), seed, name) for name in weights
        }
        self.weights = dict(weights)
        self.turns = Turns(weights)
        self.returned: list[Prompt] = []  # prompts of put_back that were not given again yet

    def next_batch(self, n: int) -> list[Prompt]:
        """The next `n` prompts, those that were put back first.

        Their uids end in "@EPOCH", the epoch of their source.
        """
        batch = self.returned[:n]
        self.returned = self.returned[n:]
        while len(batch) < n:
            batch += self.sources[self.turns.next()].next_batch(1)
        return batch

    def put_back(self, prompts: Sequence[Prompt]) -> None:
        """Return prompts that were not trained on; next_batch gives them once more."""
        self.returned += prompts

    def epochs(self) -> dict[str, float]:
        """By source: the number of prompts drawn so far, divided by the number that it has."""
        return {
            name: (source.epoch * len(source.prompts) + source.position) / len(source.prompts)
            for name, source in self.sources.items()
        }

    def state_dict(self, in_flight: Sequence[Prompt] = ()) -> dict[str, Any]:
        """The state of the cursors for a checkpoint.

        Args:
            in_flight: as of PromptSource.state_dict.
        """
        return {
            "sources": {
                name: {"epoch": source.epoch, "position": source.position}
                for name, source in self.sources.items()
            },
            "weights": dict(self.weights),
            "taken": dict(self.turns.taken),
            "owed": [p.uid for p in (*in_flight, *self.returned)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of state_dict. If the weights have changed, the shares are counted
        anew from here.

        Raises:
            DataError: the state is of other sources or prompts.
        """
        saved = state.get("sources", {})
        check_names(saved, self.sources)
        returned = prompts_owed(state["owed"], self.prompts)
        for name, source in self.sources.items():
            source.load_state_dict({**saved[name], "owed": []})
        self.returned = returned
        self.turns = Turns(self.weights)
        if state["weights"] == self.weights:
            self.turns.taken = {name: int(state["taken"][name]) for name in self.weights}


def prompts_of(prompts: Sequence[Prompt], source: str) -> list[Prompt]:
    """The prompts of one of data.sources."""
    return [prompt for prompt in prompts if source_of(prompt.uid) == source]


def check_names(saved: Iterable[str], given: Iterable[str]) -> None:
    """Refuse a checkpoint of sources with other names.

    Raises:
        DataError: names the sources of both.
    """
    if set(saved) != set(given):
        raise DataError(
            f"the checkpoint is of the data sources {', '.join(saved) or '(one without a name)'}, "
            f"and data.sources has {', '.join(given) or 'none'}; keep their names"
        )


def prompt_cursor(
    prompts: Sequence[Prompt], seed: int, weights: Mapping[str, float]
) -> PromptSource | PromptMixture:
    """The cursor over the training prompts of a run.

    Args:
        seed: run.seed.
        weights: as DataConfig.weights; empty: there is a single source.

    Raises:
        DataError: there are no prompts, or a source has none.
    """
    if not weights:
        return PromptSource(prompts, seed)
    return PromptMixture(prompts, seed, weights)


def cursors_of(
    prompts: Sequence[Prompt], seed: int, state: Mapping[str, Any]
) -> Iterator[tuple[PromptSource, Mapping[str, Any]]]:
    """A new PromptSource for each cursor of a saved state, with that cursor's state.

    Args:
        state: state_dict of a PromptSource or PromptMixture of these prompts.

    Raises:
        DataError: the state is of sources with other names.
    """
    names = dict.fromkeys(name for p in prompts if (name := source_of(p.uid)) is not None)
    check_names(state.get("sources", {}), names)
    if not names:
        yield PromptSource(prompts, seed), state
        return
    for name, cursor in state["sources"].items():
        yield PromptSource(prompts_of(prompts, name), seed, name), cursor
