"""Refuses a plan that does not fit its devices, and names settings with which it would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hybridrl.core.errors import ConfigError
from hybridrl.models.loading import load_layout
from hybridrl.models.model_internals import shards_every_layer
from hybridrl.planning.advice import with_shared_base
from hybridrl.planning.memory import engine_parts
from hybridrl.planning.model_shape import DTYPE_BYTES, model_shape
from hybridrl.planning.plan import Plan, Seat, make_plan, shown
from hybridrl.settings.checks import check_settings
from hybridrl.settings.choices import Offload
from hybridrl.settings.run import RunSettings

MOST_RANKS = 1024
ENGINE_DEVICES = (2, 4, 8)
"""The numbers of devices of one engine that a remedy may name."""
MOST_DEVICES = 32
"""The most devices of one replica of a teacher that a remedy may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting with another value."""

    text: str  # as on the command line
    make: Callable[[RunSettings], RunSettings]


def check_fit(plan: Plan) -> None:
    """Refuse a plan in which some device must hold more than it has.

    Raises:
        ConfigError: names the worker, its largest parts, and the settings to change; or as
            check_cache_of and check_measuring.
    """
    check_cache(plan)
    check_measuring(plan)
    for seat in plan.seats:
        if plan.seat_bytes(seat) > plan.device_bytes:
            refuse(plan, seat)


def check_cache(plan: Plan) -> None:
    """Refuse an engine whose KV cache is smaller than one sequence of rollout.max_model_len."""
    rollout = plan.settings.rollout
    student = plan.sizes.student
    numbers = student.kv_numbers * plan.sizes.width // rollout.tensor_parallel
    remedy = (
        "raise rollout.kv_cache_bytes"
        if rollout.kv_cache_bytes or plan.device == "cpu"
        else "raise rollout.tensor_parallel or rollout.gpu_memory_utilization"
    )
    check_cache_of(plan, "rollout", numbers, remedy)
    for teacher in plan.sizes.teachers:
        engine = f"teachers.{teacher.name}.engine"
        config = plan.settings.teachers[teacher.name]
        if config.engine is not None:
            numbers = teacher.shape.kv_numbers * teacher.width // config.gpus
            remedy = (
                f"raise {engine}.kv_cache_memory_bytes"
                if "kv_cache_memory_bytes" in config.engine or plan.device == "cpu"
                else f"raise {engine}.tensor_parallel_size or {engine}.gpu_memory_utilization"
            )
            check_cache_of(plan, f"scorer-{teacher.name}", numbers, remedy)


def check_cache_of(plan: Plan, worker: str, of_token: int, remedy: str) -> None:
    """Refuse a KV cache that is too small for one sequence.

    Args:
        of_token: bytes of a token in the cache, on each device.

    Raises:
        ConfigError: the cache holds fewer than rollout.max_model_len tokens.
    """
    needed = of_token * plan.sizes.tokens
    (cache,) = (p.nbytes for p in plan.of_worker(worker) if p.part == "KV cache")
    if cache < needed:
        raise ConfigError(
            f"rollout.max_model_len={plan.settings.rollout.max_model_len}: one sequence needs "
            f"{shown(needed)} of KV cache on each device of an engine of {worker}, which has "
            f"{shown(cache)} for it; {remedy}"
        )


def check_measuring(plan: Plan) -> None:
    """Refuse a teacher that is to be measured in the place of an engine of the student, by the
    settings of rollout, but leaves no room there for the KV cache of one sequence.

    Raises:
        ConfigError: names the teacher; only on GPUs.
    """
    settings = plan.settings
    rollout = settings.rollout
    share = rollout.gpu_memory_utilization
    for name in settings.measured_teachers if plan.device == "cuda" else ():
        if settings.teachers[name].engine is not None and name in settings.scored_teachers:
            continue  # it is sampled with the arguments of the engine that scores
        model = settings.teacher_model(name)
        setting = settings.model_setting(name)
        shape = model_shape(model, setting)
        of_token = shape.kv_numbers * DTYPE_BYTES[model.dtype] // rollout.tensor_parallel
        parts = engine_parts(plan.sizes, "teacher", model, setting, plan.device_bytes)
        needed = {p.part: p.nbytes for p in parts if p.phase == "sample"} | {
            "KV cache": rollout.kv_cache_bytes or of_token * plan.sizes.tokens
        }
        room = plan.device_bytes if rollout.kv_cache_bytes else int(share * plan.device_bytes)
        if sum(needed.values()) > room:
            raise ConfigError(
                f"eval.teacher=true: teachers.{name} does not fit one engine of rollout, which "
                f"would measure its accuracy before training: {shown(sum(needed.values()))} of "
                f"{shown(room)} on each GPU (weights {shown(needed['weights'])}); set "
                "eval.teacher=false, or raise rollout.tensor_parallel"
            )


def refuse(plan: Plan, seat: Seat) -> None:
    """Raise a ConfigError with the largest worker of a seat, its largest parts and a remedy."""
    name = max(dict.fromkeys(seat.workers), key=plan.peak)
    largest = sorted(peak_parts(plan, name).items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{part} {shown(nbytes)}" for part, nbytes in largest)
    others = len(seat.workers) - 1
    beside = f" beside {others} other worker{'s' * (others > 1)}" if others else ""
    raise ConfigError(
        f"{worker_setting(plan.settings, name)}: {name}{beside} does not fit {seat}: "
        f"{shown(plan.seat_bytes(seat))} of {shown(plan.device_bytes)} ({parts}); "
        f"{remedy(plan, name)}"
    )


def peak_parts(plan: Plan, worker: str) -> dict[str, int]:
    """The parts of a worker in the phase in which it holds most."""
    parts = plan.of_worker(worker)
    phases = {part.phase for part in parts}
    peak = max(phases, key=lambda phase: sum(p.nbytes for p in parts if p.phase == phase))
    return {part.part: part.nbytes for part in parts if part.phase == peak}


def worker_setting(settings: RunSettings, worker: str) -> str:
    """The setting that names a worker's model, or reward.workers, with its value."""
    if worker == "reward":
        return f"reward.workers={settings.reward.workers}"
    if worker.startswith("scorer-"):
        name = worker.removeprefix("scorer-")
        return f"{settings.model_setting(name)}={settings.teacher_model(name).path}"
    return f"model.path={settings.model.path}"


