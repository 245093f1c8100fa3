"""Ray's client of the jobs of a cluster, with a limit on its waits, of which Ray's own has none.

It overrides `_do_request`, through which the client sends each of its requests, as of Ray 2.60;
tests/runtime/test_ray_internals.py fails when there is no such method any more.
"""

from typing import TYPE_CHECKING, Any

from ray.job_submission import JobSubmissionClient

if TYPE_CHECKING:
    import requests

ANSWER_S = 60.0
"""The longest silence of a dashboard that was asked something."""


class TimedJobClient(JobSubmissionClient):
    """A client whose methods raise requests.Timeout if the dashboard is silent for ANSWER_S."""

    def _do_request(self, method: str, endpoint: str, **how: Any) -> "requests.Response":
        return super()._do_request(method, endpoint, **({"timeout": ANSWER_S} | how))
