"""Scenarios with faults of the driver process or its surroundings: it is killed, interrupted or
refused at the start; engines are exhausted, memory is short, calls are lost, W&B does not answer.
"""

import random
import re
import signal
import socket
import time

from chaos_faults.finding import Finding
from chaos_faults.ground import STEP, Ground, last_step
from chaos_faults.ray_options import MEMORY_SHORT, RAYS_OWN, faulty_calls
from chaos_faults.training import START_S, Training, kill, training, usage
from chaos_faults.workers import alive_after, name

KILLED_AT = [
    "controller.sampled:step=2",
    "controller.learned:step=4",
    "controller.synced:step=6",
    "controller.logged:step=8",
    "checkpoint.shards:step=10",
    "checkpoint.renamed:step=12",
    "controller.saved:step=14",
]
K1_STEPS = 16
K2_STEPS = 200
K2_KILLS = 10
K2_STARTING = (1, 4, 8)
K2_MEAN_S = 5.0
K2_SEED = 7
SAVE_EVERY = 2
SOAKED = (500, 1500)
"""The steps between which the growth of memory is measured."""
LEFT_S = 10.0
"""Time after which only Ray's own processes of a killed run may remain."""
RESUMED_S = 120.0
"""Bound on the time from the start of a resumed run to its first step; two cores need 50 to 90 s.
"""


