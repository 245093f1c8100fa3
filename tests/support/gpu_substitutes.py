"""The smallest substitutes that let vLLM's weight transfer between GPUs run on CPUs.

Each has the signature of the function that it replaces, which tests/weights/test_gpu_transfer.py
compares with the installed version. Everything else is vLLM's own code: its trainer and worker
engines, their rendezvous, its packing, and its reload of a model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo
from torch.multiprocessing import reductions
from torch.overrides import TorchFunctionMode
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import ipc_engine, packed_tensor

TIMEOUT = timedelta(seconds=120)
GPU = "GPU-0"
"""The UUID of the only GPU."""


class GlooCommunicator:
    """Replaces vLLM's PyNcclCommunicator, and communicates by gloo."""

    def __init__(
        self,
        group: StatelessProcessGroup,
        device: int | str | torch.device,
        library_path: str | None = None,
    ) -> None:
        self.rank = group.rank
        store = PrefixStore("gloo", group.store)
        self.gloo = ProcessGroupGloo(store, group.rank, group.world_size, TIMEOUT)

    def broadcast(self, tensor: Tensor, src: int, stream: "Stream | None" = None) -> None:
        options = BroadcastOptions()
        options.rootRank = src
        self.gloo.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.gloo.shutdown()


class Stream:
    """Replaces a CUDA stream; nothing is ever pending on it."""

    def synchronize(self) -> None: ...


def get_streams(device_idx: int, num_buffers: int) -> tuple[Stream, ...]:
    return (Stream(),) * num_buffers


def current_stream(device: Any = None) -> Stream:
    return Stream()


def stream(stream: Stream | None) -> AbstractContextManager:
    return nullcontext()


def synchronize(device: Any = None) -> None: ...


def ipc_collect() -> None: ...


def current_device_index() -> int:
    return 0


def get_device_properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(uuid=GPU)


EXPORTED: dict[bytes, Tensor] = {}
"""The tensors whose memory a receiver may open, by handle."""


def reduce_tensor(tensor: Tensor) -> tuple[Callable, tuple]:
    """The function that rebuilds a tensor, and its arguments, which contain a handle of its
    memory.
    """
    handle = b"handle %d" % len(EXPORTED)
    EXPORTED[handle] = tensor
    return rebuild_cuda_tensor, (
        type(tensor),
        tensor.size(),
        tensor.stride(),
        tensor.storage_offset(),
        torch.UntypedStorage,
        tensor.dtype,
        1,  # the sender's index of the GPU, which the receiver replaces by its own
        handle,
        tensor.untyped_storage().nbytes(),
        0,
        False,
        b"",
        0,
        b"",
        False,
    )


def rebuild_cuda_tensor(
    tensor_cls: type,
    tensor_size: torch.Size,
    tensor_stride: tuple[int, ...],
    tensor_offset: int,
    storage_cls: type,
    dtype: torch.dtype,
    storage_device: int,
    storage_handle: bytes,
    storage_size_bytes: int,
    storage_offset_bytes: int,
    requires_grad: bool,
    ref_counter_handle: bytes,
    ref_counter_offset: int,
    event_handle: bytes,
    event_sync_required: bool,
) -> Tensor:
    assert storage_device == current_device_index()
    memory = EXPORTED[storage_handle].untyped_storage()
    whole = torch.empty(0, dtype=dtype).set_(memory, tensor_offset, tensor_size, tensor_stride)
    return whole


class CudaAsCpu(TorchFunctionMode):
    """Creates tensors on the CPU that should be created on `cuda`."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


SUBSTITUTES: tuple[tuple[Any, str, Any], ...] = (
    (pynccl, "PyNcclCommunicator", GlooCommunicator),
    (packed_tensor, "_get_streams", get_streams),
    (packed_tensor, "reduce_tensor", reduce_tensor),
    (ipc_engine, "reduce_tensor", reduce_tensor),
    (ipc_engine, "rebuild_cuda_tensor", rebuild_cuda_tensor),
    (reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor),
    (torch.cuda, "current_stream", current_stream),
    (torch.cuda, "stream", stream),
    (torch.cuda, "synchronize", synchronize),
    (torch.cuda, "ipc_collect", ipc_collect),
    (torch.cuda, "get_device_properties", get_device_properties),
    (torch.accelerator, "current_device_index", current_device_index),
    (torch.accelerator, "synchronize", synchronize),
)
"""(module, name in it, substitute)"""


def install() -> None:
    """Install the substitutes for the rest of this process."""
    for module, name, substitute in SUBSTITUTES:
        setattr(module, name, substitute)


@contextmanager
def substituted() -> Iterator[None]:
    """Install the substitutes, and CudaAsCpu, until the end of the `with` block."""
    EXPORTED.clear()
    with CudaAsCpu():
        patches = [mock.patch.object(*substitute) for substitute in SUBSTITUTES]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
