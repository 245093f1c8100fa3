"""Chooses the values of settings that are left to the machine: dtypes, and whether activations are
recomputed.

The choice depends only on the device, the processor's instructions and the model's config, never on
a measured time, so two runs on one machine compute the same. The run's config.yaml records it.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from hybridrl.kernels.products import RATES, Processor, faster_products, processor
from hybridrl.models.decoder_layers import COMPILE_FROM
from hybridrl.models.loading import model_config
from hybridrl.settings.choices import Device, Products
from hybridrl.settings.models import AUTO
from hybridrl.settings.run import RunSettings

NARROW = (torch.bfloat16, torch.float16)


def with_arithmetic(settings: RunSettings, earlier: RunSettings | None) -> RunSettings:
    """The settings with chosen values for model.dtype=auto, train.products=auto and
    learner.gradient_checkpointing=null.

    On GPUs activations are recomputed even if they would fit. Their size depends on the longest
    sequences, the driver may not see the memory of the devices, and a GPU that runs out of memory
    ends the run.

    Args:
        earlier: settings of the run that is continued, whose choices are used again; None: a new
            run.

    Raises:
        ConfigError: the model's config cannot be read.
    """
    model = settings.model
    if model.dtype == AUTO:
        model = replace(model, dtype=earlier.model.dtype if earlier else chosen_dtype(settings))
    train = settings.train
    if train.products is Products.auto:
        products = earlier.train.products if earlier else chosen_products(settings)
        train = replace(train, products=products)
    learner = settings.learner
    if learner.gradient_checkpointing is None:
        recomputes = earlier.learner.gradient_checkpointing if earlier else on_gpu(settings)
        learner = replace(learner, gradient_checkpointing=recomputes)
    return replace(settings, model=model, train=train, learner=learner)


def on_gpu(settings: RunSettings) -> bool:
    """Whether the models of the run will presumably be on GPUs. The cluster is not known yet, so
    with cluster.device=auto the answer is whether torch is built for CUDA.
    """
    device = settings.cluster.device
    return device is Device.cuda or (device is Device.auto and torch.version.cuda is not None)


def chosen_dtype(settings: RunSettings) -> str:
    """The value of model.dtype=auto for a new run: bfloat16 on GPUs, else that of dtype_on."""
    if on_gpu(settings):
        return "bfloat16"
    return dtype_on(processor(), model_config(settings.model.path, settings.model.revision))


def dtype_on(kind: Processor, config: PreTrainedConfig) -> str:
    """The faster dtype for a model on a processor.

    That is bfloat16 if the model is stored in half precision, is wide enough that products take
    most of the time, and the processor has fast products of bfloat16; else float32, which is also
    more exact.
    """
    wide = config.get_text_config().hidden_size >= COMPILE_FROM
    fast = kind in RATES and faster_products(kind) is Products.model
    return "bfloat16" if config.dtype in NARROW and wide and fast else "float32"


def chosen_products(settings: RunSettings) -> Products:
    """The value of train.products=auto for a new run."""
    return Products.model if on_gpu(settings) else faster_products(processor())


def dtype_notice(dtype: str, kind: Processor) -> str:
    """The sentence that a run prints if its dtype was chosen.

    Args:
        dtype: the choice.
        kind: of the driver's processor.
    """
    rates = RATES.get(kind)
    measured = (
        f"two cores reach {rates.bfloat16:g} GFLOP/s in bfloat16 and {rates.float32:g} in float32"
        if rates
        else "which dtype is faster is not known"
    )
    return f"model.dtype=auto: {dtype}; on a processor with {kind}, {measured}"
