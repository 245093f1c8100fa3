"""Compares our loss over the vocabulary with autograd on full logits, other kernels, bare products.

`dense` rows compute KL(p || q) alone; `hybrid` rows also have a cost per token. On a GPU, run
`tools/bench head --all-shapes`.
"""

import argparse
import ctypes
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import head_peers
from benchmarks.timing import interleaved, medians
from hybridrl.kernels.head import HeadRule, hybrid_head_loss
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.kernels.token_columns import TokenColumns
from hybridrl.kernels.workspace import Workspace

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = (1024, 4096, 8192, 16384)
SHAPES = ((4096, 4096, 128256), (2048, 4096, 151936), (1024, 4096, 151936))
"""(Hs, Ht, V) of Llama 3 8B with itself as teacher, and of Qwen3 1.7B and 0.6B with 8B as
teacher.
"""

SLICE = 64
"""The number of rows on which gradients are compared with fp64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    rows: int
    width: int
    teacher_width: int
    vocabulary: int

    @property
    def flop(self) -> int:
        """The operations of the products that any exact method needs: 2NV(3Hs + Ht)."""
        return 2 * self.rows * self.vocabulary * (3 * self.width + self.teacher_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The inputs of the loss from student and teacher; those from the student require gradients."""

    hidden: Tensor  # [N, Hs]
    lm_head: Tensor  # [V, Hs]
    teacher_hidden: Tensor  # [N, Ht]
    teacher_head: Tensor  # [V, Ht]
    ids: Tensor  # [N]
    cost: Tensor  # [N]

    def forget(self) -> None:
        self.hidden.grad = None
        self.lm_head.grad = None


