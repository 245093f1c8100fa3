"""vLLM's own engine core with asynchronous scheduling and a simulated executor, to test updates of
weights while forward passes are pending.

A forward pass reads the weights from its launch until its tokens are collected, and each token is
the version of the weights that the pass has read.
"""

from collections import deque
from concurrent.futures import Future
from queue import Queue
from types import SimpleNamespace
from typing import Any

from vllm import LLMEngine, SamplingParams, TokensPrompt
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, WeightVersionSpan
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.executor.abstract import Executor

MIXED = 99
"""The token of a forward pass during which the weights have changed."""


class Forward(Future):
    """A forward pass, which is pending until its result is read."""

    def __init__(self, executor: "SlowExecutor") -> None:
        super().__init__()
        self.executor = executor
        self.weights = executor.weights

    def result(self, timeout: float | None = None) -> int:
        self.executor.events.append("collect")
        return self.weights if self.weights == self.executor.weights else MIXED


class SlowExecutor:
    sleep = Executor.sleep
    wake_up = Executor.wake_up
    is_sleeping = Executor.is_sleeping

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.weights = 0
        self.sleeping_tags: set[str] = set()

    def execute_model(self, batch: Any, non_block: bool) -> Forward:
        self.events.append("launch")
        return Forward(self)

    def sample_tokens(self, grammar: None, non_block: bool) -> Forward:
        return Forward(self)

    def collective_rpc(
        self, method: str, timeout: Any = None, args: tuple = (), kwargs: Any = None
    ) -> list[Any]:
        tags = (kwargs or {}).get("tags")
        self.events.append(method if tags is None else f"{method} {' '.join(tags)}")
        if method in ("update_weights", "load_adapter"):
            self.weights = args[0]["manifest"]["version"]
        return [f"digest {self.weights}"]


class Scheduler:
    """A scheduler for one request at a time."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.pause_state = PauseState.UNPAUSED
        self.to_schedule = 0

    def set_pause_state(self, state: PauseState) -> None:
        self.events.append("resume" if state is PauseState.UNPAUSED else "pause")
        self.pause_state = state

    def has_requests(self) -> bool:
        return self.pause_state is PauseState.UNPAUSED and self.to_schedule > 0

    def schedule(self, throttle: bool) -> SimpleNamespace:
        self.to_schedule -= 1
        return SimpleNamespace(total_num_scheduled_tokens=1, pending_structured_output_tokens=False)

    def get_grammar_bitmask(self, batch: SimpleNamespace) -> None:
        return None

    def update_from_output(self, batch: Any, token: int) -> dict[int, EngineCoreOutputs]:
        return {0: EngineCoreOutputs(outputs=[token])}

    def reset_prefix_cache(self, running: bool, connector: bool) -> bool:
        return True


class PipelinedEngine(LLMEngine):
    """The engine. `events` lists the calls of the executor and the scheduler, and "version V"."""

    def __init__(self) -> None:
        self.events: list[str] = []
        core = EngineCore.__new__(EngineCore)
        details = SimpleNamespace(enable_logging_iteration_details=False)
        core.vllm_config = SimpleNamespace(observability_config=details)
        core.scheduler = Scheduler(self.events)
        core.model_executor = SlowExecutor(self.events)
        core.batch_queue_size = 2
        core.batch_queue = deque(maxlen=2)
        core.step_fn = core.step_with_batch_queue
        core.async_scheduling = True
        core.aborts_queue = Queue()
        core.log_stats = core.is_mm_encoder_only = core.is_pooling_model = False
        core.check_for_draft_tokens = False
        core._weight_version = "0"
        core._reset_caches = lambda: self.events.append("reset_caches")
        self.engine_core = InprocClient.__new__(InprocClient)
        self.engine_core.engine_core = core
        self.renderer = SimpleNamespace(clear_mm_cache=lambda: None)
        self.logger_manager = None
        self.wanted = 0
        self.tokens: list[int] = []
        self.versions: list[str] = []

    def set_weight_version(self, weight_version: str) -> None:
        self.events.append(f"version {weight_version}")
        super().set_weight_version(weight_version)

    def add_request(
        self,
        request_id: str,
        prompt: TokensPrompt,
        params: SamplingParams,
        arrival_time: float,
        lora_request: LoRARequest | None,
        priority: int,
    ) -> None:
        self.request = request_id
        self.tokens = []
        self.versions = []
        self.wanted = params.max_tokens
        self.engine_core.engine_core.scheduler.to_schedule = self.wanted

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        self.wanted = 0

    def get_num_unfinished_requests(self) -> int:
        return int(self.has_unfinished_requests())

    def has_unfinished_requests(self) -> bool:
        return len(self.tokens) < self.wanted

    def step(self) -> list[SimpleNamespace]:
        collected = self.engine_core.get_output()
        self.tokens += collected.outputs
        self.versions += [collected.weight_version] * len(collected.outputs)
        if self.has_unfinished_requests():
            return []
        output = CompletionOutput(
            index=0,
            text="",
            token_ids=self.tokens,
            cumulative_logprob=None,
            logprobs=FlatLogprobs(token_ids=self.tokens, logprobs=[-1.0] * self.wanted),
            finish_reason="length",
            weight_versions=[
                WeightVersionSpan(version, at, at + 1) for at, version in enumerate(self.versions)
            ],
        )
        return [SimpleNamespace(request_id=self.request, outputs=[output])]
