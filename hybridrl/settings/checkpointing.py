"""The settings of checkpoints."""

from dataclasses import dataclass

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import BestMode


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are retained."""

    every: int = 50
    """steps between checkpoints; 0: only one at the end"""
    keep: int = 2
    """number of newest checkpoints to retain"""
    background: bool = True
    """write in the background, while the next step runs, from a copy of the learner's state, which
    takes 12 bytes a parameter of host memory; false: the run waits until a checkpoint is written
    """
    best: str | None = None
    """a metric, e.g. eval/accuracy: the checkpoint of the step with the best value is retained
    besides the newest; null: none
    """
    best_mode: BestMode = BestMode.max
    """which value of checkpoint.best is the best"""
    export: bool = True
    """write a Hugging Face folder at the end"""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(
                f"checkpoint.every={self.every}: must not be negative; 0 saves only at the end"
            )
        if self.keep < 1:
            raise ConfigError(
                f"checkpoint.keep={self.keep}: must be at least 1, or a crash leaves nothing to "
                "resume"
            )

    def check_best(self, eval_every: int) -> None:
        """Check that every saved step is evaluated, where an evaluation chooses the best.

        Raises:
            ConfigError: eval.every skips some of them.
        """
        needs_evaluation = self.best is not None and self.best.startswith("eval/")
        if needs_evaluation and self.every and (not eval_every or self.every % eval_every):
            raise ConfigError(
                f"checkpoint.best={self.best}: is measured at steps divisible by "
                f"eval.every={eval_every}, and saved are those by checkpoint.every={self.every}; "
                f"set eval.every={self.every}"
            )