def problem(shape: Shape, dtype: torch.dtype, device: str, *, peaked: bool) -> Problem:
    """Random inputs.

    Args:
        peaked: logits of variance 16, and a teacher that is the student plus noise, as is typical
            late in training; False: independent logits of variance 1.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*size, scale):
        return (torch.randn(*size, generator=g, device=device) * scale).to(dtype)

    spread = 4.0 if peaked else 1.0
    hidden = normal(shape.rows, shape.width, scale=spread)
    lm_head = normal(shape.vocabulary, shape.width, scale=shape.width**-0.5)
    teacher_hidden = normal(shape.rows, shape.teacher_width, scale=1.0)
    teacher_head = normal(shape.vocabulary, shape.teacher_width, scale=shape.teacher_width**-0.5)
    if peaked:
        shared = min(shape.width, shape.teacher_width)
        teacher_hidden = teacher_hidden * 0.1
        teacher_head = teacher_head.clone()
        teacher_hidden[:, :shared] += hidden[:, :shared]
        teacher_head[:, :shared] = lm_head[:, :shared]
    return Problem(
        hidden=hidden.requires_grad_(),
        lm_head=lm_head.requires_grad_(),
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
        ids=torch.randint(shape.vocabulary, (shape.rows,), generator=g, device=device),
        cost=torch.randn(shape.rows, generator=g, device=device),
    )


def ours(p: Problem, rule: HeadRule, *, hybrid: bool) -> None:
    """Compute our loss and both gradients in one pass, chunk by chunk."""
    ones = torch.ones(len(p.ids), device=p.ids.device)
    terms = TokenColumns(
        token_ids=p.ids,
        token_weight=ones / len(p.ids),
        sparse=p.cost * hybrid,
        value_slope=0 * ones,
        sampler_logprobs=0 * ones,
        old_logprobs=0 * ones,
    )
    teacher = HiddenTeacher(hidden=p.teacher_hidden, lm_head=p.teacher_head, weight=ones)
    hybrid_head_loss(p.hidden, p.lm_head, (teacher,), terms, rule)[0].backward()


def full_logits(p: Problem, *, hybrid: bool) -> Tensor:
    """The same loss on full logits, with log-softmax in fp32."""
    logp = torch.log_softmax((p.hidden @ p.lm_head.T).float(), -1)
    with torch.no_grad():
        logq = torch.log_softmax((p.teacher_hidden @ p.teacher_head.T).float(), -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    return (kl + p.cost * logp.gather(1, p.ids[:, None])[:, 0]).mean() if hybrid else kl.mean()


def autograd(p: Problem, *, hybrid: bool, compiled: bool = False) -> None:
    loss = torch.compile(full_logits) if compiled else full_logits
    loss(p, hybrid=hybrid).backward()


def products(p: Problem, *, out: tuple[Tensor, ...]) -> None:
    """Compute the four matrix products that any exact method needs, into memory that exists
    already.

    This is fair, because our pass also keeps its memory between calls.
    """
    logits, teacher_logits, d_hidden, d_head = out
    rows = slice(len(p.ids))
    with torch.no_grad():
        torch.mm(p.hidden, p.lm_head.T, out=logits[rows])
        torch.mm(p.teacher_hidden, p.teacher_head.T, out=teacher_logits[rows])
        torch.mm(logits[rows], p.lm_head, out=d_hidden[rows])
        torch.mm(logits[rows].T, p.hidden, out=d_head)


def outputs(p: Problem) -> tuple[Tensor, ...]:
    """Memory for the products: both models' logits [N, V], dHidden [N, Hs] and dHead [V, Hs].

    They are filled with zeros, so that every page is mapped.
    """
    logits = p.hidden.new_zeros(len(p.ids), len(p.lm_head))
    return logits, torch.zeros_like(logits), torch.zeros_like(p.hidden), torch.zeros_like(p.lm_head)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[512, 2048], help="N, a table for each"
    )
    for name, default in {
        "width": 576,
        "teacher-width": 576,
        "vocabulary": 49152,
        "chunk": 512,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--peaked",
        action="store_true",
        help="a student near its teacher, as late in training; else independent ones",
    )
    parser.add_argument(
        "--all-shapes",
        action="store_true",
        help="N of 1024 to 16384 for three pairs of models, flat and peaked: for a GPU",
    )
    parser.add_argument(
        "--trl",
        type=Path,
        help="a wheel of TRL with its kernel; by default an installed trl, if there is one",
    )


def run(options: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths = {
        "width": options.width,
        "teacher_width": options.teacher_width,
        "vocabulary": options.vocabulary,
    }
    cases = [(Shape(rows=n, **widths), options.peaked) for n in options.rows]
    if options.all_shapes:
        cases = [
            (Shape(rows=n, width=s, teacher_width=t, vocabulary=v), k)
            for s, t, v in SHAPES
            for n in ROWS
            for k in (False, True)
        ]
    square = square_rate(device)
    print(
        "square products: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in square.items())
    )
    shapes = [one(options, device, square, *case) for case in cases]
    return {
        "device": device,
        "chunk": options.chunk,
        "square_flop_s": square,
        "peers": head_peers.versions(options.trl),
        "shapes": shapes,
    }


def variants(
    p: Problem, name: str, options: argparse.Namespace
) -> dict[str, Callable[[Problem], object]]:
    """The calls to compare, by name, for inputs in one dtype.

    Args:
        name: the dtype, a key of DTYPES.
    """
    rule = HeadRule(chunk=options.chunk)
    device = p.hidden.device.type
    results: dict[str, Callable[[Problem], object]] = {
        f"products {name}": partial(products, out=outputs(p))
    }
    for kind, hybrid in (("hybrid", True), ("dense", False)):
        results[f"ours {name} {kind}"] = partial(ours, rule=rule, hybrid=hybrid)
        results[f"autograd {name} {kind}"] = partial(autograd, hybrid=hybrid)
    if name == "bf16" and device == "cpu":
        results["ours bf16 hybrid, fp32 logits"] = partial(
            ours, rule=replace(rule, exact_logits=True), hybrid=True
        )
        results["ours bf16 hybrid, fp32 products"] = partial(
            ours, rule=replace(rule, wide_products=True), hybrid=True
        )
    if device == "cuda":
        results[f"torch.compile {name} hybrid"] = partial(autograd, hybrid=True, compiled=True)
    return results | (head_peers.available(options.trl) if name == "bf16" else {})


def one(
    options: argparse.Namespace, device: str, square: dict[str, float], shape: Shape, peaked: bool
) -> dict:
    """Measure time, memory and error of every variant on one problem; failures are reported too."""
    calls = {}
    rates = {}
    measured = {}
    failed = {}
    for name, dtype in DTYPES.items() if device == "cpu" else (("bf16", torch.bfloat16),):
        p, part = (
            problem(replace(shape, rows=n), dtype, device, peaked=peaked)
            for n in (shape.rows, min(shape.rows, SLICE))
        )
        for variant, call in variants(p, name, options).items():
            try:
                timed = partial(_timed, p, call, device)
                timed()  # the first call may compile
                measured[variant] = {
                    "extra_bytes": extra_bytes(p, timed, device),
                    "error": _error(part, call, "hybrid" in variant),
                }
                calls[variant] = timed
                rates[variant] = square[name]
            # A kernel of another package may fail, or full logits may not fit into the GPU; the
            # other variants are measured all the same.
            except Exception as error:
                failed[variant] = f"{type(error).__name__}: {error}".splitlines()[0]
            p.forget()
    seconds = interleaved(calls, options.repeats)
    for variant, values in seconds.items():
        rate = shape.flop / statistics.median(values)
        measured[variant] |= {"seconds": values, "share_of_square": rate / rates[variant]}
    result = {
        **asdict(shape),
        "peaked": peaked,
        "flop": shape.flop,
        "variants": measured,
        "failed": failed,
    }
    show(result)
    return result


def _timed(p: Problem, call: Callable[[Problem], object], device: str) -> None:
    p.forget()
    call(p)
    if device == "cuda":
        torch.cuda.synchronize()


def extra_bytes(p: Problem, call: Callable[[], object], device: str) -> int:
    """The growth of memory at the peak of a call, less the two gradients; never negative.

    It is measured by torch's allocator on CUDA, else by the resident set. It is 0 for the bare
    products, which write into memory that exists already.
    """
    p.forget()
    Workspace.release()
    gradients = sum(t.numel() * t.element_size() for t in (p.hidden, p.lm_head))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return max(torch.cuda.max_memory_allocated() - before - gradients, 0)
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = resident("VmRSS")
    call()
    return max(resident("VmHWM") - before - gradients, 0)


def resident(mark: str) -> int:
    """The bytes of this process under a name of /proc/self/status, e.g. VmRSS."""
    return 1024 * next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(mark)
    )


def _error(p: Problem, call: Callable[[Problem], object], hybrid: bool) -> dict[str, float] | None:
    """The relative errors of both gradients against fp64; None: the call makes no gradient."""
    p.forget()
    call(p)
    if p.hidden.grad is None:
        return None
    wide = {
        name: value.detach().double()
        for name, value in asdict_shallow(p).items()
        if value.is_floating_point()
    }
    exact = replace(
        p,
        **wide
        | {"hidden": wide["hidden"].requires_grad_(), "lm_head": wide["lm_head"].requires_grad_()},
    )
    autograd(exact, hybrid=hybrid)
    pairs = {"hidden": (p.hidden, exact.hidden), "head": (p.lm_head, exact.lm_head)}
    return {
        name: float((a.grad.double() - b.grad).norm() / b.grad.norm())
        for name, (a, b) in pairs.items()
    }


def asdict_shallow(p: Problem) -> dict[str, Tensor]:
    return {f.name: getattr(p, f.name) for f in fields(p)}


def square_rate(device: str) -> dict[str, float]:
    """The FLOP/s of a square product of size 2048 (8192 on CUDA) in each dtype, the best of 5."""
    size = 8192 if device == "cuda" else 2048
    results = {}
    for name, dtype in DTYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)

        def call(a: Tensor = a, out: Tensor = out) -> None:
            torch.mm(a, a, out=out)
            if device == "cuda":
                torch.cuda.synchronize()

        results[name] = 2 * size**3 / min(interleaved({"": call}, 5)[""])
    return results


def show(results: dict) -> None:
    print("N={rows} Hs={width} Ht={teacher_width} V={vocabulary} peaked={peaked}".format(**results))
    middle = medians({name: row["seconds"] for name, row in results["variants"].items()})
    for name, row in results["variants"].items():
        error = " ".join(f"{e:.1e}" for e in row["error"].values()) if row["error"] else ""
        rate = results["flop"] / middle[name] / 1e9
        ratio = middle[name] / middle.get("ours bf16 hybrid", math.nan)
        speed = f"{rate:8.0f} GFLOP/s {row['share_of_square']:6.1%} of a square product"
        print(
            f"{name:37s} {middle[name]:8.4f} s {speed} {ratio:6.2f} x ours "
            f"{row['extra_bytes'] / 2**20:8.0f} MiB  {error}"
        )
    for name, why in results["failed"].items():
        print(f"{name:32s} left out: {why}")


def draw(results: dict, path: Path) -> None:
    """Draw the median of each shape's variants as bars, and the time of the products as a line."""
    from matplotlib import pyplot

    shapes = results["shapes"]
    figure, axes = pyplot.subplots(
        len(shapes), 1, figsize=(8, 0.5 + 3 * len(shapes)), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[:, 0], shapes, strict=True):
        middle = medians({name: row["seconds"] for name, row in shape["variants"].items()})
        bars = axis.barh(
            list(middle),
            list(middle.values()),
            color=["C1" if name.startswith("ours") else "C0" for name in middle],
        )
        axis.bar_label(bars, [f"{s:.3g} s" for s in middle.values()], padding=3)
        axis.axvline(middle["products bf16"], color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(
            xlabel="seconds",
            title="N={rows} Hs={width} Ht={teacher_width} V={vocabulary}".format(**shape),
            xmargin=0.15,
        )
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
