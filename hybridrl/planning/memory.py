"""The bytes that each worker holds on its device, by phase and part.

All responses are assumed to be as long as they may be. The worker that reads the data's responses
is left out, as it holds no model. Reward workers hold their models in the memory of their node,
unless reward.gpus is set.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from hybridrl.controller.engine_probe import PROMPTS, TOKENS
from hybridrl.core.compiler import has_compiler
from hybridrl.kernels.head import PIECE
from hybridrl.models.decoder_layers import COMPILE_FROM, PLAIN_ATTENTION_TOKENS
from hybridrl.planning.model_shape import DTYPE_BYTES, ModelShape, engine_weights, model_shape
from hybridrl.planning.passes import Pass, PassBytes, pass_bytes
from hybridrl.planning.sizes import ScoredTeacher, Sizes
from hybridrl.planning.zero import WIDE, ZeroBytes, zero_bytes
from hybridrl.rewards.reward_model import MAX_TOKENS
from hybridrl.rollout.engine import CPU_KV_CACHE_BYTES, prefill_tokens
from hybridrl.rollout.engine_scorer import DEFAULTS
from hybridrl.settings.choices import Attention, Products, WeightTransfer
from hybridrl.settings.models import ModelConfig
from hybridrl.teachers.evidence import Hidden, Vocabulary

SAMPLED = 3
"""float32 matrices of logits that vLLM's sampler has at once: logits, log-probs, probabilities."""

ROW_MATRICES = 6
"""float32 matrices that kernels.rows has at once where neither Triton nor a compiler runs it."""

COMPARED_MATRICES = 8
"""float32 matrices that exist at once in ops.compare, its two arguments and the student's logits
included."""

TRANSFER_BUFFER = 2**30
"""Bytes of a buffer through which vLLM hands weights to another GPU; its own default."""


class Part(NamedTuple):
    """Bytes of one part of one worker's memory, in one phase of a step."""

    worker: str  # the name of its team
    phase: str
    part: str
    nbytes: int


# -- the learner -----------------------------------------------------------------------------------


def zero_of(sizes: Sizes) -> ZeroBytes:
    learner = sizes.settings.learner
    stage = learner.zero_stage
    assert stage is not None, "run settings choose one by the model's dtype"
    return zero_bytes(
        sizes.trained,
        frozen=sizes.frozen,
        width=sizes.width,
        ranks=learner.ranks,
        stage=stage,
        micro_batches=sizes.micro_batches,
        offload=learner.offload,
        largest=sizes.largest_trained,
        overlaps=not sizes.on_cpu,
    )


def learner_pass(sizes: Sizes) -> Pass:
    """The forward and backward pass of one micro-batch."""
    settings = sizes.settings
    packs = settings.train.packing
    load = sizes.of_micro_batch
    tokens = load.sequences * load.length if packs else load.length
    narrow = settings.model.dtype == "bfloat16"
    return Pass(
        sequences=1 if packs else load.sequences,
        tokens=tokens,
        learns=True,
        recomputes=bool(settings.learner.gradient_checkpointing),
        plain_attention=(
            sizes.on_cpu
            and narrow
            and (tokens if packs else sizes.tokens) <= PLAIN_ATTENTION_TOKENS
            and settings.model.attention is Attention.auto
        ),
        rank=settings.lora.rank,
        targets=tuple(settings.lora.targets),
    )