def remedy(plan: Plan, worker: str) -> str:
    """Changes of the settings after which the worker fits, each of them necessary, as a clause.
    Changes that the checks of the settings refuse are left out.
    """
    chosen: list[Change] = []
    for change in changes(plan, worker):
        if not allowed(plan.settings, [*chosen, change]):
            continue
        chosen.append(change)
        if fits(plan, chosen, worker):
            break
    else:
        return hopeless(plan, worker)
    for change in list(chosen[:-1]):  # leave out what turns out to be unnecessary
        fewer = [other for other in chosen if other is not change]
        if allowed(plan.settings, fewer) and fits(plan, fewer, worker):
            chosen = fewer
    last: dict[str, str] = {}
    for change in chosen:
        last[change.text.partition("=")[0]] = change.text
    after = changed_plan(plan, chosen)
    gpus = sum(seat.gpus for seat in after.seats)
    devices = f", on {gpus} GPU{'s' * (gpus > 1)} in all" if gpus else ""
    host = after.offloaded_bytes
    beside = f" and {shown(host)} of host memory for each learner rank" if host else ""
    return f"it would fit with {' '.join(last.values())}{devices}{beside}"


def hopeless(plan: Plan, worker: str) -> str:
    """The remedy for a worker that no change makes fit, as a clause."""
    if worker.startswith("scorer-") and plan.device == "cuda":
        teacher = worker.removeprefix("scorer-")
        if plan.settings.teachers[teacher].engine is None and not divides(plan.settings, teacher):
            return (
                "transformers has no plan for dividing its layers among devices; choose another "
                "teacher or larger devices, or evidence that a vLLM engine gives "
                f"(teachers.{teacher}.evidence=drawn)"
            )
        return (
            f"not even {MOST_DEVICES} devices of a replica would do: choose a smaller teacher, or "
            "larger devices"
        )
    if plan.device == "cpu":
        return "choose a smaller model, or a node with more memory"
    if worker == "reward":
        return "choose a smaller reward model, or larger devices"
    if worker == "rollout":
        return (
            f"not even rollout.tensor_parallel={ENGINE_DEVICES[-1]} would do: choose a smaller "
            "model, or larger devices"
        )
    train = plan.settings.train
    most = train.prompts_per_step // train.updates_per_batch
    if worker == "learner" and most < MOST_RANKS:
        return (
            f"not even {most} ranks would do, and train.prompts_per_step={train.prompts_per_step} "
            "allows no more: choose a smaller model, or larger devices"
        )
    return f"not even {MOST_RANKS} ranks would do: choose a smaller model, or larger devices"


