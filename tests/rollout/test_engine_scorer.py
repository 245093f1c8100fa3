"""A teacher inside a vLLM engine: its settings, and its scores compared with those of a scorer with
the same model. The engine is started once, in its own process because vLLM's CPU worker patches
torch.
"""

import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from hybridrl.core.errors import ConfigError, ContractError, ServerError
from hybridrl.launch.preflight import check_gaps, check_models
from hybridrl.launch.teacher_levels import conditions_of, place_of
from hybridrl.planning.fit import check_fit, scorer_changes
from hybridrl.planning.plan import make_plan
from hybridrl.rollout.engine import engine_args
from hybridrl.rollout.engine_arguments import ArgumentRules, check_engine_arguments
from hybridrl.rollout.engine_scorer import EngineScorer, scoring_engine_args
from hybridrl.run_dir.setting_changes import changes
from hybridrl.runtime.actor_group import Slot
from hybridrl.runtime.scorer_group import scoring
from hybridrl.runtime.workers import teams
from hybridrl.settings.compose import from_yaml, load_config, to_yaml
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import ScoreHeader, TokenScores
from tests.support.batches import make_batch
from tests.support.graph import save_tiny

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]
TOPK = ("algorithm.topk.source=teacher", "algorithm.topk.k=3", "++teachers.main.evidence=support")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_tiny(folder / "student", 0)
    save_tiny(folder / "teacher", 1)
    return folder


def settings_of(folder: Path, *more: str) -> RunSettings:
    return load_config(
        [
            f"run.dir={folder}/run",
            "experiment=quickstart",
            f"model.path={folder}/student",
            f"teachers.main.path={folder}/teacher",
            "++teachers.main.evidence=drawn",
            "rollout.max_model_len=64",
            *more,
        ]
    )


class Answers(NamedTuple):
    """The engine's scores of BATCH for each of several settings, and of sequences with up to 65
    tokens.
    """

    scored: dict[tuple[str, ...], tuple[ScoreHeader, TokenScores]]
    longest: list[float]
    refusal: str
    again: list[float]
    """scores of the longest sequence that fits, after another one was refused"""


BATCH = make_batch([*PROMPTS, ((1, 5), [[7] * 61 + [2], (8, 2)])])


def answered(folder: Path) -> Answers:
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    settings = settings_of(folder, "++teachers.main.engine={kv_cache_memory_bytes:67108864}")
    evidence, rule = scoring(settings, "main")
    scorer = EngineScorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    scored = {}
    for more in ((), TOPK):
        settings = settings_of(folder, *more)
        scorer.configure(settings, *scoring(settings, "main"))
        scored[more] = scorer.score(BATCH)
    longest = scorer.answers([[5] * 64])[0].logprobs.tolist()
    with pytest.raises(ServerError) as refused:
        scorer.answers([[5, 6], [5] * 65])
    again = scorer.answers([[5] * 64])[0].logprobs.tolist()
    return Answers(scored, longest, str(refused.value), again)


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(answered, folder).result(timeout=240)


@pytest.mark.graph
@pytest.mark.parametrize("more", [(), TOPK])
def test_an_engine_gives_the_log_probs_of_the_same_model(
    folder: Path, answers: Answers, more: tuple[str, ...]
):
    """In float32 they agree to 1e-5 nats. The longest sequence uses all 64 positions of the
    model.
    """
    settings = settings_of(folder, *more)
    evidence, rule = scoring(settings, "main")
    local = Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    _, expected = local.score(BATCH)
    header, scores = answers.scored[more]
    assert (header.engine.running, header.engine.waiting, header.engine.preemptions) == (6, 0, 0)
    assert expected.logprobs[BATCH.response_mask].all()
    assert np.abs(scores.logprobs - expected.logprobs).max() < 1e-5
    assert scores.support_ids.tolist() == expected.support_ids.tolist()
    assert scores.rows.shape == expected.rows.shape
    assert np.abs(scores.rows - expected.rows).max(initial=0) < 1e-5


