"""Frees the device memory of tensors for a while, so that other processes can use it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """A storage whose memory was freed."""

    storage: torch.UntypedStorage
    nbytes: int
    host: Tensor | None  # a copy of its bytes, [nbytes] uint8; None: its content is not needed


class DeviceMemory:
    """Empties storages of a device and fills them again.

    A storage remains the same object while it has no memory, so all views of it are valid again
    once it is filled. DeepSpeed holds many views of its flat vectors; `Tensor.data = ...` would
    leave them pointing to the old memory. While a storage is empty, nothing may read or write it.

    Args:
        device: the device whose storages are emptied; storages on other devices are left alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.released: list[Released] = []
        self.spare: list[Tensor] = []  # page-locked memory is slow to get, so it is used again

    def release(self, copied: Sequence[Tensor], dropped: Sequence[Tensor]) -> None:
        """Empty the storages of these tensors.

        Args:
            copied: tensors that `acquire` restores from a copy in host memory.
            dropped: tensors that `acquire` fills with zeros.
        """
        for storage in self._storages(copied):
            host = self._host(storage.nbytes())
            host.copy_(as_bytes(storage))
            self._empty(storage, host)
        for storage in self._storages(dropped):
            self._empty(storage, None)

    def acquire(self) -> None:
        """Undo `release`; does nothing if nothing is released."""
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
        """The storages of the tensors that are on the device and not empty.

        A storage that several tensors share comes once: `release` empties it before the next.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device.type == self.device.type and storage.nbytes():
                yield storage

    def _host(self, nbytes: int) -> Tensor:
        """[nbytes] uint8 in host memory, page-locked if the device is a GPU."""
        for i, tensor in enumerate(self.spare):
            if tensor.nbytes == nbytes:
                return self.spare.pop(i)
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    """A view of the storage, [nbytes] uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
