"""The coefficients of a step, which may depend on metrics of earlier steps."""

import math

import pytest

from hybridrl.controller.coefficients import UNMEASURED_STEPS, Coefficients
from hybridrl.core.errors import MetricError
from hybridrl.settings.compose import load_config


def following(metric: str, *overrides: str) -> Coefficients:
    weight = f"algorithm.imitation_weight={{kind: feedback, value: 1, metric: {metric}, target: 1}}"
    return Coefficients(load_config(["run.dir=here", "experiment=quickstart", weight, *overrides]))


def test_a_weight_whose_metric_no_step_measures_ends_the_run_and_names_the_setting():
    coefficients = following("pair/margin")
    for _ in range(UNMEASURED_STEPS - 1):
        coefficients.observe({"kl/token": 3.0})
    with pytest.raises(
        MetricError,
        match=r"^algorithm\.imitation_weight\.metric=pair/margin: none of the first 20 steps",
    ):
        coefficients.observe({"kl/token": 3.0})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_never_a_finite_number_counts_as_not_measured(value: float):
    coefficients = following("pair/margin")
    for _ in range(UNMEASURED_STEPS - 1):
        coefficients.observe({"pair/margin": value})
    with pytest.raises(MetricError, match=r"pair/margin: none of the first 20 steps"):
        coefficients.observe({"pair/margin": value})


def test_a_metric_that_was_measured_once_may_be_missing_later_and_its_weight_stays_the_same():
    coefficients = following("kl/token")
    coefficients.observe({"kl/token": 3.0})
    weight = coefficients.teachers(1)
    assert weight != following("kl/token").teachers(1), "the measurement has changed the weight"
    for _ in range(2 * UNMEASURED_STEPS):
        coefficients.observe({"reward/mean": 0.5})
    assert coefficients.teachers(1) == weight


def test_a_metric_of_the_diagnostics_is_waited_for_until_they_are_due():
    coefficients = following("grad/cosine", "diagnostics.every=30")
    for _ in range(29):
        coefficients.observe({"kl/token": 3.0})
    with pytest.raises(MetricError, match="none of the first 30 steps"):
        coefficients.observe({"kl/token": 3.0})
