"""A teacher whose weights are divided among the ranks of one scorer replica.

This is torch's FSDP2, as transformers sets it up. Each rank reads only its rows of every weight
from the files. In a forward pass the ranks gather one decoder layer after the other, use it and
free it, and each rank computes its own sequences. So it works with every number of ranks, and
rounds as a single device does. Two alternatives were rejected. Tensor parallelism needs a number of
ranks that divides the heads, and splits each product, which rounds differently. With ZeRO 3,
transformers reads the whole model on every rank before it divides it.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from hybridrl.core.errors import ConfigError
from hybridrl.models.output_head import output_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRank:
    """One process of a scorer replica that has several devices."""

    rank: int
    ranks: int
    master: tuple[str, int]  # address and a free TCP port of rank 0, where the ranks meet


def join_replica(place: ReplicaRank, device: torch.device, timeout_s: float) -> None:
    """Join the process group of the replica.

    Args:
        timeout_s: the longest wait of a rank for the others, after which it raises an error.

    Raises:
        ConfigError: the device is the CPU, but torch is built for an accelerator, to which
            transformers would load the weights.
    """
    accelerator = torch.accelerator.current_accelerator()
    if device.type == "cpu" and accelerator is not None:
        raise ConfigError(
            f"cluster.device=cpu: this torch is built for {accelerator.type}, and a teacher on "
            "several devices would be loaded to it; set teachers.NAME.devices=1, or install the "
            "torch for CPUs"
        )
    host, port = place.master
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=place.rank,
        world_size=place.ranks,
        timeout=timedelta(seconds=timeout_s),
    )


class ShardedModel:
    """A Hugging Face model whose weights are divided among several devices, a TeacherModel. Every
    rank makes the same calls in the same order, and gets the same results.
    """

    def __init__(self, model: PreTrainedModel, setting: str, place: ReplicaRank) -> None:
        """
        Args:
            model: of load_model with this number of shards.
            setting: how an error names the model.
        """
        self.model = model
        self.place = place
        device = model.device
        # `states` calls the body alone, so the body must be FSDP's root, which starts each pass;
        # then a layer is gathered while the one before it computes.
        fully_shard(model.base_model, mesh=init_device_mesh(device.type, (place.ranks,)))
        # If the config ties the embeddings, the output embedding belongs to the whole model.
        holder = next(
            m for m in (model.get_output_embeddings(), model) if isinstance(m, FSDPModule)
        )
        holder.unshard()  # it stays whole, because every rank computes evidence with it
        self._head = output_weight(model, setting=setting).detach()

    @property
    def head(self) -> Tensor:
        return self._head

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """As TeacherModel.states. This rank computes its share of the sequences and gathers the
        others.

        Raises:
            RuntimeError: the ranks got different sequences, or one of them failed.
        """
        self._check_same(input_ids)
        count = len(input_ids)
        share = -(-count // self.place.ranks)
        first = self.place.rank * share
        # A rank without sequences repeats the last one, because all must gather layers together.
        own = torch.arange(first, first + share, device=input_ids.device).clamp_max(count - 1)
        states = self.model.base_model(
            input_ids=input_ids[own],
            attention_mask=attention_mask[own],
            position_ids=position_ids[own],
            use_cache=False,
        ).last_hidden_state  # [share, T, H]
        gathered = states.new_empty(share * self.place.ranks, *states.shape[1:])
        dist.all_gather_into_tensor(gathered, states.contiguous())
        return gathered[:count]

    def _check_same(self, input_ids: Tensor) -> None:
        """Raise RuntimeError if the ranks have different tokens: one may have missed a call."""
        weights = torch.arange(1, input_ids.numel() + 1, device=input_ids.device)
        digest = (input_ids.flatten() * weights).sum()  # int64, which wraps around
        own = torch.stack([digest, digest.new_tensor(input_ids.numel())])
        others = [torch.empty_like(own) for _ in range(self.place.ranks)]
        dist.all_gather(others, own)
        if any(not torch.equal(other, own) for other in others):
            raise RuntimeError("the ranks of this scorer replica were given different sequences")
