"""How a run computes, where its settings leave the choice to the machine: its dtypes, and whether
it recomputes activations.

The choice depends only on the device, the processor's instructions and the model's config, never on
a measured time, so two runs on one machine compute the same. config.yaml of the run records it.
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
    """The settings with a choice in the place of model.dtype=auto, of train.products=auto and of
    learner.gradient_checkpointing=null.

    Activations are recomputed on GPUs, whether or not they would fit. What they need depends on the
    longest sequences and on the memory of devices that the driver may not see, and a GPU that
    runs out of memory ends the run.

    Args:
        earlier: settings of the run that is to be continued, whose choices are used again; None: a
            new run.

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
    """Whether the models of the run are expected on GPUs. The cluster is not known yet, so with
    cluster.device=auto a build of torch for CUDA means yes.
    """
    device = settings.cluster.device
    return device is Device.cuda or (device is Device.auto and torch.version.cuda is not None)


def chosen_dtype(settings: RunSettings) -> str:
    """What model.dtype=auto means for a new run: bfloat16 on GPUs, else dtype_on."""
    if on_gpu(settings):
        return "bfloat16"
    return dtype_on(processor(), model_config(settings.model.path, settings.model.revision))


def dtype_on(kind: Processor, config: PreTrainedConfig) -> str:
    """The faster dtype for a model on a processor.

    That is bfloat16 where the model is stored in half precision, is wide enough for its products to
    take most of the time, and the processor has fast products of bfloat16; else float32, which is
    also the more exact one.
    """
    wide = config.get_text_config().hidden_size >= COMPILE_FROM
    fast = kind in RATES and faster_products(kind) is Products.model
    return "bfloat16" if config.dtype in NARROW and wide and fast else "float32"


def chosen_products(settings: RunSettings) -> Products:
    """What train.products=auto means for a new run."""
    return Products.model if on_gpu(settings) else faster_products(processor())


def dtype_notice(dtype: str, kind: Processor) -> str:
    """What a run prints where its dtype was chosen.

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
