"""`hybridrl check algorithm.advantage=file.py:Class`: measure a user's own code.

An estimator or token weight is measured like any other row: the production code computes the mean
of its gradient over all possible samples, which is compared with the gradient of the objective.
Nothing is declared for it, so the measured verdict is the result. The derivatives of a pair loss
are compared with finite differences of the loss, token by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybridrl.objectives import make_objective
from hybridrl.objectives.chosen import chosen_pair_loss
from hybridrl.objectives.credit import Credit
from hybridrl.objectives.pairs import PairObjective, ranked
from hybridrl.objectives.user_code import check_user_code
from hybridrl.oracle.cases import Case, Kind, Value, World
from hybridrl.oracle.estimator import Estimator
from hybridrl.oracle.exact import Target
from hybridrl.oracle.verdict import Row, Scope, cosine, judge, relative, settings_of
from hybridrl.settings.algorithm import PairConfig
from hybridrl.settings.choices import Ratio, Scale, Source
from hybridrl.settings.run import RunSettings
from hybridrl.types import ScoredBatch

METHOD = "algorithm="
SECTION = "algorithm."
PAIR_LOSS = "pair.loss="
MOST_PAIRS = 500
"""Largest number of pairs that are measured."""
STEP = 1e-5
"""Step of the finite differences of a pair loss, in nats; their error is about 1e-9."""
ROUNDING = 1e-6
"""Largest relative error of a pair loss's derivatives that counts as rounding."""


def user_rows(overrides: Sequence[str], scope: Scope) -> Iterator[Row]:
    """The rows of one configuration.

    Args:
        overrides: settings under `algorithm`, and optionally `algorithm=NAME`, the preset to start
            from; by default hybrid with gamma=1, or dpo for a pair loss.

    Raises:
        ConfigError: a setting is wrong, or a user's file cannot be used.
    """
    case = start(overrides)
    settings = settings_of(case, scope)
    check_user_code(settings)
    if make_objective(settings).needs.pairs:
        yield from pair_rows(case, settings, scope)
        return
    for placed in placements(case, settings):
        row = judge(placed, scope)
        yield replace(row, declared="", agrees=row.verdict != Kind.biased)


def is_own_setting(override: str) -> bool:
    """Whether this argument of `hybridrl check` is a setting."""
    return override.startswith((METHOD, SECTION)) and "=" in override


def start(overrides: Sequence[str]) -> Case:
    """The case of the preset with the settings, with two responses to each prompt, since some
    estimators need siblings.
    """
    methods = [o.removeprefix(METHOD) for o in overrides if o.startswith(METHOD)]
    options = [o.removeprefix(SECTION) for o in overrides if not o.startswith(METHOD)]
    losses = [o.removeprefix(PAIR_LOSS) for o in options if o.startswith(PAIR_LOSS)]
    if methods:
        method = methods[-1]
    elif losses:
        method = "dpo"
        if not chosen_pair_loss(PairConfig(loss=losses[-1])).needs_reference:
            options.append("pair.against=null")
    else:
        method = "hybrid"
        if not any(option.startswith("gamma=") for option in options):
            options.append("gamma=1")
    return Case(method=method, options=tuple(options), group_size=2)


def placements(case: Case, settings: RunSettings) -> Iterator[Case]:
    """The case on each of the models on which its estimator can be measured."""
    algorithm = settings.algorithm
    needs = make_objective(settings).needs
    exact = algorithm.gamma == 1 or not algorithm.imitates
    case = replace(case, target=Target.objective if exact else Target.semi_gradient)
    # Each group is a batch of its own if batches are standardised, and only the tiny model has few
    # enough groups for that.
    standardises = algorithm.scale is Scale.batch
    if needs.siblings or standardises:
        places = [(World.tiny, 3)] if standardises else [(World.ended, 2), (World.tiny, 3)]
    else:
        places = [(World.fixed, 1), (World.ended, 1), (World.ended, 2)]
    for world, group_size in places:
        for value in Value if needs.learner_values else [Value.unrelated]:
            yield replace(case, world=world, group_size=group_size, value=value)
    if algorithm.ratio.kind is not Ratio.none and not standardises:
        # A bound of the ratio has an effect only if the sampler differs from the learner.
        size = 2 if needs.siblings else 1
        yield replace(case, world=World.ended, group_size=size, sampler_distance=0.5)


