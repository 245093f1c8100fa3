"""One rank of the student's learner: DeepSpeed ZeRO 1-3 around forward, hybrid gradient and AdamW step."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from hybridrl.config import RunSettings
from hybridrl.data.collate import TrainSequence, collate, idle_sequence, train_sequences
from hybridrl.data.shards import micro_batches
from hybridrl.errors import CheckpointError, NonFiniteError
from hybridrl.models.export import export
from hybridrl.models.loading import load_model, resolve
from hybridrl.objectives.hybrid import HybridObjective
from hybridrl.ops.head import HeadStats, TeacherRows, TokenTerms
from hybridrl.types import LearnerStats, Rewards, RolloutBatch, Shard, TokenScores, UpdatePlan, WeightManifest
from hybridrl.workers.student import Student, output_weight, torch_dtype
from hybridrl.workers.weights import WeightStream

MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Holds a shard of the student and its optimizer; every method is called on all ranks together."""

    def __init__(self, settings: RunSettings, *, rank: int, master: tuple[str, int], device: str) -> None:
        self.settings, self.rank, self.world = settings, rank, settings.learner.ranks
        self.device = torch.device(device)
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(self.world), "LOCAL_RANK": "0",
            "MASTER_ADDR": master[0], "MASTER_PORT": str(master[1]),
        }  # fmt: skip
        deepspeed.init_distributed(
            "nccl" if self.device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=settings.deadlines.learn_s),
            verbose=False,
        )
        config = deepspeed_config(settings)
        sharded_loading = HfDeepSpeedConfig(config) if settings.learner.zero_stage == 3 else None  # alive while the model loads
        self.model = load_model(settings.model.path, settings.model.dtype, settings.model.revision)
        del sharded_loading
        if settings.learner.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.teacher_heads = [self._teacher_head(teacher.path, teacher.dtype) for teacher in self._teachers()]
        student = Student(self.model, settings.algorithm.temperature, settings.train.head_chunk)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=settings.train.lr, betas=tuple(settings.train.betas), weight_decay=settings.train.weight_decay
        )
        self.engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
        self.stream = WeightStream(self.model, self._gather)
        self.objective = HybridObjective(settings.algorithm, settings.rollout.max_new_tokens)
        self.optimizer_steps = 0

    def ping(self) -> int:
        return self.optimizer_steps

    # -- training ----------------------------------------------------------------------------------------------------

    def update(self, plan: UpdatePlan, shard: Shard, *values: RolloutBatch | Rewards | TokenScores) -> LearnerStats:
        """One optimizer step on this rank's groups.

        Args:
            values: for each chunk of the shard its RolloutBatch, its Rewards and one TokenScores per teacher.

        Raises:
            NonFiniteError: the loss or the gradient norm is NaN or infinite. A bad loss is found before the step.
        """
        started = time.monotonic()
        sequences = self._sequences(plan, shard, values)
        batches = [[sequences[i] for i in batch] for batch in self.pack(sequences)]
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for k in range(plan.num_micro_batches):
            batch = batches[k] if k < len(batches) else [self._idle()]
            sums += self._backward(batch, plan)
        dist.all_reduce(sums := sums.to(self.device))
        totals = dict(zip(SUMS, sums.tolist(), strict=True))
        if not np.isfinite(totals["loss"]):
            raise NonFiniteError(f"step {plan.step}: loss is {totals['loss']}; nothing was stepped; lower train.lr or look at the rewards")
        for group in self.engine.optimizer.param_groups:
            group["lr"] = plan.lr
        self.engine.step()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not np.isfinite(grad_norm):
            raise NonFiniteError(f"step {plan.step}: gradient norm is {grad_norm}; the last checkpoint is untouched")
        self.optimizer_steps += 1
        return learner_stats(totals, plan, grad_norm, time.monotonic() - started)

    def pack(self, sequences: Sequence[TrainSequence]) -> list[list[int]]:
        return micro_batches([len(s.input_ids) for s in sequences], self.settings.train.max_tokens_per_micro_batch)

    def _sequences(self, plan: UpdatePlan, shard: Shard, values: tuple) -> list[TrainSequence]:
        sequences: list[TrainSequence] = []
        stride = 2 + shard.num_teachers
        for chunk in range(shard.num_chunks):
            batch, rewards, *scores = values[chunk * stride : (chunk + 1) * stride]
            sparse = self.objective.sparse_costs(batch, scores, rewards, plan).numpy()
            weight = self.objective.token_weight(plan)
            sequences += train_sequences(batch, scores, sparse, rewards.keep, shard.groups[chunk], weight)
        return sequences

    def _backward(self, batch: Sequence[TrainSequence], plan: UpdatePlan) -> Tensor:
        """Forward and backward of one micro-batch; returns its part of SUMS."""
        micro = collate(batch)
        terms = TokenTerms(
            token_ids=micro.token_ids.to(self.device),
            token_weight=micro.token_weight.to(self.device),
            sparse=micro.sparse.to(self.device),
        )
        teachers = tuple(
            TeacherRows(hidden=hidden.to(self.device), lm_head=head, weight=weight)
            for hidden, head, weight in zip(micro.teacher_hidden, self.teacher_heads, plan.teacher_weights, strict=True)
        )
        loss, stats = self.engine(
            micro.input_ids.to(self.device), micro.attention_mask.to(self.device), micro.hidden_rows.to(self.device), teachers, terms
        )
        # DeepSpeed averages gradients over ranks; the objective's normaliser is already global.
        self.engine.backward(loss * self.world, scale_wrt_gas=False)
        return micro_sums(loss.detach(), stats, terms, micro.rollout_logprobs.to(self.device)).cpu()

    def _idle(self) -> TrainSequence:
        widths = [head.shape[1] for head in self.teacher_heads]
        wire = [np.dtype(np.uint16) if head.dtype == torch.bfloat16 else np.dtype(np.float32) for head in self.teacher_heads]
        return idle_sequence(widths, wire)

    # -- weights out -------------------------------------------------------------------------------------------------

    def pack_weights(self, version: int) -> tuple[WeightManifest | None, np.ndarray | None]:
        """The student's weights in its own dtype; rank 0 returns them, the others only help to gather."""
        if self.rank == 0:
            return self.stream.pack(version)
        for _ in self.stream:
            pass
        return None, None

    def connect_engines(self, backend: str, master: tuple[str, int], call: Callable, num_engines: int) -> None:
        """Open vLLM's own nccl or ipc channel to the engines; every rank calls it, rank 0 sends."""
        from hybridrl.workers.weight_transfer import EngineClient, trainer_engine

        client = EngineClient(call, num_engines, self.settings.rollout.tensor_parallel)
        self.sender = trainer_engine(backend, self.rank, master, client, self.stream)

    def send_weights(self) -> None:
        """Push the weights through that channel; returns when every engine has loaded them."""
        self.sender.send_weights()

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder (rank 0)."""
        own_names = dict(self.model.named_parameters())  # without the repeated tied head
        state: dict[str, Tensor] = {}
        for name, weight in self.stream:
            if self.rank == 0 and name in own_names:
                state[name] = weight.cpu().clone()
        if self.rank == 0:
            export(state, resolve(self.settings.model.path, self.settings.model.revision), Path(folder))

    # -- checkpoint --------------------------------------------------------------------------------------------------

    def save_state(self, folder: str) -> None:
        """fp32 master weights and Adam moments by parameter name, so that rank count and ZeRO stage may change."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            parts = {"master": safe_get_full_fp32_param(parameter)}
            parts |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
            if self.rank == 0:
                tensors |= {f"{part}/{name}": value.cpu().contiguous().clone() for part, value in parts.items()}
        if self.rank == 0:
            save_file(tensors, Path(folder) / "learner.safetensors", {"optimizer_steps": str(self.optimizer_steps)})

    def load_state(self, folder: str, optimizer_steps: int) -> None:
        """The inverse of save_state, on any number of ranks.

        Raises:
            CheckpointError: a parameter of the student is not in the file.
        """
        tensors = load_file(Path(folder) / "learner.safetensors")
        self._create_moments()
        for name, parameter in self.model.named_parameters():
            if f"master/{name}" not in tensors:
                raise CheckpointError(f"{folder}: has no parameter {name}, so it is of another model than {self.settings.model.path}")
            safe_set_full_fp32_param(parameter, tensors[f"master/{name}"].to(self.device))
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors[f"{moment}/{name}"].to(self.device), moment)
            self._set_weight(parameter, tensors[f"master/{name}"])
        for state in self.engine.optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(float(optimizer_steps)) if torch.is_tensor(state["step"]) else optimizer_steps
        self.optimizer_steps = optimizer_steps

    def _create_moments(self) -> None:
        """A step with zero gradient and zero learning rate: DeepSpeed creates Adam's state at the first step only."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        plan = UpdatePlan(
            step=0,
            num_tokens=1,
            num_sequences=1,
            num_micro_batches=1,
            lr=0.0,
            teacher_weights=(0.0,) * len(self.teacher_heads),
            reward_weight=0.0,
        )
        self._backward([self._idle()], plan)
        self.engine.step()

    def _set_weight(self, parameter: nn.Parameter, master: Tensor) -> None:
        """The forward's copy of a master weight."""
        with self._gather([parameter], modify=True), torch.no_grad():
            if parameter.numel() == master.numel():
                parameter.copy_(master.to(parameter.dtype))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _teachers(self) -> list:
        imitates = not self.settings.algorithm.imitation_weight.is_zero()
        return list(self.settings.teachers.values()) if imitates else []

    def _teacher_head(self, path: str | None, dtype: str) -> Tensor:
        """[V, H], frozen, beside the learner: the teacher's distribution is rebuilt from hidden states chunk by chunk."""
        weight = output_weight(load_model(path or self.settings.model.path, dtype, None if path else self.settings.model.revision))
        return weight.detach().to(self.device, torch_dtype(dtype)).clone()

    def _gather(self, parameters: Sequence[nn.Parameter], modify: bool = False) -> AbstractContextManager:
        if self.settings.learner.zero_stage < 3:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if modify else None)


