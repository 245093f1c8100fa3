"""Which engine samples what: always the one with the least to do."""

from collections.abc import Collection, Sequence

from hybridrl.runtime.calls import Pending, is_done


class EngineLoad:
    """Who has how many tokens to do: prompt and longest possible response of every chunk that is
    not done.
    """

    def __init__(self, engines: int) -> None:
        self.under_way: list[list[tuple[int, Pending]]] = [
            [] for _ in range(engines)
        ]  # per engine (tokens, -> header)

    def assign(self, tokens: Sequence[int], serving: Collection[int]) -> list[int]:
        """One of the `serving` engines for each chunk, in order: always the one with the least to
        do, of equals the first.

        All idle: the same at each call.
        """
        self.under_way = [
            [(n, header) for n, header in mine if not is_done(header)] for mine in self.under_way
        ]
        load = {i: sum(n for n, _ in self.under_way[i]) for i in sorted(serving)}
        engines = []
        for num_tokens in tokens:
            engine = min(load, key=load.__getitem__)
            load[engine] += num_tokens
            engines.append(engine)
        return engines

    def add(self, engine: int, tokens: int, header: Pending) -> None:
        self.under_way[engine].append((tokens, header))
