"""`hybridrl check` of a user's own code: correct code passes, and deliberately wrong code is
reported with the size of its bias.
"""

import json
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.oracle.cases import Kind
from hybridrl.oracle.table import main
from hybridrl.oracle.user_rows import user_rows
from hybridrl.oracle.verdict import Row, Scope
from tests.support.own_code import write_examples, write_file

OWN = """
class Half(Advantage):
    def advantages(self, grid, algorithm):
        return grid.returns / 2

class MedianOfAll(Advantage):
    needs_siblings = True

    def advantages(self, grid, algorithm):
        returns = grid.returns.unflatten(0, (-1, grid.group_size))
        return (returns - returns.median(1, keepdim=True).values).flatten(0, 1)

class ValuesAlone(Advantage):
    needs_values = True

    def advantages(self, grid, algorithm):
        return grid.returns - grid.values

def thrice(counts):
    return torch.full((1, 1), 3.0 / counts.num_sequences, dtype=torch.float64)

class Squared(PairLoss):
    factor = 2

    def gradient(self, scores, pair):
        sides = policy_logprobs(scores, pair)
        error = 1 - sides.margin
        return sides.gradient(pair, error.square(), -self.factor * error, 2 * error)

class HalfAsMuch(Squared):
    factor = 1

class Uphill(Squared):
    factor = -2

class Score(PairLoss):
    scores_by_value = True

    def gradient(self, scores, pair):
        sides = policy_logprobs(scores, pair)
        one = sides.margin * 0 + 1
        return sides.gradient(pair, -sides.margin, -one, one / 2)
"""


SMALL = Scope(ended=3)
"""A scope of fifteen sequences for estimators that read groups of two, which has 225 groups instead
of 14641.
"""


def checked(folder: Path, *settings: str) -> list[Row]:
    file = write_file(folder, OWN)
    return list(user_rows([s.format(file) for s in settings], SMALL))


def test_a_baseline_of_the_others_is_unbiased_and_one_that_holds_the_token_is_not(
    tmp_path: Path,
) -> None:
    others = f"algorithm.advantage={write_examples(tmp_path)}:MedianOfOthers"
    rows = list(user_rows([others], SMALL))
    assert [row.verdict for row in rows] == [Kind.unbiased, Kind.unbiased]
    rows = checked(tmp_path, "algorithm.advantage={}:MedianOfAll")
    assert [row.verdict for row in rows] == [Kind.biased, Kind.biased]
    assert all(row.bias > 0.1 and not row.agrees for row in rows)


def test_half_of_the_reward_is_a_bias_of_one_half(tmp_path: Path) -> None:
    rows = checked(tmp_path, "algorithm=raft", "algorithm.advantage={}:Half")
    fixed = rows[0]  # equal lengths: raft divides by the number of tokens
    assert (fixed.verdict, fixed.agrees) == (Kind.biased, False)
    assert fixed.bias == pytest.approx(0.5, abs=1e-9) and fixed.cosine == pytest.approx(1.0)


def test_an_estimator_that_reads_values_is_measured_with_wrong_and_with_exact_ones(
    tmp_path: Path,
) -> None:
    rows = checked(tmp_path, "algorithm.advantage={}:ValuesAlone")
    assert len(rows) == 6 and all(row.verdict is Kind.unbiased for row in rows)
    wrong, exact = rows[:2]
    assert "exact values" in exact.option and exact.variance < wrong.variance


def test_a_constant_token_weight_is_unbiased_whatever_its_size_and_one_by_position_is_not(
    tmp_path: Path,
) -> None:
    assert all(row.agrees for row in checked(tmp_path, "algorithm.token_weight={}:thrice"))
    own = f"algorithm.token_weight={write_examples(tmp_path)}:early_tokens"
    rows = list(user_rows([own], SMALL))
    assert [row.verdict for row in rows] == [Kind.biased] * 3


def test_the_derivatives_of_a_pair_loss_are_those_of_its_value(tmp_path: Path) -> None:
    rows = checked(tmp_path, "algorithm.pair.loss={}:Squared", "algorithm.pair.average=true")
    assert [(row.verdict, row.agrees) for row in rows] == [(Kind.exact, True)] * 2
    with_reference = f"algorithm.pair.loss={write_examples(tmp_path)}:SquaredHinge"
    assert all(row.agrees for row in user_rows([with_reference], SMALL))


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [("HalfAsMuch", 0.5, 0.0), ("Uphill", 2.0, 0.0), ("Score", 0.0, 0.5)],
)
def test_a_wrong_derivative_of_a_pair_loss_is_found_on_its_side(
    loss: str, chosen: float, rejected: float, tmp_path: Path
) -> None:
    rows = checked(tmp_path, f"algorithm.pair.loss={{}}:{loss}")
    assert [row.bias for row in rows] == pytest.approx([chosen, rejected], abs=1e-6)
    assert [row.agrees for row in rows] == [chosen == 0, rejected == 0]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "slic", "simpo", "dil_ukl", "bradley_terry"])
def test_built_in_pair_losses_can_be_checked_too(loss: str) -> None:
    rows = list(user_rows([f"algorithm.pair.loss={loss}"], SMALL))
    assert [row.verdict for row in rows] == [Kind.exact] * 2


def test_the_verb_prints_the_size_of_the_bias_and_ends_with_1(tmp_path: Path, capsys) -> None:
    file = write_file(tmp_path, OWN)
    wrong = f"algorithm.pair.loss={file}:HalfAsMuch"
    assert main([wrong]) == 1
    printed = capsys.readouterr().out
    assert "2 rows, 1 biased, by up to 0.500." in printed and "DEVIATES" not in printed
    assert main([wrong, "--json"]) == 1
    assert [Row(**row).verdict for row in json.loads(capsys.readouterr().out)] == [
        "biased",
        "exact",
    ]
    assert main([f"algorithm.pair.loss={file}:Squared"]) == 0


def test_only_settings_of_the_algorithm_can_be_checked(tmp_path: Path, capsys) -> None:
    assert main(["train.lr=1"]) == 2
    assert capsys.readouterr().out.startswith("train.lr=1: must be a setting of algorithm; write")
    with pytest.raises(ConfigError, match="there is no file"):
        main([f"algorithm.advantage={tmp_path}/absent.py:Mine"])
