"""A script for an interpreter with trl 1.16: train with TRL and print the times of steps as JSON.

    python trl_peer.py distillation|grpo ORDER.json

ORDER has work (a folder), student, teacher, problems (.jsonl), reward (file.py:function), dtype,
prompts, samples, max_new_tokens, steps, lr, betas, threads, save (a folder, or null), and
optionally seed and grpo (further arguments of GRPOConfig). Nothing of this project is imported.
"""

import importlib.util
import inspect
import json
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

MARK = "PEER "


class Clock(TrainerCallback):
    """Records wall and CPU seconds at the start and at the end of each step, and TRL's logs."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.logs: list[dict] = []

    def on_train_begin(self, args, state, control, **_) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_step_end(self, args, state, control, **_) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_log(self, args, state, control, logs=None, **_) -> None:
        self.logs.append(
            {
                key: float(value)
                for key, value in (logs or {}).items()
                if isinstance(value, int | float)
            }
        )


def common(order: dict) -> dict:
    """The arguments of both trainers' configs; all others have TRL's defaults."""
    return {
        "output_dir": order["work"],
        "use_cpu": True,
        "bf16": order["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": order["prompts"] * order["samples"],
        "gradient_accumulation_steps": 1,
        "max_steps": order["steps"],
        "max_completion_length": order["max_new_tokens"],
        "learning_rate": order["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta1": order["betas"][0],
        "adam_beta2": order["betas"][1],
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "temperature": 1.0,
        "shuffle_dataset": False,
        "model_init_kwargs": {"dtype": order["dtype"]},
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": order.get("seed", 0),
    }


def reward_function(name: str):
    path, _, function = name.partition(":")
    spec = importlib.util.spec_from_file_location("reward", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score = getattr(module, function)
    takes = inspect.signature(score).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return score

    def reward(**columns) -> list[float]:  # TRL passes every column to every function
        return score(**{key: columns[key] for key in takes})

    return reward


def trainer_of(kind: str, order: dict, rows: list[dict], clock: Clock):
    if kind == "distillation":  # it samples one response per row: K responses need K rows
        rows = [row for row in rows for _ in range(order["samples"])]
        args = DistillationConfig(
            **common(order), beta=1.0, teacher_model_init_kwargs={"dtype": order["dtype"]}
        )
        return DistillationTrainer(
            model=order["student"],
            teacher_model=order["teacher"],
            args=args,
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )
    args = GRPOConfig(**common(order), num_generations=order["samples"], **order.get("grpo", {}))
    reward = reward_function(order["reward"])
    return GRPOTrainer(
        model=order["student"],
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[clock],
    )


def timed_generation(trainer) -> list[float]:
    """A list that receives the seconds of each later call of the trainer's model.generate."""
    seconds = []
    generate = trainer.model.generate

    def timed(*args, **kwargs):
        started = time.perf_counter()
        tokens = generate(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return tokens

    trainer.model.generate = timed
    return seconds


def main(kind: str, order: dict) -> None:
    torch.set_num_threads(order["threads"])
    # datasets 5.2 cannot hash the objects of pyarrow 26.
    Hasher.hash = classmethod(lambda cls, value: "0" * 16)
    rows = [json.loads(line) for line in Path(order["problems"]).read_text().splitlines()]
    clock = Clock()
    trainer = trainer_of(kind, order, rows, clock)
    generate_s = timed_generation(trainer)
    trainer.train()
    if order["save"]:
        trainer.save_model(order["save"])
    results = {
        "step_s": [b - a for (a, _), (b, _) in zip(clock.ends, clock.ends[1:], strict=False)],
        "cpu_s": [b - a for (_, a), (_, b) in zip(clock.ends, clock.ends[1:], strict=False)],
        "rollout_s": generate_s,
        "logs": clock.logs,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: metadata.version(name) for name in ("trl", "torch", "transformers")},
    }
    print(MARK + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
