"""Checks products of bfloat16 matrices whose sums stay in float32: `mm` and `addmm` with out_dtype.

Only torch's build for CUDA has them, so those lines of kernels/workspace.py never run on a CPU.
"""

from collections.abc import Iterator

import torch

from gpu_checks.check import Check, not_run, within
from gpu_checks.ground import Ground
from gpu_checks.head_pass import error
from gpu_checks.rounding import of_sums
from hybridrl.kernels.workspace import Workspace, add_head_gradient

ROWS = 1024
WIDTH = 2048
VOCABULARY = 32_003
LOGITS = "logits by mm(out_dtype)"
GRADIENTS = (
    "gradient of the output embedding, first chunk",
    "gradient of the output embedding, second chunk by addmm(out_dtype)",
)
REASON = "4 sums of float32; sums rounded to bfloat16 would be off by 1e-3 and more"


def products(ground: Ground) -> Iterator[Check]:
    """Check that logits and the gradient of the output embedding keep their float32 sums."""
    if ground.on_gpu:
        yield from products_on("cuda", ROWS, WIDTH, VOCABULARY)
        return
    for name in (LOGITS, *GRADIENTS):
        yield not_run(name, "needs a GPU: torch's build for CPUs has no such product")


def products_on(device: str, rows: int, width: int, vocabulary: int) -> Iterator[Check]:
    """Check the products of kernels/workspace.py on random bfloat16 matrices against fp64."""
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g).bfloat16().to(device)

    hidden = normal(rows, width)
    lm_head = normal(vocabulary, width)
    logits = Workspace(exact=device == "cpu").logits(hidden, lm_head)
    assert logits.dtype is torch.float32, logits.dtype
    exact = hidden.double() @ lm_head.double().T
    yield product_check(LOGITS, logits, exact, terms=width)
    total = torch.full((vocabulary, width), torch.nan, device=device)  # as torch.empty may be
    summed = torch.zeros(vocabulary, width, dtype=torch.float64, device=device)
    for i, name in enumerate(GRADIENTS):
        d_logits = normal(rows, vocabulary)
        add_head_gradient(total, d_logits, hidden, first=i == 0)
        summed += d_logits.double().T @ hidden.double()
        yield product_check(name, total, summed, terms=rows * (i + 1))


def product_check(name: str, found: torch.Tensor, exact: torch.Tensor, *, terms: int) -> Check:
    return within(
        name,
        error(found, exact.cpu()),
        high=of_sums(terms),
        unit="relative error",
        reason=REASON,
    )
