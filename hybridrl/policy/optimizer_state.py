"""What this rank holds of the fp32 weights and Adam's moments, whichever ZeRO stage laid it out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from hybridrl.core.errors import CheckpointError, NonFiniteError
from hybridrl.weights.fragments import MASTER, PARTS, Fragment, FragmentReader


def local_fragments(
    parameters: Mapping[str, nn.Parameter], parts: Sequence[str] = PARTS
) -> list[Fragment]:
    """This rank's pieces, as views where the optimizer's own memory is on CPU; parameters it holds
    nothing of are left out.
    """
    found = []
    for name, parameter in parameters.items():
        offset, length = span(parameter)
        if length:
            tensors = {part: local_values(parameter, part)[:length] for part in parts}
            found.append(
                Fragment(name=name, shape=whole_shape(parameter), offset=offset, tensors=tensors)
            )
    return found


def load_part(parameters: Mapping[str, nn.Parameter], reader: FragmentReader, part: str) -> None:
    """Overwrite this rank's pieces of one part with the saved ones."""
    for name, parameter in parameters.items():
        offset, length = span(parameter)
        if length:
            set_local_values(parameter, part, reader.read(part, name, offset, length))


def check_model(
    parameters: Mapping[str, nn.Parameter], reader: FragmentReader, folder: Path, model: str
) -> None:
    """A state may hold more, as a value head that the algorithm no longer asks for.

    Raises:
        CheckpointError: a parameter is missing there, or has another shape.
    """
    differing = [
        name
        for name, parameter in parameters.items()
        if reader.shapes.get(name) != whole_shape(parameter)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: lacks {', '.join(differing[:3])} in the model's shape, so it is not of "
            f"model.path={model}"
        )


def check_finite(fragments: Sequence[Fragment]) -> None:
    """Raises:
    NonFiniteError: some weight or moment is NaN or infinite; names its parameter.
    """
    for fragment in fragments:
        for part, tensor in fragment.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"{part} of {fragment.name} is not finite; it is not saved, the last "
                    "checkpoint is untouched"
                )


# -- the two layouts -------------------------------------------------------------------------------
# ZeRO 3 gives rank r elements r*s ... (r+1)*s-1 of every parameter, s = ceil(size / ranks); the
# last are padding. ZeRO 1 and 2 cut all parameters, laid end to end, into one stretch a rank: a
# rank holds some of them whole, at most two in part, and most not at all. DeepSpeed keeps where in
# `_hp_mapping`, None where a rank holds nothing.


def span(parameter: nn.Parameter) -> tuple[int, int]:
    """(offset, length) of what this rank holds of the flattened parameter."""
    if is_sharded(parameter):
        share = safe_get_local_fp32_param(parameter).numel()
        offset = min(dist.get_rank() * share, parameter.ds_numel)
        return offset, min(share, parameter.ds_numel - offset)
    mapping = parameter._hp_mapping
    return (
        (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
        if mapping
        else (0, 0)
    )


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def local_values(parameter: nn.Parameter, part: str) -> Tensor:
    """[at least length] float32, padding included."""
    if is_sharded(parameter):
        return (
            safe_get_local_fp32_param(parameter)
            if part == MASTER
            else safe_get_local_optimizer_state(parameter, part)
        )
    return parameter._hp_mapping.get_hp_fragment(None if part == MASTER else part)


def set_local_values(parameter: nn.Parameter, part: str, values: Tensor) -> None:
    """values: [length] float32; padding becomes 0."""
    held = local_values(parameter, part)
    padded = torch.zeros_like(held)
    padded[: len(values)] = values.to(held.device)
    if not is_sharded(parameter):
        held.data.copy_(padded)
    elif part == MASTER:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, part)


def is_sharded(parameter: nn.Parameter) -> bool:
    """By ZeRO 3."""
    return hasattr(parameter, "ds_id")