def changed_settings(settings: RunSettings, chosen: Sequence[Change]) -> RunSettings:
    for change in chosen:
        settings = change.make(settings)
    return settings


def allowed(settings: RunSettings, chosen: Sequence[Change]) -> bool:
    """Whether the settings after the changes pass their checks."""
    try:
        check_settings(changed_settings(settings, chosen))
    except ConfigError:
        return False
    return True


def changed_plan(plan: Plan, chosen: Sequence[Change]) -> Plan:
    settings = changed_settings(plan.settings, chosen)
    return make_plan(settings, device=plan.device, device_bytes=plan.device_bytes)


def fits(plan: Plan, chosen: Sequence[Change], worker: str) -> bool:
    """Whether the worker's devices hold all of their workers after the changes. If the changes
    remove the worker, all devices count.
    """
    after = changed_plan(plan, chosen)
    seats = [seat for seat in after.seats if worker in seat.workers] or after.seats
    return all(after.seat_bytes(seat) <= after.device_bytes for seat in seats)


def changes(plan: Plan, worker: str) -> Iterator[Change]:
    """Changes that make a worker smaller, the cheapest first; each is tried with all before it."""
    settings = plan.settings
    teacher = worker.removeprefix("scorer-")
    share = None if teacher == worker else _in_learner(settings, teacher)
    if share is not None and fits(plan, [share], worker):
        yield share
        return
    if settings.cluster.colocate:
        if settings.cluster.take_turns:
            yield from smaller_shares(settings)
        elif plan.device == "cuda":
            yield _set("cluster", "take_turns", True)
        yield Change(text="cluster.colocate=false", make=_apart)
    if worker == "learner":
        yield from learner_changes(settings, can_offload=plan.device == "cuda")
    elif teacher != worker:
        can_shard = plan.device == "cuda"  # on a CPU the ranks share one node's memory
        yield from scorer_changes(settings, teacher, can_shard=can_shard)
    elif worker == "reward":
        yield _set("reward", "processes", 1)
        yield _set("reward", "workers", 1)
    else:
        yield from engine_changes(settings)


def smaller_shares(settings: RunSettings) -> Iterator[Change]:
    """Smaller shares of a GPU for an engine, which leave more room for learner and teachers."""
    for share in (0.8, 0.7, 0.6, 0.5):
        if share < settings.rollout.gpu_memory_utilization:
            yield _set("rollout", "gpu_memory_utilization", share)


def learner_changes(settings: RunSettings, *, can_offload: bool) -> Iterator[Change]:
    longest = settings.rollout.sequence_limit
    yield _set("learner", "gradient_checkpointing", True)
    yield _set("train", "head_chunk", min(settings.train.head_chunk, 256))
    if settings.train.max_tokens_per_micro_batch > longest:
        yield _set("train", "max_tokens_per_micro_batch", longest)
    yield _set("learner", "zero_stage", 3)
    if can_offload:
        yield _set("learner", "offload", Offload.optimizer)
        yield _set("learner", "offload", Offload.parameters)
    ranks = settings.learner.ranks
    while ranks < MOST_RANKS:
        ranks *= 2
        yield _set("learner", "ranks", ranks)


