"""Measures the gradient's error and the bytes per token of a teacher's hidden states in narrow
forms.

The student is the teacher with noise on its weights. The dense gradient of the reverse KL at the
student's hidden states is computed in float64 from the teacher's exact states, and from the same
states rounded to bfloat16 (the form that a run sends), to int8 and to fp8 with one scale per row. A
form is usable if its error is below that of bfloat16. The last figure is the rate at which one
process passes data to another through Ray's object store.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import ray
import torch
from torch import Tensor

from benchmarks.stage import settings_of
from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.models.loading import load_model, load_tokenizer
from hybridrl.models.output_head import output_weight
from hybridrl.runtime.cluster import Cluster

TEXT = """A student model samples a response to each prompt. Frozen teachers compute the
log-probabilities of every response token, and reward functions judge the whole text. Both become
one gradient: the divergence from the teacher over the whole vocabulary, and the reward of what
follows a token. 3 * 7 = 21, 12 + 9 = 21, (5 - 2) * 7 = 21. The weights then travel to the engines.
"""


def to_int8(rows: Tensor) -> Tensor:
    """Round to 255 levels between minus and plus the largest magnitude of each row."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round().clamp(-127, 127) * scale


def to_fp8(rows: Tensor) -> Tensor:
    """Round to float8_e4m3fn, scaled so that the largest magnitude of each row is the largest
    number of that type.
    """
    scale = rows.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], int]]] = {
    "bfloat16": (lambda rows: rows.bfloat16().to(rows.dtype), lambda width: 2 * width),
    "int8": (to_int8, lambda width: width + 4),
    "fp8": (to_fp8, lambda width: width + 4),
}
"""For each form, the rounding of [R, H] rows, and the bytes of a row of H numbers."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="builtin:smollm2-135m-instruct")
    parser.add_argument(
        "--noise",
        nargs="+",
        type=float,
        default=[0.01, 0.05, 0.2],
        help="standard deviations of the student's noise, as shares of each weight matrix's",
    )
    parser.add_argument("--mb", type=int, default=64, help="size of an object that is passed on")
    parser.add_argument("--repeats", type=int, default=5)


@torch.no_grad()
def states(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[T, H] float64, the last hidden states of a model for token ids [T]."""
    return model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0].double()


def run(options: argparse.Namespace) -> dict:
    ids = torch.tensor(load_tokenizer(options.model, None).encode(TEXT))
    teacher = load_model(options.model)
    teacher_rows = states(teacher, ids[:-1])
    head = output_weight(teacher).detach().double()
    width = teacher_rows.shape[1]
    largest = teacher_rows.abs().amax(1) / teacher_rows.square().mean(1).sqrt()
    print(f"{len(teacher_rows)} tokens of {width} numbers; largest over rms {largest.median():.0f}")
    results: dict = {"tokens": len(teacher_rows), "width": width, "students": []}
    for noise in options.noise:
        student = noisy(load_model(options.model), noise)
        rows = states(student, ids[:-1])
        exact, kl = gradient(rows, head, teacher_rows, ids[1:])
        errors = {
            name: relative_error(gradient(rows, head, rounded(teacher_rows), ids[1:])[0], exact)
            for name, (rounded, _) in FORMS.items()
        }
        results["students"].append({"noise": noise, "kl": kl, "errors": errors})
        shown = "  ".join(
            f"{name} {error:.2%} ({error / errors['bfloat16']:.1f} x)"
            for name, error in errors.items()
        )
        print(f"KL {kl:.4f} nats a token: error of the gradient by {shown}")
    results["bytes"] = {name: bytes_of(width) for name, (_, bytes_of) in FORMS.items()}
    results["edge_gb_s"] = edge_rate(options.mb * 2**20, options.repeats)
    print(f"bytes a token {results['bytes']}; object store {results['edge_gb_s']:.2f} GB/s")
    return results


@torch.no_grad()
def noisy(model: torch.nn.Module, noise: float) -> torch.nn.Module:
    """Add noise of the standard deviation noise * std to each weight matrix, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            random = torch.randn(parameter.shape, generator=generator)
            parameter += noise * parameter.std() * random
    return model


def gradient(
    rows: Tensor, head: Tensor, teacher_rows: Tensor, drawn: Tensor
) -> tuple[Tensor, float]:
    """The gradient [R, H] of the summed reverse KL at the student's hidden states, and the mean KL
    in nats.
    """
    count = len(rows)
    zero = torch.zeros(count, dtype=rows.dtype)
    columns = TokenColumns(
        token_ids=drawn,
        token_weight=torch.ones_like(zero),
        sparse=zero,
        value_slope=zero,
        sampler_logprobs=zero,
        old_logprobs=zero,
    )
    teacher = HiddenTeacher(hidden=teacher_rows, lm_head=head, weight=torch.ones_like(zero))
    rows = rows.clone().requires_grad_()
    loss, stats = hybrid_head_loss(rows, head, (teacher,), columns, HeadRule())
    loss.backward()
    assert rows.grad is not None
    return rows.grad, float(stats.kl.mean())


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@ray.remote
class Receiver:
    """An actor that copies the arrays it receives, so that every byte is read."""

    def copied(self, rows) -> int:
        return rows.copy().nbytes


def edge_rate(nbytes: int, repeats: int) -> float:
    """The rate in GB/s at which one process puts an object into the store and another reads it."""
    with Cluster(settings_of()):
        receiver = Receiver.remote()
        rows = torch.ones(nbytes, dtype=torch.uint8).numpy()
        seconds = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            ray.get(receiver.copied.remote(ray.put(rows)), timeout=60)
            seconds.append(time.perf_counter() - started)
        return nbytes / statistics.median(seconds[1:]) / 1e9


def draw(results: dict, picture: Path) -> None:
    """Draw the error of each form over the divergence of the student."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(6, 4))
    for name in FORMS:
        panel.plot(
            [student["kl"] for student in results["students"]],
            [student["errors"][name] for student in results["students"]],
            marker="o",
            label=f"{name}, {results['bytes'][name]} bytes a token",
        )
    panel.set(xscale="log", yscale="log", xlabel="KL to the teacher, nats a token")
    panel.set(ylabel="relative error of the gradient")
    panel.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
