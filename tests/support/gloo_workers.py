"""A learner and an engine that exchange weights by vLLM's nccl backend, with gloo instead of NCCL.
All their processes import this file, including those that vLLM starts.
"""

from dataclasses import replace
from typing import Any

from hybridrl.policy.learner import Learner
from hybridrl.rollout import engine
from hybridrl.weights.vllm_transfer import WorkerExtension
from tests.support.gpu_substitutes import install

install()


class GlooLearner(Learner):
    """A learner rank whose weights a test can change."""

    def double(self) -> None:
        """Multiply this rank's shard of every weight by two. The learner must use ZeRO-3."""
        self.engine.empty_partition_cache()  # drops the whole weights of the last forward pass
        for parameter in self.engine.module.parameters():
            parameter.ds_tensor.mul_(2)


class GlooExtension(WorkerExtension):
    """An unchanged extension in this file, so that vLLM's worker processes import this file."""


class GlooRollout(engine.Rollout):
    """An engine whose vLLM workers have GlooExtension."""

    def __init__(self, **arguments: Any) -> None:
        of_product = engine.engine_args

        def with_gloo(*args: Any) -> Any:
            extension = f"{__name__}.{GlooExtension.__name__}"
            return replace(of_product(*args), worker_extension_cls=extension)

        engine.engine_args = with_gloo
        super().__init__(**arguments)
