"""The lengths that are proposed for a run without rollout.max_new_tokens and max_model_len."""

import json
import math
from pathlib import Path

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.launch.lengths import Lengths, Needs, propose
from hybridrl.launch.preparation import prepare_prompts
from hybridrl.settings.compose import load_config


def needs(prompt: int, answer: int, whole: int = 0) -> Needs:
    return Needs(prompt=prompt, row="a.jsonl:1", whole=max(whole, prompt), answer=answer)


@pytest.mark.parametrize(
    ("wanted", "positions", "given", "offered"),
    [
        (
            needs(243, 310),
            4096,
            (None, None),
            (640, 896, False),
        ),  # 2 * 310 and 243 + 640, rounded up to multiples of 64
        (needs(243, 310), math.inf, (None, None), (640, 896, False)),
        (
            needs(243, 2),
            4096,
            (None, None),
            (256, 512, False),
        ),  # at least 256 new tokens, for reasoning before a short answer
        (needs(100, 0), 4096, (None, None), (256, 384, False)),
        (
            needs(10, 300, 900),
            4096,
            (None, None),
            (640, 960, False),
        ),  # a prompt and response of 900 tokens fit too
        (needs(18, 9), 64, (None, None), (46, 64, False)),  # all positions of the model
        (needs(60, 9), 64, (None, None), (9, 64, True)),  # rows that leave no room for the answer
        (needs(500, 90), 64, (None, None), (32, 64, True)),  # half of the positions
        (needs(100, 9), 4096, (512, None), (512, 640, False)),
        (needs(100, 9), 4096, (None, 200), (100, 200, False)),
        (needs(100, 9), 4096, (None, 105), (9, 105, True)),
        (
            needs(100, 9),
            1024,
            (2048, None),
            (256, 384, False),
        ),  # a given length that leaves no room is replaced
    ],
)
def test_lengths_are_offered_that_hold_the_data_within_the_models_positions(
    wanted: Needs,
    positions: float,
    given: tuple[int | None, int | None],
    offered: tuple[int, int, bool],
) -> None:
    new, length, drops = offered
    assert propose(wanted, positions, *given) == Lengths(
        max_new_tokens=new, max_model_len=length, drop_too_long=drops
    )
    assert length > new


def test_a_run_without_lengths_ends_before_it_starts_with_values_for_its_data(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": "3 7=21:", "completion": "3*7"}, {"prompt": "1 2 3=6:", "answer": "1+2+3"}]
    for name, row in zip(("train", "heldout"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    settings = [
        f"run.dir={tmp_path / 'run'}",
        "experiment=quickstart",
        "data.task=records",
        f"data.path={tmp_path / 'train.jsonl'}",
        f"data.heldout_path={tmp_path / 'heldout.jsonl'}",
    ]
    # <bos> and 8 characters; 5 characters and <eos>; the shipped student reads 64 tokens.
    expected = (
        rf"the longest prompt has 9 tokens \({tmp_path}/heldout\.jsonl:1\), the longest "
        r"answer 6, .* has 64 positions"
    )
    for without, proposed in (
        (("max_new_tokens", "max_model_len"), "max_new_tokens=55 rollout.max_model_len=64"),
        (("max_new_tokens",), "max_new_tokens=39"),  # quickstart has max_model_len=48
        (("max_model_len",), "max_model_len=64"),
    ):
        nulls = [f"rollout.{name}=null" for name in without]
        with pytest.raises(ConfigError, match=expected) as caught:
            prepare_prompts(load_config([*settings, *nulls]))
        assert str(caught.value).startswith(" and ".join(f"rollout.{name}" for name in without))
        assert str(caught.value).endswith(f"for example rollout.{proposed}")
    offered = ["rollout.max_new_tokens=55", "rollout.max_model_len=64"]
    assert len(prepare_prompts(load_config([*settings, *offered]))[0]) == 1


def test_the_lengths_have_no_default_outside_the_experiments() -> None:
    rollout = load_config(
        [
            "run.dir=here",
            "model.path=/models/x",
            "+teachers.a.path=/models/y",
            "+reward.functions.m.function=math",
        ]
    ).rollout
    assert rollout.max_new_tokens is None and rollout.max_model_len is None
