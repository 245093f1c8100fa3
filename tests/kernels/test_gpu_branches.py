"""The branches of the head pass that only run on a GPU, executed on the CPU: tensors claim to be on
a GPU, and float32 sums of bfloat16 products are computed from float32 factors. These products are
exact, so the substitute differs from a GPU only in the order of its sums.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hybridrl.kernels import rows, triton_rows
from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.kernels.row_rule import RowRule
from hybridrl.kernels.teacher_rows import Form, HiddenTeacher
from hybridrl.kernels.workspace import Workspace
from tests.support.batches import token_columns


class OnGpu(TorchFunctionMode):
    """Makes tensors claim to be on a GPU, and products accept `out_dtype`, which has no CPU
    kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wide: list[str] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.is_cuda.__get__:
            return True
        wide = kwargs.pop("out_dtype", None)
        if wide is None:
            return func(*args, **kwargs)
        self.wide.append(func.__name__)
        return func(*(factor.to(wide) for factor in args), **kwargs)


def test_torch_has_the_products_whose_sums_are_of_another_dtype():
    for product in (torch.ops.aten.mm.dtype, torch.ops.aten.addmm.dtype_out):
        assert "out_dtype" in [argument.name for argument in product._schema.arguments]


def loss_and_gradients(chunk: int, *, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients for six rows and a vocabulary of 16 tokens, in the dtype of
    `like`.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(torch.bfloat16).to(like.dtype)

    hidden = normal(6, 8).requires_grad_()
    head = normal(16, 8).requires_grad_()
    teacher = HiddenTeacher(hidden=normal(6, 8), lm_head=normal(16, 8), weight=torch.ones(6))
    columns = token_columns(
        token_ids=torch.arange(6),
        token_weight=torch.ones(6),
        sparse=torch.arange(6.0) - 2,
        sampler_logprobs=torch.full((6,), -2.0),
    )
    loss, _ = hybrid_head_loss(hidden, head, (teacher,), columns, HeadRule(chunk=chunk))
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("chunk", [6, 4])
def test_the_head_pass_of_a_gpu_gives_what_fp64_gives_from_the_same_numbers(
    chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """With chunks of four and two rows, the second chunk is added to the gradient of the first."""
    monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
    exact = loss_and_gradients(chunk, like=torch.zeros((), dtype=torch.float64))
    with OnGpu() as gpu:
        found = loss_and_gradients(chunk, like=torch.zeros((), dtype=torch.bfloat16))
    assert gpu.wide.count("addmm") == (0 if chunk == 6 else 2)
    assert gpu.wide.count("mm") == (2 if chunk == 6 else 4), "logits of student and teacher"
    for value, expected in zip(found, exact, strict=True):
        assert (value - expected).abs().max() < 2**-7 * expected.abs().max()


def test_rows_of_a_gpu_are_worked_on_by_triton_where_all_teachers_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
):
    """tests/kernels/test_triton_rows.py tests what Triton computes."""
    monkeypatch.setattr(triton_rows, "row_gradients", lambda rule, dtype, *rest: (*rest, *range(8)))
    logits = torch.zeros(2, 5)
    with OnGpu():
        work = rows.row_work(RowRule(), (Form.logits, Form.logits), logits, torch.bfloat16)
        assert work("gradient") == rows.RowResult("gradient", *range(8))

        def in_plain_torch(*forms: Form) -> bool:
            return (
                rows.row_work(RowRule(), forms, logits, torch.bfloat16).func is rows.row_gradients
            )

        others = [form for form in Form if form is not Form.logits]
        assert all(in_plain_torch(Form.logits, form) for form in others)
        monkeypatch.setattr(rows.importlib.util, "find_spec", lambda name: None)
        assert in_plain_torch(Form.logits)


def test_a_matrix_of_another_device_than_the_cpu_has_memory_of_its_own():
    like = torch.zeros(1, dtype=torch.bfloat16, device="meta")
    first = Workspace(exact=True).matrix(3, 4, like)
    assert first.shape == (3, 4) and first.device.type == "meta" and first.dtype is like.dtype
