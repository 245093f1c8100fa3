"""The sink for TensorBoard: event files in the run directory."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridrl.tracking.sink import as_code
from hybridrl.types import RunInfo, Sample

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes each metric as a scalar, and the samples of an evaluation as texts.

    Args:
        folder: of the event files, relative to the run directory.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, info: RunInfo) -> None:
        """Open a new event file. TensorBoard hides steps after info.first_step of older files."""
        from torch.utils.tensorboard import SummaryWriter

        self.close(0)
        resumed = info.first_step > 0
        self._writer = SummaryWriter(
            str(Path(info.run_dir) / self._folder),
            purge_step=info.first_step + 1 if resumed else None,
        )

    def log(self, metrics: Mapping[str, float]) -> None:
        assert self._writer is not None, "log before start"
        step = int(metrics["train/step"])
        for name, value in metrics.items():
            if name != "train/step":
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, rows: Sequence[Sample]) -> None:
        assert self._writer is not None, "samples before start"
        for row in rows:
            text = f"reward {row.reward:.3f}, {row.finish_reason}\n\n{as_code(row.response)}"
            self._writer.add_text(f"samples/{row.uid}", text, row.step)

    def close(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
