"""The recipes at the papers' own scale, conf/experiment/*gpu.yaml: each plan fits the GPUs that the
file's name states, and rows with the columns of its published data are read and scored.

The number of parameters can be checked by hand. With V tokens, hidden size H, L layers, key width W
and feed-forward width F, a Llama model with tied embeddings has

    V H + L (2 H H + 2 H W + 3 H F + 2 H) + H

parameters. Untied embeddings add V H, and Qwen2.5 has biases of H + 2 W in each layer.
Qwen2.5-1.5B:

    151936 x 1536 + 28 x 46_797_824 + 1536 = 1_543_714_304
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hybridrl.data.prompts import tokenize
from hybridrl.data.records import load
from hybridrl.planning.fit import check_fit
from hybridrl.planning.plan import GIB, make_plan
from hybridrl.rewards.load import load_reward
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.weights.parameters import merged

ROOT = Path(__file__).parents[2]
MODELS = Path(__file__).parent / "models"

QWEN_1B = 1_543_714_304
QWEN_7B = 7_615_616_512
R1_1B = 1_777_088_000  # Qwen2.5-1.5B with an output embedding of its own, 151936 x 1536 more
LLAMA_3B = 3_212_749_824
LLAMA_8B = 8_030_261_248


class Recipe(NamedTuple):
    """The expected plan of a recipe."""

    student: str  # a folder of tests/planning/models
    teacher: str | None  # None: the student before training, or no teacher
    gpus: int
    numbers: int  # number of parameters of the student
    scored_by: int | None  # number of parameters of the teacher that scores; None: there is none
    more: tuple[str, ...] = ()  # settings of another arm, which the recipe's comment names


OF_STUDENTS_CLASS = ("algorithm=grpo", "algorithm.imitation_weight.value=0.001")
"""The settings that train an expert, without the teacher's path."""

EIGHT = "llama-3-8b"
RECIPES = [
    ("countdown_qwen1.5b_4gpu", Recipe("qwen2.5-1.5b", "qwen2.5-7b", 4, QWEN_1B, QWEN_7B)),
    (
        "countdown_qwen1.5b_4gpu",
        Recipe("qwen2.5-1.5b", None, 4, QWEN_1B, QWEN_1B, OF_STUDENTS_CLASS),
    ),
    ("countdown_qwen7b_8gpu", Recipe("qwen2.5-7b", None, 8, QWEN_7B, QWEN_7B)),
    ("gsm8k_qwen1.5b_4gpu", Recipe("qwen2.5-1.5b", "qwen2.5-7b", 4, QWEN_1B, QWEN_7B)),
    ("gsm8k_qwen7b_8gpu", Recipe("qwen2.5-7b", None, 8, QWEN_7B, QWEN_7B)),
    ("openr1_llama3b_5gpu", Recipe("llama-3.2-3b", None, 5, LLAMA_3B, None)),
    ("gsm8k_llama3b_8gpu", Recipe("llama-3.2-3b", EIGHT, 8, LLAMA_3B, LLAMA_8B)),
    ("aime_r1_1.5b_8gpu", Recipe("r1-distill-qwen-1.5b", "qwen2.5-7b", 8, R1_1B, QWEN_7B)),
    ("ultrafeedback_llama8b_6gpu", Recipe(EIGHT, None, 6, LLAMA_8B, LLAMA_8B)),
    ("ultrafeedback_llama8b_6gpu", Recipe(EIGHT, None, 5, LLAMA_8B, None, ("algorithm=simpo",))),
]


def settings_of(name: str, *overrides: str) -> RunSettings:
    return load_config(["run.dir=x", f"experiment={name}", *overrides])


@pytest.mark.parametrize(("name", "recipe"), RECIPES)
def test_a_recipe_fits_the_gpus_that_its_name_states(name: str, recipe: Recipe) -> None:
    first = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert first.startswith("# NOT RUN. ")
    overrides = [f"model.path={MODELS / recipe.student}", *recipe.more]
    if recipe.teacher is not None:
        overrides.append(f"teachers.main.path={MODELS / recipe.teacher}")
    elif recipe.more == OF_STUDENTS_CLASS:
        overrides.append("teachers.main.path=null")
    plan = make_plan(settings_of(name, *overrides), device="cuda", device_bytes=79 * GIB)
    check_fit(plan)
    assert sum(seat.gpus for seat in plan.seats) == recipe.gpus
    assert name.endswith(f"_{recipe.gpus}gpu") or recipe.more
    weights = {p.worker: p.nbytes for p in plan.parts if p.part == "weights"}
    assert weights["rollout"] == 2 * recipe.numbers
    scorers = [n for worker, n in weights.items() if worker.startswith("scorer-")]
    assert scorers == ([] if recipe.scored_by is None else [2 * recipe.scored_by])


