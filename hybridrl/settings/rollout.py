"""How responses are sampled, and how far sampling runs ahead of learning."""

from dataclasses import dataclass, field
from typing import Any

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import OnStale, WeightTransfer


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    engines: int = 1
    """vLLM engines; on GPUs each uses tensor_parallel of them"""
    tensor_parallel: int = 1
    """devices inside one engine"""
    max_new_tokens: int | None = None
    """tokens of the longest response; null: the run is refused, with a proposal for your data"""
    max_model_len: int | None = None
    """tokens of the longest prompt with its response; null: the run is refused, with a proposal for
    your data
    """
    max_num_seqs: int = 256
    """sequences decoded at once by one engine"""
    kv_cache_bytes: int | None = None
    """bytes of one engine's KV cache; null: 256 MiB on CPUs, on GPUs the rest of
    gpu_memory_utilization
    """
    gpu_memory_utilization: float = 0.9
    """share of a GPU that an engine may use; at most 0.5 with cluster.colocate,
    unless engines and learner take turns (cluster.take_turns)
    """
    enforce_eager: bool | None = None
    """true: vLLM runs the model eagerly; false: it compiles it, on GPUs also to CUDA graphs, which
    delays the start and pays off after minutes of generation; null: true on CPUs, false on GPUs
    """
    engine: dict[str, Any] = field(default_factory=dict)
    """further arguments of vllm.EngineArgs for every engine, also for those that measure teachers,
    e.g. '+rollout.engine={async_scheduling: false, max_num_batched_tokens: 8192}'; an argument that
    vLLM does not have, or that another setting determines, is refused
    """
    groups_per_chunk: int = 1
    """prompt groups that an engine returns together; scoring and rewards of a chunk start when it
    is complete, while others still generate. Larger chunks make fewer and larger calls, which suits
    small models
    """
    oversample: float = 0.0
    """share of prompts sampled beyond train.prompts_per_step; a step uses the groups that finish
    first and cancels the rest, whose prompts are sampled at a later step. This shortens the wait
    for the longest responses, but prefers short ones, and which finish first is not reproducible
    """
    weight_transfer: WeightTransfer = WeightTransfer.auto
    """how the learner's weights reach the engines"""
    max_logprob_gap: float = 0.1
    """nats; a larger mean |sampler - learner| log-prob difference means that the engines do not run
    the learner's weights, and the run stops
    """

    def __post_init__(self) -> None:
        for name in (
            "engines",
            "tensor_parallel",
            "max_new_tokens",
            "max_num_seqs",
            "groups_per_chunk",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"rollout.{name}={value}: must be at least 1")
        if not 0 <= self.oversample <= 1:
            raise ConfigError(
                f"rollout.oversample={self.oversample}: must be a share of "
                "train.prompts_per_step, in [0, 1]"
            )
        if self.oversample and self.groups_per_chunk > 1:
            raise ConfigError(
                f"rollout.groups_per_chunk={self.groups_per_chunk}: rollout.oversample cancels "
                "single groups; set it to 1"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"rollout.gpu_memory_utilization={self.gpu_memory_utilization}: must be a "
                "fraction of the device, in (0, 1]"
            )
        if self.kv_cache_bytes is not None and self.kv_cache_bytes < 1:
            raise ConfigError(
                f"rollout.kv_cache_bytes={self.kv_cache_bytes}: must be positive, or null to have "
                "it chosen"
            )
        if (
            self.max_new_tokens is not None
            and self.max_model_len is not None
            and self.max_model_len <= self.max_new_tokens
        ):
            raise ConfigError(
                f"rollout.max_model_len={self.max_model_len}: must hold a prompt and "
                f"rollout.max_new_tokens={self.max_new_tokens}; raise it"
            )

    @property
    def response_limit(self) -> int:
        """Tokens of the longest response, of a run whose lengths are set."""
        assert self.max_new_tokens is not None, "a run without lengths is refused before it starts"
        return self.max_new_tokens

    @property
    def sequence_limit(self) -> int:
        """Tokens of the longest prompt with its response, of a run whose lengths are set."""
        assert self.max_model_len is not None, "a run without lengths is refused before it starts"
        return self.max_model_len


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """What engines and scorers do while the learner works.

    `schedule=pipelined` on the command line sets ahead and max_staleness.
    """

    ahead: int = 0
    """number of steps that are sampled and scored while the learner works on an earlier one; 0: all
    work is done in turn, which is bit-reproducible
    """
    max_staleness: int = 0
    """weight versions by which a token's sampler may lag the learner that trains on the token"""
    on_stale: OnStale = OnStale.wait
    """how max_staleness is enforced"""
    max_inflight_bytes: int | None = None
    """sampling waits while rollouts and scores of the steps ahead would use more bytes of the
    object store; null: half of the store
    """

    def __post_init__(self) -> None:
        for name in ("ahead", "max_staleness"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"pipeline.{name}={getattr(self, name)}: must not be negative; 0 means none"
                )
        if self.on_stale is OnStale.wait and self.ahead > self.max_staleness:
            raise ConfigError(
                f"pipeline.ahead={self.ahead}: pipeline.on_stale=wait lets sampling run no "
                f"further ahead than pipeline.max_staleness={self.max_staleness}; raise that, or "
                "choose drop or reweight"
            )
        if self.max_inflight_bytes is not None and self.max_inflight_bytes < 1:
            raise ConfigError(
                f"pipeline.max_inflight_bytes={self.max_inflight_bytes}: must be positive, or "
                "null to have it chosen"
            )
