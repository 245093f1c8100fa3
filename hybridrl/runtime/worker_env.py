"""The environment variables of a worker process."""

import os
import sys

from hybridrl.core import failpoints
from hybridrl.core.redact import worker_variables

RETAIN_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""glibc retains freed memory; see worker_env."""


def worker_env(threads: int, device: str, dtype: str, *, take_turns: bool) -> dict[str, str]:
    """Environment variables of a worker process: its share of the cores, and no telemetry.

    Ray's dashboard shows them, so none is a secret. glibc gives a freed tensor of more than 32 MiB
    back to the kernel and gets the next one as fresh pages, zeroed one by one: a quarter of a
    learner's step on CPU. The MALLOC variables make it retain them. A process that computes on a
    GPU frees its host memory: otherwise that of a model just loaded would be retained as long as
    the process lives.

    vLLM's attention for float32 on GPUs is a Triton kernel, which multiplies in TF32 by default:
    too coarse for rollout.max_logprob_gap of float32.

    An engine decodes by thousands of small products a second. Sleeping between two of them slows
    decoding by a third; spinning halves any other worker on the same cores. So threads spin, for
    half a millisecond at most, where workers compute one after another.

    Args:
        dtype: model.dtype.
        take_turns: the phases of a step do not overlap, and the workers of one phase have enough
            cores.
    """
    count = str(threads)
    spins = take_turns and device == "cpu"
    return worker_variables() | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "GOMP_SPINCOUNT": "10000" if spins else "0",
        "KMP_BLOCKTIME": "1" if spins else "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # ninja, with which vLLM's kernels for GPUs are compiled, lives beside python
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu" if device == "cpu" else "cuda",
        **(RETAIN_MEMORY if device == "cpu" else {}),
        **({"TRITON_F32_DEFAULT": "ieee"} if device == "cuda" and dtype == "float32" else {}),
        **(
            {failpoints.VARIABLE: os.environ[failpoints.VARIABLE]}
            if failpoints.VARIABLE in os.environ
            else {}
        ),
    }
