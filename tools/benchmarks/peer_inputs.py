"""Makes the inputs that all peers share: models, prompts and lengths."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridrl.data.problem_sources import load_problems
from hybridrl.models.loading import resolve
from hybridrl.settings.run import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A student and its teacher, which share a vocabulary."""

    student: str
    teacher: str
    dtype: str
    instruction: str
    lr: float


PAIRS = {
    "smollm2": Pair(
        student="builtin:smollm2-135m-instruct",
        teacher="builtin:smollm2-135m-instruct",
        dtype="bfloat16",
        lr=1e-5,
        instruction="Write an expression of these numbers that has this value: {prompt}",
    ),
    "tiny": Pair(
        student="builtin:countdown-student",
        teacher="builtin:countdown-teacher",
        dtype="float32",
        lr=1e-4,
        instruction="{prompt}",
    ),
}

NEVER = "<never>"
POSITIONS = 128
"""The number of positions for a prompt and the forced response, more than the tiny model's config
allows. It has rotary embeddings, so more positions need no further weights.
"""


def endless(model: str, folder: Path) -> Path:
    """Copy a model so that it never writes its end token; all responses then have the full length.

    The new end token has no row in the output embedding. This does not change any log-prob, whereas
    a minimal length would remove the end token from the distribution.
    """
    shutil.copytree(resolve(model), folder)
    config = json.loads((folder / "config.json").read_text())
    end = config["vocab_size"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer["added_tokens"].append({"id": end, "content": NEVER} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    positions = max(POSITIONS, config["max_position_embeddings"])
    changes: dict[str, dict] = {
        "config.json": {"eos_token_id": end, "max_position_embeddings": positions},
        "generation_config.json": {"eos_token_id": end},
    }
    changes |= {
        "tokenizer_config.json": {
            "eos_token": NEVER,
            "pad_token": tokenizer["added_tokens"][0]["content"],
        }
    }
    change(folder, changes)
    return folder


def without_end(model: Path) -> Path:
    """Copy an endless model into a folder beside it, without any end token.

    Our runs refuse an end token that has no row in the embeddings, whereas TRL requires an end
    token.
    """
    folder = model.with_name(f"{model.name}-without-end")
    shutil.copytree(model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != NEVER]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    change(
        folder,
        {
            "config.json": {"eos_token_id": None},
            "generation_config.json": {"eos_token_id": None},
            "tokenizer_config.json": {"eos_token": None},
        },
    )
    return folder


def change(folder: Path, values_of: Mapping[str, Mapping[str, object]]) -> None:
    """Overwrite values in JSON files of a folder, by the name of the file."""
    for name, values in values_of.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def write_problems(
    folder: Path, instruction: str, count: int, num_heldout: int = 1, seed: int = 0
) -> Path:
    """Write Countdown training problems as JSON lines with prompt, numbers and target."""
    problems, _ = load_problems(
        DataConfig(task="countdown", num_train=count, num_heldout=num_heldout), seed=seed
    )
    rows = [{"prompt": instruction.replace("{prompt}", p.prompt)} | p.columns for p in problems]
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