@pytest.mark.parametrize(
    ("name", "arm", "weight"),
    [
        ("countdown_qwen1.5b_4gpu", ("algorithm=seqkd",), 0.0),
        ("gsm8k_llama3b_8gpu", OF_STUDENTS_CLASS, 0.001),
        ("countdown_qwen7b_8gpu", (), 0.001),
        (
            "countdown_qwen7b_8gpu",
            ("algorithm=opd", "algorithm.imitation_weight.value=1", "train.updates_per_batch=1"),
            1.0,
        ),
        (
            "aime_r1_1.5b_8gpu",
            ("algorithm=opd_full", "algorithm.support=topk", "algorithm.topk.k=16"),
            1.0,
        ),
        ("ultrafeedback_llama8b_6gpu", ("algorithm=dil_bce",), 0.0),
    ],
)
def test_an_arm_that_a_recipes_comment_names_has_its_own_weight_of_imitation(
    name: str, arm: tuple[str, ...], weight: float
) -> None:
    assert settings_of(name, *arm).algorithm.imitation_weight.value == weight


def test_every_recipe_of_the_papers_is_tested() -> None:
    files = {path.stem for path in (ROOT / "conf" / "experiment").glob("*gpu.yaml")}
    plans = {name for name in files if "_from_" in name}  # tested in tests/planning/test_plan.py
    assert files - plans == {name for name, _ in RECIPES}


def test_a_recipe_with_adapters_sends_them_alone_as_small_steps_are_rounded_away_when_merged() -> (
    None
):
    """At a weight W of 0.02, bfloat16 has a spacing of 2^-13 = 1.2e-4; adding less than half of it
    leaves W unchanged.
    """
    weight = torch.tensor([[0.02]], dtype=torch.bfloat16)
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert torch.equal(merged(weight, one, one, scale=8e-6), weight)
    assert not torch.equal(merged(weight, one, one, scale=1.2e-4), weight)
    folder = ROOT / "conf" / "experiment"
    names = [p.stem for p in folder.glob("*.yaml") if "\nlora:" in p.read_text()]
    assert names == ["qwen7b_from_32b_2gpu"]
    for settings in map(settings_of, names):
        assert settings.lora.travels_alone and settings.train.lr >= 1e-5


# -- data and rewards ------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
BOXED = " Please reason step by step, and put your final answer within \\boxed{}."
LLAMA_OPEN = "<s><|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_CLOSE = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
THINK = "User: Using the numbers [2, 3, 4], create an equation that equals 20. Assistant:\n<think>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each byte, and the special tokens of both templates."""
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def read(
    settings: RunSettings,
    rows: list[dict[str, Any]],
    columns: dict[str, Any],
    folder: Path,
) -> tuple[list[tuple[str, ...]], dict[str, list[Any]]]:
    """The prompts and responses as the model reads them, decoded, and the columns of the rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load(str(path), "train", None, columns)
    tokenizer = byte_tokenizer()
    rollout = settings.rollout
    assert rollout.max_model_len is not None and rollout.max_new_tokens is not None
    prompts = tokenize(
        problems,
        tokenizer,
        settings.data,
        rollout.max_model_len - rollout.max_new_tokens,
        rollout.max_model_len,
        eos=tokenizer.convert_tokens_to_ids(settings.model.eos) if settings.model.eos else None,
    )
    texts = [tuple(tokenizer.decode(ids) for ids in (p.input_ids, *p.responses)) for p in prompts]
    names = problems[0].columns
    return texts, {name: [p.columns[name] for p in problems] for name in names}


def countdown_row(numbers: list[int], target: int) -> dict[str, Any]:
    """A row in the form that TinyZero's script writes."""
    return {
        "target": target,
        "nums": numbers,
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": THINK}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": {"target": target, "numbers": numbers}},
        "extra_info": {"split": "train", "index": 0},
    }


