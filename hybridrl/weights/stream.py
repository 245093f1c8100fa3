"""A model's weights as one packed buffer, in the order and under the names that a checkpoint would
use.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridrl.types import WeightManifest

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]
"""Makes the given parameters whole while the context lasts; a collective when they are sharded."""

ALIGNMENT = (
    64  # bytes; a tensor view needs its own dtype's alignment, 64 suits all and vector loads
)


class WeightStream:
    """The trainable weights, one decoder layer gathered at a time, every rank in lockstep.

    With tied embeddings the stream repeats the embedding as lm_head.weight: vLLM on CPU packs its
    output head into a copy, which an update without that name would leave stale without an error.
    """

    def __init__(self, model: PreTrainedModel, gather: Gather) -> None:
        self.gather = gather
        self.buffer: Tensor | None = (
            None  # [nbytes] uint8 of the last pack; None: nothing was packed
        )
        self.named = [(name, parameter) for name, parameter in model.named_parameters()]
        if "lm_head.weight" not in dict(self.named):
            self.named.append(("lm_head.weight", model.get_output_embeddings().weight))

    def shapes(self) -> list[tuple[int, ...]]:
        """Whole shapes, also of parameters that ZeRO-3 holds in parts."""
        return [tuple(getattr(p, "ds_shape", p.shape)) for _, p in self.named]

    @property
    def nbytes(self) -> int:
        """Of all that iterating yields, a tied head and its embedding each."""
        return sum(
            math.prod(shape) * p.element_size()
            for shape, (_, p) in zip(self.shapes(), self.named, strict=True)
        )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for group in self._layers():
            with self.gather([parameter for _, parameter in group]):
                for name, parameter in group:
                    yield name, parameter.detach()

    def _layers(self) -> Iterator[list[tuple[str, nn.Parameter]]]:
        """Neighbours with the same first number in their name ("model.layers.3.") are one layer."""
        group: list[tuple[str, nn.Parameter]] = []
        for name, parameter in self.named:
            if group and _layer(name) != _layer(group[-1][0]):
                yield group
                group = []
            group.append((name, parameter))
        yield group

    def pack(self, version: int) -> tuple[WeightManifest, np.ndarray]:
        """All weights in one buffer [nbytes] uint8, and its manifest with the buffer's digest.

        The buffer is the same one at each call: fresh pages would cost several times the copy.
        """
        shapes, dtypes = self.shapes(), [p.dtype for _, p in self.named]
        starts, nbytes = self._layout(shapes)
        if self.buffer is None:
            self.buffer = torch.zeros(nbytes, dtype=torch.uint8)
        written = set()
        for (_, weight), start in zip(self, starts, strict=True):
            if start not in written:
                written.add(start)
                there = self.buffer[start : start + weight.numel() * weight.element_size()]
                there.view(weight.dtype).view(weight.shape).copy_(weight)
        packed = self.buffer.numpy()
        manifest = WeightManifest(
            names=tuple(name for name, _ in self.named),
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
            shapes=tuple(shapes),
            offsets=tuple(starts),
            nbytes=packed.nbytes,
            digest=xxhash.xxh3_128_hexdigest(packed),
            version=version,
        )
        return manifest, packed

    def _layout(self, shapes: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
        """Where each weight begins, in bytes, and where the last one ends. The tied head lies where
        its embedding does.
        """
        starts: dict[int, int] = {}  # id of the parameter -> offset
        end = 0
        for shape, (_, parameter) in zip(shapes, self.named, strict=True):
            if id(parameter) not in starts:
                starts[id(parameter)] = end
                end += -(-math.prod(shape) * parameter.element_size() // ALIGNMENT) * ALIGNMENT
        return [starts[id(parameter)] for _, parameter in self.named], end


def unpack(manifest: WeightManifest, packed: np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Views into `packed` [nbytes] uint8, by name. They must not be written to: the object store's
    memory is shared.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffer = torch.from_numpy(packed)
    for name, dtype, shape, start in zip(
        manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True
    ):
        kind = getattr(torch, dtype)
        yield name, buffer[start : start + math.prod(shape) * kind.itemsize].view(kind).view(shape)


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])
