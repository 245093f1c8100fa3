"""Train the tiny models that are shipped in hybridrl/assets on solved Countdown problems.

    python tools/countdown_models.py --out runs/teacher --steps 2000

One process, one thread, float32; the same arguments give the same weights on the same machine.
"""

import argparse
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hybridrl.data.countdown_puzzles import Countdown, Equation
from hybridrl.models.tiny import tiny_model, tiny_tokenizer

NUM_HELDOUT = 512  # excluded from training; the default of data.num_heldout
NUM_HELDOUT_TWO = 64  # out of about 150 problems with two numbers
OPERATOR = re.compile(r"([-+*])")
IGNORED = -100  # the label that cross_entropy ignores


class Solved(Protocol):
    """A problem with a solution to imitate."""

    @property
    def prompt(self) -> str: ...

    @property
    def solution(self) -> str: ...


def train(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train a new tiny model on solved(args)."""
    return imitate(solved(args), args)


def imitate(
    examples: Iterator[Solved],
    args: argparse.Namespace,
    enough: Callable[[PreTrainedModel, PreTrainedTokenizerBase], bool] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train a new tiny model to minimise the cross-entropy of the solution and its end token, given
    the prompt; returns the model and its tokenizer.

    AdamW with a linear warm-up and a cosine decay to args.lr_end.

    Args:
        examples: an endless iterator.
        args: the arguments of `parser`.
        enough: called after every tenth step; training stops when it returns True.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, args.layers)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay
    )
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = _lr(step, args)
        input_ids, labels = _batch(list(islice(examples, args.batch)), tokenizer)
        logits = model(input_ids=input_ids).logits[:, :-1]  # [B, T-1, V] float32
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            label_smoothing=args.label_smoothing,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{args.steps} loss {loss.item():.3f}", flush=True)
        if enough is not None and (step + 1) % 10 == 0 and enough(model, tokenizer):
            break
    return model, tokenizer


def solved(args: argparse.Namespace) -> Iterator[Equation]:
    """Yield problems without end, each with the solution to imitate; held-out problems are left
    out.

    args.two_numbers is the share of problems with two numbers instead of three, args.spaced the
    share of solutions with a space on each side of an operator.
    """
    rng = random.Random(f"countdown sft {args.seed}")
    three = _outside(Countdown(), NUM_HELDOUT, rng)
    two = _outside(Countdown(num_numbers=2), NUM_HELDOUT_TWO, rng)
    choices = random.Random(f"countdown choices {args.seed}")
    while True:
        equation = next(two if choices.random() < args.two_numbers else three)
        if choices.random() < args.spaced:
            equation = replace(equation, solution=OPERATOR.sub(r" \1 ", equation.solution))
        yield equation


def _outside(game: Countdown, num_heldout: int, rng: random.Random) -> Iterator[Equation]:
    return game.stream(rng, {equation.key for equation in game.heldout(num_heldout)})


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 16,
) -> list[str]:
    """The greedily decoded answers without special tokens, of at most max_new_tokens tokens."""
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.eval().generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    answers = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def _lr(step: int, args: argparse.Namespace) -> float:
    warmup = min(1.0, (step + 1) / max(1, args.warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return warmup * (args.lr_end + (args.lr - args.lr_end) * cosine)


def _batch(examples: Sequence[Solved], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Right-padded input_ids and labels, each [B, T] int64; prompts and padding are IGNORED."""
    rows = []
    labels = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        solution = tokenizer(example.solution, add_special_tokens=False)["input_ids"]
        answer = [*solution, tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return input_ids, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description="Supervised training of the tiny model.")
    arguments.add_argument(
        "--out", type=Path, required=True, help="the Hugging Face folder to write"
    )
    arguments.add_argument("--steps", type=int, required=True)
    arguments.add_argument("--layers", type=int, default=4, help="of the decoder")
    arguments.add_argument("--batch", type=int, default=128, help="problems a step")
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument(
        "--lr-end", type=float, default=0.0, help="last learning rate; equal to --lr: constant"
    )
    arguments.add_argument("--warmup", type=int, default=100, help="steps")
    arguments.add_argument("--weight-decay", type=float, default=0.1)
    arguments.add_argument("--label-smoothing", type=float, default=0.01)
    arguments.add_argument(
        "--two-numbers", type=float, default=0.0, help="share of the problems with two numbers"
    )
    arguments.add_argument(
        "--spaced", type=float, default=0.0, help="share of the solutions with spaces"
    )
    arguments.add_argument("--seed", type=int, default=0, help="of weights and problems")
    arguments.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the saved weights"
    )
    return arguments


def main() -> None:
    args = parser().parse_args()
    model, tokenizer = train(args)
    model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
