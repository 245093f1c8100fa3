"""Runs one worker in its own process and measures its peak memory: `python -m
benchmarks.planned_worker WORKER RANK PORT OVERRIDE ...` prints one line of JSON.

Its sequences are as long as the settings allow, as the plan assumes; their tokens are arbitrary.
"""

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from hybridrl.core.peak_memory import PeakMemory
from hybridrl.models.arithmetic import with_arithmetic
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.types import (
    FinishReason,
    GenerateOrder,
    Prompt,
    Rewards,
    RolloutBatch,
    TokenScores,
    Trajectory,
    UpdatePlan,
    per_token_bytes,
)

IMPORTS = {
    "learner": ["hybridrl.policy.learner", "torch._dynamo", "torch._inductor.compile_fx"],
    "scorer": ["hybridrl.teachers.scorer", "torch._dynamo", "torch._inductor.compile_fx"],
    "engine": ["hybridrl.rollout.engine", "vllm", "vllm.v1.engine.llm_engine"],
}
"""The modules that each worker imports before it loads a model. torch imports its compiler only
when it is first used, so it is listed here.
"""


def in_use(device: str) -> int:
    """The bytes that this process holds now: those of its tensors on a GPU, else resident
    memory.
    """
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def peak(device: str) -> int:
    """The most bytes that this process has held since the last `forget_peak`."""
    now = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return max(now, PeakMemory.highest)  # the workers reset the mark of the system


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def forget_peak(device: str) -> None:
    PeakMemory.highest = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def longest_batch(settings: RunSettings) -> RolloutBatch:
    """All sequences of a step, each with the maximal length of prompt and response."""
    response = settings.rollout.response_limit
    length = settings.rollout.sequence_limit
    prompts = prompts_of(settings)
    mask = np.arange(length) >= length - response
    trajectories = [
        Trajectory(
            uid=prompt.uid,
            prompt_length=length - response,
            input_ids=np.concatenate([prompt.input_ids, np.full(response, 5)]).astype(np.int32),
            response_mask=mask,
            rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
            policy_versions=np.where(mask, 0, -1).astype(np.int32),
            support_ids=np.zeros((response, 0), np.int32),
            finish_reason=FinishReason.length,
        )
        for prompt in prompts
        for _ in range(settings.train.samples_per_prompt)
    ]
    return RolloutBatch.pack(prompts, settings.train.samples_per_prompt, trajectories)


def prompts_of(settings: RunSettings) -> list[Prompt]:
    length = settings.rollout.sequence_limit - settings.rollout.response_limit
    return [
        Prompt(
            uid=f"p{i}",
            input_ids=tuple(5 + (i + k) % 10 for k in range(length)),
            text="",
            columns={},
        )
        for i in range(settings.train.prompts_per_step)
    ]


def learner(settings: RunSettings, rank: int, port: int) -> dict[str, int]:
    from hybridrl.batch.balance import micro_batches
    from hybridrl.policy.learner import Learner

    batch = longest_batch(settings)
    n = batch.num_sequences
    device = settings.cluster.device
    worker = Learner(settings, rank=rank, master=("127.0.0.1", port), device=device)
    ranks = settings.learner.ranks
    own = tuple(g for g in range(len(batch.uids)) if g % ranks == rank)
    lengths = np.diff(batch.offsets)[: len(own) * batch.group_size].tolist()
    values = [batch, rewards_of(batch), *(zero_scores(batch, *of) for of in evidence_of(worker))]
    for step in range(2):
        plan = UpdatePlan(
            step=step,
            num_tokens=int(batch.response_mask.sum()),
            num_sequences=n,
            num_groups=len(batch.uids),
            num_micro_batches=len(
                micro_batches(lengths, settings.train.max_tokens_per_micro_batch)
            ),
            lr=1e-6,
            teacher_weights=(1.0,) * (len(values) - 2),
            teacher_routes=({},) * (len(values) - 2),
            reward_weight=1.0,
        )
        worker.update(plan, (own,), *values)
    _, packed = worker.pack_weights(1)
    return {
        "weights": 0 if packed is None else packed.nbytes,
        "checkpoint": worker.state_bytes(),
    }


def rewards_of(batch: RolloutBatch) -> Rewards:
    n = batch.num_sequences
    values = np.arange(n, dtype=np.float32) % 2
    return Rewards(
        uids=batch.uids,
        values=values,
        part_names=("it",),
        parts=values[None],
        errors=np.zeros(n, bool),
        keep=np.ones(n, bool),
        compressed=np.full(n, np.nan, np.float32),
        repeated=np.full(n, np.nan, np.float32),
    )


def evidence_of(worker: object) -> list[tuple]:
    inbox = worker.teachers  # type: ignore[attr-defined]
    return list(zip(inbox.evidence, inbox.heads, strict=True))


def zero_scores(batch: RolloutBatch, evidence, head) -> TokenScores:
    from hybridrl.teachers.scores import empty_scores

    return empty_scores(evidence, "main", batch, head)


def scorer(settings: RunSettings, rank: int, port: int) -> dict[str, int]:
    from hybridrl.objectives import make_objective
    from hybridrl.objectives.head_rule import head_rule
    from hybridrl.teachers.scorer import Scorer

    batch = longest_batch(settings)
    worker = Scorer(
        settings,
        teacher=settings.scored_teachers[0],
        device=settings.cluster.device,
        evidence=make_objective(settings).needs.evidence[0],
        rule=head_rule(settings),
    )
    _, scores = worker.score(batch)
    return {"scores": per_token_bytes(scores)}


def engine(settings: RunSettings, rank: int, port: int) -> dict[str, int]:
    from hybridrl.rollout.engine import Rollout

    async def sample() -> dict[str, int]:
        device = settings.cluster.device
        worker = Rollout(settings, model=settings.model, device=device, backend="object_store")
        order = GenerateOrder(
            wave="plan",
            chunk=0,
            num_chunks=1,
            group_size=settings.train.samples_per_prompt,
            seed=0,
            temperature=1.0,
            max_new_tokens=settings.rollout.response_limit,
        )
        header, batch = await worker.generate(order, prompts_of(settings))
        tokens = int(np.diff(batch.offsets).sum())
        return {"rollouts": header.nbytes, "tokens": tokens, "sequences": batch.num_sequences}

    return asyncio.run(sample())


WORKERS: dict[str, Callable[[RunSettings, int, int], dict[str, int]]] = {
    "learner": learner,
    "scorer": scorer,
    "engine": engine,
}


def main(arguments: Sequence[str]) -> None:
    kind, rank, port, *overrides = arguments
    settings = with_arithmetic(load_config(overrides), None)
    device = settings.cluster.device
    if kind == "engine":
        from hybridrl.rollout.vllm_internals import environment

        os.environ |= environment(own_process=False)
    for module in IMPORTS[kind]:
        importlib.import_module(module)
    imports = in_use(device)
    forget_peak(device)
    sizes = WORKERS[kind](settings, int(rank), int(port))
    print("PLANNED " + json.dumps({"imports": imports, "peak": peak(device), **sizes}), flush=True)
    os._exit(0)  # gloo's destructors sometimes abort the process


if __name__ == "__main__":
    main(sys.argv[1:])
