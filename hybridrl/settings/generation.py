"""Settings of `hybridrl generate`."""

from dataclasses import dataclass

from hybridrl.core.errors import ConfigError

FULL_BATCHES = 4
"""Default size of a wave, in units of rollout.max_num_seqs responses: engines idle at its end."""


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """How `hybridrl generate` samples."""

    samples: int = 1
    """responses to each prompt of `hybridrl generate`"""
    temperature: float | None = None
    """temperature of `hybridrl generate`; 0: always the most likely token; null:
    algorithm.temperature
    """
    wave: int | None = None
    """prompts that an engine of `hybridrl generate` or `eval` samples together and apart from all
    others, so that interruptions do not change their responses: a continued command samples
    unfinished waves again. null: as many as have 4 * rollout.max_num_seqs responses
    """

    def __post_init__(self) -> None:
        for name in ("samples", "wave"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"generate.{name}={value}: must be at least 1")
        if self.temperature is not None and not self.temperature >= 0:
            raise ConfigError(
                f"generate.temperature={self.temperature}: must not be negative; 0 always takes "
                "the most likely token"
            )

    def prompts_per_wave(self, max_num_seqs: int, samples: int) -> int:
        """`wave`, with null resolved.

        Example: an engine of 256 sequences samples waves of 512 prompts with 2 responses each.

        Args:
            max_num_seqs: sequences that an engine decodes at once.
            samples: responses to each prompt.
        """
        return self.wave or max(FULL_BATCHES * max_num_seqs // samples, 1)
