"""A user's estimator, token weight and pair loss, each in a file of the user, in the production
code.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from hybridrl.core.errors import ConfigError
from hybridrl.launch.preparation import preflight
from hybridrl.objectives import make_objective
from hybridrl.objectives.advantages.advantage import Advantage, ReturnGrid
from hybridrl.objectives.chosen import chosen_advantage, chosen_pair_loss
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.objectives.pair_losses.pair_loss import PairLoss
from hybridrl.objectives.pairs import PairObjective
from hybridrl.objectives.user_code import check_user_code
from hybridrl.settings.algorithm import AlgorithmConfig, PairConfig
from hybridrl.settings.built_in import ADVANTAGES, PAIR_LOSSES, TOKEN_WEIGHTS
from hybridrl.settings.compose import from_yaml, load_config, to_yaml
from hybridrl.settings.run import RunSettings
from hybridrl.types import ScoredBatch
from tests.support.batches import make_batch, make_plan, make_rewards, make_scores
from tests.support.own_code import write_examples, write_file
from tests.support.toy import Production, Response, preset, save_heads

TRIPLE = make_batch([((1,), [(5, 6), (7,), (8, 9)])])
PAIR = make_batch([((1,), [(5, 2), (6, 7, 8, 2)])])


def settings_with(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


# -- numbers ---------------------------------------------------------------------------------------


def test_a_users_estimator_makes_the_advantages(tmp_path: Path) -> None:
    config = AlgorithmConfig(advantage=f"{write_examples(tmp_path)}:MedianOfOthers")
    rewards = make_rewards(TRIPLE, [1.0, 0.0, 3.0])
    scored = ScoredBatch(rollout=TRIPLE, scores=(), rewards=rewards)
    objective = HybridObjective(config, 16, kinds=[])
    credit = objective.credit(scored, make_plan(TRIPLE, reward_weight=2.0))
    # Returns -2, 0, -6; torch's median of two is the lower one: -6, -6, -2.
    assert credit.columns.sparse.tolist() == [4.0, 4.0, 6.0, -4.0, -4.0]


def test_a_users_token_weight_weighs_the_tokens(tmp_path: Path) -> None:
    config = AlgorithmConfig(token_weight=f"{write_examples(tmp_path)}:early_tokens")
    rewards = make_rewards(TRIPLE, [1.0, 0.0, 3.0])
    scored = ScoredBatch(rollout=TRIPLE, scores=(), rewards=rewards)
    plan = make_plan(TRIPLE, num_tokens=10)
    weight = HybridObjective(config, 16, kinds=[]).token_weight(scored, plan)
    assert weight.tolist() == pytest.approx([0.1, 0.09, 0.1, 0.1, 0.09])


def test_a_users_estimator_does_not_get_the_groups_that_are_dropped(tmp_path: Path) -> None:
    """The reward of the second group failed. The first one's returns are -1 and -3, so this
    estimator subtracts -2.
    """
    file = write_file(
        tmp_path,
        "from hybridrl.objectives.advantages.advantage import Advantage\n"
        "class OfBatch(Advantage):\n"
        "    def advantages(self, grid, algorithm):\n"
        "        return grid.returns - grid.returns.mean()\n",
    )
    batch = make_batch([((1,), [(5,), (6,)]), ((1,), [(7,), (8,)])])
    objective = HybridObjective(AlgorithmConfig(advantage=f"{file}:OfBatch"), 16, kinds=[])
    rewards = make_rewards(batch, [1.0, 3.0, np.nan, 5.0], keep=[True, True, False, False])
    scored = ScoredBatch(rollout=batch, scores=(), rewards=rewards)
    assert objective.credit(scored, make_plan(batch)).columns.sparse.tolist() == [1.0, -1.0, 0, 0]
    none = make_rewards(batch, [np.nan] * 4, keep=[False] * 4)
    scored = ScoredBatch(rollout=batch, scores=(), rewards=none)
    assert objective.credit(scored, make_plan(batch)).columns.sparse.tolist() == [0.0] * 4


def test_a_users_token_weight_that_becomes_negative_on_a_long_response_is_an_error(
    tmp_path: Path,
) -> None:
    """The weight is 1 - 0.25 position, so the sixth token has -0.25. A trial has three tokens."""
    file = write_file(
        tmp_path,
        "import torch\ndef falls(counts):\n"
        "    return 1 - 0.25 * torch.arange(counts.mask.shape[1])\n",
    )
    config = AlgorithmConfig(token_weight=f"{file}:falls")
    batch = make_batch([((1,), [(5,) * 5, (6,) * 6])])
    objective = HybridObjective(config, 16, kinds=[])
    scored = ScoredBatch(rollout=batch, scores=(), rewards=make_rewards(batch, [0.0, 0.0]))
    with pytest.raises(
        ConfigError, match=r":falls: returned -0\.25 for token 5 of a response of 6"
    ):
        objective.token_weight(scored, make_plan(batch))


def test_a_users_pair_loss_moves_the_pair(tmp_path: Path) -> None:
    loss = f"{write_examples(tmp_path)}:SquaredHinge"
    config = AlgorithmConfig(pair=PairConfig(loss=loss, against="initial", target=3.0))
    objective = PairObjective(config)
    assert len(objective.needs.evidence) == 1
    scored = ScoredBatch(
        rollout=PAIR,
        scores=(make_scores(PAIR, [-1.0] * 6),),
        rewards=make_rewards(PAIR, [1.0, 0.0]),
        learner_logprobs=np.array([-0.5, -0.5, -2.0, -1.0, -1.0, -1.0], np.float32),
    )
    credit = objective.credit(scored, make_plan(PAIR, num_groups=1))
    # s_w = -1 + 2, s_l = -5 + 4: the margin 2 misses 3 by 1, so the slopes are -2 and 2.
    assert credit.columns.sparse.tolist() == [-2.0] * 2 + [2.0] * 4
    assert credit.watched["pair/loss"].tolist() == [1.0]


COPIES = """
class Others(Advantage):
    needs_siblings = True

    def advantages(self, grid, algorithm):
        returns = grid.returns.unflatten(0, (-1, grid.group_size))
        others = returns.sum(1, keepdim=True) - returns
        return (returns - others / (grid.group_size - 1)).flatten(0, 1)

