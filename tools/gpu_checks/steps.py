"""The steps of the proof, their parts, and what each part needs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from gpu_checks.ground import Ground

KERNELS = ("torch", "triton")
LEARNER = (*KERNELS, "transformers", "deepspeed", "hydra", "safetensors", "xxhash", "filelock")
GRAPH = (*LEARNER, "ray", "vllm", "matplotlib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some checks of a step. They run in their own process, so that a fault of the device ends only
    these checks.
    """

    name: str
    title: str
    run: str  # "module:function" of this package, which yields the checks of a Ground
    packages: tuple[str, ...]
    gpus: int = 1
    nodes: int = 1
    on_cpu: bool = True  # whether it has a reduced form for CPUs
    limit_s: float = 1800.0
    # environment variables that are set on a CPU
    cpu_environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    number: int
    title: str
    parts: tuple[Part, ...]


STEPS = (
    Step(
        number=1,
        title="torch and Triton alone: the loss over the vocabulary",
        parts=(
            Part(
                name="products",
                title="products that keep their float32 sums",
                run="products:products",
                packages=KERNELS,
            ),
            Part(
                name="rows",
                title="the Triton kernels against fp64",
                run="triton_rows:rows",
                packages=KERNELS,
                cpu_environment={"TRITON_INTERPRET": "1"},
            ),
            Part(
                name="head",
                title="the head pass against fp64",
                run="head_pass:numerics",
                packages=KERNELS,
            ),
            Part(
                name="speed",
                title="time and memory of the head pass",
                run="head_speed:speed",
                packages=KERNELS,
            ),
        ),
    ),
    Step(
        number=2,
        title="learner and scorer with DeepSpeed, without Ray and vLLM",
        parts=(
            Part(
                name="learner-float32",
                title="steps, checkpoint and scorer in float32",
                run="learner:in_float32",
                packages=LEARNER,
            ),
            Part(
                name="learner-bfloat16",
                title="steps, checkpoint and scorer in bfloat16",
                run="learner:in_bfloat16",
                packages=LEARNER,
            ),
            Part(
                name="plan",
                title="memory and bytes against the plan",
                run="planned:rows",
                packages=(*LEARNER, "ray"),  # the plan reads the layout of a run's workers
            ),
        ),
    ),
    Step(
        number=3,
        title="a whole run on one GPU",
        parts=(
            Part(
                name="object-store",
                title="weights through Ray's object store",
                run="graph:object_store",
                packages=GRAPH,
            ),
            Part(
                name="ipc",
                title="weights by CUDA IPC",
                run="graph:ipc",
                packages=GRAPH,
                on_cpu=False,
            ),
            Part(
                name="turns",
                title="engine and learner take turns",
                run="graph:turns",
                packages=GRAPH,
            ),
        ),
    ),
    Step(
        number=4,
        title="several GPUs: NCCL, ZeRO 3, bfloat16",
        parts=(
            Part(
                name="nccl",
                title="weights by NCCL, and the run continued",
                run="graph:nccl",
                packages=GRAPH,
                gpus=4,
                on_cpu=False,
                limit_s=2400.0,
            ),
            Part(
                name="lost-engine",
                title="an engine dies, and another takes its place in NCCL's group",
                run="graph:lost_engine",
                packages=GRAPH,
                gpus=4,
                on_cpu=False,
            ),
            Part(
                name="teachers",
                title="a teacher over two GPUs, and one in an engine of vLLM",
                run="graph:teachers",
                packages=GRAPH,
                gpus=4,
                on_cpu=False,
                limit_s=2400.0,
            ),
            Part(
                name="adapters",
                title="adapters, merged and by themselves",
                run="graph:adapters",
                packages=(*GRAPH, "peft"),
                gpus=4,
                on_cpu=False,
                limit_s=2400.0,
            ),
            Part(
                name="judge",
                title="a reward model on a GPU of its own",
                run="graph:judge",
                packages=GRAPH,
                gpus=4,
                on_cpu=False,
                limit_s=2400.0,
            ),
            Part(
                name="offload",
                title="a part of the learner in host memory",
                run="graph:offload",
                packages=GRAPH,
                gpus=4,
                on_cpu=False,
                limit_s=2400.0,
            ),
            Part(
                name="flash-attention",
                title="flash-attn in learner and scorer",
                run="graph:flash_attention",
                packages=(*GRAPH, "flash_attn"),
                gpus=4,
                on_cpu=False,
            ),
        ),
    ),
    Step(
        number=5,
        title="two nodes",
        parts=(
            Part(
                name="two-nodes",
                title="the workers of each group on different nodes",
                run="graph:two_nodes",
                packages=GRAPH,
                gpus=2,
                nodes=2,
                on_cpu=False,
            ),
        ),
    ),
)


def missing(part: Part, ground: Ground, *, gpus: int) -> str | None:
    """What the part needs but does not have, in a few words; None: nothing is missing.

    Args:
        gpus: the number of GPUs of this machine.
    """
    absent = [package for package in part.packages if find_spec(package) is None]
    if absent:
        return f"needs the package{'s' * (len(absent) > 1)} {', '.join(absent)}"
    if not ground.on_gpu:
        if part.on_cpu:
            return None
        return f"needs {devices(part)}; this is a run on a CPU"
    if part.nodes > 1 and not (ground.shared and "RAY_ADDRESS" in os.environ):
        return (
            f"needs a Ray cluster of {part.nodes} nodes with GPUs at RAY_ADDRESS, and a folder "
            "that all of them see: --shared FOLDER"
        )
    if gpus < part.gpus:
        return f"needs {part.gpus} GPUs, this machine has {gpus}"
    return None


def devices(part: Part) -> str:
    """The GPUs that a part needs, e.g. "4 GPUs" or "1 GPU on each of 2 nodes"."""
    count = f"{part.gpus} GPU{'s' * (part.gpus > 1)}"
    return count if part.nodes == 1 else f"{count} on each of {part.nodes} nodes"
