"""tracking.sinks.NAME=ray: the metrics of a run on the metrics port of Ray, for Prometheus.

Ray has such a port on each node, and writes the addresses of all ports into a file for Prometheus
(cluster/README.md).
"""

import math
import re
from collections.abc import Mapping, Sequence

from ray.util.metrics import Gauge

from hybridrl.types import RunInfo, Sample

PREFIX = "hybridrl_"
"""The prefix of all gauge names; Ray puts `ray_` before it."""
RUN = "run"
"""The label with the name of the run."""


class PrometheusSink:
    """A sink with a gauge for each metric. The gauge holds the latest value and has the run's name
    as a label.

    The gauges exist as long as this process is connected to Ray.
    """

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._run = ""

    def start(self, info: RunInfo) -> None:
        self._run = info.name

    def log(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self._gauge(name).set(float(value), {RUN: self._run})

    def samples(self, rows: Sequence[Sample]) -> None:
        """Does nothing, since gauges hold no text."""

    def close(self, exit_code: int) -> None:
        self._gauges.clear()

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(gauge_name(name), description=name, tag_keys=(RUN,))
        return self._gauges[name]


def gauge_name(metric: str) -> str:
    """The name of a metric's gauge, without Ray's prefix.

    Example: "eval/hard/pass_at_4" -> "hybridrl_eval_hard_pass_at_4".
    """
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)
