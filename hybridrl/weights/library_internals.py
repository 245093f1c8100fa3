"""What hybridrl reads of DeepSpeed, torch and vLLM beyond their documented interfaces.

Every such access of the learner and of the weights is a function of this file, so that after an
upgrade of a library only this file must be compared with it.
tests/weights/test_library_internals.py runs each of them against the real library, and fails when
the installed version is not the one in SEEN.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

SEEN = {"deepspeed": "0.19.8", "torch": "2.13.0", "vllm": "0.32.0"}
"""The versions that this file was written for and tested with."""


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has divided the parameter among the ranks; its `shape` is then not its own."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO-3 holds it in pieces."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# ZeRO-1 and ZeRO-2 join all parameters to one vector and give each rank one interval of it. The
# part of a parameter that a rank holds is in its attribute `_hp_mapping`: a tensor_fragment of
# deepspeed/utils/tensor_fragment.py, or None where the rank holds nothing of it. A parameter
# without the attribute is an error here, since otherwise checkpoints would lack it without notice.


def fragment_span(parameter: nn.Parameter) -> tuple[int, int]:
    """(offset, length) of this rank's part of the flattened parameter, under ZeRO-1 or 2."""
    mapping = vars(parameter)["_hp_mapping"]
    if mapping is None:
        return 0, 0
    address = mapping.lp_fragment_address
    return address.start, address.numel


def fragment_values(parameter: nn.Parameter, moment: str | None) -> Tensor:
    """[length] float32, a view of the optimizer's memory, under ZeRO-1 or 2.

    Args:
        moment: of Adam, "exp_avg" or "exp_avg_sq"; None: the master weights.
    """
    return vars(parameter)["_hp_mapping"].get_hp_fragment(moment)


class ZeroOptimizer(Protocol):
    """DeepSpeed's optimizer of any ZeRO stage, which wraps an optimizer of torch."""

    optimizer: torch.optim.Optimizer
    overflow: bool  # of the last step
    clip_grad: float  # largest norm of the gradient; 0: it is not clipped


def set_adam_steps(zero: ZeroOptimizer, steps: int) -> None:
    """Set the number of steps on which AdamW's bias correction depends."""
    for state in zero.optimizer.state.values():
        state["step"] = torch.full_like(state["step"], steps)


def update_memory(zero: ZeroOptimizer) -> tuple[list[Tensor], list[Tensor]]:
    """What only an update needs of what DeepSpeed holds between two of them.

    Returns:
        Its state: the master weights, and Adam's moments once there are some. And buffers of ZeRO-3
        whose numbers are not read again: of summed gradients, since the first micro-batch of an
        update overwrites them (all but padding, which is 0), and of those that are about to be
        summed. ZeRO-1 and ZeRO-2 make theirs anew in each update.
    """
    parts = vars(zero)
    sharded = "fp32_partitioned_groups_flat" in parts
    name = "fp32_partitioned_groups_flat" if sharded else "single_partition_of_fp32_groups"
    moments = [
        value
        for state in zero.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    ]
    state = [*parts[name], *moments]
    if not sharded:
        return state, []
    buckets = [bucket.buffer for bucket in parts["ipg_buckets"].values()]
    buffers = [parts["grad_partitions_flat_buffer"], *buckets]
    return state, [buffer for buffer in buffers if buffer is not None]


def set_adam(
    zero: ZeroOptimizer, *, betas: tuple[float, float], weight_decay: float, clip: float
) -> None:
    """Give AdamW other settings from its next step on.

    Args:
        clip: largest norm of the gradient; 0: it is not clipped.
    """
    for group in zero.optimizer.param_groups:
        group["betas"] = betas
        group["weight_decay"] = weight_decay
    zero.clip_grad = clip


def left_out(zero: ZeroOptimizer) -> bool:
    """Whether the last step changed nothing because its gradient was NaN or infinite."""
    return zero.overflow


def has_transfer_backend(factory: type, name: str) -> bool:
    """Whether vLLM's WeightTransferEngineFactory has a backend of that name; to register it twice
    is an error.
    """
    return name in vars(factory)["_registry"]


def transfer_engine(worker: Any) -> "WeightTransferEngine | None":
    """The worker's side of weight transfer, in a process of vLLM; None: it has none.

    Args:
        worker: of vLLM; the first argument of what collective_rpc calls.
    """
    return worker.weight_transfer_engine


def begin_reload(model: nn.Module) -> None:
    """Have vLLM's model take its weights anew, layer by layer, through model.load_weights."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def end_reload(model: nn.Module, config: "ModelConfig") -> None:
    """The other end of begin_reload: process the layers that wait for it, such as attention."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, config)


ADAPTER_ID = 1
"""vLLM's number of the only adapter of an engine."""


def set_empty_adapter(model: nn.Module) -> None:
    """Put an adapter of zeros, which changes nothing, into the only slot of vLLM's model."""
    whole: Any = model
    manager = whole.lora_manager
    rank = manager.get_dummy_lora_warmup_rank(1)
    manager.add_adapter(manager.create_dummy_lora(ADAPTER_ID, rank, whole.embedding_modules))
    manager.activate_adapter(ADAPTER_ID)


def set_adapter(model: nn.Module, rank: int, tensors: Mapping[str, Tensor]) -> set[str]:
    """Put an adapter into the only slot of vLLM's model, in the place of the one before.

    Requests under way continue with it, since they name it by ADAPTER_ID. A weight update of vLLM's
    own cannot carry it: Worker.finish_weight_update removes all adapters, as those of other base
    weights.

    Args:
        model: of an engine with enable_lora, which has its adapters in its `lora_manager`.
        rank: of the adapter.
        tensors: A [rank, in] and B [out, rank] by peft's names, with the factor s in B. vLLM keeps
            these tensors.

    Returns:
        The layers of the adapter for which vLLM's model has no place, by vLLM's names.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    whole: Any = model
    manager = whole.lora_manager
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        dict(tensors),
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(adapter)  # joins those of layers that vLLM has joined
    manager.activate_adapter(ADAPTER_ID)
    return adapter.loras.keys() - manager.modules.keys()
