"""A model's weights as one packed buffer, in the order and under the names that a checkpoint would use."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridrl.types import WeightManifest

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager]
"""Makes the given parameters whole while the context lasts; a collective when they are sharded."""

ALIGNMENT = 64  # bytes; a tensor view needs its own dtype's alignment, 64 suits all and vector loads


class WeightStream:
    """The trainable weights, one decoder layer gathered at a time, every rank in lockstep.

    With tied embeddings the stream repeats the embedding as lm_head.weight: vLLM on CPU packs its output head into
    a copy, which an update without that name would leave stale without an error.
    """

    def __init__(self, model: PreTrainedModel, gather: Gather) -> None:
        self.gather = gather
        self.named = [(name, parameter) for name, parameter in model.named_parameters()]
        if "lm_head.weight" not in dict(self.named):
            self.named.append(("lm_head.weight", model.get_output_embeddings().weight))

    def shapes(self) -> list[tuple[int, ...]]:
        """Whole shapes, also of parameters that ZeRO-3 holds in parts."""
        return [tuple(getattr(p, "ds_shape", p.shape)) for _, p in self.named]

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
        """All weights in one buffer [nbytes] uint8, and its manifest with the buffer's sha256."""
        shapes = self.shapes()
        sizes = [int(np.prod(s)) * p.element_size() for s, (_, p) in zip(shapes, self.named, strict=True)]
        starts = np.concatenate([[0], np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes])])
        buffer = torch.zeros(int(starts[-1]), dtype=torch.uint8)
        for (_, weight), start, size in zip(self, starts, sizes, strict=False):
            buffer[int(start) : int(start) + size].copy_(weight.contiguous().view(-1).view(torch.uint8))
        packed = buffer.numpy()
        manifest = WeightManifest(
            names=tuple(name for name, _ in self.named),
            dtypes=tuple(str(p.dtype).removeprefix("torch.") for _, p in self.named),
            shapes=tuple(shapes),
            offsets=tuple(int(s) for s in starts[:-1]),
            nbytes=packed.nbytes,
            digest=hashlib.sha256(packed).hexdigest(),
            version=version,
        )
        return manifest, packed


def unpack(manifest: WeightManifest, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views into `buffer` [nbytes] uint8, by name."""
    for name, dtype, shape, start in zip(manifest.names, manifest.dtypes, manifest.shapes, manifest.offsets, strict=True):
        kind = getattr(torch, dtype)
        size = int(np.prod(shape)) * kind.itemsize
        yield name, buffer[start : start + size].view(kind).view(shape)


def _layer(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])
