"""Responses of the data, in the form of a worker that samples."""

import pytest

from hybridrl.core.errors import DataError
from hybridrl.rollout.replay import Replay
from hybridrl.settings.choices import Source
from hybridrl.types import GenerateOrder, Prompt


def prompt(uid: str, *responses: tuple[int, ...]) -> Prompt:
    return Prompt(uid=uid, input_ids=(1, 4), text="", columns={}, responses=responses)


def order(group_size: int) -> GenerateOrder:
    return GenerateOrder(
        wave="w",
        chunk=0,
        num_chunks=1,
        group_size=group_size,
        temperature=1.0,
        max_new_tokens=4,
        seed=0,
    )


def test_the_responses_of_a_prompt_come_in_the_order_of_the_data_and_are_ranked_by_it():
    header, batch = Replay().generate(
        order(3), [prompt("a", (5, 2), (6, 7, 2), (2,)), prompt("b", (8,), (9,), (10, 2))]
    )
    assert header.uids == ("a", "b") and batch.uids == ("a", "b")
    assert batch.input_ids[batch.response_mask].tolist() == [5, 2, 6, 7, 2, 2, 8, 9, 10, 2]
    assert batch.source is Source.data
    ranked = Replay().rank(batch)
    assert ranked.values.tolist() == [1.0, 0.5, 0.0, 1.0, 0.5, 0.0]
    assert ranked.keep.all() and not ranked.errors.any()


def test_a_prompt_with_another_number_of_responses_is_named():
    with pytest.raises(DataError, match=r"^b: has 1 responses in the data, but must have 2; c"):
        Replay().generate(order(2), [prompt("a", (5,), (6,)), prompt("b", (7,))])
