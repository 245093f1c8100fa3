"""The vLLM engines of a run: which engine samples which chunk, and which weights they hold."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray

from hybridrl.core.errors import WeightSyncError, WorkerDied, WorkerError, WorkerTimeout
from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.calls import Pending, watch_nothing
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.engine_load import EngineLoad
from hybridrl.runtime.fan_out import fan_out
from hybridrl.runtime.fleet import Fleet, failures
from hybridrl.settings.choices import Source, WeightTransfer
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.run import RunSettings
from hybridrl.settings.shares import chunk_size
from hybridrl.types import GenerateOrder, Prompt, WeightManifest

PROBE = "probe"
"""The name of a probe's wave; no wave of prompts has it."""


class RolloutGroup:
    """Hands prompts to the engines that serve, and weights to all of them.

    consumes prompts and weights / produces chunks under way / `generate` and `again` wait only
    where no engine serves; `probe`, `cancel`, `quiet` and `load_weights` wait for the engines, and
    replace those that fail.
    """

    worker = "hybridrl.rollout.engine:Rollout"

    def __init__(
        self,
        settings: RunSettings,
        slots: Sequence[Slot],
        *,
        model: ModelConfig,
        device: str,
        backend: WeightTransfer,
        log_dir: str,
        name: str = "rollout",
        source: Source = Source.student,
        teacher: str | None = None,
    ) -> None:
        """
        Args:
            teacher: name of the teacher that the model is; None: it is the student.
        """
        self.settings = settings
        arguments = {
            "settings": settings,
            "model": model,
            "device": device,
            "backend": str(backend),
            "source": source,
        }
        if teacher is not None:
            arguments["teacher"] = teacher
        self.group = ActorGroup(
            name,
            self.worker,
            slots,
            [arguments] * len(slots),
            log_dir=log_dir,
            max_restarts=settings.cluster.max_restarts,
            concurrent=True,
        )
        self.load = EngineLoad(len(slots))
        self.fleet = Fleet(self.group, settings.deadlines, closed_by(settings), self.load_latest)
        # The weights that an engine must hold to serve; None: those that it has read from disk.
        self.latest: tuple[WeightManifest, ray.ObjectRef] | None = None

    def configure(self, settings: RunSettings) -> None:
        """Take sizes and deadlines from other settings from here on; the engines are unchanged."""
        self.settings = settings
        self.fleet.deadlines = settings.deadlines

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Sample for another job as engines that start with it do; the student's weights are those
        of the job before until others are loaded.
        """
        self.configure(settings)
        self.group.begin_job(settings, log_dir, {"settings": settings})
        self.group.call_all("begin_job", deadline_s=settings.deadlines.sync_s)
        self.load = EngineLoad(self.group.size)
        self.latest = None

    def ready(self) -> list[Pending]:
        return self.group.submit_all("ping", deadline_s=self.settings.deadlines.start_s)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        wave: str,
        group_size: int,
        temperature: float,
        seed: int,
        support: int = 0,
        groups_per_chunk: int | None = None,
        watch: Callable[[], None] = watch_nothing,
    ) -> list[Chunk]:
        """Start sampling. Chunks are contiguous in prompt order; each goes to the engine with the
        fewest tokens to do.

        Args:
            groups_per_chunk: None: as set in rollout.groups_per_chunk.
            watch: as of `Fleet.admit`.
        """
        self.fleet.admit(watch)
        rollout = self.settings.rollout
        size = chunk_size(
            len(prompts), groups_per_chunk or rollout.groups_per_chunk, self.group.size
        )
        pieces = [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        tokens = [longest_tokens(piece, rollout.response_limit, group_size) for piece in pieces]
        engines = self.load.assign(tokens, self.fleet.serving)
        num_chunks = Counter(engines)
        next_number = [0] * self.group.size
        chunks = []
        for piece, engine, load in zip(pieces, engines, tokens, strict=True):
            order = GenerateOrder(
                wave=wave,
                chunk=next_number[engine],
                num_chunks=num_chunks[engine],
                group_size=group_size,
                temperature=temperature,
                max_new_tokens=rollout.response_limit,
                seed=seed,
                support=support,
            )
            next_number[engine] += 1
            chunks.append(self._submit(engine, order, piece, load))
        return chunks

    def serving(self, watch: Callable[[], None] = watch_nothing) -> list[int]:
        """The engines that serve; where none does, waits for those that are joining.

        Args:
            watch: as of `Fleet.admit`.
        """
        self.fleet.admit(watch)
        return sorted(self.fleet.serving)

    def generate_on(
        self,
        engine: int,
        prompts: Sequence[Prompt],
        *,
        wave: str,
        group_size: int,
        temperature: float,
        seed: int,
    ) -> list[Chunk]:
        """Start sampling a whole wave on one engine, with a chunk for each prompt.

        An idle engine computes the same bits for the same wave at any time, since the requests that
        share its forward passes are the same.
        """
        orders = [
            GenerateOrder(
                wave=wave,
                chunk=number,
                num_chunks=len(prompts),
                group_size=group_size,
                temperature=temperature,
                max_new_tokens=self.settings.rollout.response_limit,
                seed=seed,
            )
            for number in range(len(prompts))
        ]
        return [
            self._start(engine, order, (prompt,))
            for order, prompt in zip(orders, prompts, strict=True)
        ]

    def again(self, chunk: Chunk, watch: Callable[[], None] = watch_nothing) -> Chunk:
        """The same responses once more, from an engine that serves.

        Args:
            watch: as of `Fleet.admit`.
        """
        self.fleet.admit(watch)
        order = replace(chunk.order, wave=f"{chunk.order.wave}'", chunk=0, num_chunks=1)
        load = longest_tokens(chunk.prompts, order.max_new_tokens, order.group_size)
        [engine] = self.load.assign([load], self.fleet.serving)
        return self._submit(engine, order, chunk.prompts, load)

    def _submit(
        self, engine: int, order: GenerateOrder, prompts: tuple[Prompt, ...], load: int
    ) -> Chunk:
        chunk = self._start(engine, order, prompts)
        self.load.add(engine, load, chunk.header)
        return chunk

    def _start(self, engine: int, order: GenerateOrder, prompts: tuple[Prompt, ...]) -> Chunk:
        header, batch = self.group.submit_pair(
            engine, "generate", order, prompts, deadline_s=self.settings.deadlines.rollout_s
        )
        return Chunk(order=order, prompts=prompts, header=header, batch=batch)

    def probe(
        self, prompts: Sequence[Prompt], *, num_tokens: int, temperature: float, support: int = 0
    ) -> dict[str, Chunk]:
        """Sample the same prompts on every serving engine and wait. Engines take these before all
        other work. Those that fail, or stop answering pings, are replaced.

        Returns:
            One chunk per engine, by the engine's name; at least one.

        Raises:
            FleetExhausted: all engines failed, and cannot be replaced any more.
        """
        order = GenerateOrder(
            wave=PROBE,
            chunk=0,
            num_chunks=1,
            group_size=1,
            temperature=temperature,
            max_new_tokens=num_tokens,
            seed=0,
            support=support,
            priority=-1,
        )
        chunks: dict[str, Chunk] = {}
        while not chunks:
            self.fleet.admit()
            chunks = {
                self.group.names[engine]: self._start(engine, order, tuple(prompts))
                for engine in sorted(self.fleet.serving)
            }
            errors = failures([chunk.header for chunk in chunks.values()], self.fleet.silent)
            self.fleet.lose_all(errors)
            for error in errors:
                del chunks[error.worker]
        return chunks

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        """Stop sampling these chunks, each on the engine that has it."""
        groups: dict[str, list[str]] = defaultdict(list)  # by the name of the engine
        for chunk in chunks:
            names = [f"{chunk.order.wave}/{prompt.uid}" for prompt in chunk.prompts]
            groups[chunk.header.worker] += names
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "abort", groups[name], deadline_s=limit)
                for engine in sorted(self.fleet.serving)
                if (name := self.group.names[engine]) in groups
            ]
        )

    def abort(self) -> list[Pending]:
        """Stop all sampling. One call per engine: -> how many responses it aborted."""
        limit = self.settings.deadlines.sync_s
        return [
            self.group.submit(engine, "abort", deadline_s=limit)
            for engine in sorted(self.fleet.serving)
        ]

    def quiet(self) -> None:
        """Stop all sampling and wait until it has stopped."""
        self.fleet.lose_failed(self.abort())

    # -- memory ------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Have all engines leave their GPUs to others, and wait; no response is under way. Engines
        that are asleep stay so.
        """
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "sleep", deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    def wake_up(self, parts: Sequence[str]) -> None:
        """Have all engines take these parts of rollout.sampler.PARTS back, and wait."""
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "wake_up", tuple(parts), deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    # -- failed engines ----------------------------------------------------------------------------

    def check(self) -> None:
        """Ask all engines for an answer, and replace those that give none."""
        limit = self.settings.deadlines.heartbeat_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "ping", deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    def silent(self) -> Pending | None:
        """As Fleet.silent."""
        return self.fleet.silent()

    def lose(self, error: WorkerError, watch: Callable[[], None] = watch_nothing) -> None:
        """As Fleet.lose, without a wait."""
        self.fleet.lose(error)

    # -- weights -----------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest, packed: ray.ObjectRef) -> None:
        """Load these weights into every engine, after copying them to the engines' nodes. An engine
        that fails is replaced, and the others continue.

        Raises:
            WeightSyncError: no engine loaded the weights, and some refused them: restarting engines
                would not help.
        """
        self.latest = (manifest, packed)
        serving = sorted(self.fleet.serving)
        self._copy_to_nodes(serving, packed)
        errors = failures([self._load(engine, manifest, packed) for engine in serving])
        refusals = [error for error in errors if not isinstance(error, WorkerDied | WorkerTimeout)]
        if refusals and len(errors) == len(serving):
            raise WeightSyncError(f"no engine took the weights: {refusals[0]}") from refusals[0]
        self.fleet.lose_all(errors)
        self.fleet.admit()

    def _copy_to_nodes(self, engines: Sequence[int], packed: ray.ObjectRef) -> None:
        limit = self.settings.deadlines.sync_s
        fan_out(self.group, engines, packed, deadline_s=limit, watch=self.fleet.silent)

    def load_latest(self, engine: int) -> Pending | None:
        """Start loading the newest weights into an engine; None: it has read them from disk."""
        return None if self.latest is None else self._load(engine, *self.latest)

    def _load(self, engine: int, manifest: WeightManifest, packed: ray.ObjectRef) -> Pending:
        return self.group.submit(
            engine, "load_weights", manifest, packed, deadline_s=self.settings.deadlines.sync_s
        )

    def leave_channel(self) -> None:
        """Have all engines close their ends of a channel of nccl or ipc; an engine whose update was
        interrupted cannot, and is replaced.
        """
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "leave_channel", deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    def close(self) -> None:
        self.group.close()


def closed_by(settings: RunSettings) -> str | None:
    """The setting because of which no engine can join the fleet; None: engines are replaced.

    An engine that starts measures the free memory of its GPU, which others may hold at that time if
    they take turns.
    """
    return "cluster.take_turns=true" if settings.cluster.take_turns else None


def longest_tokens(prompts: Sequence[Prompt], max_new_tokens: int, group_size: int) -> int:
    """The tokens of prompts with their longest possible responses."""
    return sum(len(prompt.input_ids) + max_new_tokens for prompt in prompts) * group_size
