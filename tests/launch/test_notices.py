"""The lines that the console prints when all workers answer, and when on_step ends a run."""

from types import SimpleNamespace

import pytest

from hybridrl.launch.notices import ready_notices, stop_notice
from hybridrl.settings.compose import load_config

BASE = ("run.dir=here", "experiment=quickstart")
READY = (
    "workers ready after 12 s on {device}, weights are sent by object_store; the longest silent "
    "wait is 1800 s"
)


@pytest.mark.parametrize(("device", "further"), [("cpu", 2), ("cuda", 0)])
def test_on_a_cpu_the_dtype_that_was_chosen_and_its_products_are_named(device: str, further: int):
    cluster = SimpleNamespace(device=device, weight_transfer="object_store")
    requested = load_config([*BASE, "model.dtype=auto"])
    settings = load_config([*BASE, "model.dtype=bfloat16"])
    *others, ready = ready_notices(requested, settings, cluster, 12.3)
    assert ready == READY.format(device=device)
    assert len(others) == further and all("bfloat16" in line for line in others)


def test_a_dtype_that_the_user_chose_is_not_explained():
    cluster = SimpleNamespace(device="cpu", weight_transfer="object_store")
    settings = load_config([*BASE, "model.dtype=float32"])
    assert list(ready_notices(settings, settings, cluster, 12.3)) == [READY.format(device="cpu")]


def test_a_run_that_on_step_ended_names_the_checkpoint_from_which_it_goes_on():
    settings = load_config([*BASE, "train.steps=4"])
    assert stop_notice(settings, 2) == (
        "on_step ended the run after step 2 of 4; the same command goes on from step_000002"
    )