@pytest.mark.graph
def test_a_sequence_that_the_engine_refuses_is_an_error_and_the_next_ones_are_scored(
    answers: Answers,
):
    """rollout.max_model_len is 64."""
    assert re.match(r"teachers\.main\.engine: .*\(length 65\)", answers.refusal)
    assert answers.again == answers.longest != []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("teachers.main.url=http://a/v1", "teachers.main.path=null"), "server at teachers.main."),
        (("teachers.main.model=a.py:A", "teachers.main.path=null"), "model=a.py:A is a class of"),
        (("teachers.main.devices=2",), "set teachers.main.engine.tensor_parallel_size in its pla"),
        (("teachers.main.engine={tensor_parallel_size:0}",), "size=0: must be a number from 1 up"),
        (("teachers.main.engine={tensor_parallel_size:two}",), "size=two: must be a number from"),
        (("cluster.colocate=true",), "needs GPUs of its own, and under cluster.colocate=true"),
        (("teachers.main.evidence=null",), "and the run needs its hidden states; set teachers.mai"),
        (("teachers.main.evidence=vocabulary",), "and the run needs its whole vocabulary"),
        (("teachers.main.evidence=support",), "and the run needs tokens that the sampler chose"),
        (("algorithm.temperature=0.7",), "an engine (teachers.main.engine) reports log-probs at"),
    ],
)
def test_settings_that_no_engine_can_serve_are_refused(
    folder: Path, more: tuple[str, ...], message: str
):
    of_teacher = [f"++{o}" if o.startswith("teachers.") else o for o in more]
    with pytest.raises(ConfigError) as caught:
        settings_of(folder, "++teachers.main.engine={}", *of_teacher)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "teachers.main.engine" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dtype", "is decided by teachers.main.dtype; set that instead"),
        ("max_model_len", "is decided by rollout.max_model_len"),
        ("data_parallel_size", "is decided by scorer.replicas"),
        ("trust_remote_code", "code in a model's folder is never run; leave it out"),
        ("logprobs_mode", "the log-probs must be those of the teacher's own distribution"),
    ],
)
def test_an_argument_of_a_teachers_engine_that_the_run_decides_is_refused(name: str, message: str):
    with pytest.raises(ConfigError) as caught:
        check_engine_arguments({name: None}, ArgumentRules.of_teacher("main"))
    assert str(caught.value).startswith(f"teachers.main.engine.{name}: {message}")


def test_an_engine_on_gpus_has_the_users_arguments_and_leaves_room_for_the_logits(folder: Path):
    more = "++teachers.main.engine={tensor_parallel_size:2,enforce_eager:false}"
    settings = settings_of(folder, more, "rollout.kv_cache_bytes=1000")
    args = scoring_engine_args(settings, "main", "cuda")
    assert (args.tensor_parallel_size, args.distributed_executor_backend) == (2, "mp")
    assert not args.enforce_eager and not args.enable_prefix_caching
    assert (args.gpu_memory_utilization, args.kv_cache_memory_bytes) == (0.9, None)
    assert (args.max_model_len, args.max_num_batched_tokens) == (65, 2048)


def test_an_engine_without_arguments_is_an_engine_and_null_is_none(folder: Path):
    settings = settings_of(folder, "++teachers.main.engine={}")
    assert settings.teachers["main"].engine == {}
    assert from_yaml(to_yaml(settings)).teachers["main"].engine == {}
    assert settings_of(folder).teachers["main"].engine is None


def test_an_engine_has_a_gpu_for_each_rank_in_every_replica_and_its_parts_are_in_the_plan(
    folder: Path,
):
    more = "++teachers.main.engine={tensor_parallel_size:2}"
    settings = settings_of(folder, more, "scorer.replicas=3", "rollout.groups_per_chunk=32")
    (team,) = [team for team in teams(settings) if team.name == "scorer-main"]
    assert (team.size, team.gpus) == (3, 2)
    plan = make_plan(settings, device="cuda", device_bytes=2**30)
    assert sum(seat.gpus for seat in plan.seats if seat.workers == ("scorer-main",)) == 6
    alone = make_plan(settings_of(folder), device="cuda", device_bytes=2**30)
    parts = {part.part: part.nbytes for part in plan.of_worker("scorer-main")}
    whole = {part.part: part.nbytes for part in alone.of_worker("scorer-main")}
    assert parts["weights"] == whole["weights"] // 2
    taken = parts["weights"] + parts["activations"]
    assert parts["KV cache"] == int(0.9 * 2**30) - taken
    assert plan.seconds.score == pytest.approx(alone.seconds.score / 6)


def test_a_run_may_continue_with_an_engine_of_another_size_and_not_with_another_engine(
    folder: Path,
):
    alone, wide, quantised = (
        settings_of(folder, f"++teachers.main.engine={{{arguments}}}")
        for arguments in ("", "tensor_parallel_size:2", "quantization:fp8")
    )
    assert changes(alone, wide) == {}
    assert list(changes(alone, quantised)) == ["teachers.main.engine.quantization"]
    assert list(changes(settings_of(folder), alone)) == ["teachers.main.engine"]