def learner_parts(sizes: Sizes) -> Iterator[Part]:
    """The memory of one learner rank.

    Phases: `score`, for a teacher that shares the learner's weights; `diagnose`, with
    diagnostics.every; `head`, the pass over the vocabulary, during which the activations are kept;
    `backward`; `reduce`, when gradients are summed over ranks; `step`, when Adam updates the
    weights; `sync`, when weights are sent. A learner that takes turns also has `probe`: a forward
    pass over sampled sequences, while the engines still hold their memory.
    """
    settings = sizes.settings
    zero = zero_of(sizes)
    body = pass_bytes(settings.model, "model.path", learner_pass(sizes))
    rows = sizes.of_micro_batch.rows
    heads = sum(
        sizes.student.vocabulary * t.shape.hidden * t.width
        for t in sizes.teachers
        if t.evidence.needs_head and not t.shares_base
    )
    if sizes.shared and settings.learner.zero_stage == 3:  # else the student's own head is whole
        heads += sizes.student.head * sizes.width
    gathered = zero.gathered + zero.always
    packed = sizes.sent * sizes.width if sizes.on_cpu else 0
    saved = checkpoint_copy(sizes) if sizes.on_cpu else 0
    earlier = zero.gradients if sizes.micro_batches > 1 or settings.learner.zero_stage == 3 else 0
    phases: dict[str, dict[str, int]] = {}
    kept = zero.gradients if settings.learner.zero_stage == 3 else 0
    # Stages 2 and 3 sum each bucket of gradients as it fills, beside the activations.
    early = settings.learner.zero_stage != 1
    if sizes.shared:
        phases["score"] = {"gradients": kept, **base_bytes(sizes, gathered)}
    if settings.diagnostics.every:
        looked = {"gradients": kept, **diagnosis_bytes(sizes, body, rows)}
        phases["diagnose"] = looked | {"buffers": gathered}
    phases |= {
        "head": {
            "gradients": earlier,
            "activations": body.kept,
            "head pass": head_bytes(sizes, rows),
            "buffers": gathered,
        },
        "backward": {
            "gradients": zero.gradients if early else earlier,
            "activations": body.peak,
            "head pass": (sizes.trained_head + rows * sizes.student.hidden) * sizes.width,
            "buffers": gathered + (zero.reducing if early else 0),
        },
        "reduce": {"gradients": zero.gradients, "buffers": zero.reducing + zero.always},
        "step": {"buffers": zero.stepping + zero.always},
        "sync": {"buffers": gathered + transfer_buffers(sizes)},
    }
    if sizes.takes_turns:
        phases["sync"] = {"buffers": zero.gathered + transfer_buffers(sizes)}
        phases["probe"] = probe_bytes(sizes) | {"buffers": zero.gathered}
    for phase, parts in phases.items():
        released = sizes.takes_turns and phase in ("sync", "probe")
        always = {
            "weights": zero.weights,
            "optimizer": 0 if released else zero.optimizer,
            "teachers' heads": heads,
            "weights to send": packed,
            "checkpoint": saved,  # a copy, which is written while the next step runs
            "offloaded": zero.host if sizes.on_cpu else 0,  # it stays in the memory of the node
        }
        for part, nbytes in (always | parts).items():
            yield Part("learner", phase, part, nbytes)


def diagnosis_bytes(sizes: Sizes, body: PassBytes, rows: int) -> dict[str, int]:
    """The parts of the diagnostics (diagnostics.every) when they need most memory. That is while
    student and teacher are compared or, with ZeRO 1 and 2, in a forward or a backward pass, beside
    the sums of both terms' gradients in float32.

    Example: Qwen2.5-7B in bfloat16: 4 P + 4 P + 2 P = 70.9 GiB of gradients on every rank.

    Args:
        body: the pass of one micro-batch.
        rows: the response tokens of the micro-batch.
    """
    student = sizes.student
    chunk = min(sizes.settings.train.head_chunk, rows)
    whole = any(t.evidence.needs_head or t.evidence.covers_vocabulary for t in sizes.scoring)
    compared = COMPARED_MATRICES * chunk * student.vocabulary * WIDE if whole else 0
    compared += sum(rows * t.row_bytes(student.vocabulary) for t in sizes.scoring)
    moments = [{"activations": body.forward, "head pass": compared}]
    if sizes.settings.learner.zero_stage != 3:
        sums = 2 * WIDE * sizes.trained
        new = sizes.width * sizes.trained
        states = rows * student.hidden * sizes.width
        moments += [
            {"gradients": sums, "activations": body.kept, "head pass": head_bytes(sizes, rows)},
            {"gradients": sums + new, "activations": body.peak, "head pass": states},
        ]
    return max(moments, key=lambda parts: sum(parts.values()))


def checkpoint_copy(sizes: Sizes) -> int:
    """Bytes of the copy of a rank's state, master weights and both moments, in host memory. It is
    written to disk while the next step runs.
    """
    settings = sizes.settings
    if not settings.checkpoint.background:
        return 0
    return 3 * WIDE * sizes.trained // settings.learner.ranks


