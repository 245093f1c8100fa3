"""S1: the hybrid against distillation and against KL in the reward, on a language model."""

import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from hybridrl.core.files import replace_text
from hybridrl.data import reasoning_gym_tasks
from hybridrl.data.problem import Problem
from reproduction.curves import draw_curves
from reproduction.differences import difference, points
from reproduction.estimate import estimate
from reproduction.experiment import (
    Arm,
    Experiment,
    Judgement,
    Numbers,
    Runs,
    Setting,
    Verdict,
    hashed,
)
from reproduction.lab import Lab
from reproduction.made_models import whole_folder
from reproduction.own_pairs import STUDENT
from reproduction.trained import TEACHER

STEPS = 12
LAST = 4
"""Steps over which the numbers at the end are averaged."""
EVERY = 4
REWARD_WEIGHT = 10.0
HYBRID = "hybrid"
DISTILLATION = "distillation"
IN_REWARD = "KL in the reward"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
"""Of experiment=smollm2_arithmetic."""
MODEL: Mapping[str, Setting] = {
    "experiment": "smollm2_arithmetic",
    "train.prompts_per_step": 8,
    "train.samples_per_prompt": 8,
    "rollout.groups_per_chunk": 8,
    "model.dtype": "float32",  # not auto, by which the processor would decide
    "cluster.threads_per_worker": 2,
    "train.max_tokens_per_micro_batch": 1024,
    # Prompts as plain text and short responses: half the tokens of a chat.
    "data.chat_template": False,
    "data.instruction": '"{prompt}"',
    "rollout.max_new_tokens": 8,
    "rollout.max_model_len": 64,
}
SMALL: Mapping[str, Setting] = {
    "experiment": "quickstart",
    "train.prompts_per_step": 32,
    "train.samples_per_prompt": 4,
    "rollout.groups_per_chunk": 32,
    "rollout.max_new_tokens": 16,
    "rollout.max_model_len": 48,
    "cluster.threads_per_worker": 1,
    "model.path": STUDENT,
    "teacher": TEACHER,
    "train.steps": 5,
    "eval.every": 0,
}
"""The small run trains the model of the quickstart: a start of this one takes a minute."""
MADE = "made:sums"
OWN = ("teacher",)
"""Settings of an arm that are none of the run."""
STEP_S = 19.6
"""Of the hybrid, in a pilot of two steps with another teacher, on two cores of an Intel Xeon."""
TEACHER_STEPS = 30


def measure(settings: Mapping[str, Setting], seed: int, lab: Lab) -> Numbers:
    """Train.

    Returns:
        reward, divergence: means over the responses of the last steps, of the reward and of
        log p - log q, in nats a response. objective: divergence - REWARD_WEIGHT reward.
        accuracy_N: greedy, on the held-out sums, after N steps. tokens: that were trained on.
    """
    teacher = str(settings["teacher"])
    path = str(made_teacher(lab)) if teacher == MADE else teacher
    with lab.run(run_settings(settings, path), seed) as trained:
        reward = trained.values("reward/mean")[-LAST:]
        tokens = trained.values("train/tokens")[-LAST:]
        costs = trained.values("kl/sampled")[-LAST:]
        nats = math.fsum(a * b for a, b in zip(costs, tokens, strict=True))
        responses = len(tokens) * responses_per_step(settings)
        mean = math.fsum(reward) / len(reward)
        return {
            "reward": mean,
            "divergence": nats / responses,
            "objective": nats / responses - REWARD_WEIGHT * mean,
            "tokens": trained.tokens,
            **trained.accuracies,
        }


def run_settings(settings: Mapping[str, Setting], teacher: str) -> Mapping[str, Setting]:
    """Those of hybridrl, by the settings of an arm."""
    name = "initial" if settings["experiment"] == MODEL["experiment"] else "main"
    return {
        **{key: value for key, value in settings.items() if key not in OWN},
        f"teachers.{name}.path": teacher,
    }


def responses_per_step(settings: Mapping[str, Setting]) -> int:
    return int(settings["train.prompts_per_step"]) * int(settings["train.samples_per_prompt"])


def made_teacher(lab: Lab) -> Path:
    """The model after SFT on solved sums, which is made when it is missing."""
    known_by = hashed({**teacher_settings(Path("a"), Path("b")), **SUMS})
    path = lab.folder / "made" / f"sums-{known_by}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        files = path.with_name("sums.jsonl"), path.with_name("sums-heldout.jsonl")
        for file, text in zip(files, solved_sums(), strict=True):
            replace_text(file, text)
        with lab.run(teacher_settings(*files), 0) as trained, whole_folder(path) as folder:
            shutil.copytree(trained.model, folder, dirs_exist_ok=True)
    return path


def solved_sums() -> tuple[str, str]:
    """Rows of data.path and of data.heldout_path: the sums of seed 0 with their answers."""
    sums = reasoning_gym_tasks.load("chain_sum", dict(SUMS), 20_000, 64, 0)
    train, heldout = ("".join(map(_row, part)) for part in sums)
    return train, heldout