SUMS = (
    "loss", "tokens", "kl", "entropy", "rho", "rho_sq", "gap", "dense_sq", "sparse_sq",
)  # fmt: skip
"""What a step adds up over micro-batches and ranks."""


def micro_sums(loss: Tensor, stats: HeadStats, terms: TokenTerms, rollout_logprobs: Tensor) -> Tensor:
    """[len(SUMS)] float64 of one micro-batch; tokens of weight 0 count nowhere."""
    live = terms.token_weight > 0
    log_ratio = (stats.logprobs - rollout_logprobs)[live].double()
    rho = log_ratio.exp()
    return torch.stack(
        [
            loss.double(), live.sum().double(), stats.kl[live].double().sum(), stats.entropy[live].double().sum(),
            rho.sum(), rho.square().sum(), log_ratio.abs().sum(), stats.dense_sq, stats.sparse_sq,
        ]
    )  # fmt: skip


def learner_stats(totals: dict[str, float], plan: UpdatePlan, grad_norm: float, learn_s: float) -> LearnerStats:
    """Means and norms of the global batch from its sums."""
    tokens = max(totals["tokens"], 1.0)
    return LearnerStats(
        loss=totals["loss"],
        grad_norm=grad_norm,
        dense_norm=totals["dense_sq"] ** 0.5,
        sparse_norm=totals["sparse_sq"] ** 0.5,
        kl_token=totals["kl"] / tokens,
        kl_sequence=totals["kl"] / max(plan.num_sequences, 1),
        entropy=totals["entropy"] / tokens,
        rho_mean=totals["rho"] / tokens,
        logprob_gap=totals["gap"] / tokens,
        ess=totals["rho"] ** 2 / (tokens * totals["rho_sq"]) if totals["rho_sq"] else 0.0,
        learn_s=learn_s,
    )


def deepspeed_config(settings: RunSettings) -> dict:
    """ZeRO with micro-batches of our own size: one step() per batch, gradients summed, never averaged over micro-batches."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.train.grad_clip,
        "zero_optimization": {"stage": settings.learner.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": settings.model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
