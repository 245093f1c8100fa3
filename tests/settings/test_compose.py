"""Every file in conf/ loads, and every bad setting is refused in one sentence with a remedy."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.choices import OnStale, ScheduleKind
from hybridrl.settings.compose import (
    conf_dir,
    from_yaml,
    known_keys,
    load_config,
    to_settings,
    to_yaml,
)
from hybridrl.settings.run import DeadlineConfig, RunSettings

BASE = ["run.dir=here", "experiment=quickstart"]


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def for_any_algorithm() -> list[str]:
    """The experiments except for the papers' recipes, whose teachers and data fit some methods
    only.
    """
    return [name for name in choices("experiment") if "_from_" in name or name[-3:] != "gpu"]


# -- valid settings --------------------------------------------------------------------------------


DIFFERENT = ("hybrid", "ppo", "dpo", "sft")
"""Algorithms with different parts: a teacher and rewards, a value head, pairs, data alone."""


@pytest.mark.parametrize(
    ("experiment", "algorithm"),
    [
        (experiment, algorithm)
        for experiment in for_any_algorithm()
        for algorithm in (choices("algorithm") if experiment == "quickstart" else DIFFERENT)
    ],
)
def test_every_experiment_loads_with_every_algorithm(experiment: str, algorithm: str):
    settings = load_config(["run.dir=here", f"experiment={experiment}", f"algorithm={algorithm}"])
    assert isinstance(settings, RunSettings) and settings.run.dir == "here"


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_loads_with_its_own_algorithm(experiment: str):
    assert load_config(["run.dir=here", f"experiment={experiment}"]).model.path


def test_every_yaml_file_is_the_root_or_a_choice_of_a_group():
    files = {str(path.relative_to(conf_dir())) for path in conf_dir().rglob("*.yaml")}
    groups = {
        f"{group}/{choice}.yaml"
        for group in ("algorithm", "experiment", "schedule")
        for choice in choices(group)
    }
    assert files == {"config.yaml"} | groups


def test_a_pipelined_schedule_runs_two_steps_ahead_and_the_default_none():
    assert load_config(BASE).pipeline.ahead == 0
    ahead = load_config([*BASE, "schedule=pipelined"]).pipeline
    assert (ahead.ahead, ahead.max_staleness, ahead.on_stale) == (2, 2, OnStale.wait)


def test_the_presets_have_the_weights_of_the_methods_after_which_they_are_named():
    def preset(name: str) -> tuple[float, float, float, str]:
        algorithm = load_config([*BASE, f"algorithm={name}"]).algorithm
        weights = (algorithm.imitation_weight.value, algorithm.reward_weight.value)
        return *weights, algorithm.gamma, algorithm.baseline

    assert preset("hybrid") == (1.0, 1.0, 0.0, "leave_one_out")
    assert preset("opd_full") == (1.0, 0.0, 0.0, "none")
    assert preset("rloo") == (0.0, 1.0, 0.0, "leave_one_out")
    assert preset("reinforce_kl") == (1.0, 10.0, 1.0, "leave_one_out")


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dapo"])
def test_the_published_settings_in_the_comments_of_a_preset_are_settings(algorithm: str):
    text = (conf_dir() / "algorithm" / f"{algorithm}.yaml").read_text()
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    found = re.findall(
        r"((?:train|rollout|algorithm)[a-z_.]+)=([0-9](?:[0-9.e-]*[0-9])?)", comments
    )
    options = [f"{key}={value}" for key, value in dict(found).items()]
    assert len(options) >= 6
    load_config([*BASE, f"algorithm={algorithm}", "rollout.max_model_len=null", *options])


def test_overrides_reach_the_typed_settings():
    settings = load_config(
        [
            *BASE,
            "train.lr=1e-4",
            "algorithm.baseline=group_mean",
            "algorithm.reward_weight={kind: linear, value: 0, end: 2, steps: 10}",
            "+teachers.b.path=/models/b",
            "+teachers.b.weight=0.5",
            "+data.options.num_numbers=4",
        ]
    )
    assert settings.train.lr == 1e-4 and settings.algorithm.baseline == "group_mean"
    assert settings.algorithm.reward_weight == ScheduleConfig(
        kind=ScheduleKind.linear, value=0.0, end=2.0, steps=10
    )
    assert list(settings.teachers) == ["main", "b"] and settings.teachers["b"].weight == 0.5
    assert settings.data.options["num_numbers"] == 4


def test_pure_distillation_needs_no_reward_and_pure_reinforcement_no_teacher():
    distillation = load_config([*BASE, "algorithm=opd_full", "~reward.functions.countdown"])
    assert not distillation.reward.functions
    assert not load_config([*BASE, "algorithm=rloo", "~teachers.main"]).teachers


def test_a_single_sample_is_allowed_where_siblings_are_not_compared():
    settings = load_config([*BASE, "train.samples_per_prompt=1", "algorithm.baseline=none"])
    assert settings.train.samples_per_prompt == 1


def test_loading_a_config_does_not_affect_the_next_one():
    load_config([*BASE, "train.lr=0.25", "+teachers.b.path=/models/b"])
    settings = load_config(BASE)
    assert settings.train.lr != 0.25 and list(settings.teachers) == ["main"]


def test_the_written_settings_load_back_to_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    settings = load_config(
        [
            *BASE,
            "model.dtype=bfloat16",
            "tracking.group=${run.dir}/g",
            "+teachers.b.path=/b",
            "train.lr_end=1e-5",
        ]
    )
    text = to_yaml(settings)
    composed = OmegaConf.create(text)
    assert isinstance(composed, DictConfig) and to_settings(composed) == settings
    assert "group: here/g" in text and "${" not in text and "k" * 40 not in text


def test_known_keys_are_dotted_paths_of_the_schema():
    keys = known_keys()
    assert {"train", "train.lr", "algorithm.reward_weight.kind", "teachers"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_reading_a_config_loads_neither_torch_nor_ray():
    code = (
        "import sys; from hybridrl.settings.compose import load_config; "
        "load_config(['run.dir=here', 'experiment=quickstart']); print(*sorted({'torch', 'ray', "
        "'vllm', 'deepspeed', 'transformers', 'wandb'} & set(sys.modules)))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        check=True,
    )
    assert process.stdout.strip() == ""


# -- invalid settings ------------------------------------------------------------------------------

BAD = [
    # keys that do not exist
    ("train.stepz=3", "train.stepz=3: no such setting; did you mean train.steps?"),
    ("++train.stepz=3", "train.stepz=3: no such setting; did you mean train.steps?"),
    ("+nonsense=1", "nonsense=1: no such setting; see hybridrl train --help"),
    ("trian.lr=1", "trian.lr=1: no such setting; did you mean train.lr?"),
    ("foo=1", "foo=1: no such setting; see hybridrl train --help"),
    ("resume=never", "resume=never: no such setting; did you mean run.resume?"),
    (
        "teachers.main.pth=x",
        "teachers.main.pth=x: no such setting; did you mean teachers.main.path?",
    ),
    ("+teachers.b.pth=x", "teachers.b.pth=x: no such setting; did you mean teachers.b.path?"),
    (
        "teachers.b.path=x",
        "teachers.b.path=x: not in the config so far; write +teachers.b.path=x to add it",
    ),
    (
        "teachers.main.weight=2",
        "teachers.main.weight=2: not in the config so far; write +teachers.main.weight=2 to add it",
    ),
    (
        "teachers.main.engine.max_num_seqs=3",
        "teachers.main.engine.max_num_seqs=3: not in the config so far; write "
        "+teachers.main.engine.max_num_seqs=3 to add it",
    ),
    (
        "eval.sets.hard.path=x",
        "eval.sets.hard.path=x: not in the config so far; write +eval.sets.hard.path=x to add it",
    ),
    (
        "eval.sets.hard.pth=x",
        "eval.sets.hard.pth=x: no such setting; did you mean eval.sets.hard.path?",
    ),
    (
        "+eval.sets.hard=3",
        "eval.sets.hard=3: cannot be read; write eval.sets.hard=FILE or "
        "'eval.sets.hard={path: FILE, samples: 8}'",
    ),
    (
        "eval.sets=hard.jsonl",
        "eval.sets=hard.jsonl: has an entry for each name; write +eval.sets.NAME=FILE or "
        "'+eval.sets.NAME={path: FILE, samples: 8}'",
    ),
    (
        "data.options.depth=4",
        "data.options.depth=4: not in the config so far; write +data.options.depth=4 to add it",
    ),
    ("algorithm=hybird", "algorithm=hybird: no such choice; did you mean hybrid?"),
    ("experiment=quikstart", "experiment=quikstart: no such choice; did you mean quickstart?"),
    ("train=3", "train=3: a section, not a value; set train.NAME=..."),
    ("train.lr=[", "train.lr=[: not KEY=VALUE as Hydra reads it"),
    # values of another type
    (
        "train.steps=many",
        "train.steps=many: Value 'many' of type 'str' could not be converted to Integer",
    ),
    (
        "train.steps=1.5",
        "train.steps=1.5: Value '1.5' of type 'float' could not be converted to Integer",
    ),
    ("run.seed=null", "run.seed=null: Incompatible value 'None' for field of type 'int'"),
    ("cluster.colocate=maybe", "cluster.colocate=maybe: Value 'maybe' is not a valid bool"),
    (
        "algorithm.baseline=median",
        "algorithm.baseline=median: must be one of none, group_mean, leave_one_out, value; "
        "write one of those, or algorithm.advantage=path/to/file.py:Class for your own",
    ),
    (
        "algorithm.baseline=leave_one_ot",
        "algorithm.baseline=leave_one_ot: must be one of none, group_mean, leave_one_out, value; "
        "did you mean leave_one_out?",
    ),
    (
        "algorithm.normalizer=sequence",
        "algorithm.normalizer=sequence: must be one of token_mean, sequence_mean, constant; "
        "did you mean sequence_mean?",
    ),
    (
        "algorithm.pair.loss=dp",
        "algorithm.pair.loss=dp: must be one of none, dpo, ipo, slic, simpo, dil_lsif, dil_ukl, "
        "dil_bce, bradley_terry; did you mean dpo?",
    ),
    (
        "algorithm.advantage=leave_one_out",
        "algorithm.advantage=leave_one_out: is built in; set algorithm.baseline=leave_one_out",
    ),
    (
        "algorithm.token_weight=mine.py",
        "algorithm.token_weight=mine.py: must be the function of a file of yours; write "
        "algorithm.token_weight=path/to/file.py:function",
    ),
    (
        "reward.on_error=ignore",
        "reward.on_error=ignore: Invalid value 'ignore', expected one of [fail, drop_group, value]",
    ),
    ("model.path=${nope}", "model.path=${nope}: Interpolation key 'nope' not found"),
    # values out of range
    ("algorithm.gamma=1.5", "algorithm.gamma=1.5: must lie in [0, 1]"),
    ("algorithm.temperature=0", "algorithm.temperature=0.0: must be positive"),
    (
        "algorithm.imitation_weight={value:0,end:2}",
        "algorithm.imitation_weight.end=2.0: has no effect with algorithm.imitation_weight.kind="
        "constant, so that the weight would be 0; set algorithm.imitation_weight.kind to linear",
    ),
    (
        "algorithm.imitation_weight.target=0.1",
        "algorithm.imitation_weight.target=0.1: has no effect with algorithm.imitation_weight.kind="
        "constant; set algorithm.imitation_weight.kind=feedback, or "
        "algorithm.imitation_weight.target=null",
    ),
    (
        "algorithm.imitation_weight.kind=step algorithm.imitation_weight.end=2",
        "algorithm.imitation_weight.kind=step: needs algorithm.imitation_weight.steps",
    ),
    (
        "algorithm.imitation_weight.kind=linear",
        "algorithm.imitation_weight.kind=linear: needs an end value",
    ),
    (
        "algorithm.imitation_weight={kind:linear,end:2,steps:0}",
        "algorithm.imitation_weight.steps=0: must be at least 1",
    ),
    ("train.lr=-1", "train.lr=-1.0: must be positive and finite"),
    ("train.lr=nan", "train.lr=nan: must be positive and finite"),
    ("train.lr_end=-1", "train.lr_end=-1.0: must be finite and not negative"),
    ("algorithm=dpo algorithm.pair.beta=0", "algorithm.pair.beta=0.0: must be positive"),
    ("algorithm=simpo algorithm.pair.beta=-1", "algorithm.pair.beta=-1.0: must be positive"),
    (
        "algorithm=ipo algorithm.pair.target=0",
        "algorithm.pair.target=0.0: with pair.loss=ipo it must be positive",
    ),
    (
        "algorithm=slic algorithm.pair.target=-1",
        "algorithm.pair.target=-1.0: with pair.loss=slic it must not be negative",
    ),
    (
        "algorithm=slic algorithm.pair.nll_weight=-1",
        "algorithm.pair.nll_weight=-1.0: must not be negative",
    ),
    (
        "algorithm=gkd algorithm.jsd_beta=1e-6",
        "algorithm.jsd_beta=1e-06: must lie in [0.001, 1), below which float32 rounds",
    ),
    ("algorithm=gkd algorithm.jsd_beta=1", "algorithm.jsd_beta=1.0: must lie in [0.001, 1)"),
    (
        "algorithm.ratio.kind=mask algorithm.ratio.low=2 algorithm.ratio.high=0.5",
        "algorithm.ratio.low=2.0, high=0.5: with kind=mask no ratio lies between them",
    ),
    (
        "algorithm=ppo algorithm.value.loss_weight=-1",
        "algorithm.value.loss_weight=-1.0: must not be negative",
    ),
    (
        "algorithm=rloo algorithm.reward_weight.value=-1",
        "algorithm.reward_weight.value=-1.0: must be at least 0",
    ),
    (
        "algorithm.reward_weight.end=-2",
        "algorithm.reward_weight.end=-2.0: must be at least 0",
    ),
    ("train.steps=0", "train.steps=0: must be at least 1"),
    ("train.betas=[0.9]", "train.betas=[0.9]: AdamW needs two numbers in [0, 1)"),
    ("train.grad_clip=-1", "train.grad_clip=-1.0: must not be negative"),
    ("model.dtype=float16", "model.dtype=float16: must be auto, float32 or bfloat16"),
    ("+teachers.main.dtype=int8", "teachers.main.dtype=int8: must be auto, float32 or bfloat16"),
    ("learner.zero_stage=0", "learner.zero_stage=0: must be 1, 2 or 3"),
    (
        "learner.offload=parameters learner.zero_stage=2",
        "learner.offload=parameters: needs learner.zero_stage=3, it is 2; set it to 3 or null, or",
    ),
    (
        "learner.offload=optimizer learner.zero_stage=2",
        "learner.offload=optimizer: needs learner.zero_stage=1 or 3, it is 2, in which DeepSpeed",
    ),
    ("checkpoint.keep=0", "checkpoint.keep=0: must be at least 1"),
    ("checkpoint.every=-1", "checkpoint.every=-1: must not be negative"),
    ("eval.every=-1", "eval.every=-1, eval.samples=8: neither may be negative"),
    (
        "+eval.sets.a-b.task=countdown",
        "eval.sets.a-b: the name of a set must be one word of letters, digits and _ that begins",
    ),
    (
        "+eval.sets.heldout.task=countdown",
        "eval.sets.heldout: heldout, train, accuracy_teacher, accuracy_source have another meaning",
    ),
    (
        "+eval.sets.a={path:x,task:countdown}",
        "eval.sets.a.path=x: cannot be combined with eval.sets.a.task=countdown, as a set has one",
    ),
    ("+eval.sets.a.samples=2", "eval.sets.a: has no problems; give eval.sets.a.path, a file of"),
    (
        "+eval.sets.a.task=records",
        "eval.sets.a.task=records: must be countdown or reasoning_gym; for rows give eval.sets.a",
    ),
    (
        "+eval.sets.a.task=reasoning_gym",
        "eval.sets.a.task=reasoning_gym: needs eval.sets.a.dataset, the generator's name, e.g.",
    ),
    (
        "+eval.sets.a={path:x,options:{num_numbers:3}}",
        "eval.sets.a.options={'num_numbers': 3}: eval.sets.a.path=x does not read it; leave it",
    ),
    (
        "+eval.sets.a={path:x,columns:{prompt:3}}",
        "eval.sets.a.columns.prompt=3: must be the name of a key in the rows, or null to leave it",
    ),
    ("+eval.sets.a={path:x,samples:0}", "eval.sets.a.samples=0: must be at least 1"),
    ("+eval.sets.a={path:x,num_problems:0}", "eval.sets.a.num_problems=0: must be at least 1"),
    (
        "+eval.sets.a={path:x,temperature:-1}",
        "eval.sets.a.temperature=-1.0: must not be negative; 0 always takes the most likely",
    ),
    (
        "+eval.sets.a={path:x,samples:4,temperature:0}",
        "eval.sets.a.samples=4: at eval.sets.a.temperature=0 all responses to a prompt are equal;",
    ),
    (
        "+eval.sets.a={path:x,reward:mathh}",
        "eval.sets.a.reward=mathh: there is no such function; reward.functions has countdown",
    ),
    (
        "algorithm=opd_full ~reward.functions.countdown +eval.sets.a.path=x",
        "eval.sets.a: nothing can be measured on it, because the run has no reward function and",
    ),
    ("deadlines.sync_s=0", "deadlines.sync_s=0.0: must be positive"),
    ("reward.timeout_s=0", "reward.timeout_s=0.0: must be positive"),
    (
        "reward.timeout_s=136",
        "deadlines.reward_s=300: a worker may wait 272 s for reward functions that hang, twice "
        "reward.timeout_s=136 for each; raise it to 303, or lower reward.timeout_s",
    ),
    ("reward.max_error_rate=2", "reward.max_error_rate=2.0: must be a fraction, in [0, 1]"),
    ("rollout.gpu_memory_utilization=3", "rollout.gpu_memory_utilization=3.0: must be a fraction"),
    ("data.num_train=0", "data.num_train=0, data.num_heldout="),
    ("data.task=sudoku", "data.task=sudoku: must be countdown, reasoning_gym or jsonl"),
    ("data.instruction=hello", "data.instruction='hello': must contain {prompt}"),
    # settings that contradict each other
    (
        "~teachers.main",
        "teachers={}: algorithm.imitation_weight is not 0, so a teacher is needed; add "
        "+teachers.NAME.path=...",
    ),
    (
        "~reward.functions.countdown",
        "reward.functions={}: algorithm.reward_weight is not 0, so a reward is needed",
    ),
    (
        "~reward.functions.countdown algorithm=dpo algorithm.data_fraction=0",
        "reward.functions={}: rewards rank the sampled responses of algorithm.pair.loss=dpo; add "
        "+reward.functions.NAME.function=..., or set algorithm.data_fraction=1",
    ),
    (
        "algorithm.imitation_weight.value=0 algorithm.reward_weight.value=0 "
        "algorithm.reward_weight.end=0",
        "algorithm.imitation_weight=0 and algorithm.reward_weight=0: nothing to learn from; raise "
        "one of them",
    ),
    (
        "+reward.functions.b.weight=2",
        "reward.functions.b.function is not set: it has no default; add "
        "reward.functions.b.function=...",
    ),
    (
        "train.samples_per_prompt=1",
        "train.samples_per_prompt=1: algorithm.baseline=leave_one_out compares siblings, needs >= "
        "2",
    ),
    (
        "train.prompts_per_step=3 rollout.engines=4",
        "train.prompts_per_step=3: must be at least rollout.engines=4",
    ),
    (
        "algorithm=word_kd algorithm.support=sampled",
        "algorithm.support=sampled: estimates by the drawn token, and data was not drawn",
    ),
    (
        "algorithm=word_kd algorithm.support=topk algorithm.topk.source=teacher",
        "algorithm.topk.correction=unbiased: corrects by the drawn",
    ),
    (
        "algorithm=minillm algorithm.nll_weight=1",
        "algorithm.nll_weight=1.0: the likelihood of what the teacher wrote is not a return",
    ),
    (
        "algorithm=minillm algorithm.ratio.kind=none",
        "algorithm.teacher_fraction=0.2: rewards and costs of what the teacher wrote count for",
    ),
    (
        "algorithm=rloo algorithm.teacher_fraction=0.5",
        "algorithm.teacher_fraction=0.5: rewards and costs of what the teacher wrote count for",
    ),
    (
        "algorithm=opd_full algorithm.teacher_fraction=0.5 algorithm.support=topk",
        "algorithm.teacher_fraction=0.5: rewards and costs of what the teacher wrote count for",
    ),
    (
        "algorithm=seqkd rollout.groups_per_chunk=1 rollout.oversample=0.5",
        "rollout.oversample=0.5: the groups that are done first would decide the teacher's share",
    ),
    (
        "algorithm=dpo +teachers.initial.evidence=hidden",
        "teachers.initial.evidence=hidden: algorithm.pair.loss=dpo reads only the drawn tokens'",
    ),
    (
        "algorithm=word_kd +teachers.main.evidence=drawn",
        "teachers.main.evidence=drawn: estimates by the drawn token",
    ),
    (
        "algorithm=dpo +teachers.initial.route={domain:math}",
        "teachers.initial.route={'domain': 'math'}: algorithm.pair.loss=dpo takes every pair's",
    ),
    (
        "algorithm=sft algorithm.data_fraction=0",
        "algorithm.imitation_weight=0 and algorithm.reward_weight=0: nothing to learn from",
    ),
    (
        "algorithm=dr_grpo train.samples_per_prompt=1",
        "train.samples_per_prompt=1: algorithm.baseline=group_mean compares siblings",
    ),
    (
        "algorithm=grpo train.samples_per_prompt=1",
        "train.samples_per_prompt=1: algorithm.scale=group_std compares siblings, needs >= 2",
    ),
    (
        "algorithm.scale=batch algorithm.reward_weight={kind:constant,value:2,end:null}",
        "algorithm.scale=batch: divides algorithm.reward_weight out again",
    ),
    (
        "algorithm=hybrid_rising algorithm.scale=batch",
        "algorithm.scale=batch: divides algorithm.reward_weight out again",
    ),
    (
        "algorithm=rloo algorithm.ratio.kind=clip",
        "algorithm.ratio.low=0.0, high=None: kind=clip bounds rho to [1 - low, 1 + high]; set both",
    ),
    (
        "algorithm=sft algorithm.imitation_weight.value=1 algorithm.support=sampled",
        "algorithm.support=sampled: estimates by the drawn token, and data was not drawn",
    ),
    (
        "algorithm=g_opd algorithm.teacher_fraction=0.2 algorithm.ratio.kind=truncate",
        "algorithm.teacher_fraction=0.2: the first teacher would write, which is initial",
    ),
    (
        "algorithm=opd_full pipeline.ahead=1 pipeline.on_stale=reweight "
        "algorithm.ratio.kind=truncate",
        "pipeline.on_stale=reweight: the dense term is not weighted by algorithm.ratio",
    ),
    (
        "algorithm=dpo algorithm.data_fraction=0 pipeline.ahead=1 pipeline.on_stale=reweight "
        "algorithm.ratio.kind=truncate",
        "pipeline.on_stale=reweight: pairs are not weighted by algorithm.ratio",
    ),
    (
        "algorithm=dapo algorithm.overlong_buffer=4096",
        "algorithm.overlong_buffer=4096: is longer than the longest response, "
        "rollout.max_new_tokens=",
    ),
    (
        "algorithm=dpo algorithm.data_fraction=0 algorithm.overlong_buffer=4",
        "algorithm.overlong_buffer=4: pairs are ranked by their rewards without it",
    ),
    (
        "algorithm.imitation_weight.low=0.5",
        "algorithm.imitation_weight.low=0.5: has no effect with algorithm.imitation_weight.kind=",
    ),
    (
        "algorithm.imitation_weight.gain=0.5",
        "algorithm.imitation_weight.gain=0.5: has no effect with algorithm.imitation_weight.kind="
        "constant; set algorithm.imitation_weight.kind=feedback, or "
        "algorithm.imitation_weight.gain=0.1",
    ),
    (
        "data.dataset=chain_sum",
        "data.dataset=chain_sum: data.task=countdown has no generators to choose from",
    ),
    ("data.revision=main", "data.revision=main: data.task=countdown reads no data set"),
    (
        "teachers.main.path=null +teachers.main.url=http://h:1/v1 +teachers.main.evidence=drawn "
        "++teachers.main.served.fallbacks=[ftp://a,http://b:1/v1]",
        "teachers.main.served.fallbacks=ftp://a: must be an address such as http://HOST:8000/v1",
    ),
    (
        "+teachers.b.url=http://me:Sup3rS3cret9x@h:1/v1 +teachers.b.evidence=drawn",
        "teachers.b.url: a password must not be written into an address",
    ),
    (
        "data.path=train.jsonl",
        "data.path=train.jsonl: data.task=countdown reads no file; set data.task=records",
    ),
    ("run.seed=-1", "run.seed=-1: must be in [0, 2**32)"),
    ("run.seed=4294967296", "run.seed=4294967296: must be in [0, 2**32)"),
    (
        "algorithm=dapo algorithm.scale=none train.samples_per_prompt=1",
        "train.samples_per_prompt=1: algorithm.dynamic_sampling compares siblings",
    ),
    ("pipeline.ahead=-1", "pipeline.ahead=-1: must not be negative"),
    (
        "pipeline.ahead=2 pipeline.max_staleness=1",
        "pipeline.ahead=2: pipeline.on_stale=wait lets sampling run no further ahead than",
    ),
    (
        "pipeline.ahead=1 pipeline.on_stale=reweight",
        "pipeline.on_stale=reweight: stale tokens are weighted by algorithm.ratio",
    ),
    ("pipeline.max_inflight_bytes=0", "pipeline.max_inflight_bytes=0: must be positive"),
    ("rollout.oversample=2", "rollout.oversample=2.0: must be a share of train.prompts_per_step"),
    (
        "rollout.oversample=0.5",
        "rollout.groups_per_chunk=96: rollout.oversample cancels single groups",
    ),
    (
        "train.prompts_per_step=3 learner.ranks=4",
        "train.prompts_per_step=3: must be at least learner.ranks=4",
    ),
    (
        "train.products=float32 cluster.device=cuda",
        "train.products=float32: is for CPUs, cluster.device is cuda",
    ),
    (
        "rollout.weight_transfer=nccl cluster.device=cpu",
        "rollout.weight_transfer=nccl: needs GPUs, cluster.device is cpu",
    ),
    (
        "rollout.max_model_len=16 rollout.max_new_tokens=16",
        "rollout.max_model_len=16: must hold a prompt and rollout.max_new_tokens=16",
    ),
    (
        "data.task=jsonl data.path=train.jsonl",
        "data.task=jsonl: needs data.path and data.heldout_path",
    ),
    ("data.task=reasoning_gym", "data.task=reasoning_gym: needs data.dataset"),
]


@pytest.mark.parametrize(("overrides", "sentence"), BAD, ids=[overrides for overrides, _ in BAD])
def test_a_bad_setting_is_refused_in_one_sentence(overrides: str, sentence: str):
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, *overrides.split(" ")])
    message = str(caught.value)
    assert message.startswith(sentence)
    assert "\n" not in message and "Error" not in message and len(message) < 240


@pytest.mark.parametrize(
    ("overrides", "key"), [(["experiment=quickstart"], "run.dir"), (["run.dir=here"], "model.path")]
)
def test_a_setting_without_default_must_be_given(overrides: list[str], key: str):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert str(caught.value) == f"{key} is not set: it has no default; add {key}=... to the command"


def test_a_config_error_is_a_value_error():
    with pytest.raises(ValueError, match="nan"):
        load_config([*BASE, f"train.lr={math.nan}"])


def test_the_longest_silence_is_that_of_the_slowest_kind_of_call():
    assert DeadlineConfig().longest_silence_s == 1800, "learn_s and save_s"
    assert DeadlineConfig(learn_s=10, save_s=10, rollout_s=700).longest_silence_s == 700


@pytest.mark.parametrize(
    ("best", "every"),
    [
        ("eval/accuracy", (40, 20)),
        ("eval/accuracy", (0, 20)),
        ("train/loss", (50, 20)),
        ("train/loss", (50, 0)),
    ],
)
def test_the_best_checkpoint_is_chosen_by_a_metric_of_every_saved_step(
    best: str, every: tuple[int, int]
):
    save_every, eval_every = every
    overrides = [
        f"checkpoint.best={best}",
        f"checkpoint.every={save_every}",
        f"eval.every={eval_every}",
    ]
    settings = load_config([*BASE, *overrides])
    assert settings.checkpoint.best == best
    assert (settings.checkpoint.every, settings.eval.every) == every


@pytest.mark.parametrize("every", [0, 20, 100])
def test_an_evaluation_that_saved_steps_lack_cannot_choose_the_best(every: int):
    with pytest.raises(ConfigError) as caught:
        load_config([*BASE, "checkpoint.best=eval/accuracy", f"eval.every={every}"])
    assert str(caught.value) == (
        f"checkpoint.best=eval/accuracy: is measured at steps divisible by eval.every={every}, "
        "and saved are those by checkpoint.every=50; set eval.every=50"
    )


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["model.dtype=float32"], 1),
        (["model.dtype=bfloat16"], 2),
        (["model.dtype=bfloat16", "learner.zero_stage=1"], 1),
        (["model.dtype=bfloat16", "learner.zero_stage=3"], 3),
        (["model.dtype=float32", "learner.zero_stage=null"], 1),
        (["model.dtype=bfloat16", "learner.offload=optimizer"], 3),
        (["model.dtype=float32", "learner.offload=optimizer", "learner.zero_stage=1"], 1),
        (["model.dtype=auto", "learner.offload=parameters"], 3),
    ],
)
def test_the_zero_stage_follows_the_dtype_unless_it_is_set_and_is_saved(
    overrides: list[str], stage: int
):
    settings = load_config([*BASE, *overrides])
    assert settings.learner.zero_stage == stage
    assert f"zero_stage: {stage}" in to_yaml(settings)
    assert from_yaml(to_yaml(settings)) == settings
