"""Settings of adapters of low rank (LoRA, arXiv 2106.09685)."""

import math
from dataclasses import dataclass, field

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import AdapterSync

ENGINE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's values of max_lora_rank. A rank between two of them takes the memory of the larger."""


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """With a rank, only matrices B and A train, and a layer computes (W + alpha / rank B A) x."""

    rank: int | None = None
    """rank of the adapters, the only weights that train then; null: no adapters, all weights train.
    Adapters need the package peft
    """
    alpha: float | None = None
    """the adapters' product is multiplied by alpha / rank; null: twice the rank"""
    targets: list[str] = field(default_factory=list)
    """the last part of the names of the linear layers that get an adapter, e.g. [q_proj, v_proj];
    empty: all linear layers of the decoder. The embeddings never get one
    """
    dropout: float = 0.0
    """fraction of an adapter's inputs that an update sets to zero"""
    sync: AdapterSync = AdapterSync.merged
    """what the engines receive after an update. merged: all weights of the model, with the adapters
    in them. adapter: A and B alone, megabytes instead of gigabytes, through the object store; vLLM
    computes B (A x) beside each layer, and takes a rank of 512 at most
    """

    def __post_init__(self) -> None:
        if self.rank is None:
            self._check_unused()
            return
        if self.rank < 1:
            raise ConfigError(
                f"lora.rank={self.rank}: must be at least 1, or null to train all weights"
            )
        if self.alpha is not None and not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"lora.alpha={self.alpha}: must be positive and finite, or null")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout={self.dropout}: must be a fraction, in [0, 1)")
        most = ENGINE_RANKS[-1]
        if self.travels_alone and self.rank > most:
            raise ConfigError(
                f"lora.sync=adapter: vLLM's engines accept adapters up to rank {most}, but "
                f"lora.rank={self.rank}; lower it, or set lora.sync=merged"
            )

    def _check_unused(self) -> None:
        """Refuse settings of adapters in a run without any.

        Raises:
            ConfigError: names the setting.
        """
        values = {
            "alpha": self.alpha,
            "targets": self.targets,
            "dropout": self.dropout,
            "sync": self.sync if self.travels_alone else None,
        }
        for name, value in values.items():
            if value:
                raise ConfigError(
                    f"lora.{name}={value}: has no effect without adapters; set lora.rank, e.g. to "
                    "16"
                )

    @property
    def travels_alone(self) -> bool:
        """Whether the engines receive A and B and no other weights."""
        return self.sync is AdapterSync.adapter

    @property
    def engine_rank(self) -> int:
        """The smallest rank that vLLM has room for and that holds the adapters."""
        assert self.rank is not None, "there are adapters"
        return next(rank for rank in ENGINE_RANKS if rank >= self.rank)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        assert self.rank is not None, "there are adapters"
        return 2.0 if self.alpha is None else self.alpha / self.rank
