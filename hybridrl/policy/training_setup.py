"""How a learner rank is set up: process group, model and its layers, optimizer, DeepSpeed."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from hybridrl.models.decoder_layers import attends_plainly, compile_layers, set_products
from hybridrl.models.loading import load_layout, load_model
from hybridrl.models.model_internals import wrapped_layers
from hybridrl.settings.choices import Attention, Offload
from hybridrl.settings.run import RunSettings
from hybridrl.weights.parameters import weights_kind

MOST_IN_BUCKET = 500_000_000
"""DeepSpeed's default for reduce_bucket_size."""


def join_ranks(
    settings: RunSettings, rank: int, master: tuple[str, int], device: torch.device
) -> None:
    """Join the process group of the learner's ranks, which meet at `master`, a (host, port)."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(settings.learner.ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
    }
    # DeepSpeed would compile an extension for sums over the ranks of one CPU, in up to a minute.
    # Only its tensor-parallel inference calls it.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=settings.deadlines.learn_s),
        verbose=False,
    )


def sharded_model(settings: RunSettings, config: dict[str, Any]) -> PreTrainedModel:
    """The student as transformers loads it; with ZeRO-3, this rank's shard of each weight.

    Args:
        config: DeepSpeed's settings.
    """
    model = settings.model
    # While this object is alive, transformers shards each weight as it loads it.
    sharding = HfDeepSpeedConfig(config) if zero_stage(settings) == 3 else None
    loaded = load_model(model.path, model.dtype, model.revision, attention=model.attention)
    del sharding
    return loaded


def set_layers(model: PreTrainedModel, settings: RunSettings, device: torch.device) -> None:
    """Set the dtype of products, the attention, recomputation and compilation of the decoder layers
    according to the settings and the device.
    """
    train = settings.train
    set_products(model, train.products, device)
    tokens = train.max_tokens_per_micro_batch if train.packing else settings.rollout.max_model_len
    assert tokens is not None, "run settings fill rollout.max_model_len in"
    chooses = device.type == "cpu" and settings.model.attention is Attention.auto
    if chooses and attends_plainly(model, tokens):
        model.set_attn_implementation("eager")
    if settings.learner.gradient_checkpointing:
        checkpoint_activations(model)
    elif chooses and zero_stage(settings) < 3 and not settings.lora.dropout:
        # Not with ZeRO 3, which gathers parameters inside of layers, nor with dropout, which would
        # need further graphs.
        bare = bool(settings.shared_teachers)
        compile_layers(model, tokens=tokens, packed=train.packing, learns=True, bare=bare)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute the activations of the layers in the backward pass.

    The model stays in evaluation mode, without dropout. Only the layers that transformers wraps for
    recomputation are set to training mode, because they recompute in no other mode. They are set
    back while they compute, because some (OPT's) have a dropout of their own in training mode.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in wrapped_layers(model):
        layer.training = True
        layer.register_forward_pre_hook(lambda layer, _: _set_training(layer, False))
        # Always, because torch may end the second pass early by an exception.
        layer.register_forward_hook(lambda layer, *_: _set_training(layer, True), always_call=True)


def _set_training(layer: nn.Module, training: bool) -> None:
    """Set the mode of the layer itself; the modules in it keep theirs."""
    layer.training = training


def adam(parameters: Sequence[nn.Parameter], settings: RunSettings) -> torch.optim.AdamW:
    """The optimizer that DeepSpeed steps, over the parameters that train."""
    train = settings.train
    first, second = train.betas
    return torch.optim.AdamW(
        parameters,
        lr=train.lr,
        betas=(first, second),
        weight_decay=train.weight_decay,
        fused=True,  # one pass over the memory instead of one for each operation
    )


def deepspeed_config(settings: RunSettings, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO, with micro-batches that this package makes and one step() per
    update.

    Gradients are summed over micro-batches, never averaged.

    Args:
        device: of the rank. On a GPU, communication overlaps with computation in the stages in
            which DeepSpeed allows it, 2 and 3; on a CPU it would only compete for the cores.
    """
    stage = zero_stage(settings)
    # With one rank and stage 1 nothing is summed, so gradients need not be converted to fp32 and
    # back.
    alone = settings.learner.ranks == 1 and stage == 1
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.train.grad_clip,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": device.type == "cuda" and stage > 1,
            "reduce_scatter": not alone,
            "reduce_bucket_size": bucket_numbers(settings),
            **offloaded(settings.learner.offload),
        },
        "zero_allow_untested_optimizer": True,
        # An offloaded optimizer is torch's AdamW too, on the CPU: DeepSpeed's own is compiled at
        # its first use, and rounds differently.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.model.dtype == "bfloat16"},
        # Sum over ranks, and over micro-batches if gradients are sharded, in fp32 whatever the
        # model's dtype.
        **({} if alone else {"communication_data_type": "fp32"}),
        **({"data_types": {"grad_accum_dtype": "fp32"}} if stage > 1 else {}),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def offloaded(offload: Offload) -> dict[str, Any]:
    """The part of DeepSpeed's ZeRO settings that offloads to host memory."""
    host = {"device": "cpu", "pin_memory": True}
    match offload:
        case Offload.none:
            return {}
        case Offload.optimizer:
            return {"offload_optimizer": host}
        case Offload.parameters:
            return {"offload_optimizer": host, "offload_param": host}


def bucket_numbers(settings: RunSettings) -> int:
    """The size, in numbers, of the buffer in which DeepSpeed sums gradients.

    DeepSpeed allocates the whole buffer at every step, by default 2 GB. For a small model most of
    it is wasted. On a CPU the freed memory stays with the process, and later activations touch
    more and more of its pages: the tiny model's learner grew by 0.5 GB in its second step.
    """
    model = load_layout(settings.model.path, settings.model.revision, setting="model.path")
    trained = weights_kind(settings)(model, None).trained()
    value_head = model.config.get_text_config().hidden_size
    return min(sum(p.numel() for p in trained.values()) + value_head, MOST_IN_BUCKET)


def zero_stage(settings: RunSettings) -> int:
    stage = settings.learner.zero_stage
    assert stage is not None, "run settings choose one by the model's dtype"
    return stage
