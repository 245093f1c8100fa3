"""The optimizer state of one rank: its pieces of the fp32 master weights and of Adam's moments, in
the layout of any ZeRO stage.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from hybridrl.core.errors import CheckpointError, NonFiniteError
from hybridrl.run_dir.saved_file import seal
from hybridrl.types import SavedFile
from hybridrl.weights.fragments import (
    MASTER,
    MOMENTS,
    PARTS,
    Fragment,
    FragmentReader,
    write_fragments,
)
from hybridrl.weights.library_internals import (
    ZeroOptimizer,
    fragment_span,
    fragment_values,
    is_sharded,
    set_adam_steps,
    whole_shape,
)

Parameters = Mapping[str, nn.Parameter]


class OptimizerState:
    """Saves and loads this rank's share of the optimizer's state. Every rank has a file of its own.

    Args:
        parameters: the parameters that a checkpoint holds, StudentWeights.saved().
        optimizer: DeepSpeed's optimizer of these parameters.
        step_in_place: takes an optimizer step that does not move the weights. DeepSpeed creates
            Adam's moments in its first step, and in every step it copies the master weights to
            those of the forward pass.
    """

    def __init__(
        self, parameters: Parameters, optimizer: ZeroOptimizer, step_in_place: Callable[[], None]
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.step_in_place = step_in_place
        self.threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.saving: Future[SavedFile] | None = None
        self.start: dict[str, Tensor] = {}  # the master weights that keep_start has copied

    def nbytes(self) -> int:
        """The bytes that `begin_save` will write on this rank, without headers."""
        masters = local_fragments(self.parameters, [MASTER])
        return sum(t.nbytes for f in masters for t in f.tensors.values()) * len(PARTS)

    def begin_save(self, folder: Path, *, background: bool) -> None:
        """Begin to write this rank's present pieces into a file of its own.

        Args:
            background: write a copy of them in another thread, so that the next step can begin;
                otherwise wait until they are written.

        Raises:
            NonFiniteError: a weight or moment is NaN or infinite.
        """
        fragments = local_fragments(self.parameters)
        check_finite(fragments)
        if background:
            fragments = [copied(fragment) for fragment in fragments]
        self.saving = self.threads.submit(
            write_sealed, folder, dist.get_rank(), dist.get_world_size(), fragments
        )
        if not background:
            wait([self.saving])

    def saved_file(self) -> SavedFile | None:
        """The file of the last `begin_save`; None: it is still being written.

        Raises:
            CheckpointError: the file cannot be written, or no save was begun.
        """
        if self.saving is None:
            raise CheckpointError("no save has begun on this rank since it started")
        return self.saving.result() if self.saving.done() else None

    def load(self, folder: Path, steps: int, model: str) -> None:
        """Load what `begin_save` wrote on any number of ranks in any ZeRO stage.

        Args:
            steps: how many steps the optimizer had taken.
            model: the name of the student's model in an error, model.path.

        Raises:
            CheckpointError: a file is missing or not a file of `begin_save`, or the state is of
                another model.
        """
        reader = FragmentReader(folder)
        check_model(self.parameters, reader, folder, model)
        load_part(self.parameters, reader, MASTER)
        self.step_in_place()
        for moment in MOMENTS:
            load_part(self.parameters, reader, moment)
        set_adam_steps(self.optimizer, steps)

    def keep_start(self) -> None:
        """Copy the master weights to host memory for `back_to_start`: 4 bytes per parameter,
        divided among the ranks.
        """
        masters = [copied(fragment) for fragment in local_fragments(self.parameters, [MASTER])]
        self.start = {fragment.name: fragment.tensors[MASTER] for fragment in masters}

    def back_to_start(self) -> None:
        """Restore the master weights that `keep_start` copied, with an optimizer that has taken no
        step.
        """
        for name, masters in self.start.items():
            set_local_values(self.parameters[name], MASTER, masters)
        self.step_in_place()
        for name, masters in self.start.items():
            for moment in MOMENTS:
                set_local_values(self.parameters[name], moment, torch.zeros_like(masters))
        set_adam_steps(self.optimizer, 0)
        self.saving = None


def write_sealed(folder: Path, rank: int, world: int, fragments: Sequence[Fragment]) -> SavedFile:
    """Write one rank's pieces to a file in `folder`, and sync it to disk.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = write_fragments(folder, rank, world, fragments)
    try:
        return seal(path)
    except OSError as error:
        raise CheckpointError(f"{path}: not on disk: {error}") from error


