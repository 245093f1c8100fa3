"""Checks learner and scorer with DeepSpeed, without Ray and vLLM: one rank and the tiny model.

The environment variables of a worker are set before anything imports DeepSpeed, which reads them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

from gpu_checks.check import Check
from gpu_checks.ground import Ground

LIMIT_S = 600.0


def in_float32(ground: Ground) -> Iterator[Check]:
    yield from in_dtype(ground, "float32")


def in_bfloat16(ground: Ground) -> Iterator[Check]:
    yield from in_dtype(ground, "bfloat16")


def in_dtype(ground: Ground, dtype: str) -> Iterator[Check]:
    set_environment(ground.device, dtype)
    expected = reference(ground)
    from gpu_checks.learner_cases import checks

    yield from checks(ground, dtype, expected)


def set_environment(device: str, dtype: str) -> None:
    from hybridrl.runtime.worker_env import worker_env

    threads = len(os.sched_getaffinity(0))
    os.environ |= worker_env(threads, device, dtype, take_turns=False)


def reference(ground: Ground) -> dict[str, list[float]]:
    """Losses and gradient norms of three steps in float32 on a CPU, and how far the weights moved.

    Another process computes them, because DeepSpeed serves only one kind of device in a process.

    Raises:
        RuntimeError: that process failed.
    """
    on_cpu = replace(ground, device="cpu")
    done = subprocess.run(
        [sys.executable, "-m", "gpu_checks.learner", on_cpu.to_json()],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the reference on the CPU failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(ground: Ground) -> None:
    set_environment("cpu", "float32")
    from gpu_checks.learner_cases import reference_steps

    print(json.dumps(reference_steps(ground)), flush=True)
    os._exit(0)  # gloo's destructors sometimes abort the process


if __name__ == "__main__":
    main(Ground.from_json(sys.argv[1]))
