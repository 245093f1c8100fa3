"""The sink for MLflow: a tracking server, or a database file in the run directory."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridrl.types import RunInfo, Sample

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST_METRICS = 1000
"""Limit of metrics per request in MLflow's REST interface."""
MOST_PARAMETERS = 100
LONGEST_PARAMETER = 6000


class MlflowSink:
    """Writes one run of MLflow; a resumed training continues the same one, by its id.

    Args:
        tracking_uri: of the server; None: the environment variable MLFLOW_TRACKING_URI, and without
            it mlflow.db in the run directory.
        experiment: the experiment of the run; it is created if it does not exist.
    """

    name = "mlflow"

    def __init__(self, tracking_uri: str | None = None, experiment: str = "hybridrl") -> None:
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._run_id: str | None = None
        self._client: MlflowClient | None = None

    def state_dict(self) -> str | None:
        """The id of the run; None before the first start."""
        return self._run_id

    def load_state_dict(self, state: str | None) -> None:
        """Continue the run of that id; None: begin a new one."""
        self._run_id = state

    def start(self, info: RunInfo) -> None:
        if self._client is not None:
            return  # training continues from a checkpoint, in the same MLflow run
        from mlflow import MlflowClient

        file = Path(info.run_dir) / "mlflow.db"
        uri = self._tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{file}"
        client = MlflowClient(uri)
        if self._run_id is None:
            experiment = client.get_experiment_by_name(self._experiment)
            number = (
                client.create_experiment(self._experiment)
                if experiment is None
                else experiment.experiment_id
            )
            self._run_id = client.create_run(number, run_name=info.name).info.run_id
            self._log_settings(client, info.config)
        else:
            client.update_run(self._run_id, status="RUNNING")
        self._client = client

    def _log_settings(self, client: "MlflowClient", config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in leaves(config, "")]
        for first in range(0, len(params), MOST_PARAMETERS):
            client.log_batch(self._run_id, params=params[first : first + MOST_PARAMETERS])

    def log(self, metrics: Mapping[str, float]) -> None:
        assert self._client is not None, "log before start"
        from mlflow.entities import Metric

        step = int(metrics["train/step"])
        now_ms = time.time_ns() // 1_000_000
        rows = [
            Metric(name, float(value), now_ms, step)
            for name, value in metrics.items()
            if name != "train/step"
        ]
        for first in range(0, len(rows), MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=rows[first : first + MOST_METRICS])

    def samples(self, rows: Sequence[Sample]) -> None:
        """Do nothing: MLflow stores files in its own artifact store, which a client may not reach.
        The run directory has the samples.
        """

    def close(self, exit_code: int) -> None:
        if self._client is not None:
            status = "FINISHED" if exit_code == 0 else "FAILED"
            self._client.set_terminated(self._run_id, status)
            self._client = None


def leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of each setting. Example: leaves({"a": {"b": 1}}, "") == [("a.b", 1)]."""
    if not isinstance(value, Mapping) or not value:
        return [(key, value)]
    return [
        pair
        for name, part in value.items()
        for pair in leaves(part, f"{key}.{name}" if key else str(name))
    ]
