"""Time and memory of the head pass, against autograd, torch.compile and Liger, as `tools/bench
head` measures them.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from benchmarks import head
from benchmarks.head import Shape
from benchmarks.timing import interleaved, medians

from gpu_checks.check import Check, failed, figure, not_run, within
from gpu_checks.ground import Ground

OURS = "ours bf16 hybrid"
OTHERS = {
    "autograd bf16 hybrid": "it makes the same products, and writes whole logits",
    "Liger JSDLoss + GRPOLoss bf16 hybrid": "it makes two passes over the vocabulary for the two "
    "terms",
}
"""Variants that compute the same, and why ours should take no longer."""
PUBLISHED = {
    ("Liger FusedLinearJSDLoss bf16 dense", 1024): 8.3,
    ("Liger FusedLinearJSDLoss bf16 dense", 8192): 60.7,
}
"""Milliseconds on an H100 80GB HBM3 by Liger's own benchmark data, of version 0.4.2."""
CHUNK = 1024  # rows at once, train.head_chunk
MATRIX_BYTES = 4 + 4 + 2
"""Of each token of a chunk and of the vocabulary: logits of student and teacher in float32, and the
gradient in bfloat16."""
ROW_BYTES = 28 + 2  # read and written by the kernels of kernels/triton_rows.py
SLOWER = 1.5
"""A kernel that reaches two thirds of the rates that single products and copies reach."""
SPARE = 1.1  # blocks of the allocator, and the products' own workspace

SHAPES = {
    "cuda": [
        Shape(rows=rows, width=4096, teacher_width=4096, vocabulary=128256) for rows in (1024, 8192)
    ],
    "cpu": [Shape(rows=64, width=64, teacher_width=64, vocabulary=1024)],
}
"""On a GPU those of Llama 3 8B."""


def speed(ground: Ground) -> Iterator[Check]:
    """The figures of every variant, and the limits of ours."""
    square = head.square_rate(ground.device)
    bandwidth = copy_rate(ground.device)
    for name, rate in square.items():
        yield figure(f"square product, {name}", rate / 1e12, "TFLOP/s")
    yield figure("copy, read and written", bandwidth / 1e12, "TB/s")
    for shape in SHAPES[ground.device]:
        result = head.one(options(), ground.device, square, shape, peaked=False)
        yield from figures(result)
        yield from limits(result, floor_s(shape, square["bf16"], bandwidth), ground)


def options() -> Namespace:
    parser = ArgumentParser()
    head.add_options(parser)
    return parser.parse_args(["--chunk", str(CHUNK)])


def figures(result: Mapping[str, Any]) -> Iterator[Check]:
    """Milliseconds and extra memory of every variant; of one that could not be measured the
    reason.
    """
    seconds = medians({name: row["seconds"] for name, row in result["variants"].items()})
    for name, row in result["variants"].items():
        reason = f"{row['extra_bytes'] / 2**20:.0f} MiB besides the gradients"
        if published := PUBLISHED.get((name, result["rows"])):
            reason += f"; published of an H100: {published} ms"
        yield figure(f"{name}, {result['rows']} tokens", 1e3 * seconds[name], "ms", reason)
    for name, why in result["failed"].items():
        yield not_run(f"{name}, {result['rows']} tokens", why)


def limits(result: Mapping[str, Any], floor: float, ground: Ground) -> Iterator[Check]:
    """The time of our pass against its floor, autograd and Liger, and its memory."""
    rows = result["rows"]
    variants = result["variants"]
    title = f"{OURS}, {rows} tokens"
    if OURS not in variants:
        yield failed(title, result["failed"].get(OURS, "it was not measured"))
        return
    if not ground.on_gpu:
        yield not_run(
            f"{title}, time and memory", "needs a GPU: the figures of a CPU say nothing about it"
        )
        return
    seconds = medians({name: row["seconds"] for name, row in variants.items()})
    yield within(
        f"{title}, time over floor",
        seconds[OURS] / floor,
        high=SLOWER,
        unit="x",
        reason=f"its products at the rate of a square one, and {ROW_BYTES} bytes for each token "
        f"and word at the rate of a copy, take {1e3 * floor:.1f} ms",
    )
    for other, reason in OTHERS.items():
        name = f"{title}, time over {other}"
        if other in variants:
            ratio = seconds[OURS] / seconds[other]
            yield within(name, ratio, high=1.0, unit="x", reason=reason)
        else:
            yield not_run(name, result["failed"].get(other, "the package is not installed"))
    yield within(
        f"{title}, memory",
        variants[OURS]["extra_bytes"] / 2**20,
        high=SPARE * expected_bytes(result) / 2**20,
        unit="MiB",
        reason=f"{MATRIX_BYTES} bytes for each token of a chunk and word, and the gradient of the "
        "output embedding in float32 if there are several chunks",
    )


def expected_bytes(result: Mapping[str, Any]) -> int:
    """The memory of our pass in bfloat16 on a GPU, besides both gradients."""
    chunk = min(CHUNK, result["rows"])
    several = result["rows"] > CHUNK
    summed = 4 * result["vocabulary"] * result["width"] if several else 0
    return MATRIX_BYTES * chunk * result["vocabulary"] + summed


def floor_s(shape: Shape, flop_s: float, bytes_s: float) -> float:
    """Seconds of the products that any exact method needs, and of our passes over the rows."""
    return shape.flop / flop_s + ROW_BYTES * shape.rows * shape.vocabulary / bytes_s


def copy_rate(device: str) -> float:
    """Bytes/s of a large copy, read and written; the best of 5."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * source.nbytes / min(interleaved({"": call}, 5)[""])