def kill_at_failpoints(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """K1: kill a run at each failpoint of KILLED_AT; each time the same command continues it."""
    ground = ground.light
    run_dir = ground.run_dir("failpoints")
    resumed: list[float] = []  # seconds from the start of each resumed run to its first step
    redone: list[int] = []  # steps done again after each kill
    remaining: list[str] = []  # processes that did not end
    points = ";".join(
        f"{place}:do=kill:once={run_dir / f'fired-{i}'}" for i, place in enumerate(KILLED_AT)
    )
    reported = 0  # the last step that the run reported
    for _ in range(len(KILLED_AT) + 1):
        with training([*ground.overrides, f"train.steps={K1_STEPS}"], run_dir, points) as run:
            started = time.time()
            run.until("workers ready")
            family = run.family()
            if reported:
                resumed.append(run.until(STEP) - started)
            status = run.ended(START_S)
            remaining += names(alive_after(family, LEFT_S, besides=RAYS_OWN))
        redone.append(num_redone(run, reported))
        reported = last_step(run) or reported
        if status == 0:
            break
    kills = len(list(run_dir.glob("fired-*")))
    within = (
        status == 0
        and kills == len(KILLED_AT)
        and max(redone) <= SAVE_EVERY
        and max(resumed) <= RESUMED_S
        and not remaining
    )
    outcome = (
        f"SIGKILL of the run's process at {kills} of {len(KILLED_AT)} places, the same command "
        f"each time; to the next step {min(resumed):.0f} to {max(resumed):.0f} s with start "
        f"(bound {RESUMED_S:g} s), {len(remaining)} processes of ours left {LEFT_S:g} s after a "
        f"kill{' '.join(['', *remaining])}"
    )
    return {
        "K1": ground.judged(
            run_dir,
            K1_STEPS,
            outcome,
            within=within,
            recovered_s=max(resumed),
            lost_steps=max(redone),
        )
    }


def names(pids: list[int]) -> list[str]:
    """The command lines of processes."""
    return [name(pid).replace("\0", " ")[:200] for pid in pids]


def num_redone(run: Training, reported: int) -> int:
    """The number of steps that a resumed run does again.

    Args:
        reported: the last step that the run reported before it was killed.
    """
    continued_from = [
        int(match[1])
        for _, text in run.lines
        if (match := re.search(r"continues after step (\d+)", text))
    ]
    return max(reported - (continued_from[0] if continued_from else 0), 0)


def kill_at_random(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """K2: kill a run ten times at random: three times while it starts, else after its start."""
    ground = ground.light
    dice = random.Random(K2_SEED)
    run_dir = ground.run_dir("random")
    command = [*ground.overrides, f"train.steps={K2_STEPS}"]
    delays = [
        ("starting workers", dice.uniform(0, 20))
        if i in K2_STARTING
        else ("workers ready", dice.expovariate(1 / K2_MEAN_S))
        for i in range(K2_KILLS)
    ]
    reported = 0  # the last step that the run reported
    kills = 0
    redone: list[int] = []  # steps done again after each kill
    remaining: list[str] = []  # processes that did not end
    for word, delay in delays:
        with training(command, run_dir) as run:
            run.until(word)
            try:
                run.until(r"^done$", delay)
                break
            except TimeoutError:
                assert run.process.poll() is None, f"the run ended by itself: {run.tail()}"
                family = run.family()
                kill(run.process.pid)
                run.ended(30)
                remaining += names(alive_after(family, LEFT_S, besides=RAYS_OWN))
        redone.append(num_redone(run, reported))
        reported = last_step(run) or reported
        kills += 1
    with training(command, run_dir) as run:
        status = run.ended(START_S)
    redone.append(num_redone(run, reported))
    outcome = (
        f"{kills} SIGKILLs, {len(K2_STARTING)} while it starts, the others at random times after "
        f"it (seed {K2_SEED}, mean {K2_MEAN_S:g} s, a third of a second a step), the same command "
        f"each time, {len(remaining)} processes of ours left {LEFT_S:g} s after a "
        f"kill{' '.join(['', *remaining])}"
    )
    within = status == 0 and kills == K2_KILLS and max(redone) <= SAVE_EVERY and not remaining
    return {"K2": ground.judged(run_dir, K2_STEPS, outcome, within=within, lost_steps=max(redone))}


def interrupt(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """J2: press Ctrl-C twice during a step; J3: measure how long a run without a fault takes to
    end.
    """
    ground = ground.light
    findings = {}
    if "J2" in wanted:
        with training(ground.overrides, ground.run_dir("interrupt")) as run:
            run.until(STEP)
            family = run.family()
            at = kill(run.process.pid, signal.SIGINT)
            run.until("press Ctrl-C again to end it at once", 60)
            kill(run.process.pid, signal.SIGINT)
            status = run.ended(60)
            took = time.time() - at
            remaining = names(alive_after(family, LEFT_S))
        outcome = (
            f"SIGINT twice, the second as soon as the first is answered: exit status {status} "
            f"after {took:.1f} s, {len(remaining)} of {len(family)} processes left after "
            f"{LEFT_S:g} s{' '.join(['', *remaining])}"
        )
        passed = status in (75, 130) and not remaining
        findings["J2"] = Finding(passed=passed, outcome=outcome, detected_s=took)
    if "J3" in wanted:
        with training(
            [*ground.overrides, "train.steps=4", "checkpoint.export=true"], ground.run_dir("end")
        ) as run:
            at = run.until(r"^step +4/")
            family = run.family()
            status = run.ended(60)
            took = time.time() - at
            num_remaining = len(alive_after(family, 10))
        outcome = (
            "from the last step to the exit, with evaluation, checkpoint, export and report; "
            f"{num_remaining} processes left"
        )
        passed = status == 0 and took <= 10 and num_remaining == 0
        findings["J3"] = Finding(passed=passed, outcome=outcome, recovered_s=took)
    return findings


def exhaust(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """E5: every engine dies when it receives version 3 of the weights, until none can be
    replaced.
    """
    run_dir = ground.run_dir("exhausted")
    with training(
        [*ground.overrides, "cluster.max_restarts=2"],
        run_dir,
        "rollout.load_weights:version=3:do=kill",
    ) as run:
        run.until(STEP)
        family = run.family()
        status = run.ended(START_S)
        took = time.time() - max(at for at, text in run.lines if "starting another worker" in text)
        num_remaining = len(alive_after(family, 10))
    one_sentence = run.printed("^hybridrl: .*cluster.max_restarts is used up")
    typed = one_sentence and not run.printed("Traceback")
    outcome = (
        f"every engine dies at version 3, 2 replacements: exit status {status}, checkpoint 2 "
        f"is intact, {num_remaining} processes left"
    )
    within = status == 1 and typed and took <= 30 and num_remaining == 0
    return {"E5": ground.judged(run_dir, 2, outcome, within=within, recovered_s=took)}


def refuse(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C4: a run needs more workers than Ray has CPUs."""
    settings = [
        "rollout.engines=400",
        "train.prompts_per_step=400",
        "data.num_train=400",
        "deadlines.placement_s=10",
    ]
    with training([*ground.overrides, *settings], ground.run_dir("crowd")) as run:
        at = run.until("starting workers")
        status = run.ended(90)
        took = time.time() - at
    reported = run.printed(
        r"could not place 40\d workers within deadlines.placement_s=10: demand .* supply"
    )
    return {
        "C4": Finding(
            passed=status == 1 and reported,
            outcome=f"400 engines: exit status {status}, demand and supply reported",
            detected_s=took,
        )
    }


def blackhole(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """X1: a W&B server accepts connections and never answers."""
    ground = ground.light
    run_dir = ground.run_dir("unreachable")
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}",
            "WANDB_API_KEY": "0" * 40,
        }
        with training(
            [*ground.overrides, "train.steps=4", "tracking.wandb=online"], run_dir, env=env
        ) as run:
            status = run.ended(START_S)
    warned = sum("this run is tracked offline" in text for _, text in run.lines)
    outcome = (
        "W&B online at an address that takes connections and never answers: exit status "
        f"{status}, {warned} warning"
    )
    return {"X1": ground.judged(run_dir, 4, outcome, within=status == 0 and warned == 1)}


def starve(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """O3: Ray's memory monitor kills workers."""
    with training(
        [*ground.overrides, "cluster.max_restarts=1"], ground.run_dir("memory"), env=MEMORY_SHORT
    ) as run:
        at = time.time()
        status = run.ended(START_S)
        took = time.time() - at
    last = run.lines[-1][1] if run.lines else ""
    output = " ".join(text for _, text in run.lines).lower()
    reported = "memory" in output and not run.printed("Traceback")
    return {
        "O3": Finding(
            passed=status == 1 and reported,
            outcome=f"memory threshold of 2 %: exit status {status}: {last[:160]}",
            detected_s=took,
        )
    }


def faulty_rpc(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C3: calls between Ray's processes are delayed, and some requests or replies are lost."""
    ground = ground.light
    run_dir = ground.run_dir("rpc")
    with training([*ground.overrides, "train.steps=4"], run_dir, env=faulty_calls()) as run:
        status = run.ended(START_S)
    outcome = (
        "tasks, leases and requests for values delayed by up to 20 ms each; of leases, pins, "
        "requests and notifications 40 % lost, half of them after their work was done, up to 20 "
        f"in each process: exit status {status}"
    )
    if status:
        outcome += f", {run.tail()[-160:]}"
    return {"C3": ground.judged(run_dir, 4, outcome, within=status == 0)}


def soak(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """X2: measure the growth of memory and of open files in every process.

    The measurement starts at step 500: before, memory grows because the learner still receives
    batches that are longer than all earlier ones.
    """
    run_dir = ground.run_dir("soak")
    first, last = SOAKED
    usages: dict[int, dict[str, tuple[float, int]]] = {}  # by step and process
    sizes = [
        f"train.steps={last + 10}",
        "train.samples_per_prompt=2",
        "train.prompts_per_step=4",
        "rollout.engines=1",
        "learner.ranks=1",
    ]
    small = [*sizes, "checkpoint.every=50", "checkpoint.keep=2"]
    with training([*ground.overrides, *small], run_dir) as run:
        for step in SOAKED:
            while last_step(run) < step:
                run.until(STEP)
            usages[step] = {
                worker: usage(run.pid(worker))
                for worker in ("rollout/0", "learner/0", "scorer-main/0", "reward/0")
            }
            usages[step]["controller"] = usage(run.process.pid)
        status = run.ended(START_S)
    before = usages[first]
    after = usages[last]
    slopes = {  # MB per 100 steps
        process: (after[process][0] - before[process][0]) / (last - first) * 100
        for process in before
    }
    files = {process: after[process][1] - before[process][1] for process in before}
    worst = max(slopes, key=slopes.__getitem__)
    most = max(files, key=files.__getitem__)
    outcome = (
        f"steps {first} to {last}: memory grows most in {worst}, {slopes[worst]:.2f} MB per 100 "
        f"steps (bound 1); open files in {most}, {files[most]:+d} (bound 5)"
    )
    passed = status == 0 and slopes[worst] < 1 and abs(files[most]) <= 5
    return {"X2": Finding(passed=passed, outcome=outcome)}