def base_bytes(sizes: Sizes, gathered: int) -> dict[str, int]:
    """The parts of the forward pass in which a learner rank scores for teachers, without adapters.

    Args:
        gathered: bytes of the weights that are whole during the pass.
    """
    settings = sizes.settings
    load = sizes.load(settings.scorer.max_tokens_per_micro_batch, sizes.of_rank)
    work = Pass(
        load.sequences,
        load.length,
        learns=False,
        plain_attention=learner_pass(sizes).plain_attention,
    )
    return {
        "activations": pass_bytes(settings.model, "model.path", work).forward,
        "head pass": max(reading_bytes(sizes, t, load.rows) for t in sizes.shared),
        "buffers": gathered + load.rows * sizes.student.hidden * sizes.width,
    }


def probe_bytes(sizes: Sizes) -> dict[str, int]:
    """The parts of the forward pass over one micro-batch of the probe's sequences. They matter only
    with turns: otherwise the phases of an update hold more.
    """
    settings = sizes.settings
    load = sizes.load(settings.train.max_tokens_per_micro_batch, PROMPTS)
    work = Pass(load.sequences, load.length, learns=False)
    body = pass_bytes(settings.model, "model.path", work)
    logits = 2 * PROMPTS * TOKENS * sizes.student.vocabulary * WIDE
    return {"activations": body.forward, "head pass": logits}


def transfer_buffers(sizes: Sizes) -> int:
    """Bytes of vLLM's buffers on the learner's rank 0, through which weights go to other GPUs.

    ipc has one buffer, which can hold the largest tensor. nccl has two; a buffer is full with the
    first tensor that goes beyond TRANSFER_BUFFER, so it may hold that much and one tensor more.
    """
    transfer = sizes.settings.weight_transfer(on_cpu=sizes.on_cpu)
    if sizes.on_cpu or transfer is WeightTransfer.object_store:
        return 0
    largest = sizes.student.largest * sizes.width
    if sizes.settings.cluster.colocate:
        return max(TRANSFER_BUFFER, largest)
    return 2 * min(TRANSFER_BUFFER + largest, sizes.student.parameters * sizes.width)


def head_bytes(sizes: Sizes, rows: int) -> int:
    """The head pass of kernels/head.py over `rows` response tokens, its result included.

    Per chunk of c tokens: the logit gradients [c, V], the logits of the student and of each hidden
    teacher; then the gradient of the output embedding, summed in float32 if there are several
    chunks, and its copy in the dtype of the model. With adapters there is no such gradient.
    """
    train = sizes.settings.train
    student = sizes.student
    width = sizes.width
    wide = sizes.on_cpu and train.products is Products.float32
    operand = WIDE if wide else width
    chunk = min(train.head_chunk, rows)
    at_once = min(PIECE, chunk) if sizes.on_cpu else chunk
    on_gpu_or_exact = not sizes.on_cpu or (train.exact_logits and width < WIDE)
    logits = WIDE if on_gpu_or_exact else operand
    total = chunk * student.vocabulary * operand
    if on_gpu_or_exact:
        total += at_once * student.vocabulary * logits
    hidden = [t for t in sizes.teachers if isinstance(t.evidence, Hidden)]
    total += sum(at_once * student.vocabulary * max(logits, t.width) for t in hidden)
    compared = [t for t in sizes.scoring if t.evidence.name]  # others are not part of the pass
    in_plain_torch = len(hidden) < len(compared) if not sizes.on_cpu else not has_compiler()
    if in_plain_torch:
        total += ROW_MATRICES * at_once * student.vocabulary * WIDE
    summed = WIDE if rows > chunk else operand
    total += sizes.trained_head * (summed + (width if summed != width else 0))
    total += rows * student.hidden * (width + operand)
    total += sum(rows * t.row_bytes(student.vocabulary) for t in sizes.scoring)
    if wide and width < WIDE:
        total += (student.head + rows * student.hidden) * WIDE
        total += sum((student.vocabulary + rows) * t.shape.hidden * WIDE for t in hidden)
    return total


