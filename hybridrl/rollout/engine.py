"""One vLLM engine: samples responses, and answers pings, aborts and weight updates while it
does.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from hybridrl.core import failpoints
from hybridrl.core.errors import DataError, WeightSyncError
from hybridrl.models.loading import is_wrongly_tied, resolve
from hybridrl.rollout.header import chunk_header
from hybridrl.settings.choices import Source
from hybridrl.settings.run import ModelConfig, RunSettings
from hybridrl.types import (
    ChunkHeader,
    FinishReason,
    GenerateOrder,
    Prompt,
    RolloutBatch,
    Trajectory,
    WeightManifest,
)

logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")
FINISH = {"stop": FinishReason.stop, "length": FinishReason.length}
CPU_KV_CACHE_BYTES = 2**28
CORE_WATCH_S = 1.0


class Finished(NamedTuple):
    """How a request ended."""

    output: Any  # the engine's completion; None: it was told to stop
    at: float  # time.monotonic()


class Waves:
    """Holds the chunks of a wave until all are here. The last to arrive submits every one, in chunk
    order and without yielding, so that what the engine sees does not depend on arrival times.

    Args:
        submit: from a chunk to the futures of its outputs.
    """

    def __init__(
        self, submit: Callable[[GenerateOrder, Sequence[Prompt]], list[asyncio.Future]]
    ) -> None:
        self._submit = submit
        self._waiting: dict[
            str, dict[int, tuple[GenerateOrder, Sequence[Prompt], asyncio.Future]]
        ] = {}  # wave -> chunk -> ...

    async def arrive(self, order: GenerateOrder, prompts: Sequence[Prompt]) -> list[asyncio.Future]:
        """What `submit` made of this chunk, or its DataError."""
        gate: asyncio.Future = asyncio.get_running_loop().create_future()
        arrived = self._waiting.setdefault(order.wave, {})
        arrived[order.chunk] = (order, prompts, gate)
        if len(arrived) == order.num_chunks:
            del self._waiting[order.wave]
            for _, (chunk, its_prompts, its_gate) in sorted(arrived.items()):
                try:
                    its_gate.set_result(self._submit(chunk, its_prompts))
                except DataError as error:
                    its_gate.set_exception(error)
        return await gate


class Rollout:
    """All methods are coroutines of one event loop. The engine steps inline in `_decode`, which
    yields to the loop between steps: consumes queued requests, produces finished trajectories,
    waits for nothing, runs while there are unfinished requests.

    Args:
        source: whom the model stands for.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        model: ModelConfig,
        device: str,
        backend: str,
        source: Source = Source.student,
    ) -> None:
        rollout = settings.rollout
        self.source = source
        # one device: the engine in this process, for IPC handles do not pass vLLM's message queue,
        # and an engine in a process of its own steps as soon as the first request is there, so that
        # the batch depends on arrival times
        self.own_process = rollout.tensor_parallel > 1
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(self.own_process)),
        }
        from vllm import EngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.llm_engine import LLMEngine

        # vLLM's CPU runner cannot rewind a seeded generator after a partial prefill, so prompts are
        # prefilled whole there
        whole_prompts = (
            {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, rollout.max_model_len),
            }
            if device == "cpu"
            else {}
        )
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(resolve(model.path, model.revision)),
                trust_remote_code=False,
                load_format="safetensors",
                # vLLM ties by the config alone; the learner, by the weights
                hf_overrides={"tie_word_embeddings": False}
                if is_wrongly_tied(model.path, model.revision)
                else {},
                dtype=model.dtype,
                max_model_len=rollout.max_model_len,
                max_num_seqs=rollout.max_num_seqs,
                tensor_parallel_size=rollout.tensor_parallel,
                distributed_executor_backend="mp" if self.own_process else "uni",
                enforce_eager=rollout.enforce_eager,
                kv_cache_memory_bytes=rollout.kv_cache_bytes
                or (CPU_KV_CACHE_BYTES if device == "cpu" else None),
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                # with the temperature in it: the sampler's own distribution
                logprobs_mode="processed_logprobs",
                max_logprobs=max(settings.algorithm.topk.k, 20),
                seed=settings.run.seed,
                weight_transfer_config=WeightTransferConfig(backend=backend),
                worker_extension_cls="hybridrl.weights.vllm_transfer.WorkerExtension",
                disable_log_stats=True,
                scheduling_policy="priority",
                **whole_prompts,
            ),
            enable_multiprocessing=self.own_process,
        )
        if self.own_process:
            Thread(target=end_with, args=(self.engine.engine_core,), daemon=True).start()
        self.version = -1  # of the weights that serve; -1: as loaded from disk
        self.engine.set_weight_version(str(self.version))
        self._finished: dict[str, asyncio.Future] = {}  # request id -> its output
        self._arrivals = count()
        self._waves = Waves(self._submit_chunk)
        self._decoding: asyncio.Task | None = None

    async def ping(self) -> dict[str, int]:
        return {"unfinished": self.engine.get_num_unfinished_requests(), "version": self.version}

    # -- sampling ----------------------------------------------------------------------------------

    async def generate(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> tuple[ChunkHeader, RolloutBatch]:
        """Sample K responses of each prompt.

        Raises:
            DataError: the engine refused a prompt.
        """
        started = time.monotonic()
        failpoints.hit("rollout.generate", wave=order.wave)
        futures = await self._waves.arrive(order, prompts)
        finished = await asyncio.gather(*futures)
        outputs = [complete(done.output) for done in finished]
        asked = [prompt for prompt in prompts for _ in range(order.group_size)]
        trajectories = [
            trajectory(prompt, output) for prompt, output in zip(asked, outputs, strict=True)
        ]
        support_ids = np.concatenate([top_tokens(output, order.support) for output in outputs])
        batch = RolloutBatch.pack(prompts, order.group_size, trajectories, self.source, support_ids)
        return chunk_header(batch, [done.at - started for done in finished]), batch

    async def abort(self, groups: Sequence[str] | None = None) -> int:
        """Stop what is being sampled; the waiting calls get empty responses, marked aborted.

        Args:
            groups: "wave/uid" of each prompt group to stop; None: all.

        Returns:
            how many responses were given up.
        """
        chosen = None if groups is None else set(groups)
        waiting = [
            request
            for request in self._finished
            if chosen is None or request.rpartition("/")[0] in chosen
        ]
        self.engine.abort_request(waiting)
        for request_id in waiting:
            self._finish(request_id, None)
        return len(waiting)

    def _finish(self, request_id: str, output: Any) -> None:
        future = self._finished.pop(request_id, None)
        if future is not None and not future.done():
            future.set_result(Finished(output, time.monotonic()))

    def _submit_chunk(
        self, order: GenerateOrder, prompts: Sequence[Prompt]
    ) -> list[asyncio.Future]:
        futures = [
            self._submit(f"{order.wave}/{p.uid}/{k}", p, k, order)
            for p in prompts
            for k in range(order.group_size)
        ]
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(
                self._decode()
            )  # starts when the wave's other chunks are submitted too
        return futures

    def _submit(
        self, request_id: str, prompt: Prompt, index: int, order: GenerateOrder
    ) -> asyncio.Future:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=order.temperature,
            max_tokens=order.max_new_tokens,
            seed=None if order.temperature == 0 else sample_seed(order.seed, prompt.uid, index),
            logprobs=order.support,  # so many besides the drawn token's own
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        # the salt keeps a prefix computed by older weights from being reused, and one that an
        # evaluation happened to compute
        tokens = TokensPrompt(
            prompt_token_ids=list(prompt.input_ids), cache_salt=f"v{self.version}/{order.wave}"
        )
        future = self._finished[request_id] = asyncio.get_running_loop().create_future()
        try:
            # of one priority the earlier goes first, by a count: a clock may be set back
            self.engine.add_request(
                request_id,
                tokens,
                params,
                arrival_time=float(next(self._arrivals)),
                priority=order.priority,
            )
        except ValueError as error:
            self._finished.pop(request_id)
            raise DataError(f"prompt {prompt.uid}: {error}") from error
        return future

    async def _decode(self) -> None:
        try:
            while self.engine.has_unfinished_requests():
                for output in self.engine.step():
                    self._finish(output.request_id, output.outputs[0])
                await asyncio.sleep(0)
        except Exception as error:  # every waiting call must hear of it
            for future in self._finished.values():
                if not future.done():
                    future.set_exception(error)
            self._finished.clear()
            raise

    # -- weights, backend object_store -------------------------------------------------------------

    async def load_weights(self, manifest: WeightManifest, packed: np.ndarray) -> str:
        """Load packed weights [nbytes] uint8 between two engine steps.

        Returns:
            the digest of the bytes that the engine's workers received.

        Raises:
            WeightSyncError: the workers did not all load what the manifest says.
        """
        failpoints.hit("rollout.load_weights", version=manifest.version)
        try:
            self.engine.collective_rpc("start_weight_update")
            with self._within_reach(packed) as place:
                self.engine.collective_rpc(
                    "update_weights", args=({"manifest": asdict(manifest), **place},)
                )
            self.engine.collective_rpc("finish_weight_update")
        except Exception as error:
            raise WeightSyncError(
                f"weights of version {manifest.version} were not loaded: {error}"
            ) from error
        digests = set(self.engine.collective_rpc("received_digest"))
        if digests != {manifest.digest}:
            raise WeightSyncError(
                f"weights of version {manifest.version}: workers acknowledge {digests}, sent "
                f"{manifest.digest}"
            )
        await self.update_weight_version(str(manifest.version))
        return manifest.digest

    @contextmanager
    def _within_reach(self, packed: np.ndarray) -> Iterator[dict[str, Any]]:
        """The buffer itself for an engine in this process; for one in others a file in shared
        memory.
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

    async def start_weight_update(self) -> None:
        self.engine.collective_rpc("start_weight_update")

    async def update_weights(self, update_info: dict | list[dict]) -> None:
        self.engine.collective_rpc("update_weights", args=(update_info,))

    async def finish_weight_update(self) -> None:
        self.engine.collective_rpc("finish_weight_update")

    async def update_weight_version(self, version: str) -> None:
        """Stamp every token sampled from here on; drop cached prefixes of older weights."""
        self.engine.reset_prefix_cache()
        self.engine.set_weight_version(version)
        self.version = int(version)


def end_with(core: Any) -> None:
    """End this process once its engine core's has ended. vLLM's client notices too, but a call that
    the core was to answer waits on for ever, and no other is served meanwhile.
    """
    while not core.resources.engine_dead:
        time.sleep(CORE_WATCH_S)
    logger.error("the engine core's process has ended, and so does this one")
    os._exit(1)


def sample_seed(seed: int, uid: str, index: int) -> int:
    """63 bits from (seed of run and wave, prompt, sample index): the same whatever engine or batch
    it falls into.
    """
    return (
        int.from_bytes(hashlib.sha256(f"{seed}/{uid}/{index}".encode()).digest()[:8], "little") >> 1
    )


def complete(output: Any) -> Any:
    """The engine's output, or None where the response did not end by itself or at its limit."""
    return output if output is not None and output.finish_reason in FINISH else None


def trajectory(prompt: Prompt, output: Any) -> Trajectory:
    """Columns of one finished response; `output` None: aborted, no response tokens, so nothing to
    train on.
    """
    sampled = list(output.token_ids) if output is not None else []
    logprobs = (
        np.asarray(output.logprobs.logprobs, np.float32).reshape(len(sampled), -1)[:, 0]
        if sampled
        else []
    )
    versions = np.full(len(sampled), -1, np.int32)
    for span in (output.weight_versions or []) if output is not None else []:
        versions[span.start : span.end] = int(span.version)
    zeros = np.zeros(len(prompt.input_ids), np.float32)
    return Trajectory(
        uid=prompt.uid,
        input_ids=np.asarray([*prompt.input_ids, *sampled], np.int32),
        response_mask=np.concatenate([zeros.astype(bool), np.ones(len(sampled), bool)]),
        rollout_logprobs=np.concatenate([zeros, np.asarray(logprobs, np.float32)]),
        policy_versions=np.concatenate([zeros.astype(np.int32), versions]),
        finish_reason=FINISH[output.finish_reason] if output is not None else FinishReason.aborted,
    )


def top_tokens(output: Any, support: int) -> np.ndarray:
    """[T_response, K] int32, the K most likely tokens at each response token, most likely first.

    vLLM reports 1 + K entries a token: the drawn token, then the K most likely ones, the drawn
    token once more if it is among them. So the first entry is left out and the support depends on
    the prefix alone.
    """
    entries = output.logprobs.token_ids if output is not None else []
    return np.asarray(entries, np.int32).reshape(-1, 1 + support)[:, 1:]
