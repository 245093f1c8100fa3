"""The learner's state on disk: the pieces of every parameter that each rank holds.

Each rank writes one file, e.g. learner-rank00000-of-00002.safetensors. Its tensors are flat float32
pieces PART/NAME; its header gives the place of each piece in the flattened parameter NAME. A rank
that loads reads the slices that it needs from the files that hold them. So no parameter is ever
gathered, and the number of ranks and the ZeRO stage may change between saving and loading.

StudentWeights.saved() decides which parameters have fragments, and their names.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridrl.core.errors import CheckpointError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (MASTER, *MOMENTS)
"""The parts of a fragment: fp32 master weights, and AdamW's two moments."""
INDEX = "fragments"
FILE = re.compile(r"learner-rank(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """All parts of the elements offset ... offset+length-1 of a flattened parameter."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int
    tensors: Mapping[str, Tensor]  # by part, each [length] float32


def write_fragments(folder: Path, rank: int, world: int, fragments: Iterable[Fragment]) -> Path:
    """Write one rank's pieces to a file in `folder`; returns the path of the file.

    Args:
        world: number of ranks.

    Raises:
        CheckpointError: the file cannot be written; the message names it and its size.
    """
    path = folder / f"learner-rank{rank:05d}-of-{world:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    index = []
    for f in fragments:
        tensors |= {
            f"{part}/{f.name}": t.detach().cpu().contiguous() for part, t in f.tensors.items()
        }
        index.append(
            {
                "name": f.name,
                "shape": f.shape,
                "offset": f.offset,
                "length": f.tensors[MASTER].numel(),
            }
        )
    try:
        save_file(tensors, path, {INDEX: json.dumps(index)})
    except (SafetensorError, OSError) as error:
        size = sum(t.nbytes for t in tensors.values())
        raise CheckpointError(
            f"{path}: {size} bytes could not be written: {error}; every learner rank must reach "
            "run.dir"
        ) from error
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    file: int  # index into the reader's files
    start: int
    stop: int


class FragmentReader:
    """Reads the files of all ranks as one state. Opening reads only the headers, and `read` only
    the requested slice.

    Example: two ranks saved the elements [0, 4) and [4, 6) of "w"; read("master", "w", 3, 2) takes
    one element from each file.
    """

    def __init__(self, folder: Path) -> None:
        """Open the files of a checkpoint.

        Raises:
            CheckpointError: a rank's file is missing or has no index of pieces, or the pieces do
                not cover a parameter exactly once.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._files = [self._open(path) for path in self._paths()]
        for number, file in enumerate(self._files):
            self._list(number, (file.metadata() or {}).get(INDEX, ""))
        for name, shape in self.shapes.items():
            self._check_tiling(name, prod(shape))

    def read(self, part: str, name: str, offset: int, length: int) -> Tensor:
        """Read elements offset ... offset+length-1 of the flattened parameter; returns [length]
        float32 on the CPU.

        Args:
            part: one of PARTS.
            name: name of the parameter, one of `shapes`.

        Raises:
            CheckpointError: the files do not hold this part, or hold it in another dtype.
        """
        stop = offset + length
        parts = [
            self._slice(
                p.file,
                f"{part}/{name}",
                max(offset, p.start) - p.start,
                min(stop, p.stop) - p.start,
            )
            for p in self._pieces[name]
            if p.start < stop and offset < p.stop
        ]
        values = torch.cat(parts) if parts else torch.empty(0)
        if values.shape != (length,) or values.dtype != torch.float32:
            raise CheckpointError(
                f"{self.folder}: {part}/{name} is {values.dtype} {list(values.shape)}, not float32 "
                f"[{length}]"
            )
        return values

    def whole(self, part: str, name: str) -> Tensor:
        """The whole parameter in its own shape, float32 on the CPU; raises as `read`."""
        return self.read(part, name, 0, prod(self.shapes[name])).reshape(self.shapes[name])

    def _paths(self) -> list[Path]:
        matches = {
            path: match
            for path in sorted(self.folder.iterdir())
            if (match := FILE.fullmatch(path.name))
        }
        worlds = {int(match[2]) for match in matches.values()}
        ranks = sorted(int(match[1]) for match in matches.values())
        if len(worlds) != 1 or ranks != list(range(*worlds)):
            raise CheckpointError(
                f"{self.folder}: holds the learner files {[p.name for p in matches]}, but must "
                "hold exactly one of each rank"
            )
        return list(matches)

    def _open(self, path: Path) -> safe_open:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error

    def _list(self, number: int, index: str) -> None:
        try:
            for entry in json.loads(index):
                name = str(entry["name"])
                start = int(entry["offset"])
                shape = tuple(int(n) for n in entry["shape"])
                if self.shapes.setdefault(name, shape) != shape:
                    raise CheckpointError(
                        f"{self.folder}: the learner files disagree about the shape of {name}"
                    )
                self._pieces.setdefault(name, []).append(
                    _Piece(file=number, start=start, stop=start + int(entry["length"]))
                )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder}: a learner file has no readable index of its pieces"
            ) from error

    def _check_tiling(self, name: str, size: int) -> None:
        pieces = sorted(self._pieces[name], key=lambda p: p.start)
        edges = [0, *(p.stop for p in pieces)]
        if edges[-1] != size or [p.start for p in pieces] != edges[:-1]:
            raise CheckpointError(
                f"{self.folder}: the pieces of {name} do not cover its {size} elements exactly once"
            )
        self._pieces[name] = pieces

    def _slice(self, file: int, key: str, start: int, stop: int) -> Tensor:
        try:
            return self._files[file].get_slice(key)[start:stop]
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder}: cannot read {key}: {error}") from error