GSM8K = [
    {
        "question": "Natalia sold 48 clips in April and half as many in May. How many in all?",
        "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n"
        "She sold 48+24 = <<48+24=72>>72 clips in all.\n#### 72",
    },
    {
        "question": "Weng earns $12 an hour. How much does she earn in 5 hours?",
        "answer": "She earns $12 x 5 = $<<12*5=60>>60.\n#### 60",
    },
]
DAPO = {"data_source": "math_dapo", "ability": "MATH", "extra_info": {"index": "a"}}
RIGHT_WRONG = ["So it is \\boxed{72}.", "So it is \\boxed{12}."]

SCORED = [
    (
        "countdown_qwen1.5b_4gpu",
        [countdown_row([2, 3, 4], 20), countdown_row([44, 19, 35], 98)],
        OPEN + THINK + CLOSE,
        ["5*4 is 20.</think> <answer> (2 + 3) * 4 </answer>", "</think><answer>44+19</answer>"],
    ),
    (
        "gsm8k_qwen1.5b_4gpu",
        GSM8K,
        OPEN + GSM8K[0]["question"] + BOXED + CLOSE,
        RIGHT_WRONG,
    ),
    (
        "gsm8k_llama3b_8gpu",
        GSM8K,
        LLAMA_OPEN + GSM8K[0]["question"] + BOXED + LLAMA_CLOSE,
        RIGHT_WRONG,
    ),
    (
        "aime_r1_1.5b_8gpu",
        [
            {**DAPO, "prompt": "What is 8 x 9?", "solution": "72"},
            {**DAPO, "prompt": "What is 6 x 7?", "solution": "42"},
        ],
        OPEN + "What is 8 x 9?" + BOXED + CLOSE,
        RIGHT_WRONG,
    ),
]


@pytest.mark.parametrize(("name", "rows", "prompt", "completions"), SCORED)
def test_published_rows_of_a_recipe_are_read_and_scored(
    name: str,
    rows: list[dict[str, Any]],
    prompt: str,
    completions: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)  # data.chat_template_file is a relative path
    settings = settings_of(name)
    texts, columns = read(settings, rows, settings.data.columns, tmp_path)
    assert texts[0] == (prompt,)
    [(reward, function)] = settings.reward.functions.items()
    score = load_reward(reward, function.function, function.options)
    used = {key: columns[key] for key in ("answer", "numbers", "target") if key in columns}
    assert score(completions=completions, **used) == [1.0, 0.0]


def test_a_problem_of_aime_is_read_by_the_columns_of_its_set(tmp_path: Path) -> None:
    settings = settings_of("aime_r1_1.5b_8gpu")
    row = {"id": 60, "problem": "Find n.", "solution": "Long.", "answer": "025", "year": "2024"}
    texts, columns = read(settings, [row], settings.eval.sets["aime24"].columns, tmp_path)
    assert texts == [(OPEN + "Find n." + BOXED + CLOSE,)]
    score = load_reward("math", "math", {})
    assert score(completions=["\\boxed{25}"], answer=columns["answer"]) == [1.0]


def test_a_verified_answer_of_openr1_is_the_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    settings = settings_of("openr1_llama3b_5gpu")
    thought = "<think>\n8 times 9.\n</think>\n\nIt is $\\boxed{72}$."
    row = {
        "problem": "8 x 9?",
        "solution": "72",
        "answer": "72",
        "generations": [thought, "?"],
        "correctness_math_verify": [True, False],
        "messages": [
            {"role": "user", "content": "8 x 9?"},
            {"role": "assistant", "content": thought},
        ],
    }
    texts, columns = read(settings, [row], settings.data.columns, tmp_path)
    assert texts == [(LLAMA_OPEN + "8 x 9?" + LLAMA_CLOSE, thought + "<|eot_id|>")]
    assert "generations" not in columns


def test_a_pair_of_ultrafeedback_has_the_better_response_first(tmp_path: Path) -> None:
    settings = settings_of("ultrafeedback_llama8b_6gpu")
    question = {"role": "user", "content": "Name a colour."}
    answers = [[question, {"role": "assistant", "content": text}] for text in ("Red.", "No.")]
    row = {
        "prompt": "Name a colour.",
        "prompt_id": "0",
        "chosen": answers[0],
        "rejected": answers[1],
        "messages": answers[0],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    }
    texts, _ = read(settings, [row], settings.data.columns, tmp_path)
    assert texts == [(OPEN + "Name a colour." + CLOSE, "Red.<|im_end|>", "No.<|im_end|>")]
