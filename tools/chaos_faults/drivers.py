"""K, J and the like: the run's own process is killed, told to end, or refused; the same command
goes on.
"""

import json
import random
import re
import signal
import socket
import time

from chaos_faults.finding import Finding
from chaos_faults.ground import STEP, Ground, last_step
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
K1_STEPS, K2_STEPS, K2_KILLS, K2_STARTING, K2_MEAN_S, K2_SEED = 16, 200, 10, (1, 4, 8), 5.0, 7
SAVE_EVERY = 2
DELAYED = [
    "CoreWorkerService.grpc_server.PushTask",
    "CoreWorkerService.grpc_server.GetObjectStatus",
    "CoreWorkerService.grpc_server.PubsubLongPolling",
    "NodeManagerService.grpc_server.RequestWorkerLease",
]
"""Not all: with a delay of every handler Ray's own raylet ends itself."""
LOST = [
    "NodeManagerService.grpc_client.RequestWorkerLease",
    "NodeManagerService.grpc_client.PinObjectIDs",
    "CoreWorkerService.grpc_client.GetObjectStatus",
    "CoreWorkerService.grpc_client.PubsubLongPolling",
]
"""Those that Ray promises to repeat. A lost CoreWorkerService.grpc_client.PushTask is an
ActorUnavailableError: it may have been done.
"""
SOAKED = (500, 1500)
LEFT_S, RAYS_OWN = (
    10.0,
    r"ray::(DashboardAgent|RuntimeEnvAgent)|[^\0]*python\0[^\0]*/ray/_private/workers/",
)
"""After which none of the processes of a killed run is left but Ray's own: its agents, which try
for 60 s to tell a control store that is gone that their raylet is gone too, and workers that Ray
had just started, which ask for their raylet for 27 s. A worker that has reported there, as all of
ours have, bears its actor's name.
"""
RESUMED_S = 120.0
"""Two cores start a run in 50 to 90 s."""


