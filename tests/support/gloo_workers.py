"""A learner and an engine that exchange weights by vLLM's nccl backend, with gloo in the place of
NCCL. Their processes import this file, vLLM's own ones among them.
"""

from dataclasses import replace
from typing import Any

from hybridrl.policy.learner import Learner
from hybridrl.rollout import engine
from hybridrl.weights.vllm_transfer import WorkerExtension
from tests.support.gpu_substitutes import install

install()


class GlooLearner(Learner):
    """A rank."""

    def double(self) -> None:
        """Multiply this rank's share of every weight by two; the learner has ZeRO-3."""
        self.engine.empty_partition_cache()  # whole weights of the last pass
        for parameter in self.engine.module.parameters():
            parameter.ds_tensor.mul_(2)


class GlooExtension(WorkerExtension):
    """vLLM imports this file when it extends the worker of a device."""


class GlooRollout(engine.Rollout):
    """An engine whose devices have the extension."""

    def __init__(self, **arguments: Any) -> None:
        of_product = engine.engine_args

        def with_gloo(*args: Any) -> Any:
            extension = f"{__name__}.{GlooExtension.__name__}"
            return replace(of_product(*args), worker_extension_cls=extension)

        engine.engine_args = with_gloo
        super().__init__(**arguments)
