"""vLLM's side of a weight update: the backend `object_store`, and the learner's source of weights
for the backends `nccl` and `ipc`.

The backend `object_store` receives one packed buffer, in the object store's own memory or as a file
in shared memory (an engine's child processes cannot read Ray's object store). It checks the digest,
names, shapes and coverage, and loads the weights layer by layer, or as an adapter of the layers. It
works on any hardware and has no process group that the failure of an engine could break.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

from hybridrl.core.parent import end_with_parent
from hybridrl.types import WeightManifest
from hybridrl.weights.library_internals import (
    begin_reload,
    end_reload,
    has_transfer_backend,
    set_adapter,
    set_empty_adapter,
    transfer_engine,
)
from hybridrl.weights.stream import WeightStream, unpack

BACKEND = "object_store"
EngineCall = Callable[[str, Sequence[tuple]], None]


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Empty, since the backend needs no set-up."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """The place of the packed weights and their manifest, as the plain values that vLLM can send to
    its child processes.
    """

    manifest: dict
    packed: np.ndarray | None = None  # [nbytes] uint8; None: they are in the file
    path: str | None = None  # a file in shared memory, which all tensor-parallel workers map

    def verified(self) -> tuple[WeightManifest, np.ndarray]:
        """The manifest and the packed weights, [nbytes] uint8.

        Raises:
            ValueError: the received bytes differ from those that were sent.
        """
        manifest = WeightManifest(**self.manifest)
        packed = self.packed
        if packed is None:
            assert self.path is not None, "the bytes are in `packed` or in a file"
            packed = np.memmap(self.path, dtype=np.uint8, mode="r")
        digest = xxhash.xxh3_128_hexdigest(packed.data)
        if packed.nbytes != manifest.nbytes or digest != manifest.digest:
            raise ValueError(
                f"received {packed.nbytes} bytes with digest {digest[:12]}, sent "
                f"{manifest.nbytes} with {manifest.digest[:12]}"
            )
        return manifest, packed


class ObjectStoreTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads a packed buffer into the model between two engine steps."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo
    expected: set[str]  # parameters of the engine's model, all of which an update must load
    received_digest: str | None = None  # of the last loaded bytes; None before and during an update

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.received_digest = None
        self.expected = {name for name, _ in self.model.named_parameters()}
        begin_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        manifest, packed = update_info.verified()
        model: Any = self.model  # vLLM's models are modules with a load_weights method
        weights = unpack(manifest, packed)
        loaded = model.load_weights((name, tensor.to(self.device)) for name, tensor in weights)
        self._check_coverage(set(loaded or ()))
        self.received_digest = manifest.digest

    def replace_adapter(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Replace the engine's adapter by the one in the packed buffer.

        Raises:
            ValueError: the received bytes differ from those that were sent, or vLLM's model has no
                place for the adapter of a layer.
        """
        self.received_digest = None
        manifest, packed = update_info.verified()
        tensors = {name: tensor.clone() for name, tensor in unpack(manifest, packed)}
        rank = manifest.shapes[0][0]  # the first tensor is an A, [rank, in]
        unused = set_adapter(self.model, rank, tensors)
        if unused:
            raise ValueError(
                f"vLLM's model has no place for the adapters of {len(unused)} layers, e.g. "
                f"{min(unused)}; set lora.sync=merged"
            )
        self.received_digest = manifest.digest

    def _check_coverage(self, loaded: set[str]) -> None:
        """Check that the update wrote every parameter of the engine's model.

        The manifest has the names of StudentWeights.published(). vLLM uses other names (it fuses q,
        k and v), so the check uses those that load_weights returns.

        Raises:
            ValueError: a parameter was not written.
        """
        missing = self.expected - loaded
        if missing:
            raise ValueError(
                f"{len(missing)} parameters were left untouched, e.g. {sorted(missing)[0]}"
            )

    def finish_weight_update(self) -> None:
        end_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Methods that are added to vLLM's worker and called by name through collective_rpc."""

    def add_empty_adapter(self) -> None:
        """Add an adapter that changes nothing, so that requests can name it before an update."""
        set_empty_adapter(object_store_engine(self).model)

    def load_adapter(self, update_info: dict[str, Any]) -> None:
        """As ObjectStoreTransferEngine.replace_adapter."""
        object_store_engine(self).replace_adapter(ObjectStoreUpdateInfo(**update_info))

    def received_digest(self) -> str | None:
        """XXH3-128 of the weights that this worker loaded last; None: it has loaded none, or the
        backend computes no digest.
        """
        return getattr(transfer_engine(self), "received_digest", None)


