"""The details of vLLM that the engine uses beyond its documented interface.

This file was written for the version below. tests/rollout/test_vllm_internals.py fails when another
version is installed, or when one of these details differs from its description here.

- `LLMEngine.engine_core.resources.engine_dead`: set when the process of the engine core has ended.
- Flat log-probs (`SamplingParams.flat_logprobs`): 1 + K entries a token, the drawn token first. For
  a prompt they begin with its second token.
- Log-probs of a prompt are computed from the unmodified logits, whatever the sampling parameters.
- The priority queue of the scheduler orders by (priority, arrival_time), and arrival_time may be
  any number.
- The environment variables below are read while the engine starts.
- `EngineCore.pause_scheduler("keep", False)`: no request is scheduled any more, and all keep their
  state. A core in a process of its own (whose client has `call_utility`) answers when it has
  collected every batch that it launched. A core in this process does not collect them: with
  asynchronous scheduling its `batch_queue` has those that `LLMEngine.step` must still collect.
- `LLMEngine.sleep(1, "keep")` pauses the scheduler and makes each worker move its weights to host
  memory and drop the KV cache; on CPUs a worker does nothing and logs that. `wake_up(tags)` brings
  back the tags that are asleep, does nothing if one of them is awake, and resumes the scheduler
  once all are back.
- `LLMEngine.logger_manager` exists if statistics are on. After each step that has any, its
  `record(scheduler_stats=..., iteration_stats=..., mm_cache_stats=...)` gets a `SchedulerStats`
  (the state after the step, and the prefix cache's counts since the previous one) and an
  `IterationStats`, which is None after a step without output. `log` is called from time to time,
  and `record_sleep_state` when the engine goes to sleep or wakes up.
- A core attaches the weight version to the tokens of a batch when it collects the batch.
- A request names an adapter by `lora_int_id`. A worker reads the folder `lora_path` only if it has
  no adapter of that number; with `load_inplace` it reads the folder in every step.
- Workers have the methods that `collective_rpc` calls by name: `start_weight_update`,
  `update_weights`, `finish_weight_update`, `init_weight_transfer_engine` and `synchronize_device`.
"""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridrl.core import parent
from hybridrl.rollout.rollouter import Completion
from hybridrl.teachers.reported import ReportedScores
from hybridrl.types import EngineStats, FinishReason
from hybridrl.weights.library_internals import ADAPTER_ID

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.lora.request import LoRARequest
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

VERSION = "0.32.0"
FINISH_REASONS = {"stop": FinishReason.stop, "length": FinishReason.length}


def environment(*, own_process: bool) -> dict[str, str]:
    """Variables that must be set before vLLM is imported.

    Args:
        own_process: whether the engine core runs in a process of its own.
    """
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
        **({parent.VARIABLE: "1"} if own_process else {}),
    }


class EngineMeter:
    """Accumulates the statistics that an engine reports after each of its steps.

    It replaces vLLM's own loggers: the one for Prometheus would cost 2 % of the time of a small
    model's steps, and no process reads its registry.
    """

    def __init__(self) -> None:
        self._stats = EngineStats()

    @classmethod
    def of(cls, engine: "LLMEngine") -> "EngineMeter":
        """Install a meter in an engine whose statistics are on."""
        assert engine.logger_manager is not None, "the arguments of an engine turn them on"
        meter = cls()
        engine.logger_manager = meter
        return meter

    def take(self) -> EngineStats:
        """The engine's statistics since the last call."""
        taken = self._stats
        self._stats = EngineStats()
        return taken

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,
    ) -> None:
        """Called by the engine after a step."""
        before = self._stats
        finished = preempted = 0
        if iteration_stats is not None:
            finished = len(iteration_stats.finished_requests)
            preempted = iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            self._stats = replace(before, preemptions=before.preemptions + preempted)
            return
        waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        cache = scheduler_stats.prefix_cache_stats
        self._stats = EngineStats(
            kv_use=max(before.kv_use, scheduler_stats.kv_cache_usage),
            running=max(before.running, scheduler_stats.num_running_reqs + finished),
            waiting=max(before.waiting, waiting),
            preemptions=before.preemptions + preempted,
            prefix_queries=before.prefix_queries + cache.queries,
            prefix_hits=before.prefix_hits + cache.hits,
        )

    def log(self) -> None:
        """Does nothing; the engine calls it from time to time."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """Does nothing; the engine calls it when it goes to sleep or wakes up."""


def refusals() -> tuple[type[Exception], ...]:
    """The types of errors by which an engine refuses a request. vLLM's own type is not a
    ValueError.
    """
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError


def adapter_request() -> "LoRARequest":
    """The object by which a request names the adapter that the learner sent last."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", ADAPTER_ID, "/in-no-folder")


