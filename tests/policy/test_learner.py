"""The real Learner, with DeepSpeed, gloo and ranks in their own processes, compared with plain
autograd and with itself.

Five process groups serve all tests: two ranks that use ZeRO 1, 2 and 3 in turn, two that offload,
one rank, two ranks again, and three.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hybridrl.batch.micro_batch import collate, sequence, train_sequences
from hybridrl.batch.wire import from_wire
from hybridrl.core.errors import CheckpointError, ConfigError
from hybridrl.kernels.head import HeadRule
from hybridrl.kernels.teacher_rows import HiddenTeacher
from hybridrl.models.loading import load_model, load_value_head
from hybridrl.models.model_internals import attention_of
from hybridrl.models.output_head import output_weight
from hybridrl.models.tiny import tiny_model, tiny_tokenizer
from hybridrl.objectives.credit import Credit
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.ops.compare import COMPARED
from hybridrl.planning.zero import zero_bytes
from hybridrl.policy import diagnostics as probe
from hybridrl.policy.optimizer_state import check_model
from hybridrl.policy.student import Student
from hybridrl.policy.training_setup import deepspeed_config, set_layers
from hybridrl.settings.choices import Attention
from hybridrl.settings.compose import load_config
from hybridrl.settings.models import ModelConfig
from hybridrl.tracking.glossary import explain
from hybridrl.types import ScoredBatch
from hybridrl.weights.fragments import PARTS, Fragment, FragmentReader, write_fragments
from hybridrl.weights.hugging_face import checkpoint_tensors
from tests.batch.test_packing import APART, TOGETHER, tiny
from tests.support.batches import token_columns
from tests.support.frozen_embedding import FrozenEmbedding
from tests.support.learner_job import (
    GROUPS,
    LR,
    MINI_BATCHES,
    OFFLOADED,
    ORDER,
    UPDATES_LR,
    chunk_of,
    chunk_of_other_sampler,
    plan_for,
    settings_for,
)
from tests.support.ranks import run_ranks


def save_models(folder: Path) -> Path:
    """Write the student and the teacher into the folder."""
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        tiny_model(tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, and with the files that the process groups have written."""
    folder = save_models(tmp_path_factory.mktemp("learner"))
    for kind, sizes in (("opt", TOGETHER["opt"]), ("gemma2", APART["gemma3_text"])):
        tiny(kind, sizes, torch.float32).save_pretrained(folder / kind)
    groups = (
        "2:two_ranks",
        "2:two_ranks_offloaded",
        "1:one_rank",
        "2:two_ranks_again",
        "3:three_ranks",
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
        run_ranks("learner_job.py", str(folder), *groups)
    return folder


def test_the_ranks_compile_no_extension_of_deepspeed(folder: Path):
    assert not (folder / "extensions").exists()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_student_is_tried_when_it_is_loaded_also_where_its_weights_are_sharded(
    folder: Path, stage: int
):
    assert result(folder, "opt-padded") == "no error"
    packed = result(folder, f"opt-packed-{stage}")
    assert packed.startswith("train.packing=true: OPTForCausalLM does not keep packed sequences")
    assert "logits of Gemma2ForCausalLM are not its last" in result(folder, f"gemma2-{stage}")


def result(folder: Path, case: str) -> dict:
    return json.loads((folder / f"{case}.json").read_text())


def next_steps(folder: Path, case: str) -> tuple[list[object], list[object]]:
    """Digest, loss and gradient norm of the third step, of the learner that took the first two, and
    of a learner that was loaded from its checkpoint.
    """
    saved, loaded = result(folder, case), result(folder, f"{case}-loaded")
    assert loaded["digest"] == saved["digest"] and loaded["optimizer_steps"] == 2
    straight, resumed = (
        [result(folder, f"{case}-{end}")[key] for key in ("digest", "loss", "grad_norm")]
        for end in ("straight", "resumed")
    )
    assert straight[0] != saved["digest"], "the step changes the weights"
    return straight, resumed


def weight_distance(folder: Path, case: str, other: str | dict[str, Tensor]) -> float:
    """The largest difference between corresponding weights of two cases."""
    found = load_file(folder / f"{case}.safetensors")
    expected = load_file(folder / f"{other}.safetensors") if isinstance(other, str) else other
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


# -- plain autograd --------------------------------------------------------------------------------


def written_out_loss(
    model: nn.Module, teacher_head: Tensor, *, dense: bool = True, sparse: bool = True
) -> Tensor:
    """The sum over the R response tokens of (sum_v p (log p - log q) + G log p(y)) / R, computed in
    plain torch, one sequence at a time.
    """
    batch, _, scores = chunk_of(0, 4)
    costs = credit().columns.sparse
    total, row = torch.zeros((), dtype=teacher_head.dtype), 0
    for i in range(batch.num_sequences):
        ids = torch.from_numpy(batch.trajectory(i).input_ids).long()
        logits = model(input_ids=ids[None]).logits[0]
        for position in range(len(ids) - int(batch.response_lengths[i]), len(ids)):
            logp = torch.log_softmax(logits[position - 1], -1)
            logq = torch.log_softmax(
                torch.from_numpy(scores.rows[row]).to(teacher_head.dtype) @ teacher_head.T, -1
            )
            total = (
                total
                + dense * (logp.exp() * (logp - logq)).sum()
                + sparse * costs[row].to(logp.dtype) * logp[ids[position]]
            )
            row += 1
    assert row == len(costs)
    return total / row


def objective() -> HybridObjective:
    settings = settings_for(Path("unused"), 1)
    assert (
        settings.algorithm.gamma == 0.5
        and settings.train.grad_clip == 1.0
        and settings.train.weight_decay == 0.0
    )
    return HybridObjective(
        settings.algorithm,
        settings.rollout.max_new_tokens,
        kinds=[settings.algorithm.evidence_kind],
    )


def scored() -> ScoredBatch:
    batch, rewards, scores = chunk_of(0, 4)
    return ScoredBatch(rollout=batch, scores=(scores,), rewards=rewards)


def credit() -> Credit:
    return objective().credit(scored(), plan_for(0, 1))


def test_the_gradient_through_the_transformer_is_plain_autograd_of_the_written_out_loss(
    folder: Path,
):
    model, plain = (load_model(str(folder / "student")).double() for _ in range(2))
    head = output_weight(load_model(str(folder / "teacher"))).detach().double()
    columns = credit().learned(torch.float32)
    hidden = HiddenTeacher(
        hidden=from_wire(scored().scores[0].rows), lm_head=head, weight=torch.ones(len(columns[0]))
    )
    micro = collate(train_sequences(scored().rollout, columns, [hidden]))
    terms = token_columns(
        token_ids=micro.columns.token_ids,
        token_weight=micro.columns.token_weight.double(),
        sparse=micro.columns.sparse.double(),
        sampler_logprobs=micro.columns.sampler_logprobs.double(),
    )
    rows = micro.teachers[0].hidden.double()
    teachers = (HiddenTeacher(hidden=rows, lm_head=head, weight=torch.ones(len(rows))),)
    student = Student(model, HeadRule(chunk=5), with_value=False)
    loss, _ = student(
        micro.input_ids,
        micro.attention_mask,
        micro.position_ids,
        micro.hidden_rows,
        teachers,
        terms,
    )
    loss.backward()
    expected = written_out_loss(plain, head)
    expected.backward()
    assert abs(loss.item() - expected.item()) < 1e-7  # token_weight is a float32
    expected_parameters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert float((parameter.grad - expected_parameters[name].grad).abs().max()) < 1e-7, name
    assert float(expected_parameters["model.embed_tokens.weight"].grad.norm()) > 0.1


def test_two_steps_are_two_steps_of_a_plain_training_loop(folder: Path):
    model = load_model(str(folder / "student"))
    head = output_weight(load_model(str(folder / "teacher"))).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = [], []
    for _ in range(2):
        optimizer.zero_grad()
        loss = written_out_loss(model, head)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    learned = result(folder, "one")
    assert learned["loss"] == pytest.approx(losses, abs=1e-5)
    assert learned["grad_norm"] == pytest.approx(norms, rel=1e-5)
    assert (
        weight_distance(folder, "one", {n: p.detach() for n, p in model.named_parameters()}) < 1e-5
    )
    assert weight_distance(folder, "one", "untouched") > 5e-4


# -- equal under any split -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "one-each",  # one sequence per micro-batch, without padding, and one empty micro-batch
        "packed",  # all sequences in a single row, without padding
        "chunks",  # the batch arrives as two chunks
        "zero1",  # two ranks with shards of 6 and 2 sequences, one sequence per micro-batch
        "zero2",
        "zero3",
    ],
)
def test_loss_and_weights_do_not_depend_on_the_split(folder: Path, case: str):
    one, other = result(folder, "one"), result(folder, case)
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    for found, expected in zip(other["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weight_distance(folder, case, "one") < 1e-5


def test_a_group_taken_out_changes_nothing(folder: Path):
    without, dropped = result(folder, "first-three"), result(folder, "fourth-dropped")
    assert dropped["loss"] == pytest.approx(without["loss"], abs=1e-5)
    for found, expected in zip(dropped["metrics"], without["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weight_distance(folder, "fourth-dropped", "first-three") < 1e-5
    assert weight_distance(folder, "one", "first-three") > 1e-4 and len(GROUPS) == 4


def test_a_response_of_two_turns_is_learned_as_each_turn_after_all_that_came_before_it(
    folder: Path,
):
    """The tokens of an observation are only read: they have no cost and are not counted."""
    together, apart = result(folder, "two-turns"), result(folder, "turns-apart")
    assert together["loss"] == pytest.approx(apart["loss"], abs=1e-5)
    assert together["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-4)
    assert weight_distance(folder, "two-turns", "turns-apart") < 5e-5
    assert weight_distance(folder, "two-turns", "untouched") > 1e-4


# -- several updates per batch ---------------------------------------------------------------------


def drawn_logprobs(model: nn.Module, i: int) -> tuple[Tensor, Tensor]:
    """log p(y) [T] and log p [T, V] at the response tokens of sequence i of GROUPS."""
    batch, _, _ = chunk_of(0, 4)
    ids = torch.from_numpy(batch.trajectory(i).input_ids).long()
    first = len(ids) - int(batch.response_lengths[i])
    logp = torch.log_softmax(model(input_ids=ids[None]).logits[0, first - 1 : -1], -1)
    return logp.gather(1, ids[first:, None])[:, 0], logp


def clipped_loss(
    model: nn.Module, teacher_head: Tensor, old: list[Tensor], groups: tuple[int, ...]
) -> Tensor:
    """The mean over the tokens of a mini-batch of sum_v p (log p - log q), plus PPO's clipped
    objective for the cost -R, times min(p_old / mu, 2).
    """
    batch, rewards, scores = chunk_of_other_sampler()
    rows = torch.from_numpy(scores.rows).split(batch.response_lengths.tolist())
    terms = []
    for i in (2 * g + k for g in groups for k in range(2)):
        drawn, logp = drawn_logprobs(model, i)
        logq = torch.log_softmax(rows[i] @ teacher_head.T, -1)
        dense = (logp.exp() * (logp - logq)).sum(1)
        sampled = torch.from_numpy(batch.trajectory(i).rollout_logprobs)[-len(drawn) :]
        ratio = (drawn - old[i]).exp()
        cost = -float(rewards.values[i]) * (old[i] - sampled).exp().clamp(max=2.0)
        terms.append(dense + torch.maximum(cost * ratio, cost * ratio.clamp(0.9, 1.2)))
    return torch.cat(terms).mean()


def test_four_updates_are_a_plain_training_loop_whose_ratios_are_to_the_model_before_the_first(
    folder: Path,
):
    model = load_model(str(folder / "student"))
    head = output_weight(load_model(str(folder / "teacher"))).detach()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=UPDATES_LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    with torch.no_grad():
        old = [drawn_logprobs(model, i)[0] for i in range(8)]
    norms = []
    for index in ORDER:
        optimizer.zero_grad()
        clipped_loss(model, head, old, MINI_BATCHES[index]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    learned = result(folder, "several")
    assert learned["grad_norm"] == pytest.approx([sum(norms) / 4], rel=1e-4)
    assert weight_distance(folder, "several", dict(model.named_parameters())) < 1e-4
    assert weight_distance(folder, "several", "untouched") > 5e-3
    (metrics,) = learned["metrics"]
    assert metrics["train/updates"] == 4.0 and learned["optimizer_steps"] == 4
    assert metrics["policy/bounded_frac"] > 0.05 and metrics["policy/kl_old"] > 0.001


@pytest.mark.parametrize("case", ["zero1-several", "zero3-several"])
def test_two_ranks_that_divide_each_mini_batch_take_the_updates_of_one_rank(
    folder: Path, case: str
):
    one, two = result(folder, "several"), result(folder, case)
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["metrics"][0] == pytest.approx(one["metrics"][0], rel=1e-3, abs=1e-6)
    assert weight_distance(folder, case, "several") < 1e-4


@pytest.mark.parametrize(("case", "tokens"), [("several", 44), ("zero1-several", 22)])
def test_a_rank_reports_the_tokens_of_all_its_updates_and_what_took_memory_since_the_last_batch(
    folder: Path, case: str, tokens: int
):
    """The mini-batches have 10 and 12 response tokens, of which the first of two ranks has 5 and 6,
    and each is used twice. After the first batch the weights are packed.
    """
    assert result(folder, case)["work"] == [[tokens, ["learn"]]]
    assert result(folder, f"{case}-straight")["work"] == [[tokens, ["learn", "sync"]]]


@pytest.mark.parametrize("case", ["several", "zero1-several", "zero3-several"])
def test_a_batch_of_several_updates_after_loading_is_bit_for_bit_the_one_that_would_have_come(
    folder: Path, case: str
):
    straight, resumed = result(folder, f"{case}-straight"), result(folder, f"{case}-resumed")
    assert resumed["digest"] == straight["digest"] != result(folder, case)["digest"]
    assert resumed["metrics"] == straight["metrics"]


def test_two_updates_of_a_batch_are_two_batches_of_one_update_bit_for_bit(folder: Path):
    assert result(folder, "two-updates")["digest"] == result(folder, "two-calls")["digest"]


def test_an_update_without_a_finite_gradient_is_left_out_and_the_rest_of_the_batch_goes_on(
    folder: Path,
):
    """Mini-batch 1 has a NaN reward; the order of updates is 0, 1, 1, 0."""
    found = result(folder, "two-left-out")
    assert found["digest"] == result(folder, "two-of-one")["digest"]
    assert found["unlearned"] == [1] and found["metrics"][0]["train/updates"] == 2.0
    assert [sentence.split(":")[0] for sentence in found["left_out"]] == [
        "step 1, update 1",
        "step 1, update 2",
    ]
    assert (folder / "skipped" / "step_000001-update2-rank0.safetensors").is_file()
    third, all_of_them, only = result(folder, "too-many-left-out")["errors"]
    assert third.startswith("NonFiniteError: step 1, update 2: loss is nan")
    assert third.endswith("train.max_skipped=1 updates in a row")
    assert all_of_them.startswith("NonFiniteError: step 1, update 1")
    assert only.startswith("SkippedStep: step 1: "), "the controller counts it"


# -- diagnostics -----------------------------------------------------------------------------------


def test_the_probe_measures_the_norms_and_the_angle_of_both_gradients_at_the_parameters(
    folder: Path,
):
    head = output_weight(load_model(str(folder / "teacher"))).detach()
    flat = []
    for parts in ({"sparse": False}, {"dense": False}):
        model = load_model(str(folder / "student"))
        written_out_loss(model, head, **parts).backward()
        flat.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    dense, sparse = flat
    cosine = float(dense @ sparse / dense.norm() / sparse.norm())
    (found,) = result(folder, "diagnosed")["metrics"]
    assert found["grad/dense_parameter_norm"] == pytest.approx(float(dense.norm()), rel=1e-4)
    assert found["grad/sparse_parameter_norm"] == pytest.approx(float(sparse.norm()), rel=1e-4)
    assert found["grad/cosine"] == pytest.approx(cosine, abs=1e-4) and 0.01 < abs(cosine) < 0.99


@pytest.mark.parametrize("case", ["zero1-diagnosed", "zero2-diagnosed", "zero3-diagnosed"])
def test_the_probe_measures_the_global_batch_on_two_ranks_and_does_not_change_the_step(
    folder: Path, case: str
):
    one, two = result(folder, "diagnosed"), result(folder, case)
    parameter_metrics = {"grad/dense_parameter_norm", "grad/sparse_parameter_norm", "grad/cosine"}
    (expected,), (found,) = one["metrics"], two["metrics"]
    assert set(expected) - set(found) == (parameter_metrics if case == "zero3-diagnosed" else set())
    assert found == pytest.approx({k: expected[k] for k in found}, rel=1e-3, abs=1e-6)
    assert {f"teacher/{name}" for name in COMPARED} < set(found) and [
        k for k in expected if explain(k) is None
    ] == []
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert one["loss"] == pytest.approx(result(folder, "one")["loss"][:1], abs=1e-5)
    assert weight_distance(folder, case, "diagnosed") < 1e-5


# -- sums over ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "stage", "sums"),
    [(1, 1, None), (2, 1, "fp32"), (1, 2, "fp32"), (1, 3, "fp32"), (2, 3, "fp32")],
)
def test_gradients_are_summed_in_fp32_wherever_there_is_something_to_sum(
    ranks: int, stage: int, sums: str | None
):
    overrides = ["model.dtype=bfloat16", f"learner.ranks={ranks}", f"learner.zero_stage={stage}"]
    settings = load_config(["run.dir=here", "experiment=quickstart", *overrides])
    config = deepspeed_config(settings, torch.device("cpu"))
    assert config.get("communication_data_type") == sums
    assert config["zero_optimization"]["reduce_scatter"] == (sums is not None)


# -- attention -------------------------------------------------------------------------------------


def test_in_bf16_short_sequences_attend_by_plain_products_and_long_packed_ones_by_the_fused_kernel(
    folder: Path,
):
    plain, fused = result(folder, "bf16"), result(folder, "bf16-packed")
    assert (plain["attention"], fused["attention"], result(folder, "one")["attention"]) == (
        "eager",
        "sdpa",
        "sdpa",
    )
    assert plain["loss"] == pytest.approx(fused["loss"], rel=0.02) and plain[
        "grad_norm"
    ] == pytest.approx(fused["grad_norm"], rel=0.02)


@pytest.mark.parametrize(("choice", "attention"), [("auto", "eager"), ("sdpa", "sdpa")])
def test_a_chosen_attention_takes_the_place_of_plain_products(
    folder: Path, choice: str, attention: str
):
    settings = settings_for(folder, 1, f"model.attention={choice}", "model.dtype=bfloat16")
    model = settings.model
    loaded = load_model(model.path, model.dtype, attention=model.attention)
    set_layers(loaded, settings, torch.device("cpu"))
    assert attention_of(loaded.config) == attention
    teacher = settings.teacher_model("main")
    assert teacher.attention is model.attention
    with pytest.raises(ConfigError, match=r"cannot be loaded as a causal .*[Ff]lash"):
        load_model(model.path, model.dtype, attention=Attention.flash_attention_2)


# -- memory of the host ----------------------------------------------------------------------------


OFFLOADS = [f"zero{stage}-{offload}" for stage, offload, _ in OFFLOADED]


@pytest.mark.parametrize("case", OFFLOADS)
def test_what_is_offloaded_learns_bit_for_bit_the_same(folder: Path, case: str):
    for end in ("", "-after"):  # "-after" follows a batch that was left out
        offloaded, on_device = result(folder, case + end), result(folder, f"{case}-none{end}")
        assert offloaded["digest"] == on_device["digest"]
        assert offloaded["loss"] == on_device["loss"]
        assert offloaded["grad_norm"] == pytest.approx(on_device["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_communication_beside_computation_changes_no_bit(folder: Path, stage: int):
    overlapped = result(folder, f"zero{stage}-overlap")
    assert overlapped["digest"] == result(folder, f"zero{stage}")["digest"]


# -- a value head ----------------------------------------------------------------------------------


def test_a_value_head_learns_and_is_exported_alike_whether_parameters_are_sharded_or_not(
    folder: Path,
):
    unsharded, sharded = result(folder, "value"), result(folder, "zero3-value")
    assert sharded["loss"] == pytest.approx(unsharded["loss"], abs=1e-5)
    heads = [
        load_value_head(str(folder / f"{case}-export"), setting="path")
        for case in ("value", "zero3-value")
    ]
    assert heads[0].shape == (1, 128) and heads[0].abs().max() > 0
    assert torch.allclose(*heads, atol=1e-6)


def test_distances_from_a_teacher_are_summed_where_the_student_computes(
    monkeypatch: pytest.MonkeyPatch,
):
    """A process group for GPUs refuses CPU tensors, and micro-batches come from host memory. Here
    the meta device stands for the GPU.
    """

    def all_reduce(sums: Tensor) -> None:
        raise RuntimeError(f"reduces on {sums.device}")

    monkeypatch.setattr(probe.dist, "all_reduce", all_reduce)
    device = torch.device("meta")
    sums = torch.zeros(1 + len(COMPARED), dtype=torch.float64, device=device)
    devices = []

    def forward(token_ids: Tensor, *others: object) -> tuple[Tensor, Tensor]:
        devices.append(token_ids.device)
        return sums, sums

    none = torch.zeros(0)
    terms = token_columns(token_ids=none, token_weight=none, sparse=none, sampler_logprobs=none)
    micro = sequence(np.zeros(0), response_at=np.zeros(0, np.int64), columns=terms)
    with pytest.raises(RuntimeError, match="reduces on meta"):
        probe.teacher_distance(forward, [micro, micro], device)
    assert devices == [device, device]


# -- checkpoints -----------------------------------------------------------------------------------


STATES = [
    "one",
    "bf16",
    "value",
    "zero3-value",
    *(f"zero{stage}{dtype}" for stage in (1, 2, 3) for dtype in ("", "-bf16")),
    *OFFLOADS,
]


@pytest.mark.parametrize("case", STATES)
def test_a_step_after_loading_is_bit_for_bit_the_step_that_would_have_come(folder: Path, case: str):
    straight, resumed = next_steps(folder, case)
    assert resumed == straight


@pytest.mark.parametrize("case", STATES)
def test_a_learner_without_its_optimizer_looks_and_sends_as_before_and_then_learns_as_it_would_have(
    folder: Path, case: str
):
    """The step after the optimizer is acquired again, "straight", equals bit for bit that of a
    loaded learner, which released nothing (the test above).
    """
    turn = result(folder, f"{case}-turn")
    held, released, again = turn["bytes"]
    assert held == again > 0 == released
    assert turn["gaps_released"] == turn["gaps"]
    assert turn["digests"][0] == turn["digests"][1]
    assert turn["error"].startswith("the learner has released its optimizer; acquire()")


def test_a_step_without_a_token_to_learn_from_leaves_the_weights_as_they_are(folder: Path):
    """This happens if all groups of a batch have equal rewards; Adam's momentum would move the
    weights.
    """
    before, after = result(folder, "fourth-dropped"), result(folder, "nothing-left")
    assert after["digest"] == before["digest"]
    assert after["work"][0][0] == 0, "it learned from no token"


@pytest.mark.parametrize("case", STATES)
def test_another_job_of_a_learner_is_bit_for_bit_that_of_a_new_one(folder: Path, case: str):
    new, begun = result(folder, case), result(folder, f"{case}-begun")
    assert begun["digest"] == new["digest"] and begun["optimizer_steps"] == 0
    assert begun["metrics"] == new["metrics"]
    # The number of tokens of each rank and step, and the phases of its peak memory, which do not
    # include the sending of weights in the previous job.
    assert begun["work"] == new["work"]


@pytest.mark.parametrize("case", ["one", "zero1", "zero2", "zero3"])
def test_another_job_of_a_learner_has_an_optimizer_with_its_own_settings(folder: Path, case: str):
    """The first job's learner had other decay rates, another weight decay and another clip."""
    diagnosed = "diagnosed-begun" if case == "one" else f"{case}-diagnosed-begun"
    assert result(folder, diagnosed)["digest"] == result(folder, case)["digest"]


@pytest.mark.parametrize("case", STATES)
def test_ranks_measure_the_gaps_of_different_numbers_of_batches_together(folder: Path, case: str):
    loaded = result(folder, f"{case}-loaded")
    gaps = loaded["gaps"]
    assert len(gaps) in (2, 3) and len(set(gaps)) == len(gaps) and gaps == loaded["whole"]


def saved_state(folder: Path, case: str) -> dict[str, Tensor]:
    """The saved state, joined from the fragments of all ranks."""
    reader = FragmentReader(folder / f"{case}-state")
    return {f"{part}/{name}": reader.whole(part, name) for name in reader.shapes for part in PARTS}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


@pytest.mark.parametrize("case", STATES)
def test_the_pieces_of_all_ranks_are_the_state_that_deepspeed_itself_gathers(
    folder: Path, case: str
):
    assert equal(saved_state(folder, case), load_file(folder / f"{case}-gathered.safetensors"))


@pytest.mark.parametrize(("case", "width"), [("zero3", 4), ("zero3-bf16", 2)])
def test_a_rank_holds_the_weights_and_the_optimizer_of_the_plan(
    folder: Path, case: str, width: int
):
    """The bound allows for the padding by which DeepSpeed gives the ranks equal shares."""
    parameters = sum(w.numel() for w in load_file(folder / f"{case}.safetensors").values())
    plan = zero_bytes(parameters, width=width, ranks=2, stage=3, micro_batches=6)
    planned = plan.weights + plan.optimizer
    assert planned <= result(folder, case)["held"] <= 1.02 * planned


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3"])
def test_no_rank_writes_more_than_its_share(folder: Path, case: str):
    files = sorted((folder / f"{case}-state").iterdir())
    assert [f.name for f in files] == [
        "learner-rank00000-of-00002.safetensors",
        "learner-rank00001-of-00002.safetensors",
    ]
    elements = [sum(t.numel() for t in load_file(f).values()) for f in files]
    total = sum(t.numel() for t in saved_state(folder, case).values())
    assert sum(elements) == total and max(elements) < 0.51 * total


MOVES = {
    "zero1-to-one": "zero1",
    "zero2-to-one": "zero2",
    "zero3-to-one": "zero3",
    "zero3-bf16-to-one": "zero3-bf16",
    "one-to-zero1": "one",
    "one-to-zero2": "one",
    "one-to-zero3": "one",
    "bf16-to-zero3": "bf16",
    "zero3-to-three": "zero3",
}


@pytest.mark.parametrize("case", MOVES)
def test_ranks_and_stage_may_change_and_the_state_stays_equal_bit_by_bit(folder: Path, case: str):
    assert equal(saved_state(folder, case), saved_state(folder, MOVES[case]))
    assert result(folder, f"{case}-loaded")["digest"] == result(folder, MOVES[case])["digest"]


@pytest.mark.parametrize("case", MOVES)
def test_other_ranks_and_another_stage_take_the_same_next_step_within_rounding(
    folder: Path, case: str
):
    moved, stayed = result(folder, case), result(folder, f"{MOVES[case]}-straight")
    tolerance = 1e-2 if "bf16" in case else 1e-5
    assert moved["loss"] == pytest.approx(stayed["loss"], abs=tolerance)
    assert weight_distance(folder, case, f"{MOVES[case]}-straight") < tolerance


def test_a_state_that_lacks_a_parameter_is_refused_and_one_with_further_parameters_is_not(
    tmp_path: Path,
):
    def parts():
        return {part: torch.zeros(6) for part in PARTS}

    write_fragments(
        tmp_path,
        0,
        1,
        [Fragment(name=name, shape=(2, 3), offset=0, tensors=parts()) for name in ("w", "value")],
    )
    reader = FragmentReader(tmp_path)
    check_model({"w": nn.Parameter(torch.zeros(2, 3))}, reader, tmp_path, "/m")
    for name, shape in (("w", (3, 2)), ("v", (2, 3))):
        with pytest.raises(
            CheckpointError,
            match=rf"has no {name} of the model's shapes, so it is not a state of model\.path=/m",
        ):
            check_model({name: nn.Parameter(torch.zeros(shape))}, reader, tmp_path, "/m")


# -- a second class of student weights -------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"
FROZEN = ["frozen", "zero1-frozen", "zero2-frozen", "zero3-frozen"]


def frozen_by_hand(folder: Path) -> dict[str, Tensor]:
    """The weights after two steps of a plain training loop that does not train the embedding."""
    model = load_model(str(folder / "student"))
    head = output_weight(load_model(str(folder / "teacher"))).detach()
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        written_out_loss(model, head).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", FROZEN)
def test_a_parameter_that_the_weights_do_not_train_stays_as_it_was(folder: Path, case: str):
    before, after = (load_file(folder / f"{c}.safetensors") for c in ("untouched", case))
    assert torch.equal(after[EMBEDDING], before[EMBEDDING])
    assert weight_distance(folder, case, frozen_by_hand(folder)) < 1e-5
    assert weight_distance(folder, case, "untouched") > 5e-4


@pytest.mark.parametrize("case", FROZEN)
def test_engines_receive_a_parameter_that_does_not_train_and_the_head_that_is_tied_to_it(
    folder: Path, case: str
):
    published = load_file(folder / f"{case}-published.safetensors")
    weights = load_file(folder / f"{case}.safetensors")
    assert equal(published, weights | {"lm_head.weight": weights[EMBEDDING]})


@pytest.mark.parametrize("case", FROZEN)
def test_a_checkpoint_has_no_fragments_of_a_parameter_that_does_not_train(folder: Path, case: str):
    reader = FragmentReader(folder / f"{case}-state")
    weights = load_file(folder / f"{case}.safetensors")
    assert reader.shapes.keys() == weights.keys() - {EMBEDDING}
    for name in reader.shapes:
        assert torch.equal(reader.whole("master", name), weights[name]), name


@pytest.mark.parametrize("case", FROZEN)
def test_an_export_of_a_checkpoint_is_the_learners_own_where_not_all_is_saved(
    folder: Path, case: str
):
    exported = load_file(folder / f"{case}-export" / "model.safetensors")
    assert equal(exported, load_file(folder / f"{case}.safetensors"))
    model = ModelConfig(path=str(folder / "student"))
    state = folder / f"{case}-state"
    assert equal(checkpoint_tensors(state, model, "float32", kind=FrozenEmbedding), exported)
    with pytest.raises(CheckpointError, match=f"{EMBEDDING} is missing"):
        checkpoint_tensors(state, model, "float32")


@pytest.mark.parametrize("case", FROZEN)
def test_a_step_after_loading_is_the_step_that_would_have_come_where_not_all_trains(
    folder: Path, case: str
):
    straight, resumed = result(folder, f"{case}-straight"), result(folder, f"{case}-resumed")
    assert resumed["digest"] == straight["digest"] != result(folder, case)["digest"]
    assert resumed["loss"] == straight["loss"] and resumed["grad_norm"] == straight["grad_norm"]


# -- values that are not finite --------------------------------------------------------------------


def test_a_nan_reward_that_was_not_dropped_changes_no_weight_and_its_batch_is_saved(
    folder: Path,
):
    assert result(folder, "nan")["error"].startswith("step 1: loss is nan")
    assert "a reward, or a teacher's log-probability" in result(folder, "nan")["error"]
    assert "no weight was updated" in result(folder, "nan")["error"]
    assert result(folder, "nan")["digest"] == result(folder, "untouched")["digest"]
    saved = load_file(folder / "skipped" / "step_000001-rank0.safetensors")
    assert saved["0/sparse"].isnan().any() and saved["0/teachers/0/hidden"].shape[1] == 128


@pytest.mark.parametrize(
    "case", [*(f"zero{stage}{dtype}" for stage in (1, 2, 3) for dtype in ("", "-bf16")), *OFFLOADS]
)
def test_a_value_that_is_not_finite_on_one_of_two_ranks_changes_no_weight_on_either(
    folder: Path, case: str
):
    """With ZeRO 1 a reward of rank 1 is NaN, with ZeRO 2 it is infinite, and with ZeRO 3 the
    teacher's hidden states of both ranks are infinite.
    """
    found = result(folder, f"{case}-left-out")
    assert "no weight was updated" in found["error"] and found["digest"] == found["before"]
    assert ("divergence from a teacher is not finite" in found["error"]) is ("zero3" in case)
    assert "lower train.lr" not in found["error"]
    assert (folder / "skipped" / "step_000004-rank1.safetensors").is_file()


def test_weights_that_are_infinite_are_not_saved(folder: Path):
    assert result(folder, "infinite")["error"].startswith("master of ")
    assert "is not finite, so it is not saved" in result(folder, "infinite")["error"]


def test_the_steps_after_a_batch_that_was_left_out_are_those_of_a_learner_without_that_batch(
    folder: Path,
):
    assert result(folder, "after-nan")["digest"] == result(folder, "one")["digest"]
