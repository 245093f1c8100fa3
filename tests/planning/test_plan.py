"""The arithmetic of the plan. Expected numbers are for Qwen2.5-7B, with 7.616e9 parameters, 152064
tokens and hidden size 3584, and a teacher of 32B.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from hybridrl.core.errors import ConfigError
from hybridrl.ops.compare import compare
from hybridrl.planning.advice import advice_lines
from hybridrl.planning.edges import checkpoint_bytes, rollout_bytes, score_bytes
from hybridrl.planning.fit import check_fit, refuse
from hybridrl.planning.live_internals import LiveBytes, without_memory
from hybridrl.planning.memory import COMPARED_MATRICES, head_bytes, transfer_buffers
from hybridrl.planning.model_shape import shape_of
from hybridrl.planning.passes import Pass, pass_bytes
from hybridrl.planning.plan import GIB, Plan, aligned, make_plan, plan_lines
from hybridrl.planning.rates import views
from hybridrl.planning.sizes import Sizes
from hybridrl.planning.zero import zero_bytes
from hybridrl.settings.choices import Offload, WeightTransfer
from hybridrl.settings.compose import load_config
from hybridrl.settings.models import ModelConfig

MODELS = Path(__file__).parent / "models"
P7 = 7_615_616_512


def planned(
    name: str,
    student: str = "qwen2.5-7b",
    teacher: str = "qwen2.5-32b",
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan of a shipped experiment on 80 GB GPUs, with models whose configs are in models/."""
    return plan_of_shipped(name, student, teacher, tuple(overrides))


@cache
def plan_of_shipped(name: str, student: str, teacher: str, overrides: tuple[str, ...]) -> Plan:
    """The result of `planned`, cached for all tests."""
    paths = [f"model.path={MODELS / student}", f"teachers.main.path={MODELS / teacher}"]
    settings = load_config(["run.dir=x", f"experiment={name}", *paths, *overrides])
    return make_plan(settings, device="cuda", device_bytes=79 * GIB)


def quickstart(*overrides: str, memory_gib: float = 24) -> Plan:
    settings = load_config(["run.dir=x", "experiment=quickstart", *overrides])
    return make_plan(settings, device="cpu", device_bytes=int(memory_gib * GIB))


def test_shapes_come_from_the_config_alone():
    shape = shape_of(str(MODELS / "qwen2.5-7b"), None, "model.path")
    assert shape.parameters == P7
    assert shape.largest == 152064 * 3584
    assert shape.kv_numbers == 2 * 28 * 4 * 128
    assert not shape.tied
    teacher = shape_of(str(MODELS / "qwen2.5-32b"), None, "model.path")
    assert round(teacher.parameters * 2 / GIB, 1) == 61.0
    assert teacher.kv_numbers * 2 == 262144  # bytes of KV cache a token
    tiny = shape_of("builtin:countdown-student", None, "model.path")
    assert (tiny.parameters, tiny.tied) == (782336, True)


@pytest.mark.parametrize(
    ("width", "stage", "gib"),
    [
        (2, 1, {1: 113.5, 2: 70.9, 4: 49.6, 8: 39.0, 16: 33.7}),
        (2, 2, {1: 127.7, 2: 70.9, 4: 42.6, 8: 28.4, 16: 21.3}),
        (2, 3, {1: 127.7, 2: 63.8, 4: 31.9, 8: 16.0, 16: 8.0}),
        (4, 1, {1: 141.9, 2: 99.3, 4: 78.0, 8: 67.4, 16: 62.1}),
        (4, 3, {1: 141.9, 2: 70.9, 4: 35.5, 8: 17.7, 16: 8.9}),
    ],
)
def test_a_rank_holds_its_share_of_weights_gradients_and_optimizer(width, stage, gib):
    for ranks, expected in gib.items():
        zero = zero_bytes(P7, width=width, ranks=ranks, stage=stage, micro_batches=1)
        held = zero.weights + zero.gradients + zero.optimizer
        assert round(held / GIB, 1) == pytest.approx(expected, abs=0.051), (stage, ranks)


