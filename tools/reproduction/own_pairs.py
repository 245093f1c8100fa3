"""Preference pairs of the shipped student's own samples: a right answer and a wrong one."""

import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from hybridrl.core.files import replace_text
from hybridrl.data.countdown_puzzles import Countdown, Equation, Key
from hybridrl.models.loading import load_model, load_tokenizer
from reproduction.sampling import sample

STUDENT = "builtin:countdown-student"
NUM_HELDOUT = 512  # problems that no pair is made of, as data.num_heldout
SAMPLES = 8  # of each problem; it gives a pair if some are right and some are wrong
AT_ONCE = 64  # problems


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPair:
    """Two of the student's responses to a problem."""

    equation: Equation
    right: str
    wrong: str

    def row(self, *, swapped: bool) -> str:
        """A line of data.path; a swapped one prefers the wrong response."""
        chosen, rejected = (self.wrong, self.right) if swapped else (self.right, self.wrong)
        return json.dumps(
            {
                "prompt": self.equation.prompt,
                "chosen": chosen,
                "rejected": rejected,
                "numbers": list(self.equation.numbers),
                "target": self.equation.target,
            }
        )


def own_pairs(
    folder: Path, *, pairs: int, noise: float, seed: int, apart: bool, heldout: int = 256
) -> tuple[Path, Path]:
    """Files of training pairs and of held-out pairs, which are made if they are missing.

    The responses are the same for every seed; the seed decides which of them are swapped.

    Args:
        pairs: of the training file.
        noise: share of the training pairs that are swapped; those held out never are.
        apart: no training pair has a problem of the held-out pairs. Otherwise most held-out pairs
            are other responses to problems that are trained on.
        heldout: pairs of the second file.
    """
    path = folder / f"pairs-{pairs}-{noise:g}-{seed}{'-apart' if apart else ''}.jsonl"
    other = folder / f"pairs-heldout-{heldout}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not other.exists():
        replace_text(other, _text(_sampled(folder, heldout, seed=1), noise=0.0, seed=0))
    if not path.exists():
        kept = _sampled(folder, heldout, seed=1) if apart else ()
        without = {pair.equation.key for pair in kept}
        chosen = _sampled(folder, pairs, seed=0, without=without)
        replace_text(path, _text(chosen, noise=noise, seed=seed))
    return path, other


def _text(pairs: Sequence[OwnPair], *, noise: float, seed: int) -> str:
    rng = random.Random(f"noise {seed}")
    return "".join(f"{pair.row(swapped=rng.random() < noise)}\n" for pair in pairs)


def _sampled(
    folder: Path, pairs: int, *, seed: int, without: Collection[Key] = frozenset()
) -> Sequence[OwnPair]:
    """The first pairs of the stream of a seed whose problems are not in `without`.

    The stream is kept in a file, for it takes minutes.
    """
    cache = folder / f"pairs-of-stream-{seed}.jsonl"
    known = [_read(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    found = [pair for pair in known if pair.equation.key not in without]
    if len(found) < pairs:
        known = []
        found = []
        for pair in _stream(seed):
            known.append(pair)
            if pair.equation.key not in without:
                found.append(pair)
            if len(found) == pairs:
                break
        replace_text(cache, "".join(f"{_line(pair)}\n" for pair in known))
    return found[:pairs]


def _line(pair: OwnPair) -> str:
    return json.dumps([list(pair.equation.numbers), pair.equation.target, pair.right, pair.wrong])


def _read(line: str) -> OwnPair:
    numbers, target, right, wrong = json.loads(line)
    equation = Equation(numbers=tuple(numbers), target=target, solution=right)
    return OwnPair(equation=equation, right=right, wrong=wrong)


@torch.no_grad()
def _stream(seed: int) -> Iterator[OwnPair]:
    """Endless pairs of random problems outside of the held-out ones."""
    tokenizer = load_tokenizer(STUDENT)
    model = load_model(STUDENT)
    game = Countdown()
    without = {equation.key for equation in game.heldout(NUM_HELDOUT)}
    problems = game.stream(random.Random(f"own pairs {seed}"), without)
    torch.manual_seed(seed)
    while True:
        equations = list(islice(problems, AT_ONCE))
        repeated = [equation for equation in equations for _ in range(SAMPLES)]
        sampled = sample(model, tokenizer, repeated)
        texts = sampled.texts
        for number, equation in enumerate(equations):
            own = range(number * SAMPLES, (number + 1) * SAMPLES)
            ended = [i for i in own if sampled.ended[i]]
            right = [texts[i] for i in ended if sampled.rewards[i] == 1]
            wrong = [texts[i] for i in ended if sampled.rewards[i] == 0]
            if right and wrong:
                yield OwnPair(equation=equation, right=right[0], wrong=wrong[0])
