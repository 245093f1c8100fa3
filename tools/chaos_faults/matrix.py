"""The fault matrix: for each fault its name, the scenario that causes it, and the file to read."""

from collections.abc import Callable
from dataclasses import dataclass

from chaos_faults import drivers, nodes, workers
from chaos_faults.finding import Finding
from chaos_faults.ground import Ground

Do = Callable[[Ground, list[str]], dict[str, Finding]]
GRAPH = "tests/controller/test_graph.py"
FAST = "tests/launch/test_faults.py"
RESUME = "tests/run_dir/test_resume.py"
SAVE = "tests/run_dir/test_checkpoint.py"
REWARDS = "tests/rewards/test_rewards.py"
DOORS = "tests/launch/test_preflight.py"
LEARNER = "tests/policy/test_learner.py"
RUN_DIR = "tests/run_dir/test_directory.py"
DATA = "tests/data/test_prompts.py"
SYNC = "tests/weights/test_vllm_transfer.py"
VLLM = "tests/rollout/test_vllm_internals.py"
PIPELINE = "tests/controller/test_pipeline.py"
TOOL = "tools/chaos_faults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A row of the matrix."""

    id: str
    name: str
    do: Do | str  # a scenario, which may cause several faults; or test files and -k for pytest
    proof: str  # the file with the scenario or the tests


MATRIX = [
    Fault(
        id="R1",
        name="stopped and continued at every step",
        do=f"{RESUME} -k bit_for_bit",
        proof=RESUME,
    ),
    Fault(
        id="R2",
        name="the same with 2 ranks; other layouts",
        do=f"{LEARNER} -k bit_for_bit|may_change|same_next",
        proof=LEARNER,
    ),
    Fault(
        id="K1",
        name="run killed at each place",
        do=drivers.kill_at_failpoints,
        proof=f"{TOOL}/drivers.py",
    ),
    Fault(
        id="K2",
        name="run killed ten times at random",
        do=drivers.kill_at_random,
        proof=f"{TOOL}/drivers.py",
    ),
    Fault(
        id="K3", name="killed at every file operation of a save", do=f"{SAVE} -k killed", proof=SAVE
    ),
    Fault(
        id="K4",
        name="newest checkpoint damaged",
        do=f"{SAVE} -k damaged|manifest|another_format",
        proof=SAVE,
    ),
    Fault(id="E1", name="engine killed", do=workers.run, proof=GRAPH),
    Fault(
        id="E2", name="engine killed while it generates", do=workers.run, proof=f"{TOOL}/workers.py"
    ),
    Fault(
        id="E3",
        name="engine core killed, its actor alive",
        do=workers.kill_core,
        proof=f"{TOOL}/workers.py",
    ),
    Fault(id="E4", name="engine hangs", do=workers.run, proof=GRAPH),
    Fault(id="E5", name="all engines dead, no replacement left", do=drivers.exhaust, proof=GRAPH),
    Fault(
        id="E6",
        name="engine answers pings and fails requests",
        do=workers.run,
        proof=f"{TOOL}/workers.py",
    ),
    Fault(
        id="W1", name="weight sync hangs on one engine", do=workers.run, proof=f"{TOOL}/workers.py"
    ),
    Fault(
        id="W2",
        name="weights not what was sent",
        do=f"{GRAPH} {SYNC} -k refuses_weights|exactly_the|digest|other_weights",
        proof=GRAPH,
    ),
    Fault(id="L1", name="learner rank killed", do=workers.run, proof=FAST),
    Fault(id="L2", name="learner rank hangs", do=workers.run, proof=f"{TOOL}/workers.py"),
    Fault(id="T1", name="scorer hangs", do=workers.run, proof=GRAPH),
    Fault(id="T2", name="teacher of another vocabulary", do=DOORS, proof=DOORS),
    Fault(
        id="V1",
        name="reward raises or returns no number",
        do=f"{REWARDS} -k causes_a_failure|finite|error_value|drop_group",
        proof=REWARDS,
    ),
    Fault(id="V2", name="reward hangs", do=f"{REWARDS} -k causes_a_failure|hangs", proof=REWARDS),
    Fault(
        id="V3",
        name="reward process dies",
        do=f"{REWARDS} -k causes_a_failure|killed_between",
        proof=REWARDS,
    ),
    Fault(
        id="V4",
        name="reward that is only measured fails",
        do=f"{REWARDS} -k only_watched|weight_0",
        proof=REWARDS,
    ),
    Fault(id="N1", name="NaN in a step", do=f"{LEARNER} -k nan|left_out|finite", proof=LEARNER),
    Fault(
        id="G1",
        name="endless responses",
        do=f"{VLLM} {GRAPH} -k did_not_end|abort_ends|oversampling",
        proof=GRAPH,
    ),
    Fault(
        id="G2", name="prompts that cannot be used", do=f"{DATA} -k refused|too_long", proof=DATA
    ),
    Fault(
        id="O1",
        name="steps ahead would fill the object store",
        do=f"{PIPELINE} -k fill_the_store",
        proof=PIPELINE,
    ),
    Fault(
        id="O2",
        name="disk full",
        do=f"{SAVE} {RESUME} -k room|save_that_fails|checkpoint_that_fails",
        proof=SAVE,
    ),
    Fault(id="O3", name="memory short", do=drivers.starve, proof=f"{TOOL}/drivers.py"),
    Fault(id="C1", name="node dies", do=nodes.lose_node, proof=f"{TOOL}/nodes.py"),
    Fault(id="C2", name="node cut off, then back", do=nodes.cut_off, proof=f"{TOOL}/nodes.py"),
    Fault(
        id="C3", name="calls delayed and lost", do=drivers.faulty_rpc, proof=f"{TOOL}/drivers.py"
    ),
    Fault(id="C4", name="more workers than CPUs", do=drivers.refuse, proof=GRAPH),
    Fault(id="J1", name="SIGTERM", do=workers.run, proof=FAST),
    Fault(id="J2", name="Ctrl-C twice", do=drivers.interrupt, proof=f"{TOOL}/drivers.py"),
    Fault(id="J3", name="end of a run", do=drivers.interrupt, proof=f"{TOOL}/drivers.py"),
    Fault(
        id="J4",
        name="two runs in one directory",
        do=f"{RUN_DIR} -k one_run_at_a_time|ends_with_its_process",
        proof=RUN_DIR,
    ),
    Fault(id="X1", name="W&B unreachable", do=drivers.blackhole, proof=f"{TOOL}/drivers.py"),
    Fault(id="X2", name="1500 steps", do=drivers.soak, proof=f"{TOOL}/drivers.py"),
    Fault(
        id="F1",
        name="arbitrary settings, rows and rewards",
        do="tests/test_fuzz.py",
        proof="tests/test_fuzz.py",
    ),
]
