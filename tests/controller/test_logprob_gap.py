"""The check that the log-probs of sampler and learner agree."""

import math

import pytest

from hybridrl.controller.logprob_gap import check_logprob_gap
from hybridrl.core.errors import WeightSyncError
from hybridrl.types import LearnerStats


def stats(gap: float | None) -> LearnerStats:
    return LearnerStats(
        logprob_gap=gap, token_kl=None, sparse_norm=0.0, metrics={}, learn_s=0.0, optimizer_steps=1
    )


def is_refused(gap: float | None) -> bool:
    try:
        check_logprob_gap(stats(gap), 0.05, step=7)
    except WeightSyncError:
        return True
    return False


def test_a_gap_up_to_the_limit_passes_and_so_does_a_step_without_one():
    gaps = [0.0, 0.05, None, 0.0501]
    assert [is_refused(gap) for gap in gaps] == [False, False, False, True]


@pytest.mark.parametrize(
    ("gap", "text"), [(0.0625, "0.0625"), (math.inf, "inf"), (math.nan, "nan")]
)
def test_a_gap_above_the_limit_or_that_is_no_number_ends_the_run(gap: float, text: str):
    with pytest.raises(
        WeightSyncError,
        match=rf"^step 7: sampler and learner differ by {text} nats per token, "
        r"rollout\.max_logprob_gap is 0\.05; the engines do not run the learner's weights",
    ):
        check_logprob_gap(stats(gap), 0.05, step=7)


def test_statistics_without_a_gap_cannot_be_made():
    """Otherwise a gap that a caller forgot to pass would count as a small one."""
    with pytest.raises(TypeError, match="logprob_gap"):
        LearnerStats(token_kl=None, sparse_norm=0.0, metrics={"policy/logprob_gap": 0.0}, learn_s=0)
