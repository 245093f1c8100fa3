"""The group of a run's vLLM engines: it assigns chunks to engines and loads weights into them."""

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
    """Distributes prompts over the engines that serve, and loads weights into all of them.

    consumes prompts and weights / produces chunks under way / `generate` and `again` wait only
    while no engine serves; `probe`, `cancel`, `quiet` and `load_weights` wait for the engines, and
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
            teacher: name of the teacher, if the model is one; None: the model is the student.
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
        # The weights that an engine must hold to serve; None: those that it reads from disk.
        self.latest: tuple[WeightManifest, ray.ObjectRef] | None = None

    def configure(self, settings: RunSettings) -> None:
        """Take sizes and deadlines from other settings from now on; the engines are unchanged."""
        self.settings = settings
        self.fleet.deadlines = settings.deadlines

    def begin_job(self, settings: RunSettings, log_dir: str) -> None:
        """Serve another job as new engines would, except that they keep the weights of the previous
        job until others are loaded.
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
        """Start sampling. Each chunk has consecutive prompts and goes to the engine with the fewest
        pending tokens.

        Args:
            groups_per_chunk: None: rollout.groups_per_chunk.
            watch: as in `Fleet.admit`.
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
        """The indices of the engines that serve; if none does, wait for one that is joining.

        Args:
            watch: as in `Fleet.admit`.
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
        """Start sampling a whole wave on one engine, with one chunk per prompt.

        An idle engine computes the same bits for the same wave at any time, since the same requests
        share its forward passes.
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
        """Sample the same responses again on an engine that serves.

        Args:
            watch: as in `Fleet.admit`.
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
        """Sample the same prompts on every serving engine and wait. Engines schedule these before
        all other requests. Engines that fail, or stop answering pings, are replaced.

        Returns:
            The chunk of each engine that succeeded, by the engine's name; at least one.

        Raises:
            FleetExhausted: all engines failed and can no longer be replaced.
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
        """Stop sampling these chunks, and wait until the engines have stopped."""
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
        """Stop all sampling, without waiting: one call per engine, which returns the number of
        aborted responses.
        """
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
        """Free the GPU memory of all engines, and wait. No response may be under way. Engines that
        are asleep stay asleep.
        """
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "sleep", deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    def wake_up(self, parts: Sequence[str]) -> None:
        """Bring parts of all engines back to their GPUs, and wait.

        Args:
            parts: some of rollout.sampler.PARTS.
        """
        limit = self.settings.deadlines.sync_s
        self.fleet.lose_failed(
            [
                self.group.submit(engine, "wake_up", tuple(parts), deadline_s=limit)
                for engine in sorted(self.fleet.serving)
            ]
        )

    # -- failed engines ----------------------------------------------------------------------------

    def check(self) -> None:
        """Ping all engines, wait, and replace those that do not answer."""
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
        """As Fleet.lose; does not wait, so `watch` is not called."""
        self.fleet.lose(error)

    # -- weights -----------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest, packed: ray.ObjectRef) -> None:
        """Load these weights into every engine that serves, after copying them to the engines'
        nodes. An engine that fails is replaced, and the others continue.

        Raises:
            WeightSyncError: no engine loaded the weights, and some refused them, so restarting
                engines would not help.
        """
        self.latest = (manifest, packed)
        serving = sorted(self.fleet.serving)
        self._copy_to_nodes(serving, packed)
        errors = failures([self._load(engine, manifest, packed) for engine in serving])
        refusals = [error for error in errors if not isinstance(error, WorkerDied | WorkerTimeout)]
        if refusals and len(errors) == len(serving):
            raise WeightSyncError(f"no engine loaded the weights: {refusals[0]}") from refusals[0]
        self.fleet.lose_all(errors)
        self.fleet.admit()

    def _copy_to_nodes(self, engines: Sequence[int], packed: ray.ObjectRef) -> None:
        limit = self.settings.deadlines.sync_s
        fan_out(self.group, engines, packed, deadline_s=limit, watch=self.fleet.silent)

    def load_latest(self, engine: int) -> Pending | None:
        """Start loading the newest weights into an engine; None: no weights were loaded yet, so it
        serves those that it read from disk.
        """
        return None if self.latest is None else self._load(engine, *self.latest)

    def _load(self, engine: int, manifest: WeightManifest, packed: ray.ObjectRef) -> Pending:
        return self.group.submit(
            engine, "load_weights", manifest, packed, deadline_s=self.settings.deadlines.sync_s
        )

    def leave_channel(self) -> None:
        """Make all engines close their ends of a channel of nccl or ipc. An engine whose update was
        interrupted cannot do that, and is replaced.
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
    """The setting that prevents the replacement of engines; None: they are replaced.

    A starting engine measures the free memory of its GPU. With cluster.take_turns, the learner may
    hold that memory at the time.
    """
    return "cluster.take_turns=true" if settings.cluster.take_turns else None


def longest_tokens(prompts: Sequence[Prompt], max_new_tokens: int, group_size: int) -> int:
    """The number of tokens of these prompts with `group_size` longest responses each."""
    return sum(len(prompt.input_ids) + max_new_tokens for prompt in prompts) * group_size
