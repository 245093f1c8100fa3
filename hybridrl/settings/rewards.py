"""The settings reward.*: the functions that judge responses, and the workers that run them."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from hybridrl.core.errors import ConfigError
from hybridrl.settings.algorithm import ScheduleConfig
from hybridrl.settings.choices import OnError

FUNCTIONS_SHARE = 0.9
"""The share of deadlines.reward_s for the reward functions; the rest is for all other work."""


@dataclass(kw_only=True, slots=True)
class RewardFunctionConfig:
    function: str = MISSING
    """countdown, math, reasoning_gym, reward_model, or file.py:function of yours"""
    weight: float = 1.0
    """factor in the reward, times algorithm.reward_weight; 0: the value is only reported"""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """multiplies the weight"""
    options: dict[str, Any] = field(default_factory=dict)
    """keyword arguments of the function; of reward_model: path, the exported folder"""
    route: dict[str, Any] = field(default_factory=dict)
    """judge only responses to prompts whose columns have these values, e.g. {data_source: math};
    empty: all
    """
    skip_special_tokens: bool = True
    """remove tokens such as the end of a turn from `completions`; false: they remain as text"""


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    functions: dict[str, RewardFunctionConfig] = field(default_factory=dict)
    workers: int = 1
    """number of workers; each runs calls in child processes of its own, which can be killed"""
    processes: int = 1
    """child processes per worker"""
    gpus: int = 0
    """GPUs of each worker, 0 or 1, on which its reward models compute; on CPUs it has no effect"""
    timeout_s: float = 10.0
    """seconds after which a call's child process is killed. A call is for all responses of a chunk
    that one process gets or, if that call fails, for one of them alone
    """
    on_error: OnError = OnError.drop_group
    """what to do where a reward function raises, hangs or returns no finite number"""
    error_value: float = 0.0
    """the reward of a failed call under on_error=value"""
    max_error_rate: float = 0.1
    """stop the run when more than this fraction of a step's calls fail, under on_error=value too"""

    @property
    def models(self) -> dict[str, str]:
        """The folders of the reward models, by the names of their functions."""
        return {
            name: function.options["path"]
            for name, function in self.functions.items()
            if function.function == "reward_model" and "path" in function.options
        }

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ConfigError(f"reward.timeout_s={self.timeout_s}: must be positive")
        if self.workers < 1 or self.processes < 1:
            raise ConfigError(
                f"reward.workers={self.workers}, reward.processes={self.processes}: both must be "
                "at least 1"
            )
        if self.gpus not in (0, 1):
            raise ConfigError(
                f"reward.gpus={self.gpus}: a reward model computes on one GPU; set it to 0 or 1"
            )
        if self.gpus and not self.models:
            raise ConfigError(
                f"reward.gpus={self.gpus}: only a reward_model uses a GPU, and no reward function "
                "is one; set it to 0"
            )
        for name in self.models:
            options = self.functions[name].options
            if "device" in options:
                raise ConfigError(
                    f"reward.functions.{name}.options.device: is decided by the placement; set "
                    "reward.gpus=1 for a GPU"
                )
            dtype = options.get("dtype", "float32")
            if dtype not in ("float32", "bfloat16"):
                raise ConfigError(
                    f"reward.functions.{name}.options.dtype={dtype}: must be float32 or bfloat16"
                )
        if not 0 <= self.max_error_rate <= 1:
            raise ConfigError(
                f"reward.max_error_rate={self.max_error_rate}: must be a fraction, in [0, 1]"
            )
