"""The file of a batch whose gradient or loss is not finite, for a look at it later."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from hybridrl.batch.micro_batch import MicroBatch


def save_batch(micros: Sequence[MicroBatch], path: Path) -> None:
    """Write the tensors of each micro-batch under its number: "0/input_ids" and so on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}/{name}": value
        for number, micro in enumerate(micros)
        for name, value in micro.tensors().items()
    }
    save_file(tensors, path)
