"""The diagnostics of every diagnostics.every steps: the gradients of both terms at the parameters,
and the distance between student and teacher.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hybridrl.batch.micro_batch import MicroBatch
from hybridrl.ops.compare import COMPARED
from hybridrl.policy.student import Look, Student


def gradient_geometry(
    student: Student, micros: Sequence[MicroBatch], device: torch.device
) -> dict[str, float]:
    """Norms of the dense and of the sparse gradient of the global batch at the parameters, and
    their cosine.

    This takes two more forward and backward passes, outside of DeepSpeed's accumulation. The
    parameters must be whole (ZeRO 1 or 2).

    Args:
        device: the student's device, to which one micro-batch at a time is moved.
    """
    dense = _gradient(student, (micro.without_sparse() for micro in micros), device)
    sparse = _gradient(student, (micro.sparse_alone() for micro in micros), device)
    product = sum((a * b).sum() for a, b in zip(dense, sparse, strict=True))
    squares = [float(sum(g.square().sum() for g in gradient)) for gradient in (dense, sparse)]
    norms = [square**0.5 for square in squares]
    cosine = float(product) / (norms[0] * norms[1]) if all(norms) else 0.0
    return {
        "grad/dense_parameter_norm": norms[0],
        "grad/sparse_parameter_norm": norms[1],
        "grad/cosine": cosine,
    }


def teacher_distance(
    forward: Callable[..., tuple[Tensor, Tensor]],
    micros: Sequence[MicroBatch],
    device: torch.device,
) -> dict[str, float]:
    """Means of ops.compare over the response tokens of the global batch and over all teachers with
    a full distribution; empty if there are none.

    Args:
        forward: of the (possibly sharded) student, called once per micro-batch on every rank.
        device: the student's device, to which one micro-batch at a time is moved.
    """
    # NCCL cannot reduce tensors in host memory.
    sums = torch.zeros(1 + len(COMPARED), dtype=torch.float64, device=device)
    for micro in micros:
        with torch.no_grad():
            sums += forward(*micro.to(device).arguments(), Look.compare)[0]
    dist.all_reduce(sums)
    sums = sums.cpu()
    count = float(sums[0])
    return (
        {
            f"teacher/{name}": float(total) / count
            for name, total in zip(COMPARED, sums[1:], strict=True)
        }
        if count
        else {}
    )


def _gradient(student: Student, micros: Iterable[MicroBatch], device: torch.device) -> list[Tensor]:
    """The gradient at each parameter that trains, fp32, summed over micro-batches and ranks."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for micro in micros:
        loss, _ = nn.Module.__call__(student, *micro.to(device).arguments(), Look.learn)
        for into, gradient in zip(
            total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                into += gradient
    for part in total:
        dist.all_reduce(part)
    return total
