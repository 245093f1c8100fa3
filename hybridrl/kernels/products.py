"""The dtype in which the matrix products of bfloat16 models are computed on a CPU.

Weights, activations and gradients stay in bfloat16. A wide product converts its operands to
float32, multiplies them, and rounds the result to bfloat16. Its result equals that of a bfloat16
product that sums in float32, except for the order of the sums. Which one is faster depends on the
processor.
"""

import os
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridrl.settings.choices import Products


class Processor(StrEnum):
    """Kinds of processors by their instructions for products of bfloat16."""

    amx = "AMX"
    amd_bf16 = "AVX512-BF16 of AMD"
    intel_bf16 = "AVX512-BF16 without AMX"
    without_bf16 = "no instructions for bfloat16"
    other = "unknown"


class Rates(NamedTuple):
    """GFLOP/s of a square product on two cores."""

    bfloat16: float
    float32: float


RATES: Mapping[Processor, Rates] = {
    Processor.amx: Rates(2056, 390),
    Processor.amd_bf16: Rates(925, 213),
    Processor.intel_bf16: Rates(155, 253),
    Processor.without_bf16: Rates(172, 213),
}
"""Measured on an Intel Xeon with AMX (`tools/bench head`), on an AMD EPYC of family 26, on an Intel
Xeon without AMX, and on that EPYC with ONEDNN_MAX_CPU_ISA=AVX512_CORE (`hybridrl doctor`). At other
times the EPYC reached half of both rates; only their ratio is used.
"""


WITH_BF16 = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512")
WITH_AMX = ("AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16")
UNLIMITED = ("", "DEFAULT", "AVX10_2_512_AMX_2", *WITH_AMX)
"""Values of ONEDNN_MAX_CPU_ISA, which limits the instructions of oneDNN, the library of matrix
products: those that allow bfloat16 instructions without AMX, those with AMX, and those that allow
every instruction used here.
"""


def processor(
    capabilities: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Processor:
    """The kind of this machine's processor, by the instructions that oneDNN may use.

    Args:
        capabilities: as of torch.cpu.get_capabilities; None: those of this machine.
        environment: its ONEDNN_MAX_CPU_ISA limits the instructions.
    """
    found = torch.cpu.get_capabilities() if capabilities is None else capabilities
    if found.get("architecture") != "x86_64":
        return Processor.other
    limit = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if found.get("amx_bf16") and limit in UNLIMITED:
        return Processor.amx
    if not found.get("avx512_bf16") or limit not in (*UNLIMITED, *WITH_BF16):
        return Processor.without_bf16
    return Processor.amd_bf16 if "AMD" in found.get("cpu_name", "") else Processor.intel_bf16


def faster_products(kind: Processor) -> Products:
    """The dtype of products that is faster for bfloat16 models on such a processor, by RATES.

    It measures nothing, so that all runs on one machine compute the same.
    """
    rates = RATES.get(kind)
    if rates is None or rates.bfloat16 >= rates.float32:
        return Products.model
    return Products.float32


def measured_rates() -> Rates:
    """The rates of this machine, measured with all threads that torch uses.

    It takes a second, or several if the processor emulates bfloat16 one number at a time.
    """
    size = 1024
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix = torch.ones(size, size, dtype=dtype)
        seconds: list[float] = []
        while len(seconds) < 10 and sum(seconds) < 0.5:  # the first one includes thread set-up
            started = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - started)
        rates.append(2 * size**3 / min(seconds) / 1e9)
    return Rates(*rates)


class WideLinear(nn.Linear):
    """A linear layer whose products are computed in float32 and rounded to the dtype of its
    input.
    """

    def forward(self, input: Tensor) -> Tensor:
        out = _WideProduct.apply(input, self.weight)
        return out if self.bias is None else out + self.bias


class _WideProduct(torch.autograd.Function):
    """x W^T in float32. Tensors are saved for the backward pass in bfloat16 and widened there."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        wide = d_out.float()
        d_x = (wide @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (wide.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype)
        return d_x, d_weight


def products_notice(products: Products, kind: Processor) -> str:
    """The sentence about matrix products that a run prints when it starts.

    Args:
        kind: of the driver's processor.
    """
    dtype = "float32" if products is Products.float32 else "bfloat16"
    choice = f"products of bfloat16 models are computed in {dtype} (train.products={products})"
    rates = RATES.get(kind)
    if rates is None:
        return f"{choice}; which dtype is faster on this processor is not known"
    other = "" if faster_products(kind) is products else ", so the other one would be faster"
    return (
        f"{choice}; on a processor with {kind}, two cores reach {rates.bfloat16:g} GFLOP/s in "
        f"bfloat16 and {rates.float32:g} in float32{other}"
    )


def widen_products(model: nn.Module) -> int:
    """Compute the products of every linear layer of the model in float32.

    Layers of other classes, such as stacked experts, are left as they are.

    Returns:
        The number of layers that were changed.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in layers:
        layer.__class__ = WideLinear  # keeps its parameters, hooks and place in the model
    return len(layers)
