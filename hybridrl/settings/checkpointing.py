"""The settings of checkpoints."""

from dataclasses import dataclass

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import BestMode


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 50
    """steps; 0: only at the end"""
    keep: int = 2
    """newest checkpoints kept"""
    best: str | None = None
    """a metric, e.g. eval/accuracy: the checkpoint whose step has the best value of it is kept
    beside the newest; null: none
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
        """Every step that is saved must have its evaluation, where that is to choose the best.

        Raises:
            ConfigError: eval.every leaves some out.
        """
        measured = self.best is None or not self.best.startswith("eval/")
        if not measured and self.every and (not eval_every or self.every % eval_every):
            raise ConfigError(
                f"checkpoint.best={self.best}: is measured at steps divisible by "
                f"eval.every={eval_every}, and saved are those by checkpoint.every={self.every}; "
                f"set eval.every={self.every}"
            )
