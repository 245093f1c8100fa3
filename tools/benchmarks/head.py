"""The loss over the vocabulary: this package's one pass, plain autograd on full logits, and the bare matrix products."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import interleaved, medians
from hybridrl.ops.head import HeadRule, TokenTerms, hybrid_head_loss
from hybridrl.ops.teachers import HiddenTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Student and teacher of one shape, as leaves of a graph."""

    hidden: Tensor  # [N, H]
    lm_head: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H]
    teacher_head: Tensor  # [V, H]
    ids: Tensor  # [N]
    cost: Tensor  # [N]


def problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Problem:
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape, scale: (torch.randn(*shape, generator=g) * scale).to(device, dtype)  # noqa: E731
    return Problem(
        hidden=normal(rows, width, scale=1.0).requires_grad_(),
        lm_head=normal(vocabulary, width, scale=width**-0.5).requires_grad_(),
        teacher_hidden=normal(rows, width, scale=1.0),
        teacher_head=normal(vocabulary, width, scale=width**-0.5),
        ids=torch.randint(vocabulary, (rows,), generator=g).to(device),
        cost=torch.randn(rows, generator=g).to(device),
    )


def ours(p: Problem, chunk: int) -> None:
    """Both gradients in one pass, chunk by chunk."""
    ones = torch.ones(len(p.ids), device=p.ids.device)
    terms = TokenTerms(token_ids=p.ids, token_weight=ones / len(p.ids), sparse=p.cost, sampler_logprobs=0 * ones)
    teacher = HiddenTeacher(hidden=p.teacher_hidden, lm_head=p.teacher_head, weight=ones)
    hybrid_head_loss(p.hidden, p.lm_head, (teacher,), terms, HeadRule(chunk=chunk))[0].backward()


def autograd(p: Problem) -> None:
    """The same loss by torch on full logits, log-softmax in fp32."""
    logp = torch.log_softmax((p.hidden @ p.lm_head.T).float(), -1)
    with torch.no_grad():
        logq = torch.log_softmax((p.teacher_hidden @ p.teacher_head.T).float(), -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    (kl + p.cost * logp.gather(1, p.ids[:, None])[:, 0]).mean().backward()


def products(p: Problem) -> None:
    """The four matrix products that any exact method needs, 2NVH each: what is left is the floor."""
    with torch.no_grad():
        logits = p.hidden @ p.lm_head.T
        p.teacher_hidden @ p.teacher_head.T
        logits @ p.lm_head
        logits.T @ p.hidden


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, default in {"rows": 512, "width": 576, "vocabulary": 49152, "chunk": 128, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def run(options: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (options.rows, options.width, options.vocabulary)
    problems = {name: problem(*shape, dtype, device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    calls = {f"products {name}": lambda p=p: products(p) for name, p in problems.items()}
    calls |= {f"ours {name}": lambda p=p: ours(p, options.chunk) for name, p in problems.items()}
    calls |= {f"autograd {name}": lambda p=p: autograd(p) for name, p in problems.items()}
    seconds = interleaved(calls, options.repeats)
    for name, median in (found := medians(seconds)).items():
        rate = 8 * options.rows * options.width * options.vocabulary / median / 1e9
        print(f"{name:16s} {median:8.3f} s   {rate:8.0f} GFLOP/s by 8NHV   {median / found['ours bf16']:5.2f} x ours bf16")
    return {"shape": shape, "chunk": options.chunk, "seconds": seconds}
