"""E, W, T and L: workers of one run die, hang and fail, one after another, while it goes on; then
SIGTERM ends it (J1).
"""

import contextlib
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos_faults.finding import Finding
from chaos_faults.ground import STEP, Ground, last_step, next_save
from chaos_faults.training import (
    Training,
    kill,
    processes,
    prompts_against,
    steps_saved,
    training,
    usage,
)
from hybridrl.tracking.jsonl import read_metrics

HEARTBEAT_S, ROLLOUT_S, SCORE_S, LEARN_S, SYNC_S = 8.0, 30.0, 10.0, 15.0, 12.0
DEADLINES = [
    f"deadlines.heartbeat_s={HEARTBEAT_S}",
    f"deadlines.rollout_s={ROLLOUT_S}",
    f"deadlines.score_s={SCORE_S}",
    f"deadlines.reward_s={SCORE_S}",
    f"deadlines.learn_s={LEARN_S}",
    f"deadlines.sync_s={SYNC_S}",
]
ENGINE, SCORER = (
    r"rollout/\d failed in .*starting another worker",
    r"scorer-main/0 failed in .*starting another worker",
)
LEARNER, SERVES = "going back to the last checkpoint", r"rollout/\d serves again"
REBUILT_S = 150.0
CORE_S = 7.0
"""The engine hears of a dead process of its own after about 5 s."""
RECOVERED_S = {
    "E1": 60.0,
    "E2": 60.0,
    "E3": 130.0,
    "E4": 90.0,
    "E6": 60.0,
    "W1": 120.0,
    "T1": 60.0,
    "L1": 45.0,
    "L2": 90.0,
}
"""Bounds on the time from the fault until all is as it was: at least twice what two cores took,
whose every start of a worker is slow.
"""
ENDED_S = 8.0
"""Bound from SIGTERM to the end of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What is done to which worker, and what must be said how soon."""

    what: str
    point: str | None  # a failpoint; None: the signal goes to the worker's process
    worker: str
    signal: int = signal.SIGKILL
    detect: str
    within_s: float  # of the fault
    back: str  # what is said when all is as it was


BY_ENGINE = {"worker": "rollout/1", "detect": ENGINE, "back": SERVES}
BY_LEARNER = {"worker": "learner/1", "detect": LEARNER, "back": STEP}
STRIKES = {
    "E1": Strike(what="SIGKILL to one of two engines", point=None, within_s=2.0, **BY_ENGINE),
    "E2": Strike(
        what="an engine kills itself in generate",
        point="rollout.generate:do=kill",
        within_s=2.0,
        **BY_ENGINE,
    ),
    "E4": Strike(
        what="SIGSTOP to an engine",
        point=None,
        signal=signal.SIGSTOP,
        within_s=HEARTBEAT_S + 5,
        **BY_ENGINE,
    ),
    "E6": Strike(
        what="an engine raises in generate",
        point="rollout.generate:do=raise",
        within_s=2.0,
        **BY_ENGINE,
    ),
    "W1": Strike(
        what="an engine stops in load_weights",
        point="rollout.load_weights:do=stop",
        within_s=SYNC_S + 2,
        **BY_ENGINE,
    ),
    "T1": Strike(
        what="the only scorer stops in score",
        point="scorer.score:do=stop",
        worker="scorer-main/0",
        detect=SCORER,
        back=STEP,
        within_s=SCORE_S + 3,
    ),
    "L1": Strike(
        what="learner rank 1 kills itself in update",
        point="learner.update:rank=1:do=kill",
        within_s=2.0,
        **BY_LEARNER,
    ),
    "L2": Strike(
        what="learner rank 1 stops in update",
        point="learner.update:rank=1:do=stop",
        within_s=LEARN_S + 2,
        **BY_LEARNER,
    ),
}


