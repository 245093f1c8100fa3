"""The batch of an update that is left out is kept, and the run goes on where it cannot be."""

from pathlib import Path

import pytest

from hybridrl.core.errors import SkippedStep
from hybridrl.policy.skipped_batch import refuse_batch
from hybridrl.types import BatchPlan
from tests.support.batches import make_batch, make_plan


def refuse(run_dir: Path) -> str:
    """The message for a batch of the first step without micro-batches."""
    plan = BatchPlan.one_update(make_plan(make_batch([((1,), [(2,), (3,)])])))
    totals = {"train/loss": float("nan")}
    with pytest.raises(SkippedStep) as caught:
        refuse_batch(plan, 0, totals, 0.5, [], run_dir=run_dir, rank=1, stepped=False)
    return str(caught.value)


def test_the_message_and_the_file_of_a_batch_that_is_left_out_count_its_step_from_1(tmp_path: Path):
    message = refuse(tmp_path)
    assert message.startswith("step 1: loss is nan, gradient norm 0.5; ")
    assert message.endswith(f"; the batch is in {tmp_path}/skipped; no weight was updated")
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == [
        "step_000001-rank1.safetensors"
    ]


def test_a_batch_is_left_out_also_where_the_run_directory_is_gone_which_is_not_made_anew(
    tmp_path: Path,
):
    message = refuse(tmp_path / "run")
    assert f"; the batch could not be written to {tmp_path}/run/skipped: " in message
    assert list(tmp_path.iterdir()) == []