@pytest.mark.parametrize(
    ("stage", "offload", "device", "host"),
    [
        # GiB: 2 P = 14.185, 4 P = 28.370, the embedding of 544_997_376 numbers 1.015 in bfloat16
        (1, Offload.optimizer, 14.2 + 14.2 + 1.0, 4 * 28.37 + 2 * 14.185 + 1.0),
        (3, Offload.optimizer, 14.2, 5 * 28.37),
        (3, Offload.parameters, 0.0, 5 * 28.37 + 14.185),
    ],
)
def test_what_is_offloaded_is_in_host_memory_instead(stage, offload, device, host):
    shared = {"width": 2, "stage": stage, "micro_batches": 4, "largest": 152064 * 3584}
    one = zero_bytes(P7, ranks=1, offload=offload, **shared)
    kept = one.always if stage < 3 else 0  # of the rest, stage 3 keeps its bucket
    assert (one.weights + one.gradients + one.optimizer + kept) / GIB == pytest.approx(device, 0.01)
    assert one.host / GIB == pytest.approx(host, 0.001)
    eight = zero_bytes(P7, ranks=8, offload=offload, **shared)
    if stage == 3:
        assert eight.host == one.host / 8 and eight.weights == one.weights / 8
    assert zero_bytes(P7, ranks=1, **shared).host == 0


def test_beside_adapters_the_weights_have_neither_gradients_nor_an_optimizer():
    adapters = 40_370_176  # rank 16, in the seven linear layers of each of 28 decoder layers
    plan = planned("qwen7b_from_32b_8gpu", overrides=["lora.rank=16"])
    assert (plan.sizes.trained, plan.sizes.frozen) == (adapters, P7)
    shared = {"width": 2, "micro_batches": 1, "frozen": P7}
    one = zero_bytes(adapters, ranks=1, stage=1, **shared)
    assert one.weights + one.gradients + one.optimizer == 2 * P7 + 16 * adapters
    shards = zero_bytes(adapters, ranks=8, stage=3, **shared)
    assert shards.weights == 2 * (P7 + adapters) / 8 and shards.optimizer == 12 * adapters / 8
    assert shards.gathered == 2 * 10**9
    moved = zero_bytes(adapters, ranks=1, stage=3, offload=Offload.parameters, **shared)
    assert (moved.weights, moved.host) == (0, 2 * P7 + 22 * adapters)
    assert checkpoint_bytes(plan.sizes) == 12 * adapters
    (sent,) = (edge for edge in plan.edges if edge.what == "weights")
    assert sent.nbytes == 2 * P7 * plan.settings.rollout.engines  # merged
    whole = planned("qwen7b_from_32b_8gpu")
    assert 0 < plan.peak("learner") < 0.9 * whole.peak("learner")


def test_adapters_by_themselves_are_all_that_a_step_sends():
    adapters = 40_370_176  # of rank 16
    asked = ["lora.rank=16", "lora.sync=adapter"]
    alone = planned("qwen7b_from_32b_8gpu", overrides=asked)
    merged = planned("qwen7b_from_32b_8gpu", overrides=asked[:1])
    (sent,) = (edge for edge in alone.edges if edge.what == "weights")
    assert sent.nbytes == 2 * adapters * alone.settings.rollout.engines  # 81 MB each
    assert alone.store_bytes == merged.store_bytes + 2 * adapters  # it is used instead of nccl
    assert alone.disk_bytes == merged.disk_bytes
    (room,) = (part for part in alone.parts if part.part == "adapters")
    assert (room.worker, room.nbytes) == ("rollout", 2 * adapters)
    taken = planned("qwen7b_from_32b_8gpu", overrides=["lora.rank=17", "lora.sync=adapter"])
    (wider,) = (part for part in taken.parts if part.part == "adapters")
    assert wider.nbytes == 2 * 2 * adapters  # vLLM's next rank is 32


