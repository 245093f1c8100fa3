"""All experiments, in the order of their value."""

from reproduction import (
    bottleneck,
    chosen_likelihood,
    curriculum,
    discount,
    endpoints,
    gaussian,
    group_size,
    preference_bandit,
    stability,
    support,
    variance,
)
from reproduction.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    endpoints.EXPERIMENT,
    curriculum.EXPERIMENT,
    support.EXPERIMENT,
    variance.EXPERIMENT,
    chosen_likelihood.EXPERIMENT,
    group_size.EXPERIMENT,
    gaussian.EXPERIMENT,
    bottleneck.EXPERIMENT,
    discount.EXPERIMENT,
    preference_bandit.EXPERIMENT,
    stability.EXPERIMENT,
)
