"""Memory of a device that its tensors leave to others for a while."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A storage without memory."""

    storage: torch.UntypedStorage
    nbytes: int
    host: Tensor | None  # its bytes, [nbytes] uint8; None: its numbers are not needed


class DeviceMemory:
    """Empties storages of a device and fills them again.

    A storage stays the same object while it has no memory, so every view of it is as before once it
    is filled: DeepSpeed holds many of its flat vectors, and `Tensor.data = ...` would leave them at
    the old memory. Between the two nothing may read or write them.

    Args:
        device: whose storages are emptied; others stay as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.released: list[Released] = []
        self.spare: list[Tensor] = []  # page-locked memory is slow to get, so it is used again

    def release(self, copied: Sequence[Tensor], dropped: Sequence[Tensor]) -> None:
        """Empty the storages of these tensors.

        Args:
            copied: to host memory, and back.
            dropped: their storages come back as zeros.
        """
        for storage in self._storages(copied):
            host = self._host(storage.nbytes())
            host.copy_(as_bytes(storage))
            self._empty(storage, host)
        for storage in self._storages(dropped):
            self._empty(storage, None)

    def acquire(self) -> None:
        """The other end of `release`; does nothing where nothing is released."""
        for part in self.released:
            part.storage.resize_(part.nbytes)
            if part.host is None:
                as_bytes(part.storage).zero_()
            else:
                as_bytes(part.storage).copy_(part.host)
                self.spare.append(part.host)
        self.released = []

    def _empty(self, storage: torch.UntypedStorage, host: Tensor | None) -> None:
        self.released.append(Released(storage=storage, nbytes=storage.nbytes(), host=host))
        storage.resize_(0)

    def _storages(self, tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
        """Those on the device, each once; one that is empty is none."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device.type == self.device.type and storage.nbytes():
                yield storage

    def _host(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 in host memory, page-locked beside a GPU."""
        for i, tensor in enumerate(self.spare):
            if tensor.nbytes == nbytes:
                return self.spare.pop(i)
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """[nbytes] uint8, a view of the storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
