"""A scorer that runs its teacher in a vLLM engine: over several GPUs, or with quantised weights."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hybridrl.core.errors import ServerError
from hybridrl.core.peak_memory import PeakMemory
from hybridrl.core.plain_text import described
from hybridrl.kernels.head import HeadRule
from hybridrl.models.loading import is_wrongly_tied, resolve
from hybridrl.rollout.engine import CPU_KV_CACHE_BYTES, start_engine
from hybridrl.rollout.engine_arguments import typed
from hybridrl.rollout.vllm_internals import read_prompt, refusals
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.evidence import Evidence
from hybridrl.teachers.reported import ReportedScorer, ReportedScores
from hybridrl.types import RolloutBatch, ScoreHeader, TokenScores

if TYPE_CHECKING:
    from vllm import EngineArgs

ONE_MORE = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
"""Lets vLLM accept a sequence with as many tokens as the model has positions, although vLLM also
counts the token that it generates. That token is not read, so no position is missing.
"""
DEFAULTS = {
    # The logits and log-probs of all tokens of a step may be in memory at once, and vLLM reserves
    # no memory for them.
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.9,
    "enforce_eager": True,  # CUDA graphs only help decoding
}
"""Default arguments of the engine, which teachers.NAME.engine replaces."""


class EngineScorer(ReportedScorer):
    """Scores sequences as prompts of one vLLM engine.

    Each sequence is the prompt of a request for one token, with `prompt_logprobs=K`. vLLM computes
    these log-probs from the unmodified logits, at temperature 1.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ServerError: from `score`, if the engine refuses a sequence or returns invalid log-probs.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        teacher: str,
        device: str,
        evidence: Evidence,
        rule: HeadRule,
    ) -> None:
        self.source = f"teachers.{teacher}.engine"
        super().__init__(settings, teacher=teacher, evidence=evidence, rule=rule)
        os.environ |= ONE_MORE
        self.engine, self.meter = start_engine(
            partial(scoring_engine_args, settings, teacher, device),
            own_process=settings.teachers[teacher].gpus > 1,
        )
        # With several GPUs the engine runs in other processes, whose memory is not measured.
        if settings.teachers[teacher].gpus == 1:
            self.peaks = PeakMemory.of_device(device)
        self.requests = 0  # number of requests so far, which makes their names unique

    def configure(self, settings: RunSettings, evidence: Evidence, rule: HeadRule) -> None:
        super().configure(settings, evidence, rule)
        self.identity = f"engine {self.identity}"

    def score(self, batch: RolloutBatch) -> tuple[ScoreHeader, TokenScores]:
        header, scores = super().score(batch)
        return replace(header, engine=self.meter.take()), scores

    def answers(self, sequences: Sequence[Sequence[int]]) -> list[ReportedScores]:
        from vllm import SamplingParams, TokensPrompt

        top = self.evidence.support
        parameters = SamplingParams(
            max_tokens=1,  # vLLM generates at least one
            temperature=0.0,
            prompt_logprobs=top,
            flat_logprobs=True,
            detokenize=False,
        )
        names = [str(self.requests + i) for i in range(len(sequences))]
        self.requests += len(sequences)
        try:
            for name, ids in zip(names, sequences, strict=True):
                self.engine.add_request(name, TokensPrompt(prompt_token_ids=list(ids)), parameters)
            outputs = self._finished()
            return [read_prompt(outputs[name], top) for name in names]
        except refusals() as error:
            self.engine.abort_request(names)
            raise ServerError(f"{self.source}: {described(error)}") from error

    def _finished(self) -> dict[str, Any]:
        """Step the engine until all requests are finished; returns their outputs by name."""
        outputs: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in self.engine.step()}
        return outputs


def scoring_engine_args(settings: RunSettings, teacher: str, device: str) -> "EngineArgs":
    """vLLM's arguments for an engine that scores, including those of teachers.NAME.engine.

    Args:
        device: "cpu" or "cuda".
    """
    from vllm import EngineArgs

    model = settings.teacher_model(teacher)
    config = settings.teachers[teacher]
    arguments = config.engine or {}
    tied = {"tie_word_embeddings": False} if is_wrongly_tied(model.path, model.revision) else {}
    chosen = {
        **DEFAULTS,
        "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES if device == "cpu" else None,
        **{name: typed(name, value) for name, value in arguments.items()},
        "hf_overrides": {**arguments.get("hf_overrides", {}), **tied},
    }
    return EngineArgs(
        model=str(resolve(model.path, model.revision)),
        trust_remote_code=False,
        load_format="safetensors",
        dtype=model.dtype,
        max_model_len=settings.rollout.sequence_limit + 1,  # with the token that is generated
        distributed_executor_backend="mp" if config.gpus > 1 else "uni",
        max_logprobs=-1,  # as many as algorithm.topk.k
        # A request for prompt_logprobs does not read the cache.
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=settings.run.seed,
        **chosen,
    )
