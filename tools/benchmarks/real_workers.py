"""Production workers that measure their time, and the bare loops with which they are compared. All
of them run as actors.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from hybridrl.batch.balance import micro_batches
from hybridrl.batch.micro_batch import collate, train_sequences
from hybridrl.kernels.head import hybrid_head_loss
from hybridrl.models.decoder_layers import attends_plainly, compile_layers
from hybridrl.models.loading import load_model
from hybridrl.models.output_head import output_weight
from hybridrl.objectives import make_objective
from hybridrl.objectives.head_rule import head_rule
from hybridrl.rollout.engine import Rollout, engine_args
from hybridrl.rollout.sampler import sample_seed
from hybridrl.rollout.vllm_internals import environment
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.inbox import TeacherInbox
from hybridrl.types import (
    GenerateOrder,
    Prompt,
    Rewards,
    RolloutBatch,
    ScoredBatch,
    TokenScores,
    UpdatePlan,
    WeightManifest,
)
from hybridrl.weights.library_internals import transfer_engine
from hybridrl.weights.parameters import FullFineTuning
from hybridrl.weights.stream import WeightStream, unpack


class WeightHost:
    """A worker in place of the learner: a model and its WeightStream, without an optimizer."""

    def __init__(
        self, settings: RunSettings, *, rank: int, master: tuple[str, int], device: str
    ) -> None:
        weights = FullFineTuning(load_model(settings.model.path, settings.model.dtype))
        self.stream = WeightStream(weights.published(), lambda parameters: nullcontext())
        self.pack_s = 0.0
        self.copy: np.ndarray | None = None  # the target of the memcpy in `parts`

    def ping(self) -> str:
        return "here"

    def pack_weights(self, version: int) -> tuple[WeightManifest, np.ndarray]:
        started = time.perf_counter()
        packed = self.stream.pack(version)
        self.pack_s = time.perf_counter() - started
        return packed

    def parts(self) -> dict[str, float]:
        """Seconds of the last pack, of one memcpy into warm memory, and of one digest."""
        assert self.stream.buffer is not None, "nothing was packed"
        packed = self.stream.buffer.numpy()
        if self.copy is None:
            self.copy = packed.copy()
        started = time.perf_counter()
        np.copyto(self.copy, packed)
        copied = time.perf_counter()
        xxhash.xxh3_128_hexdigest(packed)
        return {
            "pack": self.pack_s,
            "memcpy": copied - started,
            "digest": time.perf_counter() - copied,
        }


class TimedRollout(Rollout):
    """A rollout worker that measures the time of its last weight update."""

    load_s = 0.0

    async def load_weights(self, manifest: WeightManifest, packed: np.ndarray) -> str:
        started = time.perf_counter()
        digest = await super().load_weights(manifest, packed)
        self.load_s = time.perf_counter() - started
        return digest

    async def last_load(self) -> float:
        return self.load_s

    async def keep(self, manifest: WeightManifest, packed: np.ndarray) -> None:
        """Copy the weights into the memory of this process, for `own_load`."""
        self.weights = (manifest, np.array(packed))

    async def own_load(self) -> float:
        """The seconds that the engine itself needs to load the kept weights, without digest and
        checks.
        """
        started = time.perf_counter()
        self.engine.collective_rpc("start_weight_update")
        self.engine.collective_rpc(load_plainly, args=self.weights)
        self.engine.collective_rpc("finish_weight_update")
        return time.perf_counter() - started


def load_plainly(worker: Any, manifest: WeightManifest, packed: np.ndarray) -> None:
    transfer_engine(worker).model.load_weights(unpack(manifest, packed))


class BareEngine:
    """The same vLLM engine in a bare loop: add all requests, and step until all are done. Its
    statistics are off.
    """

    def __init__(self, settings: RunSettings) -> None:
        os.environ |= environment(own_process=False)
        from vllm import LLMEngine

        args = engine_args(settings, settings.model, "cpu", "object_store")
        self.engine = LLMEngine.from_engine_args(replace(args, disable_log_stats=True))

    def ping(self) -> str:
        return "here"

    def generate(
        self, prompts: Sequence[Prompt], order: GenerateOrder, seeded: bool
    ) -> tuple[int, float]:
        """Generate the responses; returns the number of tokens, and the seconds."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        started = time.perf_counter()
        tokens = 0
        for prompt in prompts:
            for k in range(order.group_size):
                params = SamplingParams(
                    temperature=order.temperature,
                    max_tokens=order.max_new_tokens,
                    logprobs=order.support,
                    flat_logprobs=True,
                    seed=sample_seed(order.seed, prompt.uid, k) if seeded else None,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = f"{order.wave}/{prompt.uid}/{k}"
                salt = order.wave  # prevents the reuse of prefixes of earlier calls
                self.engine.add_request(
                    name,
                    TokensPrompt(prompt_token_ids=list(prompt.input_ids), cache_salt=salt),
                    params,
                )
        while self.engine.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in self.engine.step())
        return tokens, time.perf_counter() - started


class BareLearner:
    """Forward pass, our head pass, backward pass, clipping and AdamW on fp32 weights in a bare
    loop.

    Its micro-batches are made beforehand. Layers and optimizer are those of the product, so the
    difference in time is the product's overhead.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self.model = load_model(settings.model.path, settings.model.dtype)
        tokens = settings.rollout.max_model_len
        packed = settings.train.packing
        if attends_plainly(self.model, tokens):
            self.model.set_attn_implementation("eager")
        compile_layers(self.model, tokens=tokens, packed=packed, learns=True)
        self.parameters = list(self.model.parameters())
        self.masters = [nn.Parameter(p.detach().float().clone()) for p in self.parameters]
        train = settings.train
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=train.lr,
            betas=tuple(train.betas),
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.rule = head_rule(settings)
        self.objective = make_objective(settings)
        self.teachers = TeacherInbox.load(
            settings, self.objective.needs.evidence, torch.device("cpu")
        )

    def ping(self) -> str:
        return "here"

    def prepare(
        self, plan: UpdatePlan, rollout: RolloutBatch, rewards: Rewards, scores: TokenScores
    ) -> None:
        batch = ScoredBatch(rollout=rollout, rewards=rewards, scores=(scores,))
        credit = self.objective.credit(batch, plan)
        teachers = self.teachers.head_inputs(batch, credit.teacher_weights)
        sequences = train_sequences(rollout, credit.learned(torch.float32), teachers)
        train = self.settings.train
        indices = micro_batches(
            [s.num_tokens for s in sequences],
            train.max_tokens_per_micro_batch,
            packed=train.packing,
        )
        self.micros = [
            collate([sequences[i] for i in batch], packed=train.packing) for batch in indices
        ]

    def update(self) -> float:
        """Take a training step; returns its seconds."""
        started = time.perf_counter()
        for micro in self.micros:
            inputs = {
                "input_ids": micro.input_ids,
                "attention_mask": micro.attention_mask,
                "position_ids": micro.position_ids,
            }
            hidden: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            terms = micro.columns
            rows = hidden.flatten(0, 1).index_select(0, micro.hidden_rows)
            hybrid_head_loss(rows, output_weight(self.model), micro.teachers, terms, self.rule)[
                0
            ].backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.settings.train.grad_clip)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)
        return time.perf_counter() - started
