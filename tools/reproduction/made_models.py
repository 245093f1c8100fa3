"""Models that experiments need and that are not shipped; each is made when it is missing."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
    constants: Sequence[float] = ()  # others on which the model depends


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
    "chain-student": Recipe(
        train=chain_models.student, arguments=CHAINS, constants=(chain_models.STUDENT_ACCURACY,)
    ),
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
    """The folder of a model of RECIPES, known by the hash of its arguments and constants."""
    recipe = RECIPES[name]
    path = folder / f"{name}-{hashed([*recipe.arguments, *recipe.constants])}"
    if not path.exists():
        args = countdown_models.parser().parse_args(["--out", str(path), *recipe.arguments])
        model, tokenizer = recipe.train(args)
        with whole_folder(path) as folder:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    return path


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end of the block, if that succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as temporary:
        written = Path(temporary) / "whole"
        written.mkdir()
        yield written
        written.rename(path)
