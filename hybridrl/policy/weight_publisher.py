"""Sends the student's weights from the learner to the engines, and exports them."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from hybridrl.models.loading import resolve
from hybridrl.settings.run import RunSettings
from hybridrl.types import WeightManifest
from hybridrl.weights.hugging_face import TEMPLATE, export
from hybridrl.weights.parameters import StudentWeights, WeightsKind
from hybridrl.weights.stream import Gather, WeightStream

if TYPE_CHECKING:
    from hybridrl.weights.vllm_transfer import EngineCall, EngineClient


class Sender(Protocol):
    """The learner's end of vLLM's nccl or ipc channel, an object of vLLM."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class WeightPublisher:
    """Sends the weights to engines, and writes them as a Hugging Face folder.

    Every method is called on all ranks together, since all help to gather the weights; only rank 0
    has the result.
    """

    def __init__(self, weights: StudentWeights, gather: Gather, *, rank: int) -> None:
        self.weights = weights
        self.gather = gather
        self.rank = rank
        self.stream = WeightStream(weights.published(), gather)
        self.client: EngineClient | None = None  # None: the engines take packed buffers
        self.sender: Sender | None = None

    def pack(self, version: int) -> tuple[WeightManifest | None, np.ndarray | None]:
        """The published tensors in the student's own dtype; (None, None) on all ranks but 0."""
        if self.rank == 0:
            return self.stream.pack(version)
        for _ in self.stream:
            pass
        return None, None

    def connect(
        self,
        backend: str,
        master: tuple[str, int],
        call: "EngineCall",
        *,
        num_engines: int,
        tensor_parallel: int,
    ) -> None:
        """Open vLLM's own nccl or ipc channel to these engines; it replaces an earlier one."""
        from hybridrl.weights.vllm_transfer import EngineClient, trainer_engine

        if self.sender is not None:
            self.sender.shutdown()
        self.client = EngineClient(call, num_engines, tensor_parallel)
        self.sender = trainer_engine(backend, self.rank, master, self.client, self.stream)

    def send(self, version: int) -> int:
        """Send the weights through that channel, and wait until every engine serves them as this
        version.

        Returns:
            The bytes that each engine received.
        """
        assert self.client is not None and self.sender is not None, "connect() comes first"
        self.client.version = version
        self.sender.send_weights()
        return self.stream.nbytes

    def export(self, settings: RunSettings, folder: Path, kind: WeightsKind) -> None:
        """Write the exported tensors as a Hugging Face folder, with all other files of the model
        that training started from.
        """
        state: dict[str, Tensor] = {}
        for name, weight in WeightStream(self.weights.exported(), self.gather):
            if self.rank == 0:
                state[name] = weight.cpu().clone()
        if self.rank == 0:
            model = settings.model
            template = Path(settings.run.dir).expanduser() / TEMPLATE
            source = resolve(model.path, model.revision)
            export(state, source, folder, template, kind=kind, eos=model.eos)
