"""The plan of a run: where each worker runs, what it holds and sends, and the time of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from hybridrl.core.errors import ConfigError
from hybridrl.planning.edges import Edge, checkpoint_bytes, disk_bytes, edges, store_bytes
from hybridrl.planning.memory import (
    TURNS,
    Part,
    checkpoint_copy,
    engine_parts,
    learner_parts,
    reward_parts,
    scorer_parts,
    scoring_engine_parts,
    worker_peak,
    zero_of,
)
from hybridrl.planning.rates import H100, PhaseSeconds, Rates, cpu_rates, phase_seconds
from hybridrl.planning.sizes import Sizes
from hybridrl.runtime.workers import teams
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.run import RunSettings

GIB = 2**30
IMPORTED = 0.6 * GIB
"""Bytes of a worker's process on a CPU after its imports: 0.43 to 0.60 GiB were measured."""
CHILD_IMPORTED = 25 * 2**20
"""The same bytes of a child process of a reward worker that loads no reward model."""

HEAP_SHARE = 0.28
"""Gaps in the heap of a process on a CPU, as a share of the bytes of its tensors: the heap retains
freed memory (runtime.worker_env)."""

GROWN = {"learner": 226_000_000, "rollout": 57_000_000, "teacher": 57_000_000, "scorer": 22_000_000}
"""Further bytes that a process on a CPU needs for libraries once they run, by kind of worker.

Fitted to measurements of the tiny model in float32 (`tools/bench plan`): HEAP_SHARE and the
learner's number on its ZeRO 1 and 3 runs, then the engine's. The scorer's is what stays after a
pass whose tensors go back to the system (MALLOC_MMAP_THRESHOLD_=65536). All other measurements only
test them.
"""


class Seat(NamedTuple):
    """Devices that hold the same workers."""

    first: int  # number of the first GPU
    gpus: int  # how many; 0: a node without any
    workers: tuple[str, ...]  # names of their teams; on a CPU once for each worker

    def __str__(self) -> str:
        if self.gpus == 0:
            return "this node"
        last = self.first + self.gpus - 1
        return f"GPU {self.first}" if self.gpus == 1 else f"GPU {self.first} to {last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The devices, memory, transfers, disk and time of a run, computed before it starts.

    All bytes are those of a run whose responses are as long as they may be.
    """

    settings: RunSettings
    device: str  # cpu or cuda
    device_bytes: int  # of one GPU, or of this node
    sizes: Sizes
    parts: tuple[Part, ...]  # of one worker of each team
    seats: tuple[Seat, ...]
    edges: tuple[Edge, ...]
    store_bytes: int  # the most that the object store holds
    disk_bytes: int
    seconds: PhaseSeconds
    rates: Rates

    def of_worker(self, name: str) -> list[Part]:
        return [part for part in self.parts if part.worker == name]

    def peak(self, name: str) -> int:
        """The most that one worker of a team holds."""
        return worker_peak(self.of_worker(name))

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of each learner rank in host memory: those that learner.offload holds there, and
        those that cluster.take_turns moves there while engines sample.
        """
        if self.device == "cpu":
            return 0
        zero = zero_of(self.sizes)
        return zero.host + (zero.optimizer if self.sizes.takes_turns else 0)

    def asleep_bytes(self, name: str) -> int:
        """Bytes of one engine in host memory while the learner works; 0: it does not sleep."""
        return worker_peak(self.of_worker(name), ("sync",)) if self.sizes.takes_turns else 0

    def seat_bytes(self, seat: Seat) -> int:
        """The most bytes that a device of the seat holds. A worker keeps memory that it has used in
        one phase during the others, so the peaks of its workers add up; if workers take turns, the
        peaks of each turn do.
        """
        imports = 0 if seat.gpus else sum(self.imported(name) for name in seat.workers)
        if self.sizes.takes_turns:
            return max(
                sum(worker_peak(self.of_worker(name), turn) for name in seat.workers)
                for turn in TURNS
            )
        return sum(self.peak(name) for name in seat.workers) + imports

    def imported(self, name: str) -> int:
        """Bytes of one worker of a team after its imports, with those of its child processes."""
        if name != "reward":
            return int(IMPORTED)
        reward = self.settings.reward
        return int(IMPORTED + reward.processes * (IMPORTED if reward.models else CHILD_IMPORTED))


