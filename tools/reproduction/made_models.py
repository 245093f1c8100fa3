"""Models that experiments need and that are not shipped; each is made when it is missing."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import countdown_models
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reproduction import chain_models
from reproduction.experiment import Setting, hashed

PREFIX = "made:"
CHAINS = ("--steps", "600", "--batch", "64", "--lr", "2e-3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    train: Callable[[argparse.Namespace], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    arguments: Sequence[str]  # of countdown_models.parser


def countdown(*arguments: str) -> Recipe:
    return Recipe(train=countdown_models.train, arguments=arguments)


RECIPES: Mapping[str, Recipe] = {
    # As the shipped student, but with a single layer.
    "one-layer": countdown("--layers", "1", "--steps", "400", "--lr-end", "1e-3"),
    # Students that know problems of two numbers as well.
    "both-tasks": countdown("--steps", "800", "--lr-end", "1e-3", "--two-numbers", "0.5"),
    "both-tasks-one-layer": countdown(
        *("--layers", "1", "--steps", "800", "--lr-end", "1e-3", "--two-numbers", "0.5"),
    ),
    # As the shipped teacher, from other weights and by other problems.
    "stranger": countdown("--steps", "2000", "--seed", "1"),
    # As the shipped teacher, but every second solution has spaces.
    "two-styles": countdown("--steps", "2000", "--spaced", "0.5"),
    "chain-student": Recipe(train=chain_models.student, arguments=CHAINS),
    "chain-teacher": Recipe(train=chain_models.teacher, arguments=CHAINS),
}


def with_made_models(settings: Mapping[str, Setting], folder: Path) -> Mapping[str, Setting]:
    """The settings with the path of a model in the place of each "made:NAME"."""
    return {
        name: str(made(value.removeprefix(PREFIX), folder))
        if isinstance(value, str) and value.startswith(PREFIX)
        else value
        for name, value in settings.items()
    }


def made(name: str, folder: Path) -> Path:
    """The folder of a model of RECIPES, which is known by its arguments' hash."""
    recipe = RECIPES[name]
    path = folder / f"{name}-{hashed(list(recipe.arguments))}"
    if not (path / "config.json").exists():
        args = countdown_models.parser().parse_args(["--out", str(path), *recipe.arguments])
        model, tokenizer = recipe.train(args)
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)  # last, for its config.json says that the model is there
    return path