def prompts(counts):
    return 1.0 / (counts.num_groups * counts.group_size * counts.lengths)[:, None]

class Logistic(PairLoss):
    needs_reference = True

    def gradient(self, scores, pair):
        sides = log_ratios(scores, pair)
        u = pair.beta * sides.margin
        slope = -pair.beta * torch.sigmoid(-u)
        return sides.gradient(pair, -torch.nn.functional.logsigmoid(u), slope, -slope)
"""


@pytest.mark.parametrize(
    ("method", "own", "without"),
    [
        ("rloo", "advantage={}:Others", "baseline=none"),
        ("grpo", "token_weight={}:prompts", "normalizer=constant"),
        ("dpo", "pair.loss={}:Logistic", "pair.loss=dpo"),
    ],
)
def test_a_copy_of_a_built_in_one_has_its_gradient_at_the_parameters(
    method: str, own: str, without: str, tmp_path: Path
) -> None:
    save_heads(tmp_path)
    file = write_file(tmp_path, COPIES)
    answers = [
        Response(prompt=(1, 2), ids=ids, reward=reward)
        for ids, reward in (((3, 4, 6), 1.0), ((6,), 0.0))
    ]

    def gradient(*overrides: str) -> dict[str, torch.Tensor]:
        settings = preset(method, tmp_path, "train.samples_per_prompt=2", *overrides)
        return Production(settings, wide=True).gradient(answers)

    built_in = gradient()
    copied = gradient(f"algorithm.{without}", f"algorithm.{own.format(file)}")
    assert max(float(part.abs().max()) for part in built_in.values()) > 1e-3
    for name, part in built_in.items():
        torch.testing.assert_close(copied[name], part, rtol=1e-12, atol=1e-15)


# -- what is refused before a run starts -----------------------------------------------------------

BROKEN = """
class Raises(Advantage):
    def advantages(self, grid, algorithm):
        return grid.retrns

class OnePerResponse(Advantage):
    def advantages(self, grid, algorithm):
        return grid.returns[:, 0]

class Infinite(Advantage):
    def advantages(self, grid, algorithm):
        return grid.returns / 0

class Siblings(Advantage):
    needs_siblings = True

    def advantages(self, grid, algorithm):
        return grid.returns

class Values(Siblings):
    needs_siblings = False
    needs_values = True

class Nothing(Advantage):
    pass

class Takes(Siblings):
    def __init__(self, size):
        pass

class Stranger:
    pass

NUMBER = 3

def per_token(counts):
    return counts.mask[counts.mask].double()

def negative(counts):
    return counts.mask.double() - 2

class NoGradient(PairLoss):
    def gradient(self, scores, pair):
        return scores.chosen_logp

class Referenced(PairLoss):
    needs_reference = True

    def gradient(self, scores, pair):
        sides = log_ratios(scores, pair)
        return sides.gradient(pair, sides.margin, sides.margin * 0 + 1, sides.margin * 0 - 1)

class Free(Referenced):
    needs_reference = False

class Picky(Free):
    def check(self, pair):
        raise ConfigError("algorithm.pair.beta: must be 7")
