"""Checks of a user's advantage estimator, token weight or pair loss before any worker starts.

Each is tried once on a small example, so that a wrong shape or name is found within a second.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.objectives.advantages.advantage import ReturnGrid
from hybridrl.objectives.chosen import chosen_advantage, chosen_pair_loss, chosen_token_weight
from hybridrl.objectives.pair_losses.pair_loss import PairGradient, PairScores
from hybridrl.objectives.token_weights.token_weight import TokenCounts
from hybridrl.settings.algorithm import PairConfig
from hybridrl.settings.built_in import is_own
from hybridrl.settings.choices import Scale
from hybridrl.settings.run import RunSettings

LENGTHS = (1, 3, 2, 2)
"""Tokens of the four responses of the example, two to a prompt."""


def check_user_code(settings: RunSettings) -> None:
    """Load and try a user's advantage estimator, token weight or pair loss.

    Raises:
        ConfigError: a file cannot be loaded; other settings do not give what the class in it needs;
            the trial raises, or returns another type, another shape or a number that is not finite.
    """
    algorithm = settings.algorithm
    if algorithm.ranks_pairs:
        if is_own(algorithm.pair.loss):
            check_pair_loss(algorithm.pair)
        return
    if algorithm.advantage is not None:
        check_advantage(settings)
    if algorithm.token_weight is not None:
        check_token_weight(settings)


def check_advantage(settings: RunSettings) -> None:
    algorithm = settings.algorithm
    setting = f"algorithm.advantage={algorithm.advantage}"
    advantage = chosen_advantage(algorithm)
    samples = algorithm.data_fraction < 1
    if advantage.needs_siblings and samples and settings.train.samples_per_prompt < 2:
        raise ConfigError(
            f"train.samples_per_prompt={settings.train.samples_per_prompt}: {setting} compares "
            "siblings, needs >= 2; raise it"
        )
    if advantage.needs_values and algorithm.scale is Scale.batch:
        raise ConfigError(
            f"algorithm.scale=batch: not with {setting}, whose advantages are centred by values "
            "already; set algorithm.scale=none"
        )
    mask = example_mask()
    grid = ReturnGrid(
        returns=torch.arange(12.0).reshape(4, 3).sin(),
        values=torch.where(mask, 0.5, 0.0),
        mask=mask,
        group_size=2,
    )
    tried = trial(setting, lambda: advantage.advantages(grid, algorithm))
    check_numbers(setting, "advantages", tried, mask.shape)


def check_token_weight(settings: RunSettings) -> None:
    setting = f"algorithm.token_weight={settings.algorithm.token_weight}"
    function = chosen_token_weight(settings.algorithm)
    counts = TokenCounts(
        mask=example_mask(),
        group_size=2,
        num_tokens=sum(LENGTHS),
        num_sequences=4,
        num_groups=2,
        max_new_tokens=settings.rollout.max_new_tokens or max(LENGTHS),
    )
    weight = trial(setting, lambda: function(counts))
    shape = tuple(counts.mask.shape)
    try:
        weight = weight.broadcast_to(shape)
    except (AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{setting}: returned {summary(weight)} for {shape[0]} responses of up to {shape[1]} "
            "tokens; return a tensor that broadcasts to [N, T], e.g. [N, 1]"
        ) from error
    check_numbers(setting, "the weights", weight, shape)
    if not bool((weight[counts.mask] >= 0).all()):
        raise ConfigError(
            f"{setting}: returned a negative weight, with which training would increase the loss "
            "of a token; return weights of 0 or more"
        )


def check_pair_loss(pair: PairConfig) -> None:
    setting = f"algorithm.pair.loss={pair.loss}"
    loss = chosen_pair_loss(pair)
    if loss.needs_reference and pair.against is None:
        raise ConfigError(
            f"algorithm.pair.against=null: {setting} needs a reference; name one, e.g. "
            "+teachers.initial.path=null algorithm.pair.against=initial"
        )
    if pair.against is not None and not loss.needs_reference:
        raise ConfigError(
            f"algorithm.pair.against={pair.against}: {setting} does not compare with a reference "
            "(needs_reference = False); set algorithm.pair.against=null, or needs_reference = "
            "True in the class"
        )
    loss.check(pair)
    chosen = torch.tensor([-1.0, -5.0, -2.0], dtype=torch.float64)
    rejected = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64)
    scores = PairScores(
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_ref=torch.full_like(chosen, -2.0) if loss.needs_reference else chosen * 0,
        rejected_ref=torch.full_like(chosen, -2.0) if loss.needs_reference else chosen * 0,
        chosen_len=torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64),
        rejected_len=torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64),
    )
    made = trial(setting, lambda: loss.gradient(scores, pair))
    if not isinstance(made, PairGradient):
        raise ConfigError(
            f"{setting}: gradient returned {summary(made)}; return a PairGradient "
            "(hybridrl/objectives/pair_losses/pair_loss.py)"
        )
    for field in fields(PairGradient):
        check_numbers(setting, field.name, getattr(made, field.name), chosen.shape)


def example_mask() -> Tensor:
    """[4, 3] bool."""
    return torch.arange(max(LENGTHS))[None, :] < torch.tensor(LENGTHS)[:, None]


def trial(setting: str, call: Callable[[], Any]) -> Any:
    """The result of the call.

    Raises:
        ConfigError: the call raised an exception.
    """
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{setting}: a trial on a small example raised {described(error)}; correct the file"
        ) from error


def check_numbers(setting: str, what: str, value: Any, shape: Iterable[int]) -> None:
    """Raise ConfigError unless the value is a tensor of finite numbers of this shape."""
    wanted = list(shape)
    if not isinstance(value, Tensor) or list(value.shape) != wanted:
        raise ConfigError(
            f"{setting}: {what} must be a tensor of shape {wanted} in a trial on a small example; "
            f"it is {summary(value)}"
        )
    if not bool(value.isfinite().all()):
        raise ConfigError(
            f"{setting}: {what} must be finite, and a trial on a small example gave "
            f"{value.flatten().tolist()}; correct the file"
        )


def summary(value: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a value of type {type(value).__name__}"