def copied(fragment: Fragment) -> Fragment:
    """A copy of the fragment in its own memory on the CPU."""
    tensors = {part: t.detach().to("cpu", copy=True) for part, t in fragment.tensors.items()}
    return replace(fragment, tensors=tensors)


def local_fragments(parameters: Parameters, parts: Sequence[str] = PARTS) -> list[Fragment]:
    """This rank's pieces, as views if the optimizer's memory is on the CPU.

    A parameter of which the rank holds nothing has no piece.
    """
    fragments = []
    for name, parameter in parameters.items():
        offset, length = span(parameter)
        if length:
            tensors = {part: local_values(parameter, part)[:length] for part in parts}
            fragments.append(
                Fragment(name=name, shape=whole_shape(parameter), offset=offset, tensors=tensors)
            )
    return fragments


def load_part(parameters: Parameters, reader: FragmentReader, part: str) -> None:
    """Overwrite this rank's pieces of one part with the saved ones."""
    for name, parameter in parameters.items():
        offset, length = span(parameter)
        if length:
            set_local_values(parameter, part, reader.read(part, name, offset, length))


def check_model(parameters: Parameters, reader: FragmentReader, folder: Path, model: str) -> None:
    """Compare the names and shapes of a saved state with those of the parameters.

    The state may hold more, such as a value head that the algorithm no longer needs.

    Raises:
        CheckpointError: the saved state lacks a parameter, or has it in another shape.
    """
    differing = [
        name
        for name, parameter in parameters.items()
        if reader.shapes.get(name) != whole_shape(parameter)
    ]
    if differing:
        raise CheckpointError(
            f"{folder}: the saved state has no {', '.join(differing[:3])} of the model's shapes, "
            f"so it is not a state of model.path={model} with these settings"
        )


def check_finite(fragments: Sequence[Fragment]) -> None:
    """Refuse to save numbers that are NaN or infinite.

    Raises:
        NonFiniteError: a weight or moment is; the error names its parameter.
    """
    for fragment in fragments:
        for part, tensor in fragment.tensors.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"{part} of {fragment.name} is not finite, so it is not saved; the last "
                    "checkpoint is unchanged"
                )


# -- the two layouts -------------------------------------------------------------------------------
# ZeRO-3 gives rank r elements r*s ... (r+1)*s-1 of every parameter, s = ceil(size / ranks), padded
# at the end. ZeRO-1 and ZeRO-2 lay all parameters end to end and give each rank one contiguous
# part: a rank holds some parameters whole, at most two in part, and most not at all.


def span(parameter: nn.Parameter) -> tuple[int, int]:
    """(offset, length) of this rank's piece of the flattened parameter."""
    if not is_sharded(parameter):
        return fragment_span(parameter)
    size = prod(whole_shape(parameter))
    share = safe_get_local_fp32_param(parameter).numel()
    offset = min(dist.get_rank() * share, size)
    return offset, min(share, size - offset)


def local_values(parameter: nn.Parameter, part: str) -> Tensor:
    """This rank's piece of a parameter, [at least length] float32, with its padding."""
    if not is_sharded(parameter):
        return fragment_values(parameter, None if part == MASTER else part)
    if part == MASTER:
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, part)


def set_local_values(parameter: nn.Parameter, part: str, values: Tensor) -> None:
    """Overwrite this rank's piece with `values`, [length] float32; padding becomes 0."""
    current = local_values(parameter, part)
    padded = torch.zeros_like(current)
    padded[: len(values)] = values.to(current.device)
    if not is_sharded(parameter):
        current.data.copy_(padded)
    elif part == MASTER:
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, part)
