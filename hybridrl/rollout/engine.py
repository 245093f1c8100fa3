"""The worker around one vLLM engine. It answers pings, aborts and weight updates while it samples
responses.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridrl.core import failpoints
from hybridrl.core.errors import WeightSyncError
from hybridrl.core.importing import collection_paused
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.models.adapters import target_names
from hybridrl.models.end_token import end_token_id
from hybridrl.models.loading import is_wrongly_tied, load_layout, load_tokenizer, resolve
from hybridrl.rollout.engine_arguments import typed
from hybridrl.rollout.rollouter import Rollouter, SingleTurn
from hybridrl.rollout.sampler import Sampler
from hybridrl.rollout.teacher_turn import TeacherTurn
from hybridrl.rollout.vllm_internals import (
    EngineMeter,
    adapter_request,
    core_has_ended,
    environment,
)
from hybridrl.settings.choices import Source
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig
from hybridrl.settings.rollout import RolloutConfig
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.context import Context
from hybridrl.types import (
    ChunkHeader,
    GenerateOrder,
    Prompt,
    RolloutBatch,
    WeightManifest,
    Work,
)

if TYPE_CHECKING:
    from vllm import EngineArgs, LLMEngine

logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")
CPU_KV_CACHE_BYTES = 2**28  # on CPUs, unless rollout.kv_cache_bytes is set
CPU_PREFILL_TOKENS = 8192  # most tokens of one engine step on CPUs, unless a sequence is longer
GPU_PREFILL_TOKENS = 16384  # the same on GPUs; the default of vLLM's class LLM on an H100
CORE_WATCH_S = 1.0  # between two checks whether the engine core has ended


class Rollout:
    """A worker with one vLLM engine.

    All methods are coroutines of one event loop, on which the sampler steps the engine.

    Args:
        model: the weights that the engine loads from disk.
        device: "cpu" or "cuda".
        backend: as in engine_args.
        source: who writes the responses, which the batches record.
        rollouter: makes a response of the engine's completions; None: a response is one completion.
        teacher: name of the teacher if the model is one, which reads its own prompts and has its
            own end token; None: the model is the student.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        model: ModelConfig,
        device: str,
        backend: str,
        source: Source = Source.student,
        rollouter: Rollouter | None = None,
        teacher: str | None = None,
    ) -> None:
        # With one device the engine runs in this process, because IPC handles do not pass through
        # vLLM's message queue, and because an engine in a process of its own steps as soon as the
        # first request arrives, so that the batches would depend on arrival times.
        self.own_process = settings.rollout.tensor_parallel > 1
        alone = teacher is None and settings.lora.travels_alone
        lora = settings.lora if alone else None
        self.engine, self.meter = start_engine(
            partial(engine_args, settings, model, device, backend, lora),
            own_process=self.own_process,
        )
        if lora is not None:
            self.engine.collective_rpc("add_empty_adapter")
        if rollouter is None:
            own = None if teacher is None else TeacherTurn(Context.of(settings, teacher))
            rollouter = own or SingleTurn()
        adapter = None if lora is None else adapter_request()
        self.sampler = Sampler(self.engine, rollouter, source, stop_token_ids(model), adapter)
        self.engine.set_weight_version(str(self.sampler.version))
        # The memory of an engine core in another process is not measured.
        self.peaks = None if self.own_process else PeakMemory.of_device(device)
        self.last_sync: dict[str, int] = {}  # peak memory of the last sync: {"sync": bytes}

    async def ping(self) -> dict[str, int]:
        """The number of unfinished requests, the version of the weights, and the number of PARTS
        that are asleep.
        """
        return {
            "unfinished": self.engine.get_num_unfinished_requests(),
            "version": self.sampler.version,
            "asleep": len(self.sampler.asleep),
        }

    async def begin_job(self) -> None:
        """Serve another job as a new engine would, except that the weights stay until others are
        loaded.
        """
        self.sampler.begin_job()
        self._work(tokens=0)
        self.meter.take()
        self.last_sync = {}

    # -- sampling ----------------------------------------------------------------------------------

    async def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        """Sample K responses to each prompt, K = order.group_size.

        Raises:
            DataError: the engine refused a prompt.
        """
        failpoints.hit("rollout.generate", wave=order.wave)
        with self._phase("rollout"):
            header, batch = await self.sampler.generate(order, prompts)
        work = self._work(tokens=int(header.response_lengths.sum()))
        return replace(header, engine=self.meter.take(), work=work), batch

    def _work(self, *, tokens: int) -> Work:
        """The work since the last call. The peak of a sync is in every report until the next sync,
        because the first reports, of the probe and of evaluations, are in no step's metrics.
        """
        peaks = {} if self.peaks is None else self.peaks.take()
        if "sync" in peaks:
            self.last_sync = {"sync": peaks["sync"]}
        return Work(
            tokens=tokens, busy_s=self.sampler.take_busy(), peak_bytes=peaks | self.last_sync
        )

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.peaks is None else self.peaks.phase(name)

    async def abort(self, groups: Sequence[str] | None = None) -> int:
        """Stop responses that are being sampled, as Sampler.abort; returns their number."""
        return self.sampler.abort(groups)

    # -- memory ------------------------------------------------------------------------------------

    async def sleep(self) -> None:
        """Free the GPU's memory until `wake_up`, as Sampler.sleep; pings are still answered."""
        self.sampler.sleep()

    async def wake_up(self, parts: Sequence[str]) -> None:
        """Bring these parts of PARTS back to the GPU, as Sampler.wake_up."""
        self.sampler.wake_up(parts)

    # -- weights, backend object_store -------------------------------------------------------------

    async def load_weights(self, manifest: WeightManifest, packed: np.ndarray) -> str:
        """Load packed weights [nbytes] uint8, or a packed adapter, between two engine steps, and
        serve their version.

        Returns:
            The digest of the bytes that the engine's workers received.

        Raises:
            WeightSyncError: some worker did not load what the manifest says. The engine stays
                paused, since its weights may be neither the old nor the new ones.
        """
        failpoints.hit("rollout.load_weights", version=manifest.version)
        try:
            with self._phase("sync"):
                await self._update(manifest, packed)
        except Exception as error:
            raise WeightSyncError(
                f"weights of version {manifest.version} were not loaded: {error}"
            ) from error
        digests = set(self.engine.collective_rpc("received_digest"))
        if digests != {manifest.digest}:
            raise WeightSyncError(
                f"weights of version {manifest.version}: the workers acknowledge the digests "
                f"{digests}, but {manifest.digest} was sent"
            )
        self.sampler.resume(manifest.version)
        return manifest.digest

    async def _update(self, manifest: WeightManifest, packed: np.ndarray) -> None:
        """Pause the engine, and load the weights into its workers."""
        if self.sampler.adapter is not None:
            self.sampler.pause()
            with self._within_reach(packed) as place:
                self.engine.collective_rpc(
                    "load_adapter", args=({"manifest": asdict(manifest), **place},)
                )
            return
        await self.start_weight_update()
        with self._within_reach(packed) as place:
            await self.update_weights({"manifest": asdict(manifest), **place})
        self.engine.collective_rpc("finish_weight_update")

    @contextmanager
    def _within_reach(self, packed: np.ndarray) -> Iterator[dict[str, Any]]:
        """The arguments by which the engine's workers get the buffer: the buffer itself if they are
        in this process, the path of a file in shared memory if they are in others.
        """
        if not self.own_process:
            yield {"packed": packed}
            return
        with NamedTemporaryFile(
            dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None, prefix="hybridrl-"
        ) as file:
            packed.tofile(file.name)
            yield {"path": file.name}

    # -- weights, vLLM's nccl and ipc backends: the calls that its trainer side makes through Engine

    async def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.engine.collective_rpc("init_weight_transfer_engine", args=(init_info,))

    async def leave_channel(self) -> None:
        """Raises:
        RuntimeError: an update has begun and was not finished.
        """
        self.engine.collective_rpc("shutdown_weight_transfer_engine")

    # An update is several calls, between which the event loop runs other coroutines. So the first
    # pauses the engine, and the last resumes it with the version of the new weights.

    async def start_weight_update(self) -> None:
        self.sampler.pause()
        self.engine.collective_rpc("start_weight_update")

    async def update_weights(self, update_info: dict | list[dict]) -> None:
        with self._phase("sync"):
            self.engine.collective_rpc("update_weights", args=(update_info,))

    async def finish_weight_update(self, version: int) -> None:
        self.engine.collective_rpc("finish_weight_update")
        self.sampler.resume(version)


