"""Settings of the training: the optimizer steps, and the learner's ranks that take them."""

import math
from dataclasses import dataclass, field

from hybridrl.core.errors import ConfigError
from hybridrl.settings.choices import Offload, Products


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    steps: int = 100
    """batches to learn from; each is one optimizer update, or several of them"""
    prompts_per_step: int = 32
    """prompts of one batch, on all learner ranks together"""
    updates_per_batch: int = 1
    """mini-batches of whole prompts into which a batch is cut at random; each is one optimizer
    update
    """
    epochs_per_batch: int = 1
    """passes over each batch; each pass has its mini-batches in another order"""
    samples_per_prompt: int = 8
    """K, the number of rollouts of each prompt"""
    lr: float = 5e-4
    """AdamW's learning rate after the warm-up; the default is for tiny models, from 1B parameters
    on 1e-6 to 1e-5 are usual"""
    lr_warmup_steps: int = 0
    """steps over which the learning rate rises linearly to lr"""
    lr_end: float | None = None
    """cosine from lr to lr_end over train.steps; null: constant"""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the gradient's mean and of its square"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay"""
    grad_clip: float = 1.0
    """largest gradient norm; 0: gradients are not clipped"""
    max_tokens_per_micro_batch: int = 16384
    """budget of tokens for one forward pass of one learner rank, padding included"""
    packing: bool = False
    """put sequences one after the other instead of padding them; faster for long sequences of
    unequal length
    """
    max_skipped: int = 0
    """batches in a row that may be skipped because their gradient is NaN or infinite; one more ends
    the run. If a batch has several updates, only the bad ones are skipped; this is then the
    largest number of skipped updates in a row
    """
    head_chunk: int = 1024
    """number of response tokens whose logits are in memory at once in the head pass"""
    products: Products = Products.auto
    """dtype in which learner and scorers compute matrix products of bfloat16 models on CPUs: model,
    or float32, which is faster on processors whose bfloat16 instructions are slow or missing; auto:
    the faster one by a table, on the processor of the driver. A run keeps its first choice. On GPUs
    products are in the model's dtype
    """
    exact_logits: bool = False
    """bfloat16 on CPUs: compute logits by float32 products, several times slower. It is for a
    student that nearly equals its teacher: 20 % of the dense gradient is rounding error at a KL of
    0.01 nats a token, 40 % at 0.003, all of it below 0.001. On GPUs logits are always exact
    """

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "updates_per_batch",
            "epochs_per_batch",
            "samples_per_prompt",
            "max_tokens_per_micro_batch",
            "head_chunk",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must be at least 1")
        self._check_mini_batches()
        for name in ("lr_warmup_steps", "weight_decay", "grad_clip", "max_skipped"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"train.{name}={getattr(self, name)}: must not be negative")
        if not self.lr > 0 or not math.isfinite(self.lr):
            raise ConfigError(f"train.lr={self.lr}: must be positive and finite")
        if self.lr_end is not None and not (self.lr_end >= 0 and math.isfinite(self.lr_end)):
            raise ConfigError(
                f"train.lr_end={self.lr_end}: must be finite and not negative, or the last steps "
                "would increase the loss"
            )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"train.betas={self.betas}: AdamW needs two numbers in [0, 1)")

    def _check_mini_batches(self) -> None:
        """Check that a batch can be cut into equal mini-batches of whole prompts."""
        prompts = self.prompts_per_step
        updates = self.updates_per_batch
        if prompts % updates:
            nearest = max(round(prompts / updates), 1) * updates
            raise ConfigError(
                f"train.prompts_per_step={prompts}: is cut into train.updates_per_batch={updates} "
                f"mini-batches of equally many prompts; set it to a multiple, e.g. {nearest}, or "
                "choose a divisor of it as train.updates_per_batch"
            )

    @property
    def takes_several_updates(self) -> bool:
        """Whether a batch is more than one optimizer update."""
        return self.updates_per_batch * self.epochs_per_batch > 1


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    ranks: int = 1
    """processes that share the student's optimizer state and the batch; on GPUs each uses one"""
    zero_stage: int | None = None
    """stage of DeepSpeed ZeRO, 1, 2 or 3; null: 3 with learner.offload, 2 with
    model.dtype=bfloat16, else 1. With a bfloat16 model, stage 1 adds the gradients of micro-batches
    in bfloat16, so that two ranks differ from one by about 2 % of a step; stages 2 and 3 add them
    in float32
    """
    offload: Offload = Offload.none
    """what a rank holds in host memory instead of its GPU's, which makes a step slower; on CPUs it
    saves nothing
    """
    gradient_checkpointing: bool | None = None
    """recompute activations in the backward pass: less memory, more time; null: on GPUs. A run
    keeps its first choice
    """

    def __post_init__(self) -> None:
        if self.zero_stage not in (None, 1, 2, 3):
            raise ConfigError(
                f"learner.zero_stage={self.zero_stage}: must be 1, 2 or 3; stage 0 follows "
                "another trajectory in bf16"
            )
        if self.offload is Offload.parameters and self.zero_stage not in (None, 3):
            raise ConfigError(
                f"learner.offload=parameters: needs learner.zero_stage=3, it is {self.zero_stage}; "
                "set it to 3 or null, or learner.offload=optimizer"
            )
        if self.offload is Offload.optimizer and self.zero_stage == 2:
            raise ConfigError(
                "learner.offload=optimizer: needs learner.zero_stage=1 or 3, it is 2, in which "
                "DeepSpeed 0.19.8 leaves out all steps after a bfloat16 gradient that is not "
                "finite; set it to 3 or null"
            )
        if self.ranks < 1:
            raise ConfigError(f"learner.ranks={self.ranks}: must be at least 1")