def test_a_teacher_that_shares_the_learners_base_needs_no_device_of_its_own():
    asked = ["lora.rank=16", "teachers.main.path=null"]
    share = "+teachers.main.share_base=true"
    name = "qwen7b_from_32b_8gpu"
    apart, shared = (planned(name, overrides=o) for o in (asked, [*asked, share]))
    assert sum(s.gpus for s in apart.seats) == sum(s.gpus for s in shared.seats) + 1
    assert not shared.of_worker("scorer-main")
    assert apart.peak("scorer-main") / GIB == pytest.approx(16.5, abs=0.3)  # weights of 14.2
    phases = {part.phase for part in shared.of_worker("learner")}
    assert phases - {part.phase for part in apart.of_worker("learner")} == {"score"}
    assert {(e.source, e.target) for e in shared.edges} == {
        ("rollout", "learner"),
        ("learner", "rollout"),
    }
    assert shared.store_bytes < apart.store_bytes
    # The learner computes the scorer's forward pass, divided among its ranks.
    assert shared.seconds.score == 0
    more = shared.seconds.learn - apart.seconds.learn
    assert more == pytest.approx(apart.seconds.score / shared.settings.learner.ranks)
    # If the weights are not sharded, the output embedding is not copied either.
    whole = [*asked, "learner.zero_stage=2"]
    apart, shared = (planned(name, overrides=o) for o in (whole, [*whole, share]))
    assert apart.peak("learner") - shared.peak("learner") == 152064 * 3584 * 2


def test_a_teacher_that_could_share_the_learners_base_is_named_with_the_bytes_it_would_save():
    asked = ["lora.rank=16", "teachers.main.path=null", "learner.zero_stage=2"]
    name = "qwen7b_from_32b_8gpu"
    [line] = advice_lines(planned(name, overrides=asked))
    # The scorer has 16.5 GiB, and each of four ranks a copy of the output embedding with 1.0 GiB.
    assert line.startswith("advice: teachers.main.share_base=true needs 20.5 GiB less in all: main")
    other = f"teachers.main.path={MODELS / 'qwen2.5-32b'}"
    for change in ("lora.rank=null", "+teachers.main.share_base=true", other):
        assert not list(advice_lines(planned(name, overrides=[*asked, change])))


def test_sharing_the_learners_base_is_the_first_remedy_of_a_scorer_that_does_not_fit():
    asked = ["lora.rank=16", "teachers.main.path=null"]
    asked += ["rollout.engines=1", "rollout.tensor_parallel=2"]

    def small(*overrides: str) -> Plan:
        settings = planned("qwen7b_from_32b_8gpu", overrides=[*asked, *overrides]).settings
        return make_plan(settings, device="cuda", device_bytes=16 * GIB)

    with pytest.raises(
        ConfigError, match=r"it would fit with teachers\.main\.share_base=true, on 6"
    ):
        check_fit(small())
    check_fit(small("+teachers.main.share_base=true"))


def test_adapters_keep_their_inputs_and_no_more_than_the_layers_without_them_did():
    model = ModelConfig(path=str(MODELS / "qwen2.5-7b"), dtype="bfloat16")
    whole, few, many = (
        pass_bytes(model, "model.path", Pass(1, 4096, learns=True, rank=rank)).kept
        for rank in (None, 16, 32)
    )
    low = 4096 * 16 * 2 * 7 * 28  # A x of each layer
    assert many - few == low
    assert 0.9 * whole < few < 1.02 * whole


def test_diagnostics_have_the_gradients_of_both_terms_whole_on_every_rank():
    """Two sums in float32 and the result of a backward pass in bfloat16: 4 P + 4 P + 2 P."""
    eight = ["learner.ranks=8", "learner.zero_stage=2"]
    check_fit(planned("qwen7b_from_32b_8gpu", overrides=eight))
    diagnosed = planned("qwen7b_from_32b_8gpu", overrides=[*eight, "diagnostics.every=10"])
    gradients = {p.phase: p.nbytes for p in diagnosed.of_worker("learner") if p.part == "gradients"}
    assert gradients["diagnose"] == 10 * P7
    with pytest.raises(
        ConfigError, match=r"^model\.path=.*learner does not fit GPU .*gradients 70"
    ):
        check_fit(diagnosed)


