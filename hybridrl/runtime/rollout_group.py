"""The vLLM engines of a run: who samples what, which engines serve, and which weights they hold."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from hybridrl.core.errors import (
    FleetExhausted,
    HybridRLError,
    WeightSyncError,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
)
from hybridrl.runtime.actor_group import ActorGroup, Slot
from hybridrl.runtime.calls import Pending, is_done, nobody, outcomes
from hybridrl.runtime.chunk import Chunk
from hybridrl.runtime.engine_load import EngineLoad
from hybridrl.settings.choices import Source, WeightTransfer
from hybridrl.settings.run import ModelConfig, RunSettings
from hybridrl.settings.shares import chunk_size
from hybridrl.types import (
    GenerateOrder,
    Prompt,
    WeightManifest,
)

log = logging.getLogger(__name__)
PROBE = "probe"
"""The wave of a probe; no wave of prompts is called so."""


class RolloutGroup:
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
    ) -> None:
        self.settings, self.backend = settings, backend
        kwargs = {
            "settings": settings,
            "model": model,
            "device": device,
            "backend": str(backend),
            "source": source,
        }
        restarts = settings.cluster.max_restarts
        self.group = ActorGroup(
            name,
            self.worker,
            slots,
            [kwargs] * len(slots),
            log_dir=log_dir,
            max_restarts=restarts,
            concurrent=True,
        )
        self.load = EngineLoad(len(slots))
        self.serving = set(range(len(slots)))
        self.joining: dict[int, Pending] = {}  # engines started anew -> their first ping
        self.latest: tuple[WeightManifest, ray.ObjectRef] | None = (
            None  # what an engine must hold to serve; None: as from disk
        )
        self.pings: dict[int, tuple[Pending, float]] = {}  # with the time they were sent

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
    ) -> list[Chunk]:
        """Start sampling. Chunks are contiguous in prompt order; each goes to the engine with the
        fewest tokens to do.

        Args:
            groups_per_chunk: None: as set in rollout.groups_per_chunk.
        """
        self.admit()
        rollout = self.settings.rollout
        size = chunk_size(
            len(prompts), groups_per_chunk or rollout.groups_per_chunk, self.group.size
        )
        pieces = [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        tokens = [
            sum(len(p.input_ids) + rollout.max_new_tokens for p in piece) * group_size
            for piece in pieces
        ]
        engines, numbers = self.load.assign(tokens, self.serving), [0] * self.group.size
        chunks = []
        for piece, engine, num_tokens in zip(pieces, engines, tokens, strict=True):
            order = GenerateOrder(
                wave=wave,
                chunk=numbers[engine],
                num_chunks=engines.count(engine),
                group_size=group_size,
                temperature=temperature,
                max_new_tokens=rollout.max_new_tokens,
                seed=seed,
                support=support,
            )
            numbers[engine] += 1
            chunks.append(self._submit(engine, order, piece, num_tokens))
        return chunks

    def again(self, chunk: Chunk) -> Chunk:
        """The same responses once more, from an engine that serves."""
        self.admit()
        order = replace(chunk.order, wave=f"{chunk.order.wave}'", chunk=0, num_chunks=1)
        tokens = (
            sum(len(p.input_ids) + order.max_new_tokens for p in chunk.prompts) * order.group_size
        )
        (engine,) = self.load.assign([tokens], self.serving)
        return self._submit(engine, order, chunk.prompts, tokens)

    def _submit(
        self, engine: int, order: GenerateOrder, prompts: tuple[Prompt, ...], tokens: int
    ) -> Chunk:
        header, batch = self.group.submit_pair(
            engine, "generate", order, prompts, deadline_s=self.settings.deadlines.rollout_s
        )
        self.load.add(engine, tokens, header)
        return Chunk(order=order, prompts=prompts, header=header, batch=batch)

    def probe(
        self, prompts: Sequence[Prompt], *, num_tokens: int, temperature: float, support: int = 0
    ) -> dict[str, Chunk]:
        """The same prompts on every engine that serves: one chunk by the engine's name, of one
        engine at least. Waits; who does not answer, or no ping meanwhile, is lost. An engine takes
        these before all that waits for its turn.

        Raises:
            FleetExhausted: all engines were, and cannot be replaced any more.
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
        asked, found, limit = tuple(prompts), {}, self.settings.deadlines.rollout_s
        while not found:
            self.admit()
            for engine in sorted(self.serving):
                header, batch = self.group.submit_pair(
                    engine, "generate", order, asked, deadline_s=limit
                )
                found[self.group.names[engine]] = Chunk(
                    order=order, prompts=asked, header=header, batch=batch
                )
            failed = self._failed([chunk.header for chunk in found.values()], self.silent)
            self._lose_all(failed)
            for error in failed:
                del found[error.worker]
        return found

    # -- lost engines ------------------------------------------------------------------------------

    def silent(self) -> Pending | None:
        """A ping that an engine has not answered within deadlines.heartbeat_s; None: all answer,
        also while they sample.
        """
        limit, now = self.settings.deadlines.heartbeat_s, time.monotonic()
        for engine in self.serving:
            ping, sent = self.pings.get(engine, (None, now))
            if ping is None or ping.epoch != self.group.epochs[engine] or is_done(ping):
                self.pings[engine] = self.group.submit(engine, "ping", deadline_s=limit), now
            elif now - sent > limit:
                return ping
        return None

    def lose(self, lost: WorkerError) -> None:
        """Go on without an engine, and start another in its place as long as cluster.max_restarts
        allows it.

        Raises:
            FleetExhausted: it does not, and no other engine is left; or the weights travel by a
                channel of vLLM's own, which has no way to let an engine in again, nor to go on
                without one.
        """
        if self.backend is not WeightTransfer.object_store:
            raise FleetExhausted(
                f"{lost}; with rollout.weight_transfer={self.backend} no other can join"
            )
        try:
            engine = self.group.replace(lost)
        except FleetExhausted as error:
            left = self.serving - {self.group.names.index(lost.worker)}
            if not (left or self.joining):
                raise
            if left != self.serving:
                log.warning("%s; going on with %d engines", error, len(left) + len(self.joining))
            self.serving = left
            return
        if engine is not None:
            self.serving.discard(engine)
            self.joining[engine] = self.group.submit(
                engine, "ping", deadline_s=self.settings.deadlines.start_s
            )

    def admit(self) -> None:
        """Let new engines serve that are ready, once they acknowledged the newest weights; where
        none serves, wait for them.
        """
        while self.joining:
            for engine, ping in list(self.joining.items()):
                if self.serving and not is_done(ping):
                    continue
                del self.joining[engine]
                failed = self._failed([ping])
                if not failed and self.latest is not None:
                    failed = self._failed([self._load(engine, *self.latest)])
                if not failed:
                    self.serving.add(engine)
                    log.warning("%s serves again", self.group.names[engine])
                self._lose_all(failed)
            if self.serving:
                return

    def cancel(self, chunks: Sequence[Chunk]) -> None:
        """Stop sampling these chunks, wherever they are; an engine that does not answer is lost."""
        groups = [
            f"{chunk.order.wave}/{prompt.uid}" for chunk in chunks for prompt in chunk.prompts
        ]
        self._lose_all(self._failed(self._each_serving("abort", groups)))

    def abort(self) -> list[Pending]:
        """Stop all sampling; -> how many responses each engine gave up."""
        return self._each_serving("abort")

    # -- weights -----------------------------------------------------------------------------------

    def load_weights(self, manifest: WeightManifest, packed: ray.ObjectRef) -> None:
        """Have every engine serve these weights. One that fails to is lost; the others go on.

        Raises:
            WeightSyncError: none of them took the weights, and some answered: the fault is not
                theirs.
        """
        self.latest = (manifest, packed)
        errors = self._failed(
            [self._load(engine, manifest, packed) for engine in sorted(self.serving)]
        )
        refused = [error for error in errors if not isinstance(error, WorkerDied | WorkerTimeout)]
        if refused and len(errors) == len(self.serving):
            raise WeightSyncError(f"no engine took the weights: {refused[0]}") from refused[0]
        self._lose_all(errors)
        self.admit()

    def quiet(self) -> None:
        """Stop all sampling; an engine that does not answer is lost."""
        self._lose_all(self._failed(self.abort()))

    def _failed(
        self, calls: Sequence[Pending], watch: Callable[[], Pending | None] = nobody
    ) -> list[WorkerError]:
        """What kept an engine from doing what it was told to; all have the same time."""
        errors = []
        for call, outcome in zip(calls, outcomes(calls, watch), strict=True):
            if isinstance(outcome, WorkerError):
                errors.append(outcome)
            elif isinstance(
                outcome, HybridRLError
            ):  # raised on purpose, as of weights that it refused
                errors.append(WorkerError(call.worker, call.call, str(outcome), call.epoch))
        return errors

    def _lose_all(self, errors: Sequence[WorkerError]) -> None:
        for error in errors:
            log.warning("%s; starting another worker in its place", error)
            self.lose(error)

    def _load(self, engine: int, manifest: WeightManifest, packed: ray.ObjectRef) -> Pending:
        return self.group.submit(
            engine, "load_weights", manifest, packed, deadline_s=self.settings.deadlines.sync_s
        )

    def set_version(self, version: int) -> list[Pending]:
        return self._each_serving("update_weight_version", str(version))

    def _each_serving(self, method: str, *args: Any) -> list[Pending]:
        limit = self.settings.deadlines.sync_s
        return [
            self.group.submit(engine, method, *args, deadline_s=limit)
            for engine in sorted(self.serving)
        ]

    def close(self) -> None:
        self.group.close()
