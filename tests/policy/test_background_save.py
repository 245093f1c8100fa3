"""The optimizer's state is written in the background of the next step, or before the step
begins.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hybridrl.core.errors import CheckpointError
from hybridrl.policy import optimizer_state
from hybridrl.policy.optimizer_state import OptimizerState
from hybridrl.types import SavedFile
from hybridrl.weights.fragments import MASTER, PARTS, Fragment, FragmentReader

LIMIT_S = 60.0


ALONE = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
"""A stand-in for a process group of one rank."""


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The master weights of one parameter, which the optimizer steps in place."""
    tensors = {part: torch.tensor([1.0, 2.0]) for part in PARTS}

    def fragments(parameters: object) -> list[Fragment]:
        return [Fragment(name="w", shape=(2,), offset=0, tensors=tensors)]

    monkeypatch.setattr(optimizer_state, "local_fragments", fragments)
    monkeypatch.setattr(optimizer_state, "dist", ALONE)
    return tensors[MASTER]


def written(folder: Path) -> list[float]:
    return FragmentReader(folder).whole(MASTER, "w").tolist()


def test_a_copy_is_written_while_the_weights_go_on(
    weights: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The file is written only after the next step has been taken."""
    stepped = threading.Event()
    write: Callable[[Path, int, int, Sequence[Fragment]], SavedFile] = optimizer_state.write_sealed

    def write_late(folder: Path, rank: int, world: int, of: Sequence[Fragment]) -> SavedFile:
        assert stepped.wait(LIMIT_S)
        return write(folder, rank, world, of)

    monkeypatch.setattr(optimizer_state, "write_sealed", write_late)
    state = OptimizerState({}, None, lambda: None)
    state.begin_save(tmp_path, background=True)
    assert state.saved_file() is None, "it is still being written"
    weights += 10
    stepped.set()
    assert state.saving.result(LIMIT_S) == state.saved_file()
    assert written(tmp_path) == [1.0, 2.0] and weights.tolist() == [11.0, 12.0]


def test_in_the_foreground_the_file_is_there_before_the_weights_go_on(
    weights: Tensor, tmp_path: Path
):
    state = OptimizerState({}, None, lambda: None)
    state.begin_save(tmp_path, background=False)
    assert state.saved_file() is not None
    weights += 10
    assert written(tmp_path) == [1.0, 2.0]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fails_is_an_error_of_the_file_and_not_of_the_step(
    weights: Tensor, tmp_path: Path, background: bool
):
    state = OptimizerState({}, None, lambda: None)
    state.begin_save(tmp_path / "none", background=background)
    with pytest.raises(CheckpointError, match=r"none.* could not be written: "):
        state.saving.result(LIMIT_S)
    with pytest.raises(CheckpointError, match=r"none.* could not be written: "):
        state.saved_file()
