"""The sink for Trackio: a local database that `trackio show` displays, or a Hugging Face Space."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from hybridrl.tracking.sink import as_code
from hybridrl.types import RunInfo, Sample


class TrackioSink:
    """Writes one run of Trackio; a resumed training continues the same one, by its name.

    Without `space` and without the environment variables TRACKIO_SPACE_ID and TRACKIO_SERVER_URL
    all data stay on this machine, in the folder of the variable TRACKIO_DIR.

    Args:
        project: the project of the run.
        space: OWNER/NAME of a Space to which the rows are also sent.
    """

    name = "trackio"

    def __init__(self, project: str = "hybridrl", space: str | None = None) -> None:
        self._project = project
        self._space = space
        self._run_name: str | None = None
        self._run: Any = None

    def state_dict(self) -> str | None:
        """The name of the run; None before the first start."""
        return self._run_name

    def load_state_dict(self, state: str | None) -> None:
        """Continue the run of that name; None: begin a new one."""
        self._run_name = state

    def start(self, info: RunInfo) -> None:
        if self._run is not None:
            return  # training continues from a checkpoint, in the same Trackio run
        import trackio

        # Trackio identifies a run by its name, and two runs may have folders of the same name.
        self._run_name = self._run_name or f"{info.name}-{secrets.token_hex(3)}"
        self._run = trackio.init(
            project=self._project,
            name=self._run_name,
            space_id=self._space,
            config=info.config,
            resume="allow",
            embed=False,
            # No probes of the machine: they would publish more than the run's metrics.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        assert self._run is not None, "log before start"
        self._run.log(dict(metrics), step=int(metrics["train/step"]))

    def samples(self, rows: Sequence[Sample]) -> None:
        assert self._run is not None, "samples before start"
        if not rows:
            return
        from trackio import Markdown

        texts = [
            f"**{row.uid}** reward {row.reward:.3f}, {row.finish_reason}\n\n{as_code(row.response)}"
            for row in rows
        ]
        self._run.log({"eval/samples": Markdown("\n\n".join(texts))}, step=rows[0].step)

    def close(self, exit_code: int) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
