"""The details of DeepSpeed, torch and vLLM that hybridrl uses beyond their documented interfaces.

Every such access of the learner and of the weights is a function of this file, so that after an
upgrade of a library only this file must be compared with it.
tests/weights/test_library_internals.py runs each function with the real library, and fails when
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
    """Whether ZeRO-3 has divided the parameter among the ranks; its `shape` is then only local."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, even if ZeRO-3 has divided it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# ZeRO-1 and ZeRO-2 concatenate all parameters to one vector and give each rank one interval of it.
# The attribute `_hp_mapping` of a parameter is the part of it that the rank holds: a
# tensor_fragment of deepspeed/utils/tensor_fragment.py, or None if the rank holds nothing of it. A
# parameter without the attribute is an error here, since checkpoints would silently lack it.


def fragment_span(parameter: nn.Parameter) -> tuple[int, int]:
    """(offset, length) of this rank's part of the flattened parameter, under ZeRO-1 or 2."""
    mapping = vars(parameter)["_hp_mapping"]
    if mapping is None:
        return 0, 0
    address = mapping.lp_fragment_address
    return address.start, address.numel


def fragment_values(parameter: nn.Parameter, moment: str | None) -> Tensor:
    """This rank's values of a parameter under ZeRO-1 or 2: [length] float32, a view of the
    optimizer's memory.

    Args:
        moment: a moment of Adam, "exp_avg" or "exp_avg_sq"; None: the master weights.
    """
    return vars(parameter)["_hp_mapping"].get_hp_fragment(moment)


class ZeroOptimizer(Protocol):
    """DeepSpeed's optimizer of any ZeRO stage, which wraps an optimizer of torch."""

    optimizer: torch.optim.Optimizer
    overflow: bool  # whether the last step's gradient was not finite
    clip_grad: float  # largest norm of the gradient; 0: it is not clipped


def set_adam_steps(zero: ZeroOptimizer, steps: int) -> None:
    """Set the number of steps on which AdamW's bias correction depends."""
    for state in zero.optimizer.state.values():
        state["step"] = torch.full_like(state["step"], steps)


def update_memory(zero: ZeroOptimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The memory that DeepSpeed holds between two updates and that only updates need.

    Returns:
        (state, buffers). The state is the master weights, and Adam's moments once they exist. The
        buffers are those of ZeRO-3 whose values are not read again: that of summed gradients, which
        the first micro-batch of an update overwrites (except padding, which is 0), and those of
        gradients to be summed. ZeRO-1 and ZeRO-2 allocate theirs in each update.
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
    """Change AdamW's settings from its next step on.

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
    """Whether a backend of that name is registered in vLLM's WeightTransferEngineFactory, where
    registering it twice is an error.
    """
    return name in vars(factory)["_registry"]


def transfer_engine(worker: Any) -> "WeightTransferEngine | None":
    """The worker's side of weight transfer, in a process of vLLM; None: it has none.

    Args:
        worker: vLLM's worker, the first argument of a function that collective_rpc calls.
    """
    return worker.weight_transfer_engine


def begin_reload(model: nn.Module) -> None:
    """Prepare vLLM's model for loading its weights again, layer by layer, by model.load_weights."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def end_reload(model: nn.Module, config: "ModelConfig") -> None:
    """Finish what begin_reload began: process the layers that wait for the end, e.g. attention."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, config)


ADAPTER_ID = 1
"""The number by which vLLM knows the only adapter of an engine."""


def set_empty_adapter(model: nn.Module) -> None:
    """Put an adapter of zeros, which changes nothing, into the only slot of vLLM's model."""
    whole: Any = model
    manager = whole.lora_manager
    rank = manager.get_dummy_lora_warmup_rank(1)
    manager.add_adapter(manager.create_dummy_lora(ADAPTER_ID, rank, whole.embedding_modules))
    manager.activate_adapter(ADAPTER_ID)


def set_adapter(model: nn.Module, rank: int, tensors: Mapping[str, Tensor]) -> set[str]:
    """Put an adapter into the only slot of vLLM's model, replacing the previous one.

    Requests under way continue with it, since they name it by ADAPTER_ID. vLLM's own weight update
    cannot be used for it: Worker.finish_weight_update removes all adapters, since they belong to
    other base weights.

    Args:
        model: the model of an engine with enable_lora, which has its adapters in `lora_manager`.
        rank: rank of the adapter.
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
    manager.add_adapter(adapter)  # also fuses the adapters of layers that vLLM has fused
    manager.activate_adapter(ADAPTER_ID)
    return adapter.loras.keys() - manager.modules.keys()
