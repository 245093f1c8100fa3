"""The weights that leave the learner: gathered layer by layer, or packed into one buffer."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from hybridrl.types import WeightManifest
from hybridrl.weights.parameters import NamedTensor

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]
"""A context in which the given parameters are whole; for sharded ones it is a collective call."""

ALIGNMENT = 64
"""In bytes. A tensor view must be aligned to its dtype; 64 suits all dtypes and vector loads."""


class WeightStream:
    """Iterates over the tensors that leave the learner, gathering one decoder layer at a time. All
    ranks must iterate together.

    Example: `for name, tensor in WeightStream(weights.published(), gather)`; a tensor is valid only
    until the next one is taken.
    """

    def __init__(self, tensors: Sequence[NamedTensor], gather: Gather) -> None:
        self.tensors = tuple(tensors)
        self.gather = gather
        self.buffer: Tensor | None = None  # [nbytes] uint8 of the last pack; None before the first

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors that iterating yields; a tied head and its embedding both
        count.
        """
        return sum(_nbytes(tensor) for tensor in self.tensors)

    @property
    def largest_nbytes(self) -> int:
        """The bytes of the largest tensor."""
        return max(map(_nbytes, self.tensors))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for layer in self._layers():
            with self.gather([source for t in layer for source in t.sources.values()]):
                for tensor in layer:
                    wholes = [source.detach() for source in tensor.sources.values()]
                    yield tensor.name, tensor.combine(*wholes)

    def _layers(self) -> Iterator[list[NamedTensor]]:
        """The tensors in groups of one layer: consecutive ones whose names are equal up to the
        first number, e.g. "model.layers.3".
        """
        layer: list[NamedTensor] = []
        for tensor in self.tensors:
            if layer and _layer(tensor.name) != _layer(layer[-1].name):
                yield layer
                layer = []
            layer.append(tensor)
        yield layer

    def pack(self, version: int) -> tuple[WeightManifest, np.ndarray]:
        """Pack all weights into one buffer [nbytes] uint8; returns its manifest and the buffer.

        Every call overwrites and returns the same buffer, since allocating memory would take
        several times as long as the copy.
        """
        starts, nbytes = self._layout()
        if self.buffer is None:
            self.buffer = torch.zeros(nbytes, dtype=torch.uint8)
        for (_, weight), tensor in zip(self, self.tensors, strict=True):
            if tensor.repeats is None:
                start = starts[tensor.name]
                target = self.buffer[start : start + _nbytes(tensor)]
                target.view(tensor.dtype).view(tensor.shape).copy_(weight)
        packed = self.buffer.numpy()
        manifest = WeightManifest(
            names=tuple(tensor.name for tensor in self.tensors),
            dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors),
            shapes=tuple(tensor.shape for tensor in self.tensors),
            offsets=tuple(starts[tensor.name] for tensor in self.tensors),
            nbytes=packed.nbytes,
            digest=xxhash.xxh3_128_hexdigest(packed.data),
            version=version,
        )
        return manifest, packed

    def _layout(self) -> tuple[dict[str, int], int]:
        """The offset of each tensor in bytes, by name, and the length of the buffer. A tensor that
        repeats another one has the same offset.
        """
        starts: dict[str, int] = {}
        end = 0
        for tensor in self.tensors:
            if tensor.repeats is None:
                starts[tensor.name] = end
                end += -(-_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
            else:
                starts[tensor.name] = starts[tensor.repeats]
        return starts, end


def unpack(manifest: WeightManifest, packed: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a buffer, [nbytes] uint8, as views by name.

    They must not be written to, because the memory of the object store is shared.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffer = torch.from_numpy(packed)
    for name, dtype, shape, start in zip(
        manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True
    ):
        kind = getattr(torch, dtype)
        yield name, buffer[start : start + math.prod(shape) * kind.itemsize].view(kind).view(shape)


def _nbytes(tensor: NamedTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _layer(name: str) -> str:
    """The name up to its first number. Example: "model.layers.3.mlp.bias" -> "model.layers.3"."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])
