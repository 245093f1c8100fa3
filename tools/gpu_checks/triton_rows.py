"""Compares the Triton kernels of kernels/triton_rows.py with the same computation by torch in fp64.

On a CPU Triton's interpreter runs the kernels; TRITON_INTERPRET=1 must be set before the import.
`python -m gpu_checks.triton_rows` then prints {case: {column: error}}.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
import triton
from torch import Tensor

from gpu_checks.check import Check, not_run, within
from gpu_checks.ground import Ground
from gpu_checks.rounding import epsilon, largest, of_sums
from hybridrl.kernels import triton_rows
from hybridrl.kernels.row_rule import RowRule
from hybridrl.kernels.rows import RowResult, row_gradients
from hybridrl.kernels.teacher_rows import Form
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.ops.divergence import Measure
from hybridrl.ops.ratio import RatioBounds
from hybridrl.settings.choices import Divergence, Ratio

NAMES = (
    "gradient",
    "logprobs",
    "kl",
    "entropy",
    "bounded",
    "loss",
    "dense_sq",
    "sparse_sq",
    "dense_sparse",
)
RATIOS = (
    RatioBounds(),
    RatioBounds(kind=Ratio.truncate, low=0.5, high=2.0),
    RatioBounds(kind=Ratio.mask, low=0.5, high=2.0),
    RatioBounds(kind=Ratio.clip, low=0.2, high=0.2),
)


def errors(
    rule: RowRule, num_teachers: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, float]:
    """The relative error of each column of NAMES, over 6 rows.

    Row 1 has token weight 0. In row 2, teacher 0 has weight 0 and its logits are NaN.
    """
    g = torch.Generator().manual_seed(vocabulary + num_teachers)

    def normal(*shape):
        return 3 * torch.randn(*shape, generator=g)

    logits, teachers = (
        normal(6, vocabulary),
        tuple((normal(6, vocabulary),) for _ in range(num_teachers)),
    )
    weights = tuple(torch.full((6,), 0.5 - i) for i in range(num_teachers))
    token_weight = torch.full((6,), 0.25)
    token_weight[1] = 0.0
    if teachers:
        weights[0][2], teachers[0][0][2] = 0.0, torch.nan
    ids = torch.randint(vocabulary, (6,), generator=g)
    sampler = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0] + 0.3 * normal(6)
    columns = TokenColumns(ids, token_weight, normal(6), torch.zeros(6), sampler, sampler)

    def wide(*tensors):
        return tuple(t.double() if t.is_floating_point() else t for t in tensors)

    exact = row_gradients(
        rule,
        (Form.logits,) * num_teachers,
        torch.float64,
        logits.double(),
        tuple(wide(*t) for t in teachers),
        wide(*weights),
        TokenColumns(*wide(*columns)),
    )
    place = logits.to(device)
    found = triton_rows.row_gradients(
        rule,
        dtype,
        place,
        tuple((t.to(device),) for (t,) in teachers),
        tuple(w.to(device) for w in weights),
        columns.to(torch.device(device)),
    )
    assert found[0].dtype is dtype and found[0].data_ptr() == place.data_ptr()
    scale = {
        "dense_sparse": float((exact[6].sum() * exact[7].sum()).sqrt())
    }  # an inner product may nearly vanish
    return {n: error(a.cpu(), b, scale.get(n)) for n, a, b in zip(NAMES, found, exact, strict=True)}


def error(found: Tensor, exact: Tensor, scale: float | None) -> float:
    return float((found.double() - exact.double()).norm()) / max(
        float(exact.double().norm()) if scale is None else scale, 1e-30
    )


def case_errors(device: str, vocabulary: int) -> dict[str, dict[str, float]]:
    """{case: {column: error}} for every divergence with 0, 1 and 2 teachers, for a clipped
    log-ratio whose rows are exactly one block, and for a gradient in bfloat16.
    """
    found = {}
    for divergence, num_teachers in product(Divergence, (0, 1, 2)):
        rule = RowRule(
            temperature=0.7,
            measure=Measure(divergence=divergence, beta=0.3),
            ratio=RATIOS[num_teachers],
        )
        found[f"{divergence.value} of {num_teachers}"] = errors(
            rule, num_teachers, vocabulary, torch.float32, device
        )
    rule = RowRule(measure=Measure(log_ratio_clip=1.0), ratio=RATIOS[3])
    whole = triton_rows.LARGEST_BLOCK
    found["clipped, a whole block"] = errors(rule, 1, whole, torch.float32, device)
    narrow = replace(rule, measure=Measure())
    found["bf16"] = errors(narrow, 1, vocabulary, torch.bfloat16, device)
    return found


def interpreted() -> dict[str, dict[str, float]]:
    """case_errors on the CPU, where a row has several blocks, of which the last is not full.

    Raises:
        AssertionError: TRITON_INTERPRET=1 is not set.
    """
    assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
    triton_rows.LARGEST_BLOCK = 16
    return case_errors("cpu", 37)


# -- checks ----------------------------------------------------------------------------------------

ON_GPU = 151_937
"""The size of the vocabulary on a GPU. It is no multiple of a block, so a row's last block is
ragged.
"""
FAR_ROWS = 2**31 // ON_GPU + 2
"""The number of rows of a matrix whose last row begins beyond entry 2**31."""
FAR_BYTES = 4 * FAR_ROWS * ON_GPU * 4
"""The logits of student and teacher in float32, and as much again for the comparison."""


def rows(ground: Ground) -> Iterator[Check]:
    """Check the Triton rows against fp64, and the last rows of a very large matrix."""
    terms = ON_GPU if ground.on_gpu else 37
    of_cases = case_errors("cuda", ON_GPU) if ground.on_gpu else interpreted()
    for case, of_columns in of_cases.items():
        gradient = of_columns.pop("gradient")
        narrow = epsilon(torch.bfloat16) / 2 if case == "bf16" else 0.0
        yield within(
            f"Triton rows, gradient, {case}",
            gradient,
            high=narrow + of_sums(terms),
            unit="relative error",
            reason="one rounding to bfloat16" if narrow else "4 sums of float32",
        )
        yield within(
            f"Triton rows, values, {case}",
            largest(list(of_columns.values())),
            high=of_sums(terms),
            unit="relative error",
            reason="4 sums of float32",
        )
    yield far_rows(ground)


def far_rows(ground: Ground) -> Check:
    """Check that rows beyond entry 2**31 of a matrix get the same gradients as these rows alone."""
    name = "Triton rows past entry 2**31"
    if not ground.on_gpu:
        return not_run(name, f"needs a GPU with {FAR_BYTES / 2**30:.0f} GiB free")
    free, _ = torch.cuda.mem_get_info()
    if free < FAR_BYTES:
        return not_run(
            name, f"needs {FAR_BYTES / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        )
    different = differing_entries(FAR_ROWS, ON_GPU, "cuda")
    return within(
        name, different, high=0, unit="entries differ", reason="a row is worked on by itself"
    )


def differing_entries(count: int, vocabulary: int, device: str) -> int:
    """The number of entries in the gradients of the last two rows that differ from the gradients of
    these two rows alone.
    """
    g = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(count, vocabulary, generator=g, device=device) for _ in range(2)
    )
    last = student[-2:].clone(), teacher[-2:].clone()
    whole = gradients_of(student, teacher)
    return int((whole[-2:] != gradients_of(*last)).sum())


def gradients_of(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, V] the gradients by Triton of rows whose drawn tokens are all token 0."""
    count = len(student)
    ones = torch.ones(count, device=student.device)
    columns = TokenColumns(
        token_ids=torch.zeros(count, dtype=torch.int64, device=student.device),
        token_weight=ones,
        sparse=ones,
        value_slope=0 * ones,
        sampler_logprobs=0 * ones,
        old_logprobs=0 * ones,
    )
    arguments = (student, ((teacher,),), (ones,), columns)
    result = RowResult(*triton_rows.row_gradients(RowRule(), torch.float32, *arguments))
    return result.gradient


if __name__ == "__main__":
    print(json.dumps(interpreted()))
