"""The student and the teacher of the task of chains."""

import argparse
import random

import countdown_models
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reproduction.chains import MAX_NEW_TOKENS, MOST, heldout, rewards, stream

STUDENT_ACCURACY = 0.15
"""Share of right greedy answers to the longest chains. It rises from 2 % to 98 % within 100 steps,
and at which of them depends on rounding errors, so the student's training ends by its accuracy and
not by its steps.
"""
EXAMINED = 128  # chains


def teacher(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Supervised learning of chains of all lengths.

    Args:
        args: of countdown_models.parser.
    """
    return countdown_models.imitate(stream(random.Random(f"chains {args.seed}")), args)


def student(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `teacher`, ended once the model has STUDENT_ACCURACY."""
    chains = stream(random.Random(f"chains {args.seed}"))
    return countdown_models.imitate(chains, args, enough=is_student)


def is_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    longest = heldout(MOST, EXAMINED)
    prompts = [chain.prompt for chain in longest]
    answers = countdown_models.greedy_answers(model, tokenizer, prompts, MAX_NEW_TOKENS)
    return sum(rewards(answers, longest)) >= STUDENT_ACCURACY * EXAMINED
