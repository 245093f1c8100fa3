"""The internals of Ray that ray_internals.py uses are unchanged.

If the first test fails after an upgrade, read the code that hybridrl/runtime/ray_internals.py lists
again, then change VERSION.
"""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import services, worker
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table

from hybridrl.runtime.ray_internals import (
    VERSION,
    cause_of,
    dashboard_address,
    ignore_unfetched_errors,
    is_alive,
    node_address,
    node_cpus,
    node_id,
    nodes_of_bundles,
    what_happened,
)


def test_ray_is_the_version_that_was_read():
    assert ray.__version__.rpartition(".")[0] == VERSION, "see the first lines of this file"


def test_ray_reads_the_variable_that_ignores_unfetched_errors(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", {})
    ignore_unfetched_errors()
    (name,) = os.environ
    assert name in inspect.getsource(worker), f"Ray does not read {name} any more"


def test_the_error_of_a_call_holds_what_the_method_raised():
    raised = OSError(28, "No space left")
    assert cause_of(RayTaskError("call", "the traceback", raised)) is raised


def test_the_last_line_of_a_death_says_what_happened():
    context = ActorDiedErrorContext(
        error_message="The process exited with status 7.",
        actor_id=bytes(16),
        class_name="Host",
        pid=1,
    )
    error = ActorDiedError(context)
    assert what_happened(error) == "The process exited with status 7.", (
        f"Ray words the death of an actor otherwise: {error}"
    )
    assert what_happened(RayError()) == "RayError"


def test_a_dashboard_is_started_by_the_file_and_options_that_mark_it():
    program = Path(ray.__file__).parent / "dashboard" / "dashboard.py"
    assert program.is_file(), "Ray's dashboard is another file, which doctor would not find"
    source = inspect.getsource(services.start_api_server)
    assert 'f"--host={host}"' in source and 'f"--port={port}"' in source, (
        "the options of Ray's dashboard have other names, so that doctor would not read them"
    )
    command = ["python", "-u", str(program), "--host=0.0.0.0", "--port=8265"]
    assert dashboard_address(command) == ("0.0.0.0", 8265)
    assert dashboard_address(["grep", "ray/dashboard/dashboard.py"]) is None


@pytest.fixture
def one_node() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.graph
def test_the_records_of_a_running_ray_name_its_nodes_and_the_places_of_bundles(one_node: None):
    """The records exist only while Ray runs."""
    (record,) = ray.nodes()
    assert node_id(record) == ray.get_runtime_context().get_node_id()
    assert node_address(record) == ray.util.get_node_ip_address()
    assert node_cpus(record) == 3 and is_alive(record)
    group = placement_group([{"CPU": 1}, {"CPU": 1}])
    assert group.wait(60)
    assert nodes_of_bundles(placement_group_table(group)) == dict.fromkeys((0, 1), node_id(record))


def test_a_call_after_the_end_of_ray_starts_no_other_ray():
    """The thread of a checkpoint may make such a call when the run is ended at once."""
    call = "import hybridrl.runtime.calls as calls; calls.ray.wait([calls.ray.ObjectRef.nil()])"
    ended = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert ended.returncode == 1 and "Ray has not been started yet" in ended.stderr, ended.stderr


def test_rays_client_of_jobs_sends_each_request_by_the_method_that_gets_a_time_limit():
    call = "requests.request("
    whole = inspect.getsource(dashboard_sdk)
    assert 1 <= inspect.getsource(SubmissionClient._do_request).count(call) == whole.count(call)
    assert not re.search(r"requests\.(get|post|put|delete|Session)\b", whole)
