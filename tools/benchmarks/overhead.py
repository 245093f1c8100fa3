"""Measures the overhead over bare vLLM and a bare PyTorch loop, and of controller and Ray in a
step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

from benchmarks.fake_workers import Work, rollouts
from benchmarks.stage import Stage, prompts_of, settings_of
from hybridrl.runtime.actor_group import ActorGroup
from hybridrl.runtime.calls import gather
from hybridrl.runtime.cluster import Cluster, Team
from hybridrl.runtime.learner_group import LearnerGroup
from hybridrl.runtime.rollout_group import RolloutGroup
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.run import RunSettings
from hybridrl.types import (
    BatchPlan,
    GenerateOrder,
    Prompt,
    Rewards,
    RolloutBatch,
    TokenScores,
    UpdatePlan,
)

TARGETS = {"generation": 0.95, "learner": 0.90, "controller": 0.05}
SMOLLM2 = [
    "model.path=builtin:smollm2-135m-instruct",
    "model.dtype=bfloat16",
    "teachers.main.path=null",
    "+teachers.main.dtype=bfloat16",
    "rollout.max_model_len=128",
    "rollout.kv_cache_bytes=536870912",
    "train.head_chunk=256",
]
MODELS = {
    "tiny": [
        "train.prompts_per_step=96",
        "train.samples_per_prompt=4",
        "rollout.max_new_tokens=16",
    ],
    "SmolLM2": [
        *SMOLLM2,
        "train.prompts_per_step=8",
        "train.samples_per_prompt=4",
        "rollout.max_new_tokens=32",
    ],
}
PARTS = ("generation", "learner", "controller", "scaling")
QUICKSTART = Work(generate_s=0.42, score_s=0.22, learn_s=0.54, pack_s=0.02, load_s=0.02)
"""The times of the phases in a step of the quickstart."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--most-engines", type=int, default=64)
    parser.add_argument("--most-groups", type=int, default=1024)


def run(options: argparse.Namespace) -> dict:
    with Cluster(settings_of()):  # all parts share one Ray
        return measured_parts(options)


def measured_parts(options: argparse.Namespace) -> dict:
    results: dict = {"targets": TARGETS}
    for part, measure in (("generation", generation), ("learner", learner)):
        if part in options.parts:
            results[part] = {}
            for name in options.models:
                results[part][name] = placed(measure, settings_of(*MODELS[name]), options.repeats)
                row = results[part][name]
                verdict = "reached" if row["share"] >= TARGETS[part] else "MISSED"
                print(
                    f"{part:11s} {name:8s} {row['text']}: {row['share']:.1%} of bare, target "
                    f"{TARGETS[part]:.0%}: {verdict}",
                    flush=True,
                )
    if "controller" in options.parts:
        results["controller"] = controller_share(options.repeats)
    if "scaling" in options.parts:
        results["scaling"] = scaling(
            options.most_engines, options.most_groups, min(options.repeats, 3)
        )
    return results


def placed(measure, settings: RunSettings, repeats: int) -> dict:
    """Call `measure` with a place for one of our workers and one for a bare one; both end after
    it.
    """
    with (
        tempfile.TemporaryDirectory(prefix="hybridrl-bench-") as logs,
        Cluster(settings) as cluster,
    ):
        slots = cluster.place(
            [Team(name=name, size=1, gpus=0, heavy=True) for name in ("ours", "bare")]
        )
        return measure(settings, slots, logs, repeats)


def bare(name: str, settings: RunSettings, slots: dict, logs: str) -> ActorGroup:
    return ActorGroup(
        "bare",
        f"benchmarks.real_workers:{name}",
        slots["bare"],
        [{"settings": settings}],
        log_dir=logs,
    )


def shares(totals: list[float], parts: list[float]) -> float:
    """The median of part / total over the turns."""
    return statistics.median(part / total for total, part in zip(totals, parts, strict=True))


# -- generation and learner, against the bare parts ------------------------------------------------