def test_diagnostics_compare_student_and_teacher_beside_sharded_weights_too():
    """Eight matrices of 1024 x 152064, and the teacher's hidden states of 5120 numbers for the
    16384 response tokens of a micro-batch.
    """
    plan = planned("qwen7b_from_32b_8gpu", overrides=["diagnostics.every=10"])
    parts = {p.part: p.nbytes for p in plan.of_worker("learner") if p.phase == "diagnose"}
    assert parts["head pass"] == 8 * 1024 * 152064 * 4 + 16384 * 5120 * 2
    assert parts["gradients"] == 4 * P7 // 4  # of the last batch, divided among four ranks
    assert not [p for p in planned("qwen7b_from_32b_8gpu").parts if p.phase == "diagnose"]


def test_a_comparison_has_as_many_matrices_at_once_as_are_planned():
    with without_memory():
        logits = torch.ones(64, 4096)
        with LiveBytes([logits]) as live:
            compare(logits.log_softmax(-1), logits.log_softmax(-1))
    assert 1 + live.peak / (64 * 4096 * 4) == pytest.approx(COMPARED_MATRICES, abs=0.01)


def test_communication_beside_the_backward_pass_needs_a_second_bucket_in_stage_2():
    for stage, more in ((1, 0), (2, 500_000_000 * 2), (3, 0)):
        one, two = (
            zero_bytes(P7, width=2, ranks=8, stage=stage, micro_batches=1, overlaps=overlaps)
            for overlaps in (False, True)
        )
        assert two.reducing - one.reducing == more


@pytest.mark.parametrize(
    ("width", "micro_batches", "times"),
    # With DeepSpeed 0.19.8 on one rank, 12.0 P were measured in bfloat16: the sum of the rank's
    # shard in float32, the bucket, its parts joined, and these in float32. With a model in float32
    # there is another sum instead of the latter, from the second micro-batch on.
    [(2, 1, 4 + 2 + 2 + 4), (2, 2, 12), (4, 1, 4 + 4 + 4), (4, 2, 16)],
)
def test_stage_2_sums_a_bucket_beside_the_sum_so_far(width, micro_batches, times):
    zero = zero_bytes(1000, width=width, ranks=1, stage=2, micro_batches=micro_batches)
    assert zero.gradients + zero.reducing == times * 1000


def test_buckets_of_gradients_are_summed_beside_the_activations_from_stage_2_on():
    """Buckets have 500 M numbers: two buckets, their parts and these in float32; in stage 3 the
    parts alone.
    """
    buckets = {2: (2 + 2 + 2 + 4) * 500_000_000, 3: (4 + 4) * 500_000_000 + 2 * 10**9, 1: 0}
    for stage, buffers in buckets.items():
        asked = ["learner.ranks=8", f"learner.zero_stage={stage}"]
        plan = planned("qwen7b_from_32b_8gpu", overrides=asked)
        parts = {p.part: p.nbytes for p in plan.of_worker("learner") if p.phase == "backward"}
        assert parts["buffers"] == buffers
        assert parts["gradients"] == (2 * P7 if stage == 1 else 4 * P7 / 8)
        assert parts["activations"] > 0


def test_teachers_of_whom_the_drawn_token_alone_is_known_have_no_part_in_the_pass_over_the_rows():
    """For top-K scores plain torch needs six matrices of 1024 x 152064 in float32."""
    top = ["algorithm=opd_full", "algorithm.support=topk", "algorithm.topk.k=16"]

    def head_pass(*overrides: str) -> int:
        sizes = planned("qwen7b_from_32b_8gpu", overrides=overrides).sizes
        return head_bytes(sizes, rows=1024)

    assert head_pass(*top) - head_pass("algorithm=opd") == 6 * 1024 * 152064 * 4 + 1024 * 16 * (
        4 + 4
    )