def test_a_cache_that_cannot_hold_a_sequence_is_refused_with_the_engines_own_setting(folder: Path):
    settings = settings_of(folder, "++teachers.main.engine={kv_cache_memory_bytes:1000}")
    with pytest.raises(ConfigError, match=r"raise teachers\.main\.engine\.kv_cache_memory_bytes$"):
        check_fit(make_plan(settings, device="cpu", device_bytes=2**36))
    settings = settings_of(folder, "++teachers.main.engine={gpu_memory_utilization:0.001}")
    with pytest.raises(ConfigError, match=r"raise teachers\.main\.engine\.tensor_parallel_size or"):
        check_fit(make_plan(settings, device="cuda", device_bytes=2**30))


def test_an_engine_that_does_not_fit_is_proposed_more_gpus_beside_its_other_arguments(folder: Path):
    settings = settings_of(folder, "++teachers.main.engine={block_size:16,tensor_parallel_size:2}")
    *_, four, eight = scorer_changes(settings, "main", can_shard=True)
    assert four.text == "teachers.main.engine.tensor_parallel_size=4"
    assert eight.text == "teachers.main.engine.tensor_parallel_size=8"
    changed = four.make(settings).teachers["main"].engine
    assert changed == {"block_size": 16, "tensor_parallel_size": 4}


def slot_of(name: str) -> Slot:
    return Slot(
        group=None,  # type: ignore[arg-type]
        bundle=0,
        node_id=name,
        node_ip="",
        num_cpus=1.0,
        num_gpus=1.0,
    )


def test_a_teacher_is_sampled_by_an_engine_with_the_arguments_of_the_one_that_scores(folder: Path):
    own = "{tensor_parallel_size:2,max_num_seqs:7,block_size:32,scheduling_policy:fcfs}"
    more = (
        "rollout.tensor_parallel=4",
        "rollout.kv_cache_bytes=9",
        "++rollout.engine={block_size:16}",
    )
    settings = settings_of(folder, f"++teachers.main.engine={own}", *more)
    slots = {name: [slot_of(name), slot_of("no")] for name in ("rollout", "scorer-main")}
    of_engine, slot = place_of(settings, slots, "main")
    assert slot.node_id == "scorer-main"
    arguments = engine_args(of_engine, settings.teacher_model("main"), "cuda", "nccl")
    assert (arguments.tensor_parallel_size, arguments.max_num_seqs, arguments.block_size) == (
        2,
        7,
        32,
    )
    assert arguments.scheduling_policy == "priority", "that of every engine that samples"
    assert arguments.kv_cache_memory_bytes is None
    changed = conditions_of(settings, [])["engines"]["main"]
    assert changed["block_size"] == 32

    student, slot = place_of(settings_of(folder, *more), slots, "main")
    assert slot.node_id == "rollout" and student.rollout.tensor_parallel == 4
    assert "engines" not in conditions_of(student, [])


def test_two_answers_of_an_engine_may_differ_by_rounding_alone():
    def scores(logprob: float) -> TokenScores:
        return TokenScores(
            teacher="main",
            logprobs=np.array([0, logprob], np.float32),
            rows=np.zeros((1, 0), np.float32),
            support_ids=np.zeros((1, 0), np.int32),
        )

    check_gaps("main", [scores(-0.5)], [scores(-0.54)], 0.05, "0.05")
    with pytest.raises(ContractError, match=r"scorer-main/0: .* differ by 0\.06 nats a token"):
        check_gaps("main", [scores(-0.5)], [scores(-0.56)], 0.05, "0.05")


def test_quantised_weights_are_left_to_the_engine(folder: Path, tmp_path: Path):
    """The plan counts the bytes of their file."""
    quantised = tmp_path / "quantised"
    shutil.copytree(folder / "teacher", quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (quantised / "config.json").write_text(json.dumps(config))
    save_file({"a.qweight": np.zeros(1000, np.int32)}, quantised / "model.safetensors")
    engine = f"teachers.main.path={quantised}", "++teachers.main.engine={}"
    settings = settings_of(folder, *engine)
    check_models(settings)
    plan = make_plan(settings, device="cuda", device_bytes=2**30)
    parts = {part.part: part.nbytes for part in plan.of_worker("scorer-main")}
    assert parts["weights"] == (quantised / "model.safetensors").stat().st_size
    with pytest.raises(ConfigError):
        check_models(settings_of(folder, engine[0]))
