"""Compares time and memory of the head pass with autograd, torch.compile and Liger, as measured by
`tools/bench head`.
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
"""Variants that compute the same loss, and the reason why ours should take no longer."""
PUBLISHED = {
    ("Liger FusedLinearJSDLoss bf16 dense", 1024): 8.3,
    ("Liger FusedLinearJSDLoss bf16 dense", 8192): 60.7,
}
"""Milliseconds by variant and number of tokens, on an H100 80GB HBM3, from Liger's own benchmark
data of version 0.4.2.
"""
CHUNK = 1024  # rows at once, train.head_chunk
MATRIX_BYTES = 4 + 4 + 2
"""Bytes for each pair of a row of a chunk and a token of the vocabulary: the logits of student and
teacher in float32, and the gradient in bfloat16.
"""
ROW_BYTES = 28 + 2  # bytes of such a pair that the kernels of kernels/triton_rows.py read and write
SLOWER = 1.5
"""Bound on our time over its floor: our kernels must reach two thirds of the rates of single
products and copies.
"""
SPARE = 1.1  # for the rounding of the allocator, and the workspace of the products

SHAPES = {
    "cuda": [
        Shape(rows=rows, width=4096, teacher_width=4096, vocabulary=128256) for rows in (1024, 8192)
    ],
    "cpu": [Shape(rows=64, width=64, teacher_width=64, vocabulary=1024)],
}
"""The shapes by device; on a GPU those of Llama 3 8B."""


def speed(ground: Ground) -> Iterator[Check]:
    """Yield the figures of every variant, and the checks of our pass."""
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
    """Yield milliseconds and extra memory of every variant, or why it could not be measured."""
    seconds = medians({name: row["seconds"] for name, row in result["variants"].items()})
    for name, row in result["variants"].items():
        reason = f"{row['extra_bytes'] / 2**20:.0f} MiB besides the gradients"
        if published := PUBLISHED.get((name, result["rows"])):
            reason += f"; published of an H100: {published} ms"
        yield figure(f"{name}, {result['rows']} tokens", 1e3 * seconds[name], "ms", reason)
    for name, why in result["failed"].items():
        yield not_run(f"{name}, {result['rows']} tokens", why)


def limits(result: Mapping[str, Any], floor: float, ground: Ground) -> Iterator[Check]:
    """Check the time of our pass against its floor, autograd and Liger, and its memory."""
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
    """A lower bound in seconds: the products that any exact method needs, at flop_s, and the memory
    traffic of our kernels, at bytes_s.
    """
    return shape.flop / flop_s + ROW_BYTES * shape.rows * shape.vocabulary / bytes_s


def copy_rate(device: str) -> float:
    """The bytes that a large copy reads and writes per second, the best of 5."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)

    def call() -> None:
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * source.nbytes / min(interleaved({"": call}, 5)[""])
