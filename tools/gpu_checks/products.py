"""Products of bfloat16 matrices whose float32 sums are kept: `mm` and `addmm` with out_dtype.

Only torch's build for CUDA has them, so these lines of kernels/workspace.py never run on a CPU.
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
REASON = "4 sums of float32; sums rounded to bfloat16 would be off by 1e-3 and more"


def products(ground: Ground) -> Iterator[Check]:
    """Whether logits and the gradient of the output embedding keep their float32 sums."""
    names = ("logits by mm(out_dtype)", "first chunk", "second chunk by addmm(out_dtype)")
    if not ground.on_gpu:
        for name in names:
            yield not_run(name, "needs a GPU: torch's build for CPUs has no such product")
        return
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, device="cuda").bfloat16()

    hidden = normal(ROWS, WIDTH)
    lm_head = normal(VOCABULARY, WIDTH) * WIDTH**-0.5
    logits = Workspace(exact=False).logits(hidden, lm_head)
    assert logits.dtype is torch.float32, logits.dtype
    exact = hidden.double() @ lm_head.double().T
    yield within(
        names[0],
        error(logits, exact.cpu()),
        high=of_sums(WIDTH),
        unit="relative error",
        reason=REASON,
    )
    total = torch.full((VOCABULARY, WIDTH), torch.nan, device="cuda")  # as torch.empty may give
    chunks = [normal(ROWS, VOCABULARY) for _ in range(2)]
    summed = torch.zeros(VOCABULARY, WIDTH, dtype=torch.float64, device="cuda")
    for i, d_logits in enumerate(chunks):
        add_head_gradient(total, d_logits, hidden, first=i == 0)
        summed += d_logits.double().T @ hidden.double()
        yield within(
            f"gradient of the output embedding, {names[1 + i]}",
            error(total, summed.cpu()),
            high=of_sums(ROWS * (i + 1)),
            unit="relative error",
            reason=REASON,
        )
