"""Scenarios with faults of workers (E, W, T, L). In one run, workers die, hang and fail one after
another, and SIGTERM then ends this run (J1). E3 has a run of its own.
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

HEARTBEAT_S = 8.0
ROLLOUT_S = 30.0
SCORE_S = 10.0
LEARN_S = 15.0
SYNC_S = 12.0
DEADLINES = [
    f"deadlines.heartbeat_s={HEARTBEAT_S}",
    f"deadlines.rollout_s={ROLLOUT_S}",
    f"deadlines.score_s={SCORE_S}",
    f"deadlines.reward_s={SCORE_S}",
    "reward.timeout_s=4",
    f"deadlines.learn_s={LEARN_S}",
    f"deadlines.sync_s={SYNC_S}",
]
ENGINE = r"rollout/\d failed in .*starting another worker"
SCORER = r"scorer-main/0 failed in .*starting another worker"
LEARNER = "going back to the last checkpoint"
SERVES = r"rollout/\d serves again"
REBUILT_S = 150.0
CORE_S = 7.0
"""Bound on the detection of a dead engine core, which vLLM notices after about 5 s."""
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
"""Bounds on the time from each fault until the run is as before: at least twice the time that a
machine with two cores needs, which starts workers slowly.
"""
ENDED_S = 8.0
"""Bound on the time from SIGTERM to the end of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault of one worker, and the lines that the run must then print."""

    description: str
    point: str | None  # a failpoint; None: a signal is sent to the worker's process
    worker: str
    signal: int = signal.SIGKILL
    detect: str  # regular expression of the line that reports the fault
    within_s: float  # bound on the time from the fault to that line
    back: str  # regular expression of the line after which the run is as before


BY_ENGINE = {"worker": "rollout/1", "detect": ENGINE, "back": SERVES}
BY_LEARNER = {"worker": "learner/1", "detect": LEARNER, "back": STEP}
STRIKES = {
    "E1": Strike(
        description="SIGKILL to one of two engines", point=None, within_s=2.0, **BY_ENGINE
    ),
    "E2": Strike(
        description="an engine kills itself in generate",
        point="rollout.generate:do=kill",
        within_s=2.0,
        **BY_ENGINE,
    ),
    "E4": Strike(
        description="SIGSTOP to an engine",
        point=None,
        signal=signal.SIGSTOP,
        within_s=HEARTBEAT_S + 5,
        **BY_ENGINE,
    ),
    "E6": Strike(
        description="an engine raises in generate",
        point="rollout.generate:do=raise",
        within_s=2.0,
        **BY_ENGINE,
    ),
    "W1": Strike(
        description="an engine stops in load_weights",
        point="rollout.load_weights:do=stop",
        within_s=SYNC_S + 2,
        **BY_ENGINE,
    ),
    "T1": Strike(
        description="the only scorer stops in score",
        point="scorer.score:do=stop",
        worker="scorer-main/0",
        detect=SCORER,
        back=STEP,
        within_s=SCORE_S + 3,
    ),
    "L1": Strike(
        description="learner rank 1 kills itself in update",
        point="learner.update:rank=1:do=kill",
        within_s=2.0,
        **BY_LEARNER,
    ),
    "L2": Strike(
        description="learner rank 1 stops in update",
        point="learner.update:rank=1:do=stop",
        within_s=LEARN_S + 2,
        **BY_LEARNER,
    ),
}


def run(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """Cause the wanted faults of STRIKES, and J1, in one run.

    Every failpoint is set from the start, but is marked as fired by a file; removing the file arms
    the failpoint.
    """
    run_dir = ground.run_dir("workers")
    armed = run_dir.with_name(f"armed-{run_dir.name}")  # a run refuses a folder with other files
    armed.mkdir()
    points = []
    for key, strike in STRIKES.items():
        if strike.point:
            (armed / key).touch()
            points.append(f"{strike.point}:once={armed / key}")
    judges: dict[str, Callable[[], Finding]] = {}
    with training([*ground.overrides, *DEADLINES], run_dir, ";".join(points)) as under_way:
        under_way.until(STEP)
        under_way.until(STEP)
        for key in (key for key in STRIKES if key in wanted):
            judges[key] = strike_at(ground, under_way, STRIKES[key], armed / key, RECOVERED_S[key])
        if "J1" in wanted:
            judges["J1"] = terminate(ground, under_way)
    ground.clean(last_step(under_way) + 4)
    return {key: judge() for key, judge in judges.items()}


def strike_at(
    ground: Ground, under_way: Training, strike: Strike, fired: Path, recovered_s: float
) -> Callable[[], Finding]:
    """Cause a fault and wait until the run is as before.

    Args:
        fired: the file that marks the failpoint as fired.
        recovered_s: bound on the time from the fault until the run is as before.

    Returns:
        a function that judges the fault after the end of the run.
    """
    before = last_step(under_way)
    at = None
    try:
        if strike.point:
            fired.unlink()
        else:
            at = kill(under_way.pid(strike.worker), strike.signal)
        detected = under_way.until(strike.detect, strike.within_s + 60)
        at = at or fired.stat().st_mtime
        reached = last_step(under_way)
        recovered = under_way.until(strike.back, REBUILT_S)
        saved = next_save(under_way, 60)
    except (TimeoutError, OSError) as error:
        failure = Finding(passed=False, outcome=f"{strike.description}: {error}")
        return lambda: failure
    steps = last_step(under_way) - before
    continued_from = [
        int(match[1])
        for _, text in under_way.lines
        if (match := re.search(r"continues after step (\d+)", text))
    ]
    detected_s = detected - at
    lost_steps = reached - continued_from[-1] if strike.detect == LEARNER else 0
    within, bounds = check_bounds(detected_s, strike.within_s, recovered - at, recovered_s)
    return lambda: ground.judged(
        under_way.run_dir,
        saved,
        f"{strike.description} ({bounds}); {steps} steps until all was as before",
        within=within,
        detected_s=detected_s,
        recovered_s=recovered - at,
        lost_steps=lost_steps,
    )


def check_bounds(
    detected_s: float, detect_within_s: float, recovered_s: float, recover_within_s: float
) -> tuple[bool, str]:
    """Whether both times are within their bounds, and the bounds as text."""
    detect_mark = "" if detected_s <= detect_within_s else " MISSED"
    recover_mark = "" if recovered_s <= recover_within_s else " MISSED"
    text = f"bounds {detect_within_s:g} s{detect_mark} and {recover_within_s:g} s{recover_mark}"
    return not detect_mark and not recover_mark, text


def kill_core(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """E3: kill the engine-core process of an engine with two ranks, while its actor lives on."""
    run_dir = ground.run_dir("core")
    with training(
        [*ground.overrides, "rollout.engines=1", "rollout.tensor_parallel=2"], run_dir
    ) as under_way:
        under_way.until(STEP)
        under_way.until(STEP)
        actor = under_way.pid("rollout/0")
        parents = processes()
        children = [pid for pid, parent in parents.items() if parent == actor]
        # The core is the child with the most memory; the others are helper processes.
        at = kill(max(children, key=lambda pid: usage(pid)[0]))
        detected = under_way.until(ENGINE, 60)
        recovered = under_way.until(SERVES, REBUILT_S)
        saved = next_save(under_way, 60)
    rows = [row for row in read_metrics(run_dir) if row["train/step"] > 0]
    gap = max(row["policy/logprob_gap"] for row in rows)
    within, bounds = check_bounds(detected - at, CORE_S, recovered - at, RECOVERED_S["E3"])
    outcome = (
        f"SIGKILL to the engine core of an engine of two ranks ({bounds}); went on to step "
        f"{saved}, log-prob gap at most {gap:.1e}"
    )
    within = within and gap < 1e-4
    lost, twice = prompts_against(run_dir, ground.clean(), saved)
    return {
        "E3": Finding(
            passed=within and not lost and not twice,
            outcome=outcome,
            detected_s=detected - at,
            recovered_s=recovered - at,
            lost_steps=0,
            lost_uids=lost,
            duplicated_uids=twice,
        )
    }


def terminate(ground: Ground, under_way: Training) -> Callable[[], Finding]:
    """J1: send SIGTERM, then run the same command again; returns a function that judges both."""
    family = under_way.family()
    at = kill(under_way.process.pid, signal.SIGTERM)
    status = under_way.ended(60)
    took = time.time() - at
    reported = under_way.printed("ended by SIGTERM")
    step = max(steps_saved(under_way.run_dir), default=0)
    lost = last_step(under_way) - step
    orphans = alive_after(family, 10)
    end = step // 2 * 2 + 4
    with training([*ground.overrides, f"train.steps={end}"], under_way.run_dir) as second:
        resumed = second.ended(240) == 0 and second.printed(f"continues after step {step} of")
    outcome = (
        f"SIGTERM in a step: exit status {status} after {took:.1f} s (bound {ENDED_S:g} s), "
        f"{len(orphans)} processes left; the same command went on from step {step}"
    )
    in_time = status == 75 and took <= ENDED_S and reported
    within = in_time and resumed and not orphans and lost == 0
    return lambda: ground.judged(
        under_way.run_dir,
        end,
        outcome,
        within=within,
        detected_s=took,
        recovered_s=None,
        lost_steps=lost,
    )


def alive_after(pids: list[int], limit_s: float, besides: str = "(?!)") -> list[int]:
    """Wait until all processes have ended, but at most limit_s; returns those that still run.

    Args:
        besides: a regular expression of the command lines of processes to ignore.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        remaining = [pid for pid in pids if running(pid) and not re.match(besides, name(pid))]
        if not remaining:
            return []
        time.sleep(0.1)
    return remaining


def name(pid: int) -> str:
    """The command line of a process, its words separated by NUL; empty: the process has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False
