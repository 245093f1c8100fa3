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
"""Variables that make glibc retain freed memory; see worker_env."""


def worker_env(threads: int, device: str, dtype: str, *, take_turns: bool) -> dict[str, str]:
    """Environment variables of a worker process: its number of threads, and no telemetry.

    Ray's dashboard shows them, so none is a secret.

    By default glibc returns a freed tensor of more than 32 MiB to the kernel and gets the next one
    as fresh pages, which are zeroed one by one. That took a quarter of a learner's step on CPU, so
    there the MALLOC variables make glibc retain memory. A process that computes on a GPU does not
    retain it: otherwise it would keep the host memory of a model that it has just loaded.

    vLLM's attention for float32 on GPUs is a Triton kernel, which multiplies in TF32 by default:
    too coarse for rollout.max_logprob_gap of float32.

    An engine computes thousands of small matrix products a second. Threads that sleep between two
    of them slow decoding by a third; threads that spin halve the speed of any other worker on the
    same cores. So threads spin, for a millisecond at most, only where workers compute one after
    another.

    Args:
        threads: number of threads of the process.
        device: cpu or cuda.
        dtype: model.dtype.
        take_turns: whether the phases of a step do not overlap, and the workers of each phase have
            enough cores. It is not cluster.take_turns.
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
        # ninja, which compiles vLLM's GPU kernels, is in the folder of the python executable
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