def object_store_engine(worker: WorkerExtension) -> ObjectStoreTransferEngine:
    """The worker's side of the backend `object_store`."""
    engine = transfer_engine(worker)
    assert isinstance(engine, ObjectStoreTransferEngine), (
        "checks.py allows no other backend with adapters"
    )
    return engine


class StreamSource(WeightSource):
    """A WeightStream in the form that vLLM's trainer side reads: the metadata has the whole shapes
    of sharded tensors, and iterating gathers the tensors.
    """

    def __init__(self, stream: WeightStream) -> None:
        self.stream = stream

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(t.name, t.dtype, t.shape) for t in self.stream.tensors]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.stream)


class EngineClient:
    """Implements vLLM's control-plane protocol for several engines: each call goes to all engines,
    and waits for all.

    Args:
        call: calls a method of every engine, with one tuple of arguments each, and waits for them
            within a deadline.
        num_engines, tensor_parallel: the engines' NCCL ranks follow the sender's rank 0, engine
            after engine.

    Attributes:
        version: the version of the weights of the next update. The call that finishes the update
            sets it in the engine, so no token is sampled with the new weights and the old version.
    """

    def __init__(self, call: EngineCall, num_engines: int, tensor_parallel: int) -> None:
        self.call = call
        self.num_engines = num_engines
        self.tensor_parallel = tensor_parallel
        self.version = -1  # no update yet

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in range(self.num_engines)]
        if "rank_offset" in init_info:
            for i, info in enumerate(infos):
                info["rank_offset"] = init_info["rank_offset"] + i * self.tensor_parallel
        self.call("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self.call("start_weight_update", [()] * self.num_engines)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.call("update_weights", [(update_info,)] * self.num_engines)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the update with `self.version`, since vLLM's senders pass no `weight_version`."""
        self.call("finish_weight_update", [(self.version,)] * self.num_engines)


def trainer_engine(
    backend: str, rank: int, master: tuple[str, int], client: EngineClient, stream: WeightStream
) -> TrainerWeightTransferEngine:
    """vLLM's trainer side of `nccl` or `ipc`, which sends the tensors of `stream`.

    Every learner rank calls it; rank 0 sends.

    Args:
        master: address and port of the process group of `nccl`.
    """
    source = StreamSource(stream)
    if backend == "ipc":
        # Without packing, vLLM would hold every gathered tensor until the update is finished, so a
        # rank of ZeRO-3 would hold the whole student. The buffer must hold the largest tensor.
        ipc = IPCTrainerInitInfo(
            rank=rank,
            packed=True,
            packed_buffer_size_bytes=max(DEFAULT_PACKED_BUFFER_SIZE_BYTES, stream.largest_nbytes),
        )
        return WeightTransferTrainerFactory.trainer_init(ipc, client=client, source=source)
    nccl = NCCLTrainerInitInfo(
        rank=rank,
        master_address=master[0],
        master_port=master[1],
        world_size=1 + client.num_engines * client.tensor_parallel,
    )
    return WeightTransferTrainerFactory.trainer_init(nccl, client=client, source=source)


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it in every process of an engine."""
    end_with_parent()
    if not has_transfer_backend(WeightTransferEngineFactory, BACKEND):
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, "ObjectStoreTransferEngine")
