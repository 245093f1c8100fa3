"""Compare the Triton rows on CPU tensors, under TRITON_INTERPRET=1, with the eager rows in fp64.

It prints {case: {column: error}}.
"""

import json
from dataclasses import replace
from itertools import product

import torch
import triton
from torch import Tensor

from hybridrl.kernels import triton_rows
from hybridrl.kernels.row_rule import RowRule
from hybridrl.kernels.rows import row_gradients
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
    rule: RowRule, num_teachers: int, vocabulary: int, dtype: torch.dtype
) -> dict[str, float]:
    """The errors of 6 rows. Row 1 has token weight 0. Teacher 0 has weight 0 and NaN in row 2."""
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
    columns = TokenColumns(ids, token_weight, normal(6), torch.zeros(6), sampler)

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
    found = triton_rows.row_gradients(rule, dtype, logits, teachers, weights, columns)
    assert found[0].dtype is dtype and found[0].data_ptr() == logits.data_ptr()
    scale = {
        "dense_sparse": float((exact[6].sum() * exact[7].sum()).sqrt())
    }  # an inner product may nearly vanish
    return {n: error(a, b, scale.get(n)) for n, a, b in zip(NAMES, found, exact, strict=True)}


def error(found: Tensor, exact: Tensor, scale: float | None) -> float:
    return float((found.double() - exact.double()).norm()) / max(
        float(exact.double().norm()) if scale is None else scale, 1e-30
    )


def main() -> None:
    assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
    triton_rows.LARGEST_BLOCK = 16  # several blocks a row, the last one ragged
    found = {}
    for divergence, num_teachers in product(Divergence, (0, 1, 2)):
        rule = RowRule(
            temperature=0.7,
            measure=Measure(divergence=divergence, beta=0.3),
            ratio=RATIOS[num_teachers],
        )
        found[f"{divergence.value} of {num_teachers}"] = errors(
            rule, num_teachers, 37, torch.float32
        )
    rule = RowRule(measure=Measure(log_ratio_clip=1.0), ratio=RATIOS[3])
    found["clipped, a whole block"] = errors(rule, 1, 16, torch.float32)
    found["bf16"] = errors(replace(rule, measure=Measure()), 1, 37, torch.bfloat16)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
