"""Writes files like those of a user, with an advantage estimator, a token weight or a pair loss."""

import re
import zlib
from pathlib import Path

import hybridrl.objectives

README = Path(hybridrl.objectives.__file__).parent / "README.md"


def write_examples(folder: Path) -> Path:
    """Write the worked examples of hybridrl/objectives/README.md into one file; returns its
    path.
    """
    file = folder / f"examples_{mark(folder)}.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)))
    return file


def write_file(folder: Path, text: str) -> Path:
    """Write the imports of the examples and the text into a file; returns its path."""
    file = folder / f"own_{mark(folder)}.py"
    file.write_text(f"{IMPORTS}\n\n{text}")
    return file


def mark(folder: Path) -> int:
    """A number that makes the names of a folder's files unique, because one process cannot import
    two files of the same name from different folders.
    """
    return zlib.crc32(str(folder).encode())


IMPORTS = """
import torch

from hybridrl.core.errors import ConfigError
from hybridrl.objectives.advantages.advantage import Advantage
from hybridrl.objectives.pair_losses.pair_loss import PairLoss
from hybridrl.objectives.pair_losses.scored_sides import log_ratios, policy_logprobs
"""
