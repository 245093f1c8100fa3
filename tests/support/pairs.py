"""A base model and an instruct model of the same vocabulary, as tiny models on disk."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from hybridrl.models.tiny import tiny_model, tiny_tokenizer

EOS = 2
"""The token <eos>, with which the base model ends a text."""
END = 23
"""The token <end>, with which the instruct model ends a turn."""
TURN = 24
"""The token <turn>, with which the instruct model's chat template begins a turn."""

TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{{ '' if enable_thinking else '=' }}{% endif %}"
)


def instruct_tokenizer(
    eos: str = "<end>", template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two more special tokens, by default that of the instruct model. The
    base model's has eos="<eos>" and template=None.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<turn>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def save_pair(folder: Path) -> tuple[Path, Path]:
    """Save both models with random weights; returns the folders of the base and instruct model."""
    tokenizers = {
        "student": instruct_tokenizer("<eos>", None),
        "teacher": instruct_tokenizer(),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        torch.manual_seed(seed)
        tiny_model(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "student", folder / "teacher"


def pair_overrides(folder: Path) -> list[str]:
    """The settings of a run with the base model as student and the instruct model as teacher.

    Their folders need not exist yet.
    """
    return [
        f"run.dir={folder / 'run'}",
        "experiment=quickstart",
        f"model.path={folder / 'student'}",
        f"teachers.main.path={folder / 'teacher'}",
    ]