def test_offloading_is_a_remedy_on_gpus_alone():
    plan = planned("qwen7b_from_32b_8gpu")
    alone = replace(plan.settings, learner=replace(plan.settings.learner, ranks=1))
    with pytest.raises(
        ConfigError,
        match=r"it would fit with learner\.offload=optimizer, on 5 GPUs in all and 141\.9 GiB of "
        r"host memory for each learner rank$",
    ):
        check_fit(make_plan(alone, device="cuda", device_bytes=79 * GIB))
    fitting = replace(alone, learner=replace(alone.learner, offload=Offload.optimizer))
    plan = make_plan(fitting, device="cuda", device_bytes=79 * GIB)
    check_fit(plan)
    assert "host memory of each learner rank, offloaded: 141.9 GiB" in plan_lines(plan)
    with pytest.raises(ConfigError, match=r"choose a smaller model, or a node with more memory$"):
        check_fit(quickstart(memory_gib=0.5))
    (part,) = {
        p.nbytes
        for p in quickstart("learner.offload=optimizer", "learner.zero_stage=3").parts
        if p.part == "offloaded"
    }
    assert part == 5 * 4 * 782336


def shared(*overrides: str) -> Plan:
    """The plan of a 7B student with a reward and no teacher, on two GPUs that learner and engines
    share.
    """
    settings = load_config(
        [
            "run.dir=x",
            "experiment=qwen7b_from_32b_1gpu",
            f"model.path={MODELS / 'qwen2.5-7b'}",
            "~teachers.main",
            "algorithm=grpo",
            "algorithm.imitation_weight=0",
            "learner.ranks=2",
            "rollout.engines=2",
            *overrides,
        ]
    )
    return make_plan(settings, device="cuda", device_bytes=79 * GIB)


TURNS = ("cluster.take_turns=true", "rollout.gpu_memory_utilization=0.7")


def test_workers_that_take_turns_are_added_up_turn_by_turn():
    plan = shared(*TURNS)
    [seat] = plan.seats
    learner = {(p.phase, p.part): p.nbytes for p in plan.of_worker("learner")}
    engine = {(p.phase, p.part): p.nbytes for p in plan.of_worker("rollout")}
    weights = P7  # of two ranks, in bfloat16
    assert all(learner[phase, "weights"] == weights for phase in ("sync", "probe", "step"))
    optimizer = [learner[phase, "optimizer"] for phase in ("probe", "sync", "step")]
    assert optimizer == [0, 0, 12 * P7 / 2]
    buffers = 2 * 10**9 + 544_997_376 * 2  # gathered weights, and the embedding on its way
    sync = weights + buffers + 2 * P7
    assert (learner["sync", "buffers"], engine["sync", "weights"]) == (buffers, 2 * P7)
    sample = sum(engine[key] for key in engine if key[0] == "sample")
    sample += sum(learner[key] for key in learner if key[0] == "probe")
    assert int(0.7 * 79 * GIB) + weights < sample < 0.8 * 79 * GIB + weights
    assert plan.seat_bytes(seat) == max(plan.peak("learner"), sync, sample) < 79 * GIB
    assert plan.offloaded_bytes == 12 * P7 / 2 and plan.asleep_bytes("rollout") == 2 * P7
    lines = "\n".join(plan_lines(plan))
    assert "host memory of each learner rank, offloaded: 42.6 GiB" in lines
    assert "host memory of each engine of rollout, while it sleeps: 14.2 GiB" in lines


def test_without_turns_the_same_workers_do_not_fit_and_turns_are_the_remedy():
    plan = shared("rollout.gpu_memory_utilization=0.5")
    assert plan.offloaded_bytes == plan.asleep_bytes("rollout") == 0
    with pytest.raises(ConfigError, match=r"it would fit with cluster\.take_turns=true, on 2 GPUs"):
        check_fit(plan)
    wider = shared("cluster.take_turns=true", "rollout.gpu_memory_utilization=0.9")
    with pytest.raises(ConfigError, match=r"fit with rollout\.gpu_memory_utilization=0\.8, on 2"):
        check_fit(wider)
    asked = ("pipeline.ahead=1", "pipeline.max_staleness=1")
    ahead = shared("rollout.gpu_memory_utilization=0.5", *asked)
    with pytest.raises(ConfigError, match=r"it would fit with cluster\.colocate=false, on"):
        check_fit(ahead)


