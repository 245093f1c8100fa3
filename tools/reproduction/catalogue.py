"""All experiments, in the order of their value."""

from reproduction import (
    bottleneck,
    chosen_likelihood,
    curriculum,
    discount,
    endpoints,
    epochs,
    gaussian,
    group_size,
    label_noise,
    methods,
    preference_bandit,
    realizability,
    sample_efficiency,
    stability,
    support,
    variance,
)
from reproduction.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    endpoints.EXPERIMENT,
    curriculum.EXPERIMENT,
    support.EXPERIMENT,
    realizability.EXPERIMENT,
    variance.EXPERIMENT,
    sample_efficiency.EXPERIMENT,
    chosen_likelihood.EXPERIMENT,
    methods.EXPERIMENT,
    group_size.EXPERIMENT,
    label_noise.EXPERIMENT,
    epochs.EXPERIMENT,
    gaussian.EXPERIMENT,
    bottleneck.EXPERIMENT,
    discount.EXPERIMENT,
    preference_bandit.EXPERIMENT,
    stability.EXPERIMENT,
)
