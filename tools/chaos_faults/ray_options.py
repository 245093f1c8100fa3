"""The undocumented parts of Ray that the faults use: options, which are environment variables
RAY_name, and the command lines of Ray's own processes.

They were read in the source of the version below. tests/tools/test_chaos.py fails when another
version is installed or when an option does not exist.
"""

import json

VERSION = "2.60"

QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
"""Ray gives up a node after about 4.5 s instead of a minute."""

MEMORY_SHORT = {"RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "250"}
"""Ray kills workers as soon as the machine uses 2 % of its memory."""

DELAYED = [
    "CoreWorkerService.grpc_server.PushTask",
    "CoreWorkerService.grpc_server.GetObjectStatus",
    "CoreWorkerService.grpc_server.PubsubLongPolling",
    "NodeManagerService.grpc_server.RequestWorkerLease",
]
"""The handlers that are delayed. If all handlers were, Ray's raylet would end itself."""
LOST = [
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.PinObjectIDs",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "CoreWorkerService.grpc_client.PubsubLongPolling",
]
"""The calls that Ray promises to repeat. PushTask is not among them: if it is lost, Ray raises an
ActorUnavailableError, because the task may have been done.
"""

RAYS_OWN = r"ray::(DashboardAgent|RuntimeEnvAgent)|[^\0]*python\0[^\0]*/ray/_private/workers/"
"""A regular expression of the command lines of Ray's own processes, which may outlive a killed run:
agents, which try for 60 s to reach the control store, and workers that Ray had just started, which
try for 27 s to reach their raylet. A worker that has reached it has the name of its actor as its
command line, as all workers of a run do.
"""


def faulty_calls() -> dict[str, str]:
    """Environment variables that make Ray delay the handlers in DELAYED by up to 20 ms, and lose
    40 % of the calls in LOST, half of them before and half after their work is done.

    The number of failures is per process and method, the probabilities are in percent.
    """
    lost = {
        method: {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20}
        for method in LOST
    }
    return {
        "RAY_testing_asio_delay_us": ",".join(f"{handler}=0:20000" for handler in DELAYED),
        "RAY_testing_rpc_failure": json.dumps(lost),
    }
