"""The warning that a gradient consists mostly of rounding errors."""

import pytest

from hybridrl.controller.rounding import rounding_warning
from hybridrl.settings.compose import load_config
from hybridrl.types import LearnerStats

BASE = ["run.dir=here", "experiment=quickstart", "model.dtype=bfloat16"]


def stats(token_kl: float | None, sparse_norm: float = 0.0) -> LearnerStats:
    return LearnerStats(
        logprob_gap=None,
        token_kl=token_kl,
        sparse_norm=sparse_norm,
        metrics={},
        optimizer_steps=1,
        learn_s=0.0,
    )


NEAR_TEACHER = stats(0.003)


@pytest.mark.parametrize(
    ("overrides", "measured", "device", "warned"),
    [
        ([], NEAR_TEACHER, "cpu", True),
        ([], stats(0.05), "cpu", False),
        ([], stats(0.0), "cpu", False),
        ([], stats(0.003, sparse_norm=0.1), "cpu", False),
        ([], stats(None), "cpu", False),
        ([], NEAR_TEACHER, "cuda", False),
        (["train.exact_logits=true"], NEAR_TEACHER, "cpu", False),
        (["train.products=float32"], NEAR_TEACHER, "cpu", False),
        (["model.dtype=float32"], NEAR_TEACHER, "cpu", False),
    ],
)
def test_exact_logits_are_suggested_where_rounding_is_a_large_part_of_all_that_is_learned(
    overrides: list[str], measured: LearnerStats, device: str, warned: bool
):
    sentence = rounding_warning(load_config([*BASE, *overrides]), measured, device)
    assert (sentence is not None) is warned
    assert sentence is None or "train.exact_logits=true" in sentence