def core_has_ended(engine: "LLMEngine") -> bool:
    """Whether the process of the engine core has ended. The core must run in its own process."""
    return engine.engine_core.resources.engine_dead


def pause_scheduling(engine: "LLMEngine") -> None:
    """Schedule no requests, old or new, until resume_scheduling is called."""
    call_core(engine, "pause_scheduler", "keep", False)


def resume_scheduling(engine: "LLMEngine") -> None:
    """Undo pause_scheduling."""
    call_core(engine, "resume_scheduler")


def call_core(engine: "LLMEngine", method: str, *args: Any) -> Any:
    """Call a method of the engine core, for which LLMEngine has no method of its own."""
    client = engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility(method, *args)
    return getattr(client.engine_core, method)(*args)


def has_launched(engine: "LLMEngine") -> bool:
    """Whether a paused engine has launched a batch whose tokens are not collected yet."""
    client = engine.engine_core
    return not hasattr(client, "call_utility") and bool(client.engine_core.batch_queue)


def read_completion(output: "CompletionOutput", support: int) -> Completion:
    """The completion in the output of a finished request.

    vLLM reports 1 + K entries a token: the drawn token, then the K most likely ones, with the drawn
    token once more if it is among them. The first entry is not part of the support, which therefore
    depends only on the prefix.

    Raises:
        asyncio.CancelledError: the response ended for another reason than an end token or its
            limit.
    """
    if output.finish_reason not in FINISH_REASONS:
        raise asyncio.CancelledError(f"vLLM ended the request: {output.finish_reason}")
    r = len(output.token_ids)
    flat = output.logprobs
    logprobs = np.asarray(flat.logprobs if r else [], np.float32).reshape(r, 1 + support)
    entries = np.asarray(flat.token_ids if r else [], np.int32).reshape(r, 1 + support)
    versions = np.full(r, -1, np.int32)
    for span in output.weight_versions or []:
        versions[span.start : span.end] = int(span.version)
    return Completion(
        token_ids=tuple(output.token_ids),
        logprobs=logprobs[:, 0],
        policy_versions=versions,
        support_ids=entries[:, 1:],
        finish_reason=FINISH_REASONS[output.finish_reason],
    )


def read_prompt(output: "RequestOutput", top: int) -> ReportedScores:
    """The log-probs [T] of a request's prompt, and those of the K most likely tokens at each
    position.

    Args:
        top: K.

    Raises:
        ValueError: vLLM reports the wrong number of log-probs, or one that is not finite or is
            above 0.
    """
    length = len(output.prompt_token_ids or [])
    flat = output.prompt_logprobs
    logprobs = np.zeros((length, 1 + top), np.float32)
    entries = np.tile(np.arange(-1, top, dtype=np.int32), (length, 1))
    logprobs[1:] = np.reshape(flat.logprobs, (length - 1, 1 + top))
    entries[1:] = np.reshape(flat.token_ids, (length - 1, 1 + top))
    return ReportedScores(
        logprobs=logprobs[:, 0], top_ids=entries[:, 1:], top_logprobs=logprobs[:, 1:]
    )