def make_plan(settings: RunSettings, *, device: str, device_bytes: int) -> Plan:
    """The plan of a run on devices of one kind.

    Args:
        device: cpu or cuda.
        device_bytes: of one GPU, or of the node on a CPU.

    Raises:
        ConfigError: the lengths are not set, or a model's config cannot be read.
    """
    for key in ("max_new_tokens", "max_model_len"):
        if getattr(settings.rollout, key) is None:
            raise ConfigError(
                f"rollout.{key} is not set: a plan needs the length of the longest sequence; "
                "`hybridrl train --dry-run` proposes one for the data"
            )
    on_cpu = device == "cpu"
    sizes = Sizes(settings, on_cpu=on_cpu)
    rates = cpu_rates(settings.model.dtype) if on_cpu else H100
    return Plan(
        settings=settings,
        device=device,
        device_bytes=device_bytes,
        sizes=sizes,
        parts=tuple(with_heap(settings, list(worker_parts(sizes, device_bytes)), on_cpu=on_cpu)),
        seats=tuple(seats(settings, on_cpu=on_cpu)),
        edges=tuple(edges(sizes)),
        store_bytes=store_bytes(sizes, weights_travel=by_store(settings, on_cpu=on_cpu)),
        disk_bytes=disk_bytes(sizes),
        seconds=phase_seconds(sizes, rates),
        rates=rates,
    )


def by_store(settings: RunSettings, *, on_cpu: bool) -> bool:
    """Whether weights travel through the object store."""
    return settings.weight_transfer(on_cpu=on_cpu) is WeightTransfer.object_store


def worker_parts(sizes: Sizes, device_bytes: int) -> Iterator[Part]:
    """The parts of one worker of each team that holds a model."""
    settings = sizes.settings
    yield from learner_parts(sizes)
    yield from engine_parts(sizes, "rollout", settings.model, "model.path", device_bytes)
    if settings.algorithm.teacher_fraction:
        name = next(iter(settings.teachers))
        teacher = settings.teacher_model(name)
        setting = settings.model_setting(name)
        yield from engine_parts(sizes, "teacher", teacher, setting, device_bytes)
    for scored in sizes.teachers:
        if scored.shares_base:
            continue
        if settings.teachers[scored.name].engine is not None:
            yield from scoring_engine_parts(sizes, scored, device_bytes)
        else:
            yield from scorer_parts(sizes, scored)
    yield from reward_parts(sizes)


def with_heap(settings: RunSettings, parts: Sequence[Part], *, on_cpu: bool) -> Iterator[Part]:
    """The parts and, on a CPU, one more for the heap of each process in each phase."""
    yield from parts
    if not on_cpu:
        return
    for worker, phase in dict.fromkeys((part.worker, part.phase) for part in parts):
        tensors = sum(p.nbytes for p in parts if (p.worker, p.phase) == (worker, phase))
        yield Part(worker, phase, "heap", int(HEAP_SHARE * tensors) + grown(settings, worker))


def grown(settings: RunSettings, worker: str) -> int:
    """The bytes in GROWN for the kind of the worker."""
    if not worker.startswith("scorer-"):
        return GROWN.get(worker, 0)
    engine = settings.teachers[worker.removeprefix("scorer-")].engine
    return GROWN["scorer" if engine is None else "rollout"]


def seats(settings: RunSettings, *, on_cpu: bool) -> list[Seat]:
    """The devices, and the workers on each of them, in the order in which they are placed."""
    own_classes = {f"scorer-{n}" for n in settings.teachers if settings.teachers[n].model}
    models = [t for t in teams(settings) if t.gpus and t.name not in own_classes]
    if on_cpu:
        models += [t for t in teams(settings) if t.name == "reward" and t not in models]
        return [Seat(0, 0, tuple(team.name for team in models for _ in range(team.size)))]
    if settings.cluster.colocate:
        width = max(team.size for team in models)
        on_gpu = [tuple(t.name for t in models if i < t.size) for i in range(width)]
    else:
        on_gpu = [(team.name,) for team in models for _ in range(team.size * team.gpus)]
    found = []
    first = 0
    for workers, run in groupby(on_gpu):
        count = len(list(run))
        found.append(Seat(first, count, workers))
        first += count
    return found


# -- as text ---------------------------------------------------------------------------------------


