"""E2L: a rising reward weight against constant ones, on responses of 34 tokens."""

from dataclasses import replace
from functools import partial

from reproduction import curriculum
from reproduction.chain_runs import chain_arm
from reproduction.chains import MOST
from reproduction.curves import draw_curves
from reproduction.experiment import Arm

STEPS = 100


def arm(name: str) -> Arm:
    settings = {
        **curriculum.COMMON,
        "train.steps": STEPS,
        "eval.every": 25,
        "train.lr_end": curriculum.COMMON["train.lr"],
        **curriculum.weight(*curriculum.WEIGHTS[name]),
    }
    return chain_arm(
        name, MOST, settings, curriculum.weight(*curriculum.WEIGHTS[curriculum.RISING])
    )


EXPERIMENT = replace(
    curriculum.EXPERIMENT,
    id="E2L",
    title="A rising reward weight against constant ones, on longer responses",
    design=f"E2 on the task of E5: chains of {MOST} operations, whose responses have "
    f"{4 * MOST + 2} tokens, with the student and the teacher made for it. {STEPS} steps of 128 "
    "responses; the weights and the controls are those of E2. The learning rate is constant, so "
    "that early and late weights count alike.",
    arms=tuple(arm(name) for name in curriculum.WEIGHTS),
    seeds=(0, 1, 2),
    draw=partial(draw_curves, steps=range(0, STEPS + 1, 25)),
    cuts=f"{STEPS} steps and three seeds. The student is an early checkpoint of the teacher's own "
    "training.",
)