def generation(settings: RunSettings, slots: dict, logs: str, repeats: int) -> dict:
    """Compare the tokens per second of our engine and a bare one, for the same requests and seeds.

    In fp32 both must sample the same number of tokens; in bf16 a response may depend on the other
    responses in its batch.
    """
    ours = RolloutGroup(
        settings,
        slots["ours"],
        model=settings.model,
        device="cpu",
        backend=WeightTransfer.object_store,
        log_dir=logs,
    )
    engine = bare("BareEngine", settings, slots, logs)
    gather([*ours.ready(), *engine.submit_all("ping", deadline_s=600.0)])
    train = settings.train
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(uid=f"p{i}", input_ids=tuple(rng.integers(3, 16, 12).tolist()), text="", columns={})
        for i in range(train.prompts_per_step)
    ]
    kinds = ("ours", "bare", "bare, unseeded")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}  # tokens per second
    for turn in range(1 + repeats):
        how = {
            "wave": f"w{turn}",
            "group_size": train.samples_per_prompt,
            "temperature": 1.0,
            "seed": turn,
        }
        started = time.perf_counter()
        headers = gather([chunk.header for chunk in ours.generate(prompts, **how)])
        took = time.perf_counter() - started
        made = {"ours": (int(sum(h.response_lengths.sum() for h in headers)), took)}
        order = GenerateOrder(
            **how, chunk=0, num_chunks=1, max_new_tokens=settings.rollout.max_new_tokens
        )
        for kind, seeded in (("bare", True), ("bare, unseeded", False)):
            made[kind] = engine.submit(
                0, "generate", prompts, order, seeded, deadline_s=600.0
            ).result()
        same = made["ours"][0] == made["bare"][0]
        assert same or settings.model.dtype != "float32", (
            f"turn {turn}: the same requests and seeds gave {made}"
        )
        for kind, (tokens, seconds) in made.items() if turn else ():
            rates[kind].append(tokens / seconds)
    rate = statistics.median(rates["ours"])
    tokens = {kind: made[kind][0] for kind in kinds}
    share, unseeded = (shares(rates[kind], rates["ours"]) for kind in kinds[1:])
    text = (
        f"{tokens['ours']} tokens ({tokens['bare']} bare), {rate:.0f} tok/s ({unseeded:.1%} "
        "of bare without seeds)"
    )
    return {
        "tokens": tokens,
        "tokens_per_s": rates,
        "share": share,
        "share_of_unseeded": unseeded,
        "text": text,
    }


def learner(settings: RunSettings, slots: dict, logs: str, repeats: int) -> dict:
    """Compare the seconds that LearnerGroup.learn takes its caller with a bare loop on that
    batch.
    """
    ours = LearnerGroup(settings, slots["ours"], device="cpu", log_dir=logs)
    loop = bare("BareLearner", settings, slots, logs)
    gather([*ours.ready(), *loop.submit_all("ping", deadline_s=600.0)])
    plan, batch, rewards, scores = problem(settings)
    loop.submit(0, "prepare", plan, batch, rewards, scores, deadline_s=600.0).result()
    groups = [range(len(batch.uids))]
    refs = [ray.put(value) for value in (batch, rewards, scores)]
    seconds: dict[str, list[float]] = {"ours": [], "worker": [], "bare": []}
    for turn in range(2 + repeats):
        started = time.perf_counter()
        stats = ours.learn(BatchPlan.one_update(plan), [[groups]], [refs])
        took = {"ours": time.perf_counter() - started, "worker": stats.learn_s}
        took["bare"] = loop.submit(0, "update", deadline_s=600.0).result()
        if turn > 1:
            for kind, value in took.items():
                seconds[kind].append(value)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    text = (
        f"{plan.num_tokens} tokens, {median['ours']:.3f} s (worker {median['worker']:.3f}, "
        f"bare {median['bare']:.3f})"
    )
    return {
        "tokens": plan.num_tokens,
        "seconds": seconds,
        "share": shares(seconds["ours"], seconds["bare"]),
        "text": text,
    }


def problem(settings: RunSettings) -> tuple[UpdatePlan, RolloutBatch, Rewards, TokenScores]:
    """The batch of one step, with random tokens, rewards and teacher states, and its plan."""
    from hybridrl.batch.balance import micro_batches
    from hybridrl.models.loading import load_output_head

    train = settings.train
    rng = np.random.default_rng(0)
    how = {"wave": "w", "chunk": 0, "num_chunks": 1, "temperature": 1.0, "seed": 0}
    order = GenerateOrder(
        **how, group_size=train.samples_per_prompt, max_new_tokens=settings.rollout.max_new_tokens
    )
    plain = rollouts(order, prompts_of(train.prompts_per_step, 12), 0)
    width = load_output_head(
        settings.teachers["main"].path or settings.model.path, "float32"
    ).shape[1]
    ids = rng.integers(3, 16, len(plain.input_ids)).astype(np.int32)
    rows = int(plain.response_mask.sum())
    n = plain.num_sequences
    values = {f: getattr(plain, f) for f in plain.__dataclass_fields__} | {"input_ids": ids}
    states = rng.standard_normal((rows, width)).astype(np.float32)
    if settings.teachers["main"].dtype == "bfloat16":
        states = (states.view(np.uint32) >> 16).astype(np.uint16)
    value = rng.integers(0, 2, n).astype(np.float32)
    ones = np.ones(n, np.float32)
    rewards = Rewards(
        uids=plain.uids,
        values=value,
        part_names=("r",),
        parts=value[None],
        errors=ones < 0,
        keep=ones > 0,
        compressed=ones,
        repeated=ones,
    )
    scores = TokenScores(
        teacher="main",
        logprobs=np.zeros(len(ids), np.float32),
        rows=states,
        support_ids=np.zeros((rows, 0), np.int32),
    )
    lengths = np.diff(plain.offsets).tolist()
    plan = UpdatePlan(
        step=0,
        num_tokens=rows,
        num_sequences=n,
        num_groups=len(plain.uids),
        lr=1e-5,
        teacher_weights=(1.0,),
        teacher_routes=({},),
        reward_weight=1.0,
        num_micro_batches=len(
            micro_batches(lengths, train.max_tokens_per_micro_batch, packed=train.packing)
        ),
    )
    return plan, RolloutBatch(**values), rewards, scores