# -- scorers and engines ---------------------------------------------------------------------------


def scorer_parts(sizes: Sizes, teacher: ScoredTeacher) -> Iterator[Part]:
    """The memory of one replica of a teacher, or of one rank of a replica with several devices."""
    settings = sizes.settings
    devices = settings.teachers[teacher.name].devices
    load = sizes.of_scoring(devices)
    narrow = teacher.model.dtype == "bfloat16"
    plain = (
        sizes.on_cpu
        and narrow
        and sizes.tokens <= PLAIN_ATTENTION_TOKENS
        and teacher.shape.hidden >= COMPILE_FROM
        and has_compiler()
        and teacher.model.attention is Attention.auto
    )
    share = -(-load.sequences // devices)
    work = Pass(share, load.length, learns=False, plain_attention=plain and devices == 1)
    body = pass_bytes(teacher.model, settings.model_setting(teacher.name), work)
    worker = f"scorer-{teacher.name}"
    yield Part(worker, "score", "weights", -(-teacher.shape.parameters // devices) * teacher.width)
    yield Part(worker, "score", "activations", body.forward)
    yield Part(worker, "score", "head pass", reading_bytes(sizes, teacher, load.rows))
    buffers = load.rows * teacher.shape.hidden * teacher.width
    if devices > 1:
        states = load.sequences * load.length * teacher.shape.hidden * teacher.width
        buffers += states + gathered_numbers(teacher.shape) * teacher.width
    yield Part(worker, "score", "buffers", buffers)


def reading_bytes(sizes: Sizes, teacher: ScoredTeacher, rows: int) -> int:
    """Bytes for computing the evidence about `rows` response tokens from hidden states: the logits
    of a chunk and their log-probs, and the log-probs of the vocabulary that are sent.
    """
    chunk = min(sizes.settings.train.head_chunk, rows)
    vocabulary = sizes.student.vocabulary
    logits = 2 * chunk * vocabulary * WIDE if teacher.reads_logits else 0
    sent = rows * vocabulary * WIDE if isinstance(teacher.evidence, Vocabulary) else 0
    return logits + sent


def gathered_numbers(shape: ModelShape) -> int:
    """Numbers of whole weights that a rank of a teacher on several devices holds besides its share.

    The output embedding stays whole. The larger of two things comes to it: the layer in use and two
    copies of the next one, as received and in its place; or two copies of the input embedding,
    which is gathered before the layers. Of tied embeddings, FSDP2 gathers the matrix for each.
    """
    layer = shape.multiplied // shape.layers
    always = shape.head * (2 if shape.tied else 1)
    return always + max(3 * layer, 0 if shape.tied else 2 * shape.head)


def engine_parts(
    sizes: Sizes, worker: str, model: ModelConfig, setting: str, device_bytes: int
) -> Iterator[Part]:
    """The memory of one engine, on each of its devices.

    Phases: `sample` and, for an engine that takes turns, `sync`, in which it has only its weights
    and the room for adapters.

    Args:
        worker: the name of its team.
        model: the model that it samples from.
        setting: the setting that names the model.
        device_bytes: the bytes of one device.
    """
    rollout = sizes.settings.rollout
    shape = model_shape(model, setting)
    width = DTYPE_BYTES[model.dtype]
    devices = rollout.tensor_parallel
    repeated = shape.head if shape.tied and sizes.on_cpu else 0  # vLLM's CPU engine packs a copy
    prompts = sizes.of_decoding * max(sizes.tokens - rollout.response_limit, 1)
    most = prefill_tokens(rollout, on_cpu=sizes.on_cpu)
    prefill = Pass(max(min(most, prompts) // sizes.tokens, 1), sizes.tokens, learns=False)
    parts = {
        "weights": (shape.parameters + repeated) * width // devices,
        "activations": pass_bytes(model, setting, prefill).forward // devices,
        "head pass": sizes.of_decoding * shape.vocabulary * (width + SAMPLED * WIDE) // devices,
    }
    if worker == "rollout" and sizes.settings.lora.travels_alone:
        parts["adapters"] = adapter_room(sizes)
    room = int(rollout.gpu_memory_utilization * device_bytes) - sum(parts.values())
    parts["KV cache"] = kv_cache(rollout.kv_cache_bytes, room, on_cpu=sizes.on_cpu)
    for part, nbytes in parts.items():
        yield Part(worker, "sample", part, nbytes)
    if sizes.takes_turns:
        for part in ("weights", "adapters"):
            yield Part(worker, "sync", part, parts.get(part, 0))


def adapter_room(sizes: Sizes) -> int:
    """Bytes that an engine reserves for one adapter, on each of its devices. vLLM divides only some
    of the adapter's matrices among several devices; here all of them count whole.
    """
    lora = sizes.settings.lora
    assert lora.rank is not None, "there are adapters"
    return sizes.trained * lora.engine_rank // lora.rank * sizes.width


def scoring_engine_parts(sizes: Sizes, teacher: ScoredTeacher, device_bytes: int) -> Iterator[Part]:
    """The memory of an engine that scores, on each of its devices."""
    config = sizes.settings.teachers[teacher.name]
    setting = sizes.settings.model_setting(teacher.name)
    arguments = DEFAULTS | (config.engine or {})
    shape = teacher.shape
    at_once = arguments["max_num_batched_tokens"]
    longest = min(at_once, sizes.tokens)
    work = Pass(max(at_once // longest, 1), longest, learns=False)
    repeated = shape.head * teacher.width if shape.tied and sizes.on_cpu else 0
    weights = engine_weights(teacher.model, setting, arguments) + repeated
    worker = f"scorer-{teacher.name}"
    parts = {
        "weights": weights // config.gpus,
        "activations": pass_bytes(teacher.model, setting, work).forward // config.gpus,
    }
    parts["KV cache"] = kv_cache(
        arguments.get("kv_cache_memory_bytes"),
        int(arguments["gpu_memory_utilization"] * device_bytes) - sum(parts.values()),
        on_cpu=sizes.on_cpu,
    )
    # The logits of one sequence at a time, and their log-probs, whole on every device.
    parts["head pass"] = longest * shape.vocabulary * (teacher.width + WIDE)
    for part, nbytes in parts.items():
        yield Part(worker, "score", part, nbytes)


def reward_parts(sizes: Sizes) -> Iterator[Part]:
    """The memory of one reward worker and its child processes, each of which has every reward
    model, on the CPU or on the worker's GPU; other reward functions hold no model.
    """
    settings = sizes.settings
    weights = 0
    activations = 0
    for name, path in settings.reward.models.items():
        setting = f"reward.functions.{name}.options.path"
        dtype = settings.reward.functions[name].options.get("dtype", "float32")
        model = ModelConfig(path=path, dtype=dtype)
        load = sizes.load(MAX_TOKENS, sizes.of_chunk)
        work = Pass(load.sequences, load.length, learns=False)
        shape = model_shape(model, setting)
        of_body = shape.parameters - (0 if shape.tied else shape.head)
        weights += of_body * DTYPE_BYTES[dtype]
        activations = max(activations, pass_bytes(model, setting, work).forward)
    yield Part("reward", "reward", "weights", weights * settings.reward.processes)
    yield Part("reward", "reward", "activations", activations * settings.reward.processes)


def kv_cache(chosen: int | None, room: int, *, on_cpu: bool) -> int:
    """Bytes of an engine's KV cache on each of its devices.

    Args:
        chosen: the bytes that the settings name; None: they name none.
        room: the bytes of a GPU that the engine may use besides weights and activations.
    """
    if chosen:
        return chosen
    return CPU_KV_CACHE_BYTES if on_cpu else max(room, 0)


TURNS = (
    ("sample", "probe", "score"),
    ("sync", "score"),
    ("diagnose", "head", "backward", "reduce", "step", "score"),
)
"""The phases of all workers in each turn. A scorer keeps its memory in all turns."""


def worker_peak(parts: Sequence[Part], turn: Collection[str] | None = None) -> int:
    """The highest sum of one worker's parts over its phases.

    Args:
        turn: the phases of one of TURNS; None: all.
    """
    phases = {part.phase for part in parts if turn is None or part.phase in turn}
    return max((sum(p.nbytes for p in parts if p.phase == phase) for phase in phases), default=0)
