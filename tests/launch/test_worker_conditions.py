"""Which settings may differ between two jobs that share workers."""

import ast
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hybridrl.launch.worker_conditions import (
    TAKEN_ANEW,
    alone,
    differences,
    is_taken_anew,
    leaves,
    needs_room,
    worker_conditions,
)
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

PACKAGE = Path(__file__).parent.parent.parent / "hybridrl"
FILES = {"data": "0", "model.path": "1", "teachers.main.path": "2"}


def settings_of(*overrides: str) -> RunSettings:
    return load_config(["experiment=quickstart", "run.dir=unused", *overrides])


def differing(*overrides: str, base: tuple[str, ...] = ()) -> list[str]:
    """The conditions of workers in which the quickstart with these overrides differs from the one
    without.
    """
    one, other = (settings_of(*base, *more) for more in ((), overrides))
    return differences(worker_conditions(one, FILES), worker_conditions(other, FILES))


@pytest.mark.parametrize(
    "overrides",
    [
        ("run.dir=other", "run.seed=1", "run.resume=never"),
        ("train.lr=1e-3", "train.lr_warmup_steps=3", "train.steps=7", "train.samples_per_prompt=4"),
        ("train.betas=[0.8,0.9]", "train.weight_decay=0.1", "train.grad_clip=2"),
        ("algorithm.gamma=1", "algorithm.reward_weight=3", "algorithm.temperature=0.9"),
        ("algorithm=hybrid_rising",),
        ("algorithm=opd",),
        ("+teachers.main.weight=0.5", "algorithm.divergence=forward_kl", "algorithm.gamma=0"),
        ("data.num_train=64", "eval.every=0", "tracking.wandb=disabled", "checkpoint.every=1"),
        ("reward.timeout_s=3", "+reward.functions.countdown.weight=2"),
        ("rollout.max_new_tokens=8", "rollout.groups_per_chunk=2"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_workers_stay_where_only_what_they_take_anew_differs(overrides: tuple[str, ...]):
    assert differing(*overrides) == []


def test_workers_start_anew_in_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Workers of the first job would load its rewards.py instead of that of the second job."""
    settings = settings_of()
    before = worker_conditions(settings, FILES)
    monkeypatch.chdir(tmp_path)
    assert differences(before, worker_conditions(settings, FILES)) == ["the working directory"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("model.path=builtin:countdown-teacher",), ["model.path"]),
        (("model.dtype=bfloat16",), ["learner.zero_stage", "model.dtype"]),
        (("teachers.main.path=builtin:countdown-student",), ["teachers.main.path"]),
        (("train.packing=true",), ["train.max_tokens_per_micro_batch", "train.packing"]),
        (("train.products=float32",), ["train.products"]),
        (("learner.ranks=2",), ["learner.ranks", "the number of workers"]),
        (("reward.workers=2", "rollout.groups_per_chunk=1"), ["the number of workers"]),
        (("rollout.max_num_seqs=8",), ["rollout.max_num_seqs"]),
        (("rollout.max_model_len=99",), ["rollout.max_model_len"]),
        (("+rollout.engine.block_size=32",), ["rollout.engine", "rollout.engine.block_size"]),
        (("algorithm.topk.k=21",), ["the log-probs of an engine"]),
        (("algorithm=ppo",), ["the value head"]),
        (("algorithm.imitation_weight=0",), ["the number of workers", "the scored teachers"]),
        (
            ("algorithm.teacher_fraction=0.5", "algorithm.ratio.kind=truncate"),
            ["the number of workers"],
        ),
        (("pipeline.ahead=1", "pipeline.max_staleness=1"), ["pipeline.ahead"]),
    ],
    ids=lambda value: value[0],
)
def test_workers_start_anew_where_they_were_built_for_something_else(
    overrides: tuple[str, ...], names: list[str]
):
    assert differing(*overrides) == sorted(names)


def test_what_a_setting_decides_when_a_worker_is_built_counts_only_where_it_does():
    assert differing("run.seed=1", base=("lora.rank=4",)) == ["run.seed"]
    tokens = "train.max_tokens_per_micro_batch"
    assert differing(f"{tokens}=99") == []
    assert differing(f"{tokens}=99", base=("train.packing=true",)) == [tokens]


def test_a_condition_that_is_new_or_gone_differs():
    assert differences({"a": None, "b": 1}, {"b": 1}) == ["a"]
    assert differences({"b": 1}, {"a": None, "b": 1}) == ["a"]


def test_a_model_whose_files_have_changed_is_loaded_anew_and_other_data_are_not():
    settings = settings_of()
    before = worker_conditions(settings, FILES)
    assert differences(before, worker_conditions(settings, {**FILES, "data": "9"})) == []
    assert differences(before, worker_conditions(settings, {**FILES, "model.path": "9"})) == [
        "the files of model.path"
    ]


def test_a_setting_that_is_not_listed_must_agree_and_each_listed_one_exists():
    assert not is_taken_anew("train.something_new") and not is_taken_anew("algorithm.new")
    assert not is_taken_anew("evaluate") and not is_taken_anew("teachers.weight.path")
    assert is_taken_anew("teachers.main.route.domain") and is_taken_anew("data.path")
    settings = settings_of("+teachers.main.route={a: b}")
    known = [key for key, _ in leaves(asdict(settings))]
    for name in TAKEN_ANEW:
        key = name.replace("*", "main")
        assert any(f"{one}.".startswith(f"{key}.") for one in known), f"{name} is no setting"


def test_sections_that_may_differ_as_a_whole_are_read_by_no_worker_that_stays():
    sections = {name for name in TAKEN_ANEW if "." not in name} - {"checkpoint"}
    assert sections == {"data", "eval", "generate", "tracking", "reward"}
    folders = ("policy", "teachers", "rollout", "weights", "objectives", "batch", "kernels")
    read = {
        f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for folder in folders
        for path in (PACKAGE / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in sections
        and ast.unparse(node.value).endswith("settings")
    }
    assert read == set()


def test_workers_with_code_of_the_users_or_a_trace_or_turns_serve_one_job():
    assert alone(settings_of()) is None
    assert alone(settings_of("diagnostics.trace=true")) == (
        "diagnostics.trace records all work of the workers"
    )
    assert alone(settings_of("cluster.colocate=true", "cluster.take_turns=true")) == (
        "cluster.take_turns: a job begins with workers of which none has released memory"
    )
    settings = settings_of()
    own = replace(settings, algorithm=replace(settings.algorithm, token_weight="mine.py:Mine"))
    assert alone(own) == (
        "algorithm.token_weight=mine.py:Mine is your own code, whose state only a new process "
        "resets"
    )


def test_an_engine_that_measures_teachers_needs_a_gpu_that_the_workers_of_another_job_have():
    assert needs_room("cuda", measures=True) == (
        "the engine that measures the teachers needs a GPU of these workers (eval.teacher)"
    )
    assert needs_room("cuda", measures=False) is None and needs_room("cpu", measures=True) is None
