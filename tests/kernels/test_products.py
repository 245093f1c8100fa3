"""The dtype of matrix products: which one is chosen, and how exact float32 products are."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybridrl.kernels.head import HeadRule, chosen_logprobs, hybrid_head_loss
from hybridrl.kernels.products import (
    RATES,
    Processor,
    WideLinear,
    faster_products,
    processor,
    products_notice,
    widen_products,
)
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.settings.choices import Products
from tests.support.batches import token_columns

X86 = {"architecture": "x86_64", "cpu_name": "Intel(R) Xeon(R) Processor"}


@pytest.mark.parametrize(
    ("capabilities", "kind", "choice"),
    [
        (X86 | {"amx_bf16": True, "avx512_bf16": True}, Processor.amx, "model"),
        (X86 | {"avx512_bf16": True}, Processor.intel_bf16, "float32"),
        (X86 | {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, Processor.amd_bf16, "model"),
        (X86 | {"avx512_bf16": False}, Processor.without_bf16, "float32"),
        (X86, Processor.without_bf16, "float32"),
        ({"architecture": "aarch64"}, Processor.other, "model"),
        ({}, Processor.other, "model"),
    ],
)
def test_the_processor_decides_which_products_are_chosen(capabilities, kind, choice):
    assert processor(capabilities, {}) is kind
    assert faster_products(kind) == choice


@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        ("default", Processor.amx),
        ("AVX512_CORE_AMX", Processor.amx),
        ("AVX512_CORE_BF16", Processor.intel_bf16),
        ("AVX512_CORE", Processor.without_bf16),
        ("avx2", Processor.without_bf16),
    ],
)
def test_a_limit_on_the_instructions_of_products_counts_as_a_processor_without_them(limit, kind):
    found = X86 | {"amx_bf16": True, "avx512_bf16": True}
    assert processor(found, {"ONEDNN_MAX_CPU_ISA": limit}) is kind


def test_the_choice_is_the_larger_rate_of_the_table_and_the_sentence_names_both():
    for kind, rates in RATES.items():
        wide = rates.float32 > rates.bfloat16
        assert faster_products(kind) is (Products.float32 if wide else Products.model)
    sentence = products_notice(Products.float32, Processor.intel_bf16)
    assert "computed in float32 (train.products=float32)" in sentence
    assert "155 GFLOP/s in bfloat16 and 253 in float32" in sentence
    assert "the other one" not in sentence
    assert products_notice(Products.model, Processor.intel_bf16).endswith(
        "so the other one would be faster"
    )
    assert products_notice(Products.model, Processor.other).endswith("is not known")


def narrow_layer() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64).to(torch.bfloat16)
    return layer, torch.randn(5, 7, 96).to(torch.bfloat16)


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.double().square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, *(p.grad for p in layer.parameters())


def test_a_wide_layer_gives_the_bf16_numbers_that_are_next_to_the_exact_product():
    layer, x = narrow_layer()
    wide = copy.deepcopy(layer)
    assert widen_products(nn.Sequential(wide)) == 1 and type(wide) is WideLinear
    exact = copy.deepcopy(layer).double()
    for got, expected in zip(gradients(wide, x), gradients(exact, x.double()), strict=True):
        assert got.dtype is torch.bfloat16
        # Half a unit in the last of 8 bits, and as much again for the addition of the bias and the
        # rounding of the incoming gradient.
        assert float((got.double() - expected).norm() / expected.norm()) < 2**-8


class ProductDtypes(TorchDispatchMode):
    """Records the dtypes of the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.seen += [a.dtype for a in arguments if isinstance(a, Tensor)]
        return function(*arguments, **(kwargs or {}))


def test_the_products_are_computed_in_float32_in_both_directions():
    layer, x = narrow_layer()
    widen_products(nn.Sequential(layer))
    with ProductDtypes() as dtypes:
        gradients(layer, x)
    assert dtypes.seen == [torch.float32] * 6  # two operands each: x W^T, dy W and dy^T x


def test_layers_of_a_subclass_are_left_as_they_are():
    class Own(nn.Linear):
        pass

    assert widen_products(nn.Sequential(Own(2, 2), nn.ReLU())) == 0


def head_problem() -> tuple[Tensor, Tensor, HiddenTeacher]:
    torch.manual_seed(1)
    hidden = torch.randn(6, 32).to(torch.bfloat16)
    head = torch.randn(50, 32).to(torch.bfloat16)
    teacher = HiddenTeacher(
        hidden=(hidden.float() + 0.01 * torch.randn(6, 32)).to(torch.bfloat16),
        lm_head=head,
        weight=torch.ones(6),
    )
    return hidden, head, teacher


def head_gradients(rule: HeadRule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden, head, teacher = head_problem()
    hidden = hidden.to(dtype).requires_grad_()
    head = head.to(dtype).requires_grad_()
    teacher = HiddenTeacher(
        hidden=teacher.hidden.to(dtype), lm_head=teacher.lm_head.to(dtype), weight=teacher.weight
    )
    columns = token_columns(
        token_ids=torch.arange(6),
        token_weight=torch.full((6,), 0.5),
        sparse=torch.zeros(6),
        sampler_logprobs=torch.zeros(6),
    )
    loss, _ = hybrid_head_loss(hidden, head, (teacher,), columns, rule)
    loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return hidden.grad.double(), head.grad.double()


def test_wide_products_in_the_head_pass_leave_the_rounding_of_the_result_alone():
    exact = head_gradients(HeadRule(), torch.float64)
    narrow = head_gradients(HeadRule(), torch.bfloat16)
    wide = head_gradients(HeadRule(wide_products=True), torch.bfloat16)
    for k in range(2):
        errors = [float((g[k] - exact[k]).norm() / exact[k].norm()) for g in (narrow, wide)]
        assert errors[1] < 2**-8 < errors[0], errors


def test_wide_log_probs_are_those_of_float32_matrices():
    hidden, head, _ = head_problem()
    ids = torch.arange(6)[:, None]
    wide = chosen_logprobs(hidden, head, ids, HeadRule(wide_products=True))
    assert torch.equal(wide, chosen_logprobs(hidden.float(), head.float(), ids, HeadRule()))
    assert not torch.equal(wide, chosen_logprobs(hidden, head, ids, HeadRule()))