def start_engine(
    make_args: Callable[[], "EngineArgs"], *, own_process: bool
) -> tuple["LLMEngine", EngineMeter]:
    """Load a vLLM engine.

    Args:
        make_args: makes the engine's arguments; called after the environment is set, which vLLM
            reads when it is imported.
        own_process: whether the engine core runs in a process of its own; this process then ends
            with it.

    Returns:
        The engine and its meter.
    """
    os.environ |= environment(own_process=own_process)
    with collection_paused():
        from vllm import LLMEngine

    engine: LLMEngine = LLMEngine.from_engine_args(make_args(), enable_multiprocessing=own_process)
    if own_process:
        Thread(target=end_with_core, args=(engine,), daemon=True).start()
    return engine, EngineMeter.of(engine)


def engine_args(
    settings: RunSettings,
    model: ModelConfig,
    device: str,
    backend: str,
    lora: LoraConfig | None = None,
) -> "EngineArgs":
    """vLLM's arguments for an engine that samples, including those of rollout.engine.

    Args:
        model: the weights that the engine loads from disk.
        device: "cpu" or "cuda".
        backend: the way in which later weights arrive, a value of `rollout.weight_transfer`.
        lora: settings of adapters that arrive without the base weights; None: all weights arrive.
    """
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig

    rollout = settings.rollout
    assert rollout.max_model_len is not None, "launch.lengths decides it before any engine starts"
    on_cpu = device == "cpu"
    # vLLM ties the embeddings if the config says so; the learner also compares their weights.
    tied = {"tie_word_embeddings": False} if is_wrongly_tied(model.path, model.revision) else {}
    chosen = {
        "enforce_eager": on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        **{name: typed(name, value) for name, value in rollout.engine.items()},
        "max_num_batched_tokens": prefill_tokens(rollout, on_cpu=on_cpu),
        "hf_overrides": {**rollout.engine.get("hf_overrides", {}), **tied},
    }
    return EngineArgs(
        model=str(resolve(model.path, model.revision)),
        trust_remote_code=False,
        load_format="safetensors",
        dtype=model.dtype,
        max_model_len=rollout.max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel,
        distributed_executor_backend="mp" if rollout.tensor_parallel > 1 else "uni",
        kv_cache_memory_bytes=rollout.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        # vLLM refuses it on CPUs, where a sleeping engine keeps its memory anyway.
        enable_sleep_mode=settings.cluster.take_turns and not on_cpu,
        # vLLM's CPU runner cannot rewind a seeded generator after a partial prefill, so each prompt
        # is prefilled in one piece there. None: vLLM's own choice.
        enable_chunked_prefill=False if on_cpu else None,
        # Log-probs of the distribution that is sampled, i.e. with the temperature applied.
        logprobs_mode="processed_logprobs",
        max_logprobs=most_logprobs(settings),
        seed=settings.run.seed,
        weight_transfer_config=WeightTransferConfig(backend=backend),
        worker_extension_cls="hybridrl.weights.vllm_transfer.WorkerExtension",
        scheduling_policy="priority",
        disable_log_stats=False,
        **({} if lora is None else adapter_args(model, lora)),
        **chosen,
    )