def test_no_remedy_has_more_ranks_than_a_step_has_prompts():
    """The embeddings of a 7B student alone, gathered and in transit, take 4 GiB."""
    name = "qwen7b_from_32b_8gpu"
    for prompts in (4, 64):
        asked = (f"train.prompts_per_step={prompts}", "rollout.groups_per_chunk=1")
        plan = planned(name, overrides=asked)
        small = make_plan(plan.settings, device="cuda", device_bytes=8 * GIB)
        with pytest.raises(ConfigError) as caught:
            refuse(small, small.seats[0])
        assert str(caught.value).endswith(
            f"; not even {prompts} ranks would do, and train.prompts_per_step={prompts} allows no "
            "more: choose a smaller model, or larger devices"
        )


def test_activations_are_those_of_transformers_own_modules():
    model = ModelConfig(path=str(MODELS / "qwen2.5-7b"), dtype="bfloat16")
    tokens = 4 * 4096
    kept = pass_bytes(model, "model.path", Pass(4, 4096, learns=True)).kept
    assert kept / tokens / 28 / 1024 == pytest.approx(236, rel=0.03)  # KiB a token and layer
    again = pass_bytes(model, "model.path", Pass(4, 4096, learns=True, recomputes=True)).kept
    assert 3.4 < again / GIB < 3.7


def test_a_7b_student_of_a_32b_teacher_fits_eight_gpus():
    plan = planned("qwen7b_from_32b_8gpu")
    check_fit(plan)
    of_part = {p.part: p.nbytes / GIB for p in plan.of_worker("learner") if p.phase == "head"}
    assert round(of_part["teachers' heads"], 2) == 1.45
    assert 3.5 < of_part["head pass"] < 4.9
    assert [str(seat) for seat in plan.seats] == ["GPU 0 to 3", "GPU 4 to 6", "GPU 7"]
    assert round(checkpoint_bytes(plan.sizes) / 1e9, 1) == 91.4
    assert round((plan.disk_bytes - 2 * P7) / 1e9) == 274  # two checkpoints and a third


@pytest.mark.parametrize(
    ("transfer", "colocate", "nbytes"),
    [
        (WeightTransfer.auto, False, 2 * (2**30 + 544_997_376 * 2)),
        (WeightTransfer.object_store, False, 0),
        (WeightTransfer.auto, True, 544_997_376 * 2),  # the embedding, larger than 1 GiB
    ],
)
def test_weights_that_go_to_other_gpus_pass_through_buffers(
    transfer: WeightTransfer, colocate: bool, nbytes: int
):
    settings = planned("qwen7b_from_32b_8gpu").settings
    settings = replace(
        settings,
        rollout=replace(settings.rollout, weight_transfer=transfer),
        cluster=replace(settings.cluster, colocate=colocate),
    )
    assert transfer_buffers(Sizes(settings, on_cpu=False)) == nbytes
    assert transfer_buffers(Sizes(settings, on_cpu=True)) == 0


def test_a_single_gpu_does_not_hold_a_student_of_7b_beside_a_teacher_of_32b():
    with pytest.raises(ConfigError, match=r"learner beside 2 other workers does not fit GPU 0"):
        check_fit(planned("qwen7b_from_32b_1gpu"))


def test_two_gpus_hold_them_with_adapters_and_a_divided_teacher_alone():
    check_fit(planned("qwen7b_from_32b_2gpu"))
    for whole in (["lora.rank=null", "lora.sync=merged"], ["teachers.main.devices=1"]):
        with pytest.raises(ConfigError, match=r"does not fit GPU 0"):
            check_fit(planned("qwen7b_from_32b_2gpu", overrides=whole))


def test_a_teacher_of_72b_fits_two_devices_and_the_refusal_of_one_names_them():
    plan = planned("qwen72b_from_72b_64gpu", "qwen2.5-72b", "qwen2.5-72b")
    of_part = {p.part: p.nbytes / GIB for p in plan.of_worker("scorer-main")}
    assert round(of_part["weights"], 1) == 67.7  # half of 135.4
    assert plan.peak("scorer-main") < 79 * GIB
    one = replace(plan.settings.teachers["main"], devices=1)
    alone = replace(plan.settings, teachers={"main": one})
    with pytest.raises(ConfigError, match=r"it would fit with teachers\.main\.devices=2, on"):
        check_fit(make_plan(alone, device="cuda", device_bytes=79 * GIB))