def run(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """One run; every failpoint is set from the start, and armed by removing the file that says it
    has fired.
    """
    run_dir = ground.run_dir("workers")
    (armed := run_dir / "armed").mkdir()
    points = []
    for key, strike in STRIKES.items():
        if strike.point:
            (armed / key).touch()
            points.append(f"{strike.point}:once={armed / key}")
    struck: dict[str, Callable[[], Finding]] = {}
    with training([*ground.overrides, *DEADLINES], run_dir, ";".join(points)) as under_way:
        under_way.until(STEP)
        under_way.until(STEP)
        for key in (key for key in STRIKES if key in wanted):
            struck[key] = strike_at(ground, under_way, STRIKES[key], armed / key, RECOVERED_S[key])
        if "J1" in wanted:
            struck["J1"] = terminate(ground, under_way)
    ground.clean(last_step(under_way) + 4)
    return {key: judge() for key, judge in struck.items()}


def strike_at(
    ground: Ground, under_way: Training, strike: Strike, once: Path, recovered_s: float
) -> Callable[[], Finding]:
    """Do it, wait until all is as it was; what that was is judged when the run is over."""
    before, at = last_step(under_way), None
    try:
        if strike.point:
            once.unlink()
        else:
            at = kill(under_way.pid(strike.worker), strike.signal)
        detected = under_way.until(strike.detect, strike.within_s + 60)
        at = at or once.stat().st_mtime
        seen = last_step(under_way)
        recovered = under_way.until(strike.back, REBUILT_S)
        saved = next_save(under_way, 60)
    except (TimeoutError, OSError) as error:
        missed = str(error)
        return lambda: Finding(passed=False, said=f"{strike.what}: {missed}")
    meanwhile = last_step(under_way) - before
    redone = [
        int(match[1])
        for _, text in under_way.lines
        if (match := re.search(r"continues after step (\d+)", text))
    ]
    times = {
        "detected_s": detected - at,
        "recovered_s": recovered - at,
        "lost_steps": seen - redone[-1] if strike.detect == LEARNER else 0,
    }
    within, word = held(detected - at, strike.within_s, recovered - at, recovered_s)
    return lambda: ground.judged(
        under_way.run_dir,
        saved,
        f"{strike.what} ({word}); {meanwhile} steps until all was as before",
        within=within,
        **times,
    )


def held(
    detected_s: float, detect_within_s: float, recovered_s: float, recover_within_s: float
) -> tuple[bool, str]:
    """Whether both bounds were held, and the bounds in words."""
    marks = [
        "" if took <= bound else " MISSED"
        for took, bound in ((detected_s, detect_within_s), (recovered_s, recover_within_s))
    ]
    return not any(
        marks
    ), f"bounds {detect_within_s:g} s{marks[0]} and {recover_within_s:g} s{marks[1]}"


def kill_core(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """E3: an engine with a process of its own, which only one of several devices has; its actor
    lives on.
    """
    run_dir = ground.run_dir("core")
    with training(
        [*ground.overrides, "rollout.engines=1", "rollout.tensor_parallel=2"], run_dir
    ) as under_way:
        under_way.until(STEP)
        under_way.until(STEP)
        actor, parents = under_way.pid("rollout/0"), processes()
        children = [pid for pid, parent in parents.items() if parent == actor]
        at = kill(max(children, key=lambda pid: usage(pid)[0]))  # the others keep books for it
        detected = under_way.until(ENGINE, 60)
        recovered = under_way.until(SERVES, REBUILT_S)
        saved = next_save(under_way, 60)
    rows = [row for row in read_metrics(run_dir) if row["train/step"] > 0]
    gap = max(row["policy/logprob_gap"] for row in rows)
    within, word = held(detected - at, CORE_S, recovered - at, RECOVERED_S["E3"])
    said = (
        f"SIGKILL to the engine core of an engine of two ranks ({word}); went on to step "
        f"{saved}, log-prob gap at most {gap:.1e}"
    )
    within = within and gap < 1e-4
    lost, twice = prompts_against(run_dir, ground.clean(), saved)
    times = {"detected_s": detected - at, "recovered_s": recovered - at}
    return {
        "E3": Finding(
            passed=within and not lost and not twice,
            said=said,
            lost_steps=0,
            lost_uids=lost,
            duplicated_uids=twice,
            **times,
        )
    }


def terminate(ground: Ground, under_way: Training) -> Callable[[], Finding]:
    """SIGTERM, and the same command again."""
    family = under_way.family()
    at = kill(under_way.process.pid, signal.SIGTERM)
    status = under_way.ended(60)
    took = time.time() - at
    told, step = (
        under_way.said("told to end by SIGTERM"),
        max(steps_saved(under_way.run_dir), default=0),
    )
    lost = last_step(under_way) - step
    orphans = alive_after(family, 10)
    end = step // 2 * 2 + 4
    with training([*ground.overrides, f"train.steps={end}"], under_way.run_dir) as again:
        resumed = again.ended(240) == 0 and again.said(f"continues after step {step} of")
    said = (
        f"SIGTERM in a step: exit status {status} after {took:.1f} s (bound {ENDED_S:g} s), "
        f"{len(orphans)} processes left; the same command went on from step {step}"
    )
    within = status == 75 and took <= ENDED_S and told and resumed and not orphans and lost == 0
    return lambda: ground.judged(
        under_way.run_dir,
        end,
        said,
        within=within,
        detected_s=took,
        recovered_s=None,
        lost_steps=lost,
    )


def alive_after(pids: list[int], limit_s: float, besides: str = "(?!)") -> list[int]:
    """Those that still run after so long, or none as soon as all have ended but those whose names
    match the regular expression.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        left = [pid for pid in pids if running(pid) and not re.match(besides, name(pid))]
        if not left:
            return []
        time.sleep(0.1)
    return left


def name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False