def kill_at_failpoints(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """K1: one logical run, killed at one place after another, each time continued by the same
    command.
    """
    ground = ground.light
    run_dir, resumed, redone, left = ground.run_dir("failpoints"), [], [], []
    points = ";".join(
        f"{place}:do=kill:once={run_dir / f'fired-{i}'}" for i, place in enumerate(KILLED_AT)
    )
    told = 0
    for _ in range(len(KILLED_AT) + 1):
        with training([*ground.overrides, f"train.steps={K1_STEPS}"], run_dir, points) as run:
            started = time.time()
            run.until("workers ready")
            family = run.family()
            if told:
                resumed.append(run.until(STEP) - started)
            status = run.ended(START_S)
            left += names(alive_after(family, LEFT_S, besides=RAYS_OWN))
        redone.append(lost_by(run, told))
        told = last_step(run) or told
        if status == 0:
            break
    kills = len(list(run_dir.glob("fired-*")))
    within = (
        status == 0
        and kills == len(KILLED_AT)
        and max(redone) <= SAVE_EVERY
        and max(resumed) <= RESUMED_S
        and not left
    )
    said = (
        f"SIGKILL of the run's process at {kills} of {len(KILLED_AT)} places, the same command "
        f"each time; to the next step {min(resumed):.0f} to {max(resumed):.0f} s with start "
        f"(bound {RESUMED_S:g} s), {len(left)} processes of ours left {LEFT_S:g} s after a "
        f"kill{' '.join(['', *left])}"
    )
    return {
        "K1": ground.judged(
            run_dir, K1_STEPS, said, within=within, recovered_s=max(resumed), lost_steps=max(redone)
        )
    }


def names(pids: list[int]) -> list[str]:
    return [name(pid).replace("\0", " ")[:200] for pid in pids]


def lost_by(run: Training, told: int) -> int:
    """Steps done again: from the step that the run goes on from to the last one that its
    predecessor told of.
    """
    found = [
        int(match[1])
        for _, text in run.lines
        if (match := re.search(r"continues after step (\d+)", text))
    ]
    return max(told - (found[0] if found else 0), 0)


def kill_at_random(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """K2: one logical run, killed ten times: three while it starts, the others at any moment from
    then on.
    """
    ground, dice = ground.light, random.Random(K2_SEED)
    run_dir, command = ground.run_dir("random"), [*ground.overrides, f"train.steps={K2_STEPS}"]
    delays = [
        ("starting workers", dice.uniform(0, 20))
        if i in K2_STARTING
        else ("workers ready", dice.expovariate(1 / K2_MEAN_S))
        for i in range(K2_KILLS)
    ]
    told, done, redone, left = 0, 0, [], []
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
                left += names(alive_after(family, LEFT_S, besides=RAYS_OWN))
        redone.append(lost_by(run, told))
        told, done = last_step(run) or told, done + 1
    with training(command, run_dir) as run:
        status = run.ended(START_S)
    redone.append(lost_by(run, told))
    said = (
        f"{done} SIGKILLs, {len(K2_STARTING)} while it starts, the others at random times after "
        f"it (seed {K2_SEED}, mean {K2_MEAN_S:g} s, a third of a second a step), the same command "
        f"each time, {len(left)} processes of ours left {LEFT_S:g} s after a "
        f"kill{' '.join(['', *left])}"
    )
    within = status == 0 and done == K2_KILLS and max(redone) <= SAVE_EVERY and not left
    return {"K2": ground.judged(run_dir, K2_STEPS, said, within=within, lost_steps=max(redone))}


def interrupt(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """J2: Ctrl-C twice in a step; J3: the end of a run that nothing happens to."""
    ground, found = ground.light, {}
    if "J2" in wanted:
        with training(ground.overrides, ground.run_dir("interrupt")) as run:
            run.until(STEP)
            family, at = run.family(), kill(run.process.pid, signal.SIGINT)
            run.until("once more ends it at once", 60)
            kill(run.process.pid, signal.SIGINT)
            status, took = run.ended(60), time.time() - at
            left = names(alive_after(family, LEFT_S))
        said = (
            f"SIGINT twice, the second as soon as the first is answered: exit status {status} "
            f"after {took:.1f} s, {len(left)} of {len(family)} processes left after {LEFT_S:g} "
            f"s{' '.join(['', *left])}"
        )
        found["J2"] = Finding(passed=status in (75, 130) and not left, said=said, detected_s=took)
    if "J3" in wanted:
        with training(
            [*ground.overrides, "train.steps=4", "checkpoint.export=true"], ground.run_dir("end")
        ) as run:
            at = run.until(r"^step +4/")
            family, status = run.family(), run.ended(60)
            took = time.time() - at
            left = alive_after(family, 10)
        said = (
            "from the last step to the exit, with evaluation, checkpoint, export and report; "
            f"{len(left)} processes left"
        )
        found["J3"] = Finding(
            passed=status == 0 and took <= 10 and not left, said=said, recovered_s=took
        )
    return found


def exhaust(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """E5: engines die whenever they are given version 3."""
    run_dir = ground.run_dir("exhausted")
    with training(
        [*ground.overrides, "cluster.max_restarts=2"],
        run_dir,
        "rollout.load_weights:version=3:do=kill",
    ) as run:
        run.until(STEP)
        family, status = run.family(), run.ended(START_S)
        took = time.time() - max(at for at, text in run.lines if "starting another worker" in text)
        left = alive_after(family, 10)
    typed = run.said("^hybridrl: .*cluster.max_restarts is used up") and not run.said("Traceback")
    said = (
        f"every engine dies at version 3, 2 replacements: exit status {status}, checkpoint 2 "
        f"stands, {len(left)} processes left"
    )
    kept = ground.judged(
        run_dir, 2, said, within=status == 1 and typed and took <= 30 and not left, recovered_s=took
    )
    return {"E5": kept}


def refuse(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C4: more workers than Ray has CPUs for."""
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
    told = run.said(
        r"could not place 40\d workers within deadlines.placement_s=10: demand .* supply"
    )
    return {
        "C4": Finding(
            passed=status == 1 and told,
            said=f"400 engines: exit status {status}, demand and supply told",
            detected_s=took,
        )
    }


def blackhole(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """X1: a W&B server that takes connections and never says a word."""
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
    said = (
        "W&B online at an address that takes connections and never answers: exit status "
        f"{status}, {warned} warning"
    )
    return {"X1": ground.judged(run_dir, 4, said, within=status == 0 and warned == 1)}


def starve(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """O3: Ray's memory monitor kills workers."""
    env = {"RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "250"}
    with training(
        [*ground.overrides, "cluster.max_restarts=1"], ground.run_dir("memory"), env=env
    ) as run:
        at = time.time()
        status = run.ended(START_S)
        took = time.time() - at
    last = run.lines[-1][1] if run.lines else ""
    told = "memory" in " ".join(text for _, text in run.lines).lower() and not run.said("Traceback")
    return {
        "O3": Finding(
            passed=status == 1 and told,
            said=f"memory threshold of 2 %: exit status {status}: {last[:160]}",
            detected_s=took,
        )
    }


def faulty_rpc(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """C3: calls between Ray's processes are delayed, and some are lost on their way there or
    back.
    """
    ground = ground.light
    run_dir = ground.run_dir("rpc")
    lost = {
        method: {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20}
        for method in LOST
    }  # of each process; in percent
    env = {
        "RAY_testing_asio_delay_us": ",".join(f"{handler}=0:20000" for handler in DELAYED),
        "RAY_testing_rpc_failure": json.dumps(lost),
    }
    with training([*ground.overrides, "train.steps=4"], run_dir, env=env) as run:
        status = run.ended(START_S)
    said = (
        "tasks, leases and questions after values delayed by up to 20 ms each; of leases, pins, "
        "questions and news 40 % lost, half of them with their work done, up to 20 in each "
        f"process: exit status {status}"
    )
    return {
        "C3": ground.judged(
            run_dir, 4, said + (f", {run.tail()[-160:]}" if status else ""), within=status == 0
        )
    }


def soak(ground: Ground, wanted: list[str]) -> dict[str, Finding]:
    """X2: memory and open files of every process. Until step 500 the learner's allocator still
    meets longer batches than before.
    """
    run_dir, (first, last), seen = ground.run_dir("soak"), SOAKED, {}
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
            seen[step] = {
                worker: usage(run.pid(worker))
                for worker in ("rollout/0", "learner/0", "scorer-main/0", "reward/0")
            }
            seen[step]["controller"] = usage(run.process.pid)
        status = run.ended(START_S)
    slopes = {
        name: (seen[last][name][0] - seen[first][name][0]) / (last - first) * 100
        for name in seen[first]
    }  # MB per 100 steps
    files = {name: seen[last][name][1] - seen[first][name][1] for name in seen[first]}
    worst, most = max(slopes, key=slopes.__getitem__), max(files, key=files.__getitem__)
    said = (
        f"steps {first} to {last}: memory grows most in {worst}, {slopes[worst]:.2f} MB per 100 "
        f"steps (bound 1); open files in {most}, {files[most]:+d} (bound 5)"
    )
    return {
        "X2": Finding(passed=status == 0 and slopes[worst] < 1 and abs(files[most]) <= 5, said=said)
    }