def most_logprobs(settings: RunSettings) -> int:
    """The most log-probs per token that a request may ask for; 20 is vLLM's default."""
    return max(settings.algorithm.topk.k, 20)


def adapter_args(model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """vLLM's arguments for an engine with one adapter.

    Without target modules vLLM would also reserve memory for adapters of the embeddings.
    """
    layout = load_layout(model.path, model.revision, setting="model.path")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": lora.engine_rank,
        "lora_target_modules": target_names(layout, lora),
    }


def stop_token_ids(model: ModelConfig) -> list[int]:
    """The tokens at which an engine stops, in addition to those of the model's own settings.

    Raises:
        ConfigError: model.eos is not a special token of the model's tokenizer.
    """
    if model.eos is None:
        return []
    return [end_token_id(model.eos, load_tokenizer(model.path, model.revision), "model.eos")]


def prefill_tokens(rollout: RolloutConfig, *, on_cpu: bool) -> int:
    """The most tokens of one step of the engine.

    On a GPU vLLM would choose 2048, since the engine is not made by its class LLM. On GPUs a longer
    prompt is prefilled in several steps; on CPUs it must fit into one.
    """
    if tokens := rollout.engine.get("max_num_batched_tokens"):
        return tokens
    return max(CPU_PREFILL_TOKENS, rollout.sequence_limit) if on_cpu else GPU_PREFILL_TOKENS


def end_with_core(engine: "LLMEngine") -> None:
    """End this process when the process of its engine core has ended.

    vLLM detects that too, but a call that is under way would wait forever and block all others.
    """
    while not core_has_ended(engine):
        time.sleep(CORE_WATCH_S)
    logger.error("the process of the engine core has ended, so this process ends too")
    os._exit(1)