def plan_lines(plan: Plan) -> Iterator[str]:
    """The plan as tables of text."""
    yield from seat_lines(plan)
    on_gpu = bool(plan.settings.reward.gpus)  # the reward workers, where the run has GPUs
    for name in dict.fromkeys(part.worker for part in plan.parts):
        if plan.peak(name) and (name != "reward" or plan.device == "cpu" or on_gpu):
            yield ""
            yield from part_lines(name, plan.of_worker(name))
    yield ""
    yield "a step sends at most"
    yield from aligned(
        [[f"  {e.source} -> {e.target}", e.what, shown(e.nbytes)] for e in plan.edges]
    )
    retained = plan.settings.checkpoint.keep
    if plan.device == "cuda" and not on_gpu and (models := plan.peak("reward")):
        yield f"host memory of each reward worker, for its reward models: {shown(models)}"
    if plan.offloaded_bytes:
        yield f"host memory of each learner rank, offloaded: {shown(plan.offloaded_bytes)}"
    if plan.device == "cuda" and (copy := checkpoint_copy(plan.sizes)):
        yield f"host memory of each learner rank, while a checkpoint is written: {shown(copy)}"
    for name in ("rollout", "teacher"):
        if asleep := plan.asleep_bytes(name):
            yield f"host memory of each engine of {name}, while it sleeps: {shown(asleep)}"
    yield f"object store, most at once: {shown(plan.store_bytes)}"
    yield (
        f"disk: {shown(plan.disk_bytes)} for {retained} checkpoints of "
        f"{shown(checkpoint_bytes(plan.sizes))}, the one being written"
        + (", the best" if plan.settings.checkpoint.best else "")
        + (", and the export" if plan.settings.checkpoint.export else "")
    )
    yield ""
    seconds = plan.seconds
    whole = seconds.step(overlaps=plan.settings.pipeline.ahead > 0)
    yield f"a step of the longest responses, by arithmetic alone: {whole:.3g} s"
    yield (
        f"  sampling {seconds.rollout:.3g} s, scoring {seconds.score:.3g} s, learning "
        f"{seconds.learn:.3g} s, weights {seconds.sync:.3g} s"
    )
    yield f"  at {plan.rates} for each {'GPU' if plan.device == 'cuda' else 'node'}"


def seat_lines(plan: Plan) -> Iterator[str]:
    """Which workers are on which device, and how much of its memory they need."""
    rows = []
    for seat in plan.seats:
        needed = plan.seat_bytes(seat)
        workers = ", ".join(
            f"{n} x {name}" if (n := seat.workers.count(name)) > 1 else name
            for name in dict.fromkeys(seat.workers)
        )
        verdict = "fits" if needed <= plan.device_bytes else "does not fit"
        of_device = f"{shown(needed)} of {shown(plan.device_bytes)}"
        rows.append([str(seat), workers, of_device, verdict])
    yield from aligned(rows)
    if plan.device == "cpu":
        yield (
            f"(with {shown(int(IMPORTED))} for the imports of each worker; for those of a reward "
            f"worker and its children {shown(plan.imported('reward'))})"
        )


def part_lines(name: str, parts: Sequence[Part]) -> Iterator[str]:
    """A table of one worker: a row for each part of its memory, a column for each phase."""
    phases = list(dict.fromkeys(part.phase for part in parts))
    of_cell = {(part.part, part.phase): part.nbytes for part in parts}
    totals = [sum(p.nbytes for p in parts if p.phase == phase) for phase in phases]
    unit = "GiB" if max(totals) >= 10 * GIB else "MiB"
    rows = [[f"one {name}, {unit}", *phases]]
    for row in dict.fromkeys(part.part for part in parts):
        cells = [of_cell.get((row, phase), 0) for phase in phases]
        if any(cells):
            rows.append([f"  {row}", *(in_unit(cell, unit) for cell in cells)])
    rows.append(["  total", *(in_unit(total, unit) for total in totals)])
    yield from aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows whose columns are as wide as their widest cell; numbers are at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() or cell == "-" else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


UNITS = {"GiB": GIB, "MiB": 2**20, "KiB": 2**10}


def in_unit(nbytes: int, unit: str) -> str:
    """Example: in_unit(3 * 2**30 // 2, "GiB") == "1.5"; nothing is "-"."""
    return f"{nbytes / UNITS[unit]:.1f}" if nbytes else "-"


def shown(nbytes: int) -> str:
    """Example: shown(41_900_000_000) == "39.0 GiB", shown(2**21) == "2.0 MiB"."""
    for unit, size in UNITS.items():
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