"""
FIXED = "algorithm.reward_weight.kind=constant algorithm.reward_weight.value=1"
ADVANTAGE = "algorithm.advantage={}:"
WEIGHT = "algorithm.token_weight={}:"
LOSS = "algorithm=dpo algorithm.pair.loss={}:"
FREE = f"algorithm.pair.against=null {LOSS}"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (f"{ADVANTAGE}Absent", "has no Absent; name a function that the file defines"),
        (f"{ADVANTAGE}NUMBER", "NUMBER must be callable"),
        (f"{ADVANTAGE}Stranger", "must be a class that inherits from hybridrl.objectives.advant"),
        (f"{ADVANTAGE}per_token", "must be a class that inherits from"),
        (f"{ADVANTAGE}Nothing", "the class has no method advantages; write one"),
        (f"{ADVANTAGE}Takes", "creating an instance raised TypeError: "),
        (f"{ADVANTAGE}Raises", "a trial on a small example raised AttributeError: "),
        (f"{ADVANTAGE}OnePerResponse", "must be a tensor of shape [4, 3] in a trial on a small"),
        (f"{ADVANTAGE}Infinite", "advantages must be finite, and a trial on a small example gave"),
        (f"{ADVANTAGE}Siblings train.samples_per_prompt=1", "compares siblings, needs >= 2"),
        (
            f"{ADVANTAGE}Siblings train.samples_per_prompt=1 algorithm.teacher_fraction=1 "
            "algorithm.ratio.kind=truncate",
            "compares siblings, needs >= 2",
        ),
        (
            f"{ADVANTAGE}Values algorithm.scale=batch {FIXED}",
            "algorithm.scale=batch: not with algorithm.",
        ),
        (f"{WEIGHT}per_token", "for 4 responses of up to 3 tokens; return a tensor that broadcast"),
        (f"{WEIGHT}negative", "returned a negative weight"),
        (f"{LOSS}NoGradient", "algorithm.pair.against=initial: "),
        (f"{FREE}NoGradient", "gradient returned a tensor of shape [3]; return a PairGradient"),
        (f"{FREE}Referenced", "algorithm.pair.against=null: algorithm.pair.loss="),
        (f"{LOSS}Free", "does not compare with a reference (needs_reference = False); set algor"),
        (f"{FREE}Picky", "algorithm.pair.beta: must be 7"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    overrides: str, sentence: str, tmp_path: Path
) -> None:
    file = write_file(tmp_path, BROKEN)
    settings = settings_with(*overrides.format(file).split())
    with pytest.raises(ConfigError) as caught:
        check_user_code(settings)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_examples_of_the_readme_are_accepted(tmp_path: Path) -> None:
    file = write_examples(tmp_path)
    own = f"algorithm.advantage={file}:MedianOfOthers algorithm.token_weight={file}:early_tokens"
    settings = settings_with(*own.split())
    check_user_code(settings)
    grid = ReturnGrid(
        returns=torch.tensor([[1.0], [2.0], [4.0]]),
        values=torch.zeros(3, 1),
        mask=torch.ones(3, 1, dtype=torch.bool),
        group_size=3,
    )
    advantages = chosen_advantage(settings.algorithm).advantages(grid, settings.algorithm)
    assert advantages.tolist() == [[-1.0], [1.0], [3.0]]  # the lower median of the two others
    pairs = settings_with("algorithm=dpo", f"algorithm.pair.loss={file}:SquaredHinge")
    check_user_code(pairs)
    assert type(chosen_pair_loss(pairs.algorithm.pair)).__name__ == "SquaredHinge"


def test_a_run_tries_the_users_code_before_it_reads_models_or_data() -> None:
    settings = settings_with("algorithm.advantage=absent.py:Mine", "model.path=/nowhere")
    with pytest.raises(ConfigError, match=r"algorithm\.advantage=absent\.py:Mine: there is no"):
        preflight(settings)


def test_reading_the_settings_that_a_run_left_runs_no_file(tmp_path: Path) -> None:
    """A run directory may come from an untrusted source."""
    file = write_file(tmp_path, "raise SystemExit('was run')")
    own = [f"algorithm.{s}={file}:A" for s in ("advantage", "token_weight", "pair.loss")]
    written = settings_with("algorithm=dpo", *own)
    settings = from_yaml(to_yaml(written))
    assert settings == written
    assert settings.scored_teachers == ["initial"]  # as algorithm.pair.against says
    assert settings_with("algorithm=simpo", *own).scored_teachers == []


# -- built in --------------------------------------------------------------------------------------


def test_every_word_of_the_settings_names_a_class_or_function_that_exists() -> None:
    assert all(Advantage in word.load().__mro__ for word in ADVANTAGES.values())
    assert all(PairLoss in word.load().__mro__ for word in PAIR_LOSSES.values())
    assert all(callable(word.load()) for word in TOKEN_WEIGHTS.values())
    places = [w.place for words in (ADVANTAGES, PAIR_LOSSES, TOKEN_WEIGHTS) for w in words.values()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("loss", "referenced", "by_value"),
    [
        ("dpo", True, False),
        ("ipo", True, False),
        ("slic", False, False),
        ("simpo", False, False),
        ("dil_lsif", True, False),
        ("dil_ukl", True, False),
        ("dil_bce", True, False),
        ("bradley_terry", False, True),
    ],
)
def test_a_loss_says_what_its_run_needs(loss: str, referenced: bool, by_value: bool) -> None:
    settings = settings_with("algorithm=dpo", f"algorithm.pair.loss={loss}")
    assert settings.scored_teachers == (["initial"] if referenced else [])
    needs = make_objective(settings).needs
    assert bool(needs.evidence) == referenced
    assert (needs.learner_values, needs.learner_logprobs) == (by_value, not by_value)