def scorer_changes(settings: RunSettings, teacher: str, *, can_shard: bool) -> Iterator[Change]:
    longest = settings.rollout.sequence_limit
    if settings.scorer.max_tokens_per_micro_batch > longest:
        yield _set("scorer", "max_tokens_per_micro_batch", longest)
    if settings.teachers[teacher].dtype == "float32":

        def narrow(old: RunSettings) -> RunSettings:
            changed = replace(old.teachers[teacher], dtype="bfloat16")
            return replace(old, teachers=old.teachers | {teacher: changed})

        yield Change(text=f"teachers.{teacher}.dtype=bfloat16", make=narrow)
    if settings.teachers[teacher].engine is not None:
        ranks = settings.teachers[teacher].gpus
        more = (r for r in ENGINE_DEVICES if r > ranks and can_shard)
        yield from (_in_engine(teacher, r) for r in more)
        return
    if not can_shard:
        return
    if divides(settings, teacher):
        for devices in range(settings.teachers[teacher].devices + 1, MOST_DEVICES + 1):
            yield _on_devices(teacher, devices)
    else:
        yield from (_in_engine(teacher, r) for r in ENGINE_DEVICES)


def divides(settings: RunSettings, teacher: str) -> bool:
    """Whether the teacher's layers can be divided among several devices of a scorer."""
    model = settings.teacher_model(teacher)
    layout = load_layout(model.path, model.revision, setting=settings.model_setting(teacher))
    return shards_every_layer(layout)


def _in_learner(settings: RunSettings, teacher: str) -> Change | None:
    """The learner scores in the teacher's place; None: it does not have the teacher's weights."""
    shared = with_shared_base(settings, teacher)
    if shared is None:
        return None

    def make(old: RunSettings) -> RunSettings:
        return replace(old, teachers=old.teachers | {teacher: shared.teachers[teacher]})

    return Change(text=f"teachers.{teacher}.share_base=true", make=make)


def _on_devices(teacher: str, devices: int) -> Change:
    def make(old: RunSettings) -> RunSettings:
        changed = replace(old.teachers[teacher], devices=devices)
        return replace(old, teachers=old.teachers | {teacher: changed})

    return Change(text=f"teachers.{teacher}.devices={devices}", make=make)


def _in_engine(teacher: str, ranks: int) -> Change:
    def make(old: RunSettings) -> RunSettings:
        arguments = (old.teachers[teacher].engine or {}) | {"tensor_parallel_size": ranks}
        changed = replace(old.teachers[teacher], engine=arguments)
        return replace(old, teachers=old.teachers | {teacher: changed})

    return Change(text=f"teachers.{teacher}.engine.tensor_parallel_size={ranks}", make=make)


def engine_changes(settings: RunSettings) -> Iterator[Change]:
    rollout = settings.rollout
    if rollout.kv_cache_bytes:
        yield _set("rollout", "kv_cache_bytes", max(rollout.kv_cache_bytes // 4, 1))
    yield _set("rollout", "max_num_seqs", max(rollout.max_num_seqs // 4, 1))
    for devices in ENGINE_DEVICES:
        if devices > rollout.tensor_parallel:
            yield _set("rollout", "tensor_parallel", devices)


def _set(section: str, name: str, value: object) -> Change:
    def make(settings: RunSettings) -> RunSettings:
        changed = replace(getattr(settings, section), **{name: value})
        return replace(settings, **{section: changed})

    word = str(value).lower() if isinstance(value, bool) else value
    return Change(text=f"{section}.{name}={word}", make=make)


def _apart(settings: RunSettings) -> RunSettings:
    return replace(settings, cluster=replace(settings.cluster, colocate=False, take_turns=False))
