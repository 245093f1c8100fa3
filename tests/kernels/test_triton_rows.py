"""The Triton kernels in Triton's interpreter, in a new process, because import selects it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hybridrl.kernels import triton_rows

ROOT = Path(__file__).parents[2]


def test_the_triton_rows_give_what_fp64_gives_for_every_divergence_and_number_of_teachers():
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        ),
        "OMP_NUM_THREADS": "1",
    }
    job = [sys.executable, "-m", "gpu_checks.triton_rows"]
    done = subprocess.run(
        job, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(done.stdout)
    assert len(cases) == 11
    narrow = cases.pop("bf16")
    assert narrow.pop("gradient") < 4e-3  # one rounding to 8 bits
    for case, errors in {**cases, "bf16": narrow}.items():
        assert errors.get("bounded", 0.0) == 0.0, case
        assert all(e < 3e-6 for e in errors.values()), (case, errors)


@pytest.mark.parametrize("num_teachers", [0, 2])
@pytest.mark.parametrize("kernel", [triton_rows._sums_kernel, triton_rows._gradient_kernel])
def test_the_triton_rows_compile_for_a_gpu_that_is_not_there(
    kernel: triton.JITFunction, num_teachers: int
):
    types = {
        "V": "i32",
        "ids": "*i64",
        "gradient": "*bf16",
        "gradient_stride": "i64",
        "teachers": ("*fp32",) * num_teachers,
    }
    constants = {
        "DIVERGENCE": 2,
        "BETA": 0.5,
        "CLIP": float("inf"),
        "INVERSE_T": 1.0,
        "BLOCK": triton_rows.LARGEST_BLOCK,
    }
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 0
