"""A batch whose gradient or loss is not finite: the error that says what to change, and the file
that keeps the batch for inspection.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError
from safetensors.torch import save_file

from hybridrl.batch.micro_batch import MicroBatch
from hybridrl.core.errors import NonFiniteError, SkippedStep
from hybridrl.policy.statistics import remedy
from hybridrl.types import BatchPlan


def refuse_batch(
    plan: BatchPlan,
    number: int,
    totals: Mapping[str, float],
    grad_norm: float,
    micros: Sequence[MicroBatch],
    *,
    run_dir: Path,
    rank: int,
    stepped: bool,
) -> NoReturn:
    """Write the micro-batches of update `number` to run_dir/skipped, and raise. The message says
    where they are, or why they could not be written.

    Args:
        totals: of Tally.totals, over all ranks.
        grad_norm: over all ranks.
        stepped: whether the optimizer has stepped the weights.

    Raises:
        SkippedStep: the weights were not stepped.
        NonFiniteError: the weights were stepped.
    """
    several = len(plan.order) > 1
    step = plan.step + 1  # messages, rows and files count steps from 1
    name = f"step_{step:06d}" + (f"-update{number}" if several else "")
    folder = run_dir / "skipped"
    kept = f"the batch is in {folder}"
    try:
        save_batch(micros, folder / f"{name}-rank{rank}.safetensors")
    except (OSError, SafetensorError) as error:
        kept = f"the batch could not be written to {folder}: {error}"
    which = f"step {step}" + (f", update {number}" if several else "")
    sentence = (
        f"{which}: loss is {totals['train/loss']}, gradient norm {grad_norm}; {remedy(totals)}; "
        f"{kept}"
    )
    if stepped:
        raise NonFiniteError(
            f"{sentence}; the weights were already updated; the last checkpoint is unchanged"
        )
    raise SkippedStep(f"{sentence}; no weight was updated")


def save_batch(micros: Sequence[MicroBatch], path: Path) -> None:
    """Write the tensors of each micro-batch under its number: "0/input_ids" and so on.

    Raises:
        OSError, SafetensorError: they cannot be written, e.g. because the run directory is gone,
            which is not made anew.
    """
    path.parent.mkdir(exist_ok=True)
    tensors = {
        f"{number}/{name}": value
        for number, micro in enumerate(micros)
        for name, value in micro.tensors().items()
    }
    save_file(tensors, path)
