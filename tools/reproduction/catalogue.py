"""All experiments, in the order of their value."""

from reproduction import (
    bottleneck,
    curriculum,
    discount,
    endpoints,
    gaussian,
    preference_bandit,
    stability,
    support,
    variance,
)
from reproduction.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    endpoints.EXPERIMENT,
    curriculum.EXPERIMENT,
    variance.EXPERIMENT,
    support.EXPERIMENT,
    gaussian.EXPERIMENT,
    bottleneck.EXPERIMENT,
    discount.EXPERIMENT,
    preference_bandit.EXPERIMENT,
    stability.EXPERIMENT,
)