# -- controller and Ray, with workers that wait ----------------------------------------------------


def controller_share(repeats: int) -> dict:
    """The share of a quickstart step in which no worker is busy, with one chunk and with 96."""
    rows = {}
    with Stage(settings_of()) as stage:
        stage.assign(QUICKSTART)
        for name, size in {"one chunk": 96, "96 chunks": 1}.items():
            controller = stage.controller(
                settings_of(f"rollout.groups_per_chunk={size}", f"train.steps={2 + repeats}")
            )
            step_s = statistics.median(
                [controller.step()["time/step_s"] for _ in range(2 + repeats)][2:]
            )
            g, s, t, w = QUICKSTART.phases
            # All chunks but the last one are scored while others are generated.
            busy = g + s * size / 96 + t + w
            rows[name] = {"step_s": step_s, "busy_s": busy, "share": 1 - busy / step_s}
            verdict = "reached" if rows[name]["share"] <= TARGETS["controller"] else "MISSED"
            print(
                f"controller  {name}: step {step_s:.3f} s, workers {busy:.3f} s: "
                f"{rows[name]['share']:.1%} is controller and Ray, target "
                f"{TARGETS['controller']:.0%}: {verdict}",
                flush=True,
            )
    return rows


def scaling(most_engines: int, most_groups: int, repeats: int) -> dict:
    """The controller's seconds per step with workers that do nothing, as the numbers of engines,
    groups and tokens grow.
    """
    base = {"engines": min(4, most_engines), "groups": min(256, most_groups), "tokens": 256}

    def fourfold(first, last):
        return [first * 4**i for i in range(20) if first * 4**i <= last]

    axes = {
        "engines": fourfold(1, most_engines),
        "groups": fourfold(max(most_groups // 16, base["engines"]), most_groups),
        "tokens": [64, 256, 1024, 4096],
    }
    rows: dict = {}
    sizes = [f"train.prompts_per_step={most_groups}", f"rollout.engines={most_engines}"]
    with Stage(settings_of(*sizes)) as stage:
        stage.assign(Work())
        for axis, values in axes.items():
            rows[axis] = [
                driver_cost(stage, **(base | {axis: value}), repeats=repeats) for value in values
            ]
            points = "   ".join(
                f"{r[axis]}: {1e3 * r['cpu_s']:.0f} ms CPU, {1e3 * r['wall_s']:.0f} wall"
                for r in rows[axis]
            )
            print(f"scaling     {axis:8s} {points}; {growth(rows[axis], axis)}", flush=True)
    return rows


def growth(points: list[dict], axis: str) -> str:
    """A sentence that says whether the cost grows more than linearly between an axis's last two
    points.
    """
    if len(points) < 2:
        return "one point only"
    before, last = points[-2:]
    times = last[axis] / before[axis]
    cost = last["wall_s"] / before["wall_s"]
    return (
        f"{times:.0f} times the {axis} cost {cost:.2f} times: "
        f"{'at most linear' if cost <= 1.1 * times else 'MORE than linear'}"
    )


def driver_cost(stage: Stage, *, engines: int, groups: int, tokens: int, repeats: int) -> dict:
    settings = settings_of(
        f"train.prompts_per_step={groups}",
        "train.samples_per_prompt=2",
        "rollout.groups_per_chunk=1",
        f"rollout.engines={engines}",
        f"train.steps={1 + repeats}",
        f"rollout.max_new_tokens={tokens}",
        f"rollout.max_model_len={tokens + 16}",
    )
    controller = stage.controller(settings, engines=engines)
    walls = []
    cpus = []
    for _ in range(1 + repeats):
        wall = time.perf_counter()
        cpu = time.process_time()
        controller.step()
        walls = [*walls, time.perf_counter() - wall]
        cpus = [*cpus, time.process_time() - cpu]
    medians = {"wall_s": statistics.median(walls[1:]), "cpu_s": statistics.median(cpus[1:])}
    return {"engines": engines, "groups": groups, "tokens": tokens, **medians}


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = {part: results[part] for part in ("generation", "learner") if part in results}
    panels = [*shares.items(), *results.get("scaling", {}).items()] or [
        ("controller", results["controller"])
    ]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.7 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], panels, strict=True):
        if isinstance(rows, dict):
            axis.bar(list(rows), [100 * row["share"] for row in rows.values()], 0.5)
            axis.axhline(
                100 * results["targets"][name], color="black", linestyle="dashed", label="target"
            )
            axis.set_ylabel("% of a step" if name == "controller" else "% of the bare part's speed")
            axis.set_title(name, fontsize=10)
        else:
            for kind, label in {"wall_s": "wall of an empty step", "cpu_s": "driver's CPU"}.items():
                axis.plot(
                    [row[name] for row in rows],
                    [1e3 * row[kind] for row in rows],
                    "o-",
                    label=label,
                )
            axis.set_xlabel({"tokens": "tokens of a response"}.get(name, name))
            axis.set_ylabel("ms")
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
