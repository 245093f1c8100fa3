"""The undocumented parts of vLLM on which the engine relies are unchanged."""

import asyncio
import inspect

import pytest
import vllm
from vllm.envs import environment_variables
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
from vllm.v1.core.sched.request_queue import PriorityRequestQueue
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import (
    BackgroundResources,
    InprocClient,
    MPClient,
    SyncMPClient,
)
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.stats import (
    FinishedRequestStats,
    IterationStats,
    PrefixCacheStats,
    SchedulerStats,
)
from vllm.v1.request import Request
from vllm.v1.worker.gpu_worker import Worker

from hybridrl.rollout.vllm_internals import (
    VERSION,
    EngineMeter,
    environment,
    read_completion,
    read_prompt,
)
from hybridrl.types import EngineStats, FinishReason


def output(finish_reason: str | None = "stop") -> CompletionOutput:
    """An output of the tokens 7 and 8, with the two most likely tokens at each position: 7 is not
    among them, and 8 is the second one.
    """
    return CompletionOutput(
        index=0,
        text="",
        token_ids=[7, 8],
        cumulative_logprob=None,
        logprobs=FlatLogprobs(
            token_ids=[7, 1, 2, 8, 3, 8], logprobs=[-3.0, -0.5, -1.0, -0.9, -0.7, -0.9]
        ),
        finish_reason=finish_reason,
        weight_versions=[WeightVersionSpan("3", 0, 1), WeightVersionSpan("4", 1, 2)],
    )


def test_a_completion_holds_the_drawn_tokens_own_log_probs_and_versions():
    completion = read_completion(output("length"), support=2)
    assert completion.token_ids == (7, 8)
    assert completion.logprobs.tolist() == pytest.approx([-3.0, -0.9])
    assert completion.policy_versions.tolist() == [3, 4]
    assert completion.finish_reason is FinishReason.length


def test_the_support_is_the_most_likely_tokens_and_owes_nothing_to_the_drawn_one():
    assert read_completion(output(), support=2).support_ids.tolist() == [[1, 2], [3, 8]]


def prompt_output(logprobs: list[float]) -> RequestOutput:
    """An output for the prompt 5, 7, 8, with the two most likely tokens at its last two
    positions.
    """
    return RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=[5, 7, 8],
        prompt_logprobs=FlatLogprobs(token_ids=[7, 1, 2, 8, 3, 8], logprobs=logprobs),
        outputs=[],
        finished=True,
    )


def test_a_prompt_has_log_probs_from_its_second_token_on():
    scores = read_prompt(prompt_output([-3.0, -0.5, -1.0, -0.9, -0.7, -0.9]), top=2)
    assert scores.logprobs.tolist() == pytest.approx([0.0, -3.0, -0.9])
    assert scores.top_ids[1:].tolist() == [[1, 2], [3, 8]]
    assert scores.top_logprobs[1:].tolist() == [
        pytest.approx([-0.5, -1.0]),
        pytest.approx([-0.7, -0.9]),
    ]


@pytest.mark.parametrize("logprobs", [[-1.0] * 5, [-1.0] * 5 + [float("nan")], [-1.0] * 5 + [0.5]])
def test_log_probs_of_a_prompt_that_are_missing_or_none_are_refused(logprobs: list[float]):
    with pytest.raises(ValueError):
        read_prompt(prompt_output(logprobs), top=2)


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", "something new", None])
def test_a_response_that_did_not_end_by_itself_is_aborted(reason: str | None):
    with pytest.raises(asyncio.CancelledError):
        read_completion(output(reason), support=2)


def test_vllm_is_the_version_that_was_read():
    """After an upgrade, read again the code that rollout/vllm_internals.py lists, then change
    VERSION.
    """
    assert vllm.__version__.split("+")[0] == VERSION


def test_a_meter_has_the_largest_values_and_the_sums_of_the_steps_since_it_was_read():
    meter = EngineMeter()
    first, second = SchedulerStats(), SchedulerStats()
    first.kv_cache_usage, second.kv_cache_usage = 0.75, 0.5
    first.num_running_reqs, second.num_running_reqs = 3, 2
    second.num_waiting_reqs, second.num_skipped_waiting_reqs = 4, 1
    first.prefix_cache_stats = PrefixCacheStats(queries=10, hits=4)
    second.prefix_cache_stats = PrefixCacheStats(queries=5, preempted_queries=9, preempted_hits=9)
    done = IterationStats()
    done.num_preempted_reqs = 2
    done.finished_requests = [FinishedRequestStats(finish_reason=None)] * 2
    meter.record(scheduler_stats=first, iteration_stats=None)
    meter.record(scheduler_stats=second, iteration_stats=done)
    meter.record(scheduler_stats=None, iteration_stats=done)
    last = IterationStats()
    last.num_preempted_reqs = 1
    meter.record(scheduler_stats=SchedulerStats(), iteration_stats=last)
    assert meter.take() == EngineStats(
        kv_use=0.75, running=4, waiting=5, preemptions=5, prefix_queries=15, prefix_hits=4
    )
    assert meter.take() == EngineStats()


def test_an_engine_gives_its_loggers_what_a_meter_takes():
    calls = inspect.getsource(LLMEngine)
    for call in (
        "logger_manager.record(",
        "logger_manager.log()",
        "logger_manager.record_sleep_state(",
    ):
        assert call in calls
    taken = list(inspect.signature(EngineMeter.record).parameters)[1:]
    assert all(f"{name}=" in inspect.getsource(LLMEngine.step) for name in taken)


def test_the_client_of_an_engine_core_knows_that_its_process_has_ended():
    assert "engine_dead" in BackgroundResources.__dataclass_fields__
    assert "self.resources = BackgroundResources(" in inspect.getsource(MPClient.__init__)


def test_a_core_is_paused_by_its_client_or_in_this_process():
    """tests/rollout/test_weight_update.py executes the second way."""
    assert hasattr(SyncMPClient, "call_utility") and not hasattr(InprocClient, "call_utility")
    assert list(inspect.signature(EngineCore.pause_scheduler).parameters)[1:] == [
        "mode",
        "clear_cache",
    ]
    assert callable(EngineCore.resume_scheduler)


def test_the_scheduler_takes_the_lowest_priority_and_then_the_lowest_arrival_time_first():
    queue = PriorityRequestQueue()
    for name, priority, arrival in (("c", 0, 2.0), ("b", 0, 1.0), ("d", 1, 0.0), ("a", -1, 3.0)):
        request = Request.__new__(Request)
        request.request_id = name
        request.priority = priority
        request.arrival_time = arrival
        queue.add_request(request)
    assert [queue.pop_request().request_id for _ in range(4)] == ["a", "b", "c", "d"]


def test_vllm_reads_the_environment_that_the_engine_sets():
    assert environment(own_process=True)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert environment(own_process=False).keys() <= environment_variables.keys()


@pytest.mark.parametrize(
    "method",
    [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "synchronize_device",
    ],
)
def test_a_worker_of_vllm_has_the_methods_that_are_called_by_name(method: str):
    assert callable(getattr(Worker, method))