def test_a_teacher_that_an_engine_of_the_student_cannot_hold_is_refused_before_it_is_measured():
    """A 32B model has 61.0 GiB of weights in bfloat16; an engine may use 0.5 or 0.85 of 79 GiB."""
    name = "qwen7b_from_32b_8gpu"
    measured = ("eval.teacher=true", "rollout.gpu_memory_utilization=0.5")
    message = r"^eval\.teacher=true: teachers\.main does not fit .* \(weights 61\.0 GiB\); set eval"
    with pytest.raises(ConfigError, match=message):
        check_fit(planned(name, overrides=measured))
    check_fit(planned(name, overrides=("eval.teacher=true",)))
    check_fit(planned(name, overrides=(*measured, "eval.teacher=false")))
    check_fit(planned(name, overrides=(*measured, "rollout.tensor_parallel=2")))
    check_fit(planned(name, overrides=(*measured, "rollout.kv_cache_bytes=2147483648")))
    own = ("++teachers.main.engine={tensor_parallel_size:2}", "++teachers.main.evidence=support")
    ours = ("algorithm.topk.source=teacher", "algorithm.topk.k=16")
    check_fit(planned(name, overrides=(*measured, *own, *ours)))


def test_the_copy_of_a_checkpoint_in_the_background_is_in_the_hosts_memory():
    """It has three numbers of 4 bytes for each of 7,615,616,512 parameters, divided among four
    ranks.
    """
    line = "host memory of each learner rank, while a checkpoint is written: 21.3 GiB"
    assert P7 == 7_615_616_512 and round(3 * 4 * P7 / 4 / GIB, 1) == 21.3
    name = "qwen7b_from_32b_8gpu"
    assert line in plan_lines(planned(name))
    waiting = "\n".join(plan_lines(planned(name, overrides=["checkpoint.background=false"])))
    assert "while a checkpoint is written" not in waiting
    assert "while a checkpoint is written" not in "\n".join(plan_lines(quickstart()))


def test_a_refusal_names_settings_with_which_it_would_fit():
    plan = quickstart(memory_gib=3.7)
    with pytest.raises(ConfigError, match=r"it would fit with (\S+=\S+)$") as caught:
        check_fit(plan)
    change = str(caught.value).rpartition(" ")[2]
    check_fit(quickstart(change, memory_gib=3.7))


def test_a_teacher_whose_layers_cannot_be_divided_is_offered_an_engine_where_it_can_answer(
    tmp_path: Path,
):
    GPT2Config(n_embd=8192, n_head=64, n_layer=60, vocab_size=152064).save_pretrained(tmp_path)
    of_teacher = [f"teachers.main.path={tmp_path}", "teachers.main.devices=1"]

    def refused(*overrides: str) -> str:
        with pytest.raises(ConfigError, match="scorer-main does not fit GPU") as caught:
            overrides = (*of_teacher, *overrides)
            check_fit(planned("qwen72b_from_72b_64gpu", "qwen2.5-72b", overrides=overrides))
        return str(caught.value)

    drawn = refused("++teachers.main.evidence=drawn")
    assert "it would fit with teachers.main.engine.tensor_parallel_size=2, on" in drawn
    assert "no plan for dividing its layers" in refused("++teachers.main.evidence=hidden")


def test_each_child_process_of_a_reward_worker_has_every_reward_model():
    judge = "{function:reward_model,options:{path:builtin:countdown-student}}"
    plan = quickstart(f"+reward.functions.judge={judge}", "reward.processes=3")
    parts = {part.part: part.nbytes for part in plan.of_worker("reward")}
    assert parts["weights"] == 3 * 782336 * 4
    assert parts["activations"] > 0
    own = plan.imported("learner")
    assert plan.imported("reward") == pytest.approx(4 * own, abs=4), "each child loads torch"
    assert "one reward, MiB" in "\n".join(plan_lines(plan))
    plain = quickstart()
    assert plain.peak("reward") == 0
    assert plain.imported("reward") - own == 25 * 2**20, "that of a child without torch"