def _row(problem: Problem) -> str:
    """With the columns that the reward needs."""
    own = {"prompt": problem.prompt, "completion": f" {problem.columns['answer']}"}
    return f"{json.dumps({**own, **problem.columns})}\n"


def teacher_settings(rows: Path, heldout: Path) -> Mapping[str, Setting]:
    return {
        **MODEL,
        "algorithm": "sft",
        "data.task": "records",
        "data.path": str(rows),
        "data.heldout_path": str(heldout),
        "data.dataset": "null",
        "data.options": "{}",
        "train.prompts_per_step": 64,
        "train.samples_per_prompt": 1,
        "rollout.groups_per_chunk": 64,
        "train.steps": TEACHER_STEPS,
        "train.lr": 5e-5,
    }


METHODS: Mapping[str, Mapping[str, Setting]] = {
    HYBRID: {"algorithm": "hybrid", "algorithm.reward_weight.value": REWARD_WEIGHT},
    DISTILLATION: {"algorithm": "hybrid", "algorithm.reward_weight.value": 0.0},
    IN_REWARD: {
        "algorithm": "reinforce_kl",
        "algorithm.reward_weight.value": REWARD_WEIGHT,
        "algorithm.support": "sampled",
    },
}


def arm(name: str) -> Arm:
    settings = {
        **MODEL,
        "teacher": MADE,
        **METHODS[name],
        "algorithm.gamma": 1.0,
        "train.steps": STEPS,
        "train.lr": 2e-5,
        "eval.every": EVERY,
    }
    return Arm(name=name, settings=settings, small=SMALL, measure=measure, step_s=STEP_S)


def judge(runs: Runs) -> Judgement:
    gain = difference(runs, HYBRID, DISTILLATION, "reward")
    saved = difference(runs, IN_REWARD, HYBRID, "objective")
    verdict = Verdict.undecided
    if gain.low > 0 and saved.low > 0:
        verdict = Verdict.confirmed
    elif gain.high < 0 or saved.high < 0:
        verdict = Verdict.refuted
    ends = {
        name: estimate([run.numbers[f"accuracy_{STEPS}"] for run in of])
        for name, of in runs.items()
    }
    listed = ", ".join(f"{of.text(100, 1)} % ({name})" for name, of in ends.items())
    return Judgement(
        verdict=verdict,
        effect=f"reward of the hybrid minus distillation: {points(gain)}; J with the KL in the "
        f"reward minus that of the hybrid: {saved.text(digits=2)}",
        reason=f"The greedy accuracy ends at {listed}.",
    )


EXPERIMENT = Experiment(
    id="S1",
    title="The hybrid on a language model",
    claim="From equally many responses of a language model the hybrid ends with more reward than "
    "distillation alone, and with a smaller J than KL-regularised RLHF, whose gradient of the same "
    "J is sampled.",
    source="arXiv 2512.23097",
    design="SmolLM2-135M-Instruct in float32 learns sums and differences of two numbers of one or "
    "two digits (the problems of experiment=smollm2_arithmetic, as plain text, with responses of "
    f"at most {MODEL['rollout.max_new_tokens']} tokens). The teacher is the same model after "
    f"{TEACHER_STEPS} steps of SFT on solved problems. {STEPS} steps of 64 responses, eight to a "
    f"prompt, AdamW at 2e-5, all with gamma=1: the hybrid with lambda={REWARD_WEIGHT:g}, whose "
    "imitation term is computed over the whole vocabulary; the same with lambda=0, which is "
    f"distillation; and KL-regularised RLHF, the same J with lambda={REWARD_WEIGHT:g} and "
    "everything estimated from the drawn tokens. Reward and log p - log q are averaged over the "
    f"sampled responses of the last {LAST} steps, which are those that were trained on; J = (log p "
    "- log q) - lambda reward, of a response.",
    rule="Differences are paired by seed, with 95 % intervals. Confirmed if the reward of the "
    "hybrid lies above that of distillation and its J below that with the KL in the reward. "
    "Refuted if one of the two lies on the other side. Otherwise undecided.",
    columns={
        "reward": "reward",
        "divergence": "log p - log q, nats",
        "objective": "J",
        "tokens": "tokens",
    },
    arms=tuple(arm(name) for name in METHODS),
    seeds=(0, 1, 2),
    judge=judge,
    draw=partial(draw_curves, steps=range(0, STEPS + 1, EVERY)),
    cuts=f"One task, three methods, {STEPS} steps of workers with two threads: what less than an "
    "hour allows. Before its first run it was cut from 30 steps, from 60 of the teacher, and from "
    "prompts as chats with responses of 16 tokens, because a step took 40 s here and not 8 s as "
    "was assumed. Its five-step run trains the model of the quickstart, so a change of the code "
    "that affects this model alone would not make its runs anew.",
)
