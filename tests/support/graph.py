"""Settings of a run with all kinds of workers that is small enough for tests."""

from pathlib import Path

import torch

from hybridrl.models.tiny import tiny_model, tiny_tokenizer
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from tests.support import first_character


def save_tiny(folder: Path, seed: int, *, tied: bool = True) -> Path:
    """Save a tiny Llama with random weights as a Hugging Face folder; returns the folder.

    Args:
        tied: whether the output head is the input embedding.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = tiny_model(tokenizer)
    if not tied:
        config = model.config
        config.tie_word_embeddings = False
        model = type(model)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_overrides(folder: Path) -> list[str]:
    """Save a random student and a random teacher; returns the overrides of a hybrid run with them.

    About a quarter of the rewards are 1 and the others 0, so that groups with equal and with
    different rewards occur.
    """
    student = save_tiny(folder / "student", 0)
    teacher = save_tiny(folder / "teacher", 1)
    return [
        f"run.dir={folder / 'run'}",
        "experiment=quickstart",
        f"model.path={student}",
        f"teachers.main.path={teacher}",
        f"reward.functions.countdown.function={first_character.__file__}:begins_low",
        "algorithm.gamma=0.5",
        "algorithm.reward_weight={kind:linear,value:1,end:2,steps:4}",
        "train.steps=2",
        "train.prompts_per_step=16",
        "train.samples_per_prompt=4",
        "train.max_tokens_per_micro_batch=512",
        "train.lr=1e-3",
        "train.lr_warmup_steps=0",
        "train.lr_end=null",
        "data.num_train=64",
        "data.num_heldout=16",
        "eval.every=0",
        "eval.teacher=false",
        "checkpoint.every=0",
        "tracking.wandb=disabled",
        "rollout.max_num_seqs=64",
    ]


def tiny_settings(folder: Path, *overrides: str) -> RunSettings:
    return load_config([*tiny_overrides(folder), *overrides])