def pair_rows(case: Case, settings: RunSettings, scope: Scope) -> Iterator[Row]:
    """Two rows: the derivatives with respect to the chosen, and to the rejected responses."""
    trial = PairTrial(settings, scope)
    for side, sequences in zip(("chosen", "rejected"), trial.pairs, strict=True):
        claimed, differences = trial.derivatives(sequences)
        same = bool((claimed == differences).all())  # both may be 0
        bias = 0.0 if same else relative(claimed, differences)
        verdict = Kind.exact if bias < ROUNDING else Kind.biased
        yield Row(
            method=case.method,
            option=" ".join([*case.options, side]),
            estimates="d loss / d log p" if not trial.by_value else "d loss / d value",
            bias=bias,
            cosine=1.0 if same else cosine(claimed, differences),
            variance=0.0,
            declared="",
            verdict=verdict,
            agrees=verdict is Kind.exact,
        )


class PairTrial:
    """Pairs of enumerated sequences, with the objective's losses and derivatives."""

    def __init__(self, settings: RunSettings, scope: Scope) -> None:
        mdp = scope.mdp(World.ended)
        self.estimator = Estimator(settings, mdp)
        assert isinstance(self.estimator.objective, PairObjective)
        self.objective = self.estimator.objective
        self.by_value = self.objective.loss.scores_by_value
        self.members = different_pairs(mdp.rewards)  # [P, 2]
        chosen = self.members.flatten()
        self.mask = mdp.mask[chosen]  # [2P, T]
        at = mdp.prefixes[chosen][self.mask]
        tokens = mdp.tokens[chosen][self.mask]
        self.logprobs = mdp.logp(mdp.student)[at, tokens]  # [R]
        self.values = mdp.values[at]  # [R]
        self.batch = replace(
            self.estimator.batch(self.members, Source.student),
            learner_logprobs=self.logprobs.numpy(),
            learner_values=self.values.numpy(),
        )
        self.pairs = ranked(self.batch)  # chosen and rejected, [P] each

    def derivatives(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of each pair's loss with respect to the log-prob (or value) of each token
        of one of its responses: those that the objective passes to the head pass, and central
        differences; both [P, T].

        Args:
            sequences: [P] the index of this response of each pair.
        """
        claimed = self._grid(self._coefficients(self.credit(self.batch)))[sequences]
        differences = torch.zeros_like(claimed)
        for t in range(self.mask.shape[1]):
            step = torch.zeros(self.mask.shape, dtype=torch.float64)
            step[sequences, t] = STEP
            step = step[self.mask]
            up = self._losses(step)
            down = self._losses(-step)
            differences[:, t] = torch.where(self.mask[sequences, t], (up - down) / (2 * STEP), 0.0)
        return claimed, differences

    def credit(self, batch: ScoredBatch) -> Credit:
        """The objective's coefficients of all tokens, for the log-probs and values of `batch`."""
        plan = self.estimator.plan(int(self.mask.sum()), len(self.mask))
        return self.objective.credit(batch, plan)

    def _coefficients(self, credit: Credit) -> Tensor:
        """[R] the derivative of the pair's loss with respect to log p, or the value, of the token.
        The number of groups in the plan is 1, so the loss is not divided.
        """
        columns = credit.columns
        return columns.value_slope if self.by_value else columns.token_weight * columns.sparse

    def _losses(self, step: Tensor) -> Tensor:
        """[P] the loss of each pair after `step` [R] is added to each token's log-prob or value."""
        moved = (
            replace(self.batch, learner_values=(self.values + step).numpy())
            if self.by_value
            else replace(self.batch, learner_logprobs=(self.logprobs + step).numpy())
        )
        return self.credit(moved).watched["pair/loss"]

    def _grid(self, column: Tensor) -> Tensor:
        """[2P, T] an [R] column as a row for each sequence, 0 in the padding."""
        grid = torch.zeros(self.mask.shape, dtype=column.dtype)
        grid[self.mask] = column
        return grid


def different_pairs(rewards: Tensor) -> Tensor:
    """[P, 2] at most MOST_PAIRS pairs of sequences whose rewards differ, evenly spread over all
    such pairs.
    """
    pairs = torch.cartesian_prod(torch.arange(len(rewards)), torch.arange(len(rewards)))
    pairs = pairs[rewards[pairs[:, 0]] != rewards[pairs[:, 1]]]
    return pairs[:: -(-len(pairs) // MOST_PAIRS)]
