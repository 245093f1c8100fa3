"""Loads the advantage estimator, token weight and pair loss that the settings name: built-in ones
or those of a user's file.
"""

from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.core.user_files import load_from_file
from hybridrl.objectives.advantages.advantage import Advantage
from hybridrl.objectives.pair_losses.pair_loss import PairLoss
from hybridrl.objectives.token_weights.token_weight import TokenWeight
from hybridrl.settings.algorithm import AlgorithmConfig, PairConfig
from hybridrl.settings.built_in import ADVANTAGES, PAIR_LOSSES, TOKEN_WEIGHTS


def chosen_advantage(algorithm: AlgorithmConfig) -> Advantage:
    """The estimator of algorithm.advantage, or else the one that algorithm.baseline names.

    Raises:
        ConfigError: a user's file cannot be loaded, or what it defines is not an Advantage.
    """
    if algorithm.advantage is None:
        return ADVANTAGES[algorithm.baseline].load()()
    return _made("algorithm.advantage", algorithm.advantage, Advantage, "advantages")


def chosen_token_weight(algorithm: AlgorithmConfig) -> TokenWeight:
    """The function of algorithm.token_weight, or else the one that algorithm.normalizer names.

    Raises:
        ConfigError: a user's file cannot be loaded.
    """
    name = algorithm.token_weight
    if name is None:
        return TOKEN_WEIGHTS[algorithm.normalizer].load()
    return load_from_file(f"algorithm.token_weight={name}", name)


def chosen_pair_loss(pair: PairConfig) -> PairLoss:
    """The loss that algorithm.pair.loss names, for a run that ranks pairs.

    Raises:
        ConfigError: a user's file cannot be loaded, or what it defines is not a PairLoss.
    """
    if pair.loss in PAIR_LOSSES:
        return PAIR_LOSSES[pair.loss].load()()
    return _made("algorithm.pair.loss", pair.loss, PairLoss, "gradient")


def _made(setting: str, name: str, base: type, method: str) -> Any:
    """An instance of the class `name`, "file.py:Class", of a user.

    Raises:
        ConfigError: the file cannot be loaded; the class does not inherit from `base` or does not
            define `method`; it cannot be instantiated without arguments.
    """
    field = f"{setting}={name}"
    loaded = load_from_file(field, name)
    if not isinstance(loaded, type) or base not in loaded.__mro__:
        raise ConfigError(
            f"{field}: must be a class that inherits from {base.__module__}.{base.__name__}; "
            "derive it from that one"
        )
    if getattr(loaded, method) is getattr(base, method):
        raise ConfigError(f"{field}: the class has no method {method}; write one")
    try:
        return loaded()
    except Exception as error:
        raise ConfigError(
            f"{field}: creating an instance raised {described(error)}; correct the class, which "
            "must be instantiable without arguments"
        ) from error
