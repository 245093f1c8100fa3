"""A run that cannot fit the memory of its GPUs is refused before it starts."""

from pathlib import Path

import pytest
import torch

from hybridrl.core.errors import ConfigError
from hybridrl.launch.planning_device import check_memory, known_gpu_bytes, planned_device
from hybridrl.launch.session import train
from hybridrl.planning.plan import GIB
from hybridrl.settings.compose import load_config

SMALL = ("experiment=quickstart", "model.dtype=float32", "cluster.device_memory_gib=0.01")
REFUSED = (
    r"rollout\.max_model_len=48: one sequence needs 192\.0 KiB of KV cache .*; "
    r"if the plan is wrong, cluster\.check_memory=false starts the run all the same$"
)


def test_a_run_that_does_not_fit_its_gpus_is_refused_unless_the_check_is_off():
    settings = load_config(["run.dir=x", *SMALL])
    with pytest.raises(ConfigError, match=REFUSED):
        check_memory(settings, "cuda")
    check_memory(settings, "cpu")
    check_memory(load_config(["run.dir=x", *SMALL, "cluster.check_memory=false"]), "cuda")
    check_memory(load_config(["run.dir=x", *SMALL, "cluster.device_memory_gib=79"]), "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory of the GPU here is known")
def test_gpus_of_unknown_memory_are_planned_as_an_h100_and_checked_against_nothing():
    settings = load_config(["run.dir=x", "experiment=quickstart", "cluster.device=cuda"])
    assert planned_device(settings) == ("cuda", 79 * GIB)
    assert known_gpu_bytes(settings) is None
    check_memory(settings, "cuda")


def test_train_makes_the_check_before_it_touches_ray_or_the_run_directory(tmp_path: Path):
    run_dir = tmp_path / "run"
    with pytest.raises(ConfigError, match=REFUSED):
        train(load_config([f"run.dir={run_dir}", *SMALL, "cluster.device=cuda"]))
    assert not run_dir.exists()
