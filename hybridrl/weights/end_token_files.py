"""Writing the end token of model.eos into the files of an exported model."""

import json
from pathlib import Path
from typing import Any

from hybridrl.models.loading import load_tokenizer, stop_token_ids

GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def write_end_token(folder: Path, eos: str) -> None:
    """Make a token the end token of a model folder, as it was in training.

    Generation stops at it and, as in training, at the tokens at which the model stopped before. It
    becomes the tokenizer's end token, to which templates may refer as `eos_token`.

    Args:
        folder: a folder with the files of the model that training started from; they are changed.
        eos: model.eos.

    Raises:
        ConfigError: `eos` is not one of the tokenizer's special tokens.
    """
    before = stop_token_ids(str(folder), load_tokenizer(str(folder)))
    tokenizer = load_tokenizer(str(folder), eos=eos)
    generation = read(folder / GENERATION)
    others = sorted(before - {tokenizer.eos_token_id})
    generation["eos_token_id"] = [tokenizer.eos_token_id, *others]
    # This key allows transformers to derive the settings from config.json and its end token again.
    generation.pop("_from_model_config", None)
    write(folder / GENERATION, generation)
    for name in TOKENIZER_FILES:
        settings = read(folder / name)
        if name == TOKENIZER_FILES[0] or "eos_token" in settings:
            write(folder / name, settings | {"eos_token": tokenizer.eos_token})


def read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write(file: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")
