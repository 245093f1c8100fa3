"""Models that experiments need and that are not shipped; each is made when it is missing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import countdown_models

from reproduction.experiment import Setting, hashed

PREFIX = "made:"
MODELS: Mapping[str, Sequence[str]] = {
    # As the shipped student, but with a single layer.
    "one-layer": ("--layers", "1", "--steps", "400", "--lr-end", "1e-3"),
    # Students that know problems of two numbers as well.
    "both-tasks": ("--steps", "800", "--lr-end", "1e-3", "--two-numbers", "0.5"),
    "both-tasks-one-layer": (
        *("--layers", "1", "--steps", "800", "--lr-end", "1e-3", "--two-numbers", "0.5"),
    ),
    # As the shipped teacher, from other weights and by other problems.
    "stranger": ("--steps", "2000", "--seed", "1"),
    # As the shipped teacher, but every second solution has spaces.
    "two-styles": ("--steps", "2000", "--spaced", "0.5"),
}
"""Arguments of tools/countdown_models.py."""


def with_made_models(settings: Mapping[str, Setting], folder: Path) -> Mapping[str, Setting]:
    """The settings with the path of a model in the place of each "made:NAME"."""
    return {
        name: str(made(value.removeprefix(PREFIX), folder))
        if isinstance(value, str) and value.startswith(PREFIX)
        else value
        for name, value in settings.items()
    }


def made(name: str, folder: Path) -> Path:
    """The folder of a model of MODELS, which is known by its arguments' hash."""
    arguments = MODELS[name]
    path = folder / f"{name}-{hashed(list(arguments))}"
    if not (path / "config.json").exists():
        args = countdown_models.parser().parse_args(["--out", str(path), *arguments])
        model, tokenizer = countdown_models.train(args)
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)  # last, for its config.json says that the model is there
    return path