def test_a_reward_model_on_a_gpu_has_one_of_its_own():
    """The judge is the 7B model itself in bfloat16, without its output embedding."""
    options = f"{{path: {MODELS / 'qwen2.5-7b'}, dtype: bfloat16}}"
    judge = f"+reward.functions.judge={{function: reward_model, options: {options}}}"
    name = "qwen7b_from_32b_8gpu"
    on_host, on_gpu = (planned(name, overrides=o) for o in ([judge], [judge, "reward.gpus=1"]))
    assert sum(s.gpus for s in on_gpu.seats) == sum(s.gpus for s in on_host.seats) + 1
    (seat,) = (seat for seat in on_gpu.seats if seat.workers == ("reward",))
    weights = 2 * (P7 - 152064 * 3584)
    assert weights < on_gpu.seat_bytes(seat) == on_gpu.peak("reward") < 1.2 * weights
    text = "\n".join(plan_lines(on_gpu))
    assert "one reward, GiB" in text and "host memory of each reward worker" not in text
    assert "host memory of each reward worker" in "\n".join(plan_lines(on_host))


def test_an_engine_needs_a_cache_for_the_longest_sequence():
    plan = quickstart("rollout.kv_cache_bytes=1000")
    with pytest.raises(ConfigError, match=r"rollout\.max_model_len=48: .*raise rollout\.kv_cache_"):
        check_fit(plan)


def test_bytes_of_a_step_are_those_that_the_workers_count():
    sizes = quickstart().sizes
    tokens = 384 * 48
    assert rollout_bytes(sizes) == tokens * 13 + (384 + 1) * 8
    assert score_bytes(sizes, sizes.teachers[0]) == tokens * 4 + 384 * 16 * 128 * 4


def responses_of(plan: Plan) -> int:
    """The planned bytes of a step's responses."""
    return next(edge.nbytes for edge in plan.edges if edge.what == "responses")


def test_pairs_of_the_students_own_are_made_of_all_its_responses_to_a_prompt():
    """Pairs of the data are made of two responses."""
    of_student = [
        responses_of(quickstart("algorithm=dpo", "algorithm.data_fraction=0", samples))
        for samples in ("train.samples_per_prompt=2", "train.samples_per_prompt=8")
    ]
    of_data = [
        responses_of(quickstart("algorithm=dpo", "+data.options.responses=pair", samples))
        for samples in ("train.samples_per_prompt=2", "train.samples_per_prompt=8")
    ]
    assert of_student[1] > 3.9 * of_student[0] and of_data[0] == of_data[1] == of_student[0]


def test_the_object_store_holds_all_waves_that_a_step_may_draw():
    """dapo draws again while too few groups have different rewards, here at most twice."""
    once = quickstart("algorithm=dapo", "algorithm.dynamic_sampling=0")
    thrice = quickstart("algorithm=dapo", "algorithm.dynamic_sampling=2")
    assert thrice.store_bytes - once.store_bytes == 2 * responses_of(once)


def test_a_table_has_a_total_for_each_phase():
    text = "\n".join(plan_lines(quickstart()))
    assert "one learner, MiB" in text
    assert "a step sends at most" in text
    assert list(aligned([["a", "10"], ["bcd", "9"]])) == ["a    10", "bcd   9"]


def test_a_plan_needs_the_lengths():
    settings = load_config(["run.dir=x", "experiment=quickstart", "rollout.max_model_len=null"])
    with pytest.raises(ConfigError, match=r"rollout\.max_model_len is not set"):
        make_plan(settings, device="cpu", device_bytes=GIB)


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], 0.0),
        (["algorithm=ppo"], 1.0),
        (["algorithm=grpo", "train.updates_per_batch=2"], 1 + 1 - 1 / 2),
        (["algorithm=dapo", "train.updates_per_batch=2", "train.epochs_per_batch=3"], 1.0),
        (["algorithm=ppo", "train.updates_per_batch=4", "train.epochs_per_batch=2"], 2.75),
    ],
)
def test_the_learners_own_passes_before_its_updates_are_counted(overrides, passes):
    """grpo has costs of drawn tokens, which are computed again before each update; dapo has
    none.
    """
    assert views(quickstart(*overrides).sizes) == passes
