"""Which of the student's weights are trained, sent to engines, saved and exported, and by which
names.

A class with the four methods of StudentWeights decides this for the optimizer, the weight stream,
the fragments of a checkpoint and the export. No other file decides by the name of a parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hybridrl.models.adapters import (
    AdaptedLayer,
    adapted_layers,
    add_adapters,
    name_without_adapters,
)
from hybridrl.models.loading import VALUE_HEAD
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.run import RunSettings
from hybridrl.weights.library_internals import whole_shape

LM_HEAD = "lm_head.weight"
"""The name by which vLLM loads an output embedding."""


def _unchanged(parameter: Tensor) -> Tensor:
    return parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensor:
    """A tensor that leaves the learner, and the parameters that it is computed from.

    Example: the output head of a tied model with 5 tokens and a width of 2 is

        NamedTensor(
            name="lm_head.weight",
            shape=(5, 2),
            dtype=torch.float32,
            sources={"model.embed_tokens.weight": embedding},
            repeats="model.embed_tokens.weight",
        )
    """

    name: str  # as in the model's Hugging Face folder; engines read the same names
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: Mapping[str, nn.Parameter]  # by the names that StudentWeights.saved() uses
    combine: Callable[..., Tensor] = _unchanged  # (whole source, ...) -> a tensor of `shape`
    repeats: str | None = None  # name of an earlier tensor with the same bytes; None: no repetition


def same_tensor(name: str, parameter: nn.Parameter) -> NamedTensor:
    """The NamedTensor of a parameter that leaves the learner unchanged, under this name."""
    return NamedTensor(
        name=name,
        shape=whole_shape(parameter),
        dtype=parameter.dtype,
        sources={name: parameter},
    )


class StudentWeights(Protocol):
    """A way of training a model. Names and shapes do not change during a run."""

    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that the optimizer changes; all others are constant."""

    def published(self) -> Sequence[NamedTensor]:
        """All tensors that an engine must receive to sample from the student.

        An engine refuses an update that leaves any part of its model untouched, and an adapter for
        which its model has no place. A tied output head is listed in addition to its embedding:
        vLLM on CPU packs the head into a copy, which an update without its name would leave stale
        without an error.
        """

    def saved(self) -> Mapping[str, nn.Parameter]:
        """The parameters whose fragments a checkpoint holds, by the names of the fragments.

        All of them must be trained, since a fragment has master weights and Adam's moments.
        """

    def exported(self) -> Sequence[NamedTensor]:
        """All tensors that an exported folder holds, each once.

        They include a value head, under the name VALUE_HEAD.
        """


WeightsKind = Callable[[PreTrainedModel, nn.Parameter | None], StudentWeights]
"""A class of student weights, built from the model and its value head [1, H] or None.

The model may be on torch's meta device, without values.
"""


class FullFineTuning:
    """The way of training in which all parameters are trained and leave the learner unchanged."""

    def __init__(self, model: PreTrainedModel, value_head: nn.Parameter | None = None) -> None:
        self.model = model
        self.value_head = {} if value_head is None else {VALUE_HEAD: value_head}

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters()) | self.value_head  # tied parameters appear once

    def published(self) -> list[NamedTensor]:
        tensors = self.tensors()
        if any(tensor.name == LM_HEAD for tensor in tensors):
            return tensors
        head = self.model.get_output_embeddings().weight
        embedding = next(tensor for tensor in tensors if tensor.sources[tensor.name] is head)
        return [*tensors, replace(embedding, name=LM_HEAD, repeats=embedding.name)]

    def tensors(self) -> list[NamedTensor]:
        """All weights of the model, without a value head; tied parameters appear once."""
        return [same_tensor(name, p) for name, p in self.model.named_parameters()]

    def saved(self) -> dict[str, nn.Parameter]:
        return self.trained()

    def exported(self) -> list[NamedTensor]:
        tensors = [tensor for tensor in self.published() if tensor.repeats is None]
        return tensors + [same_tensor(name, head) for name, head in self.value_head.items()]


class LowRankAdapters(FullFineTuning):
    """The way of training in which only low-rank adapters are trained. They leave the learner
    merged into the constant weights, or with lora.sync=adapter without them.

    Example: for W [4, 3] and a rank of 2, A [2, 3] and B [4, 2] are trained. Engines receive, and
    an export holds, W + s B A under the name of W; a checkpoint holds A and B. With
    lora.sync=adapter, engines receive A and s B.

    Args:
        model: gets the adapters in place.
        seed: seed of the adapters' initial values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        value_head: nn.Parameter | None = None,
        *,
        lora: LoraConfig,
        seed: int,
    ) -> None:
        super().__init__(model, value_head)
        add_adapters(model, lora, seed)
        self.layers = adapted_layers(model)
        self.scale = lora.scale
        self.travel_alone = lora.travels_alone

    def trained(self) -> dict[str, nn.Parameter]:
        return self.adapters() | self.value_head

    def adapters(self) -> dict[str, nn.Parameter]:
        """A and B of every layer, by the names of their fragments."""
        pairs = [adapter_parameters(layer) for layer in self.layers]
        return dict(item for pair in pairs for item in pair.items())

    def published(self) -> list[NamedTensor]:
        if not self.travel_alone:
            return super().published()
        return [tensor for layer in self.layers for tensor in self._alone(layer)]

    def exported(self) -> list[NamedTensor]:
        return self.tensors() + [same_tensor(*item) for item in self.value_head.items()]

    def tensors(self) -> list[NamedTensor]:
        """All weights, with the names and order that the model has without adapters, and with the
        adapters merged into them.
        """
        layer_of = {id(layer.weight): layer for layer in self.layers}
        adapters = {id(parameter) for parameter in self.adapters().values()}
        tensors = []
        for name, parameter in self.model.named_parameters():
            if id(parameter) in adapters:
                continue
            tensor = same_tensor(name_without_adapters(name), parameter)
            layer = layer_of.get(id(parameter))
            tensors.append(tensor if layer is None else self._merged(tensor, layer))
        return tensors

    def _alone(self, layer: AdaptedLayer) -> list[NamedTensor]:
        """A and s B of a layer; s is multiplied into B, so that an engine does not need it."""
        down, up = (same_tensor(*item) for item in adapter_parameters(layer).items())
        return [down, replace(up, combine=partial(scaled, scale=self.scale))]

    def _merged(self, tensor: NamedTensor, layer: AdaptedLayer) -> NamedTensor:
        """The tensor W of a layer with the adapter merged into it."""
        return replace(
            tensor,
            sources={**tensor.sources, **adapter_parameters(layer)},
            combine=partial(merged, scale=self.scale),
        )


def adapter_parameters(layer: AdaptedLayer) -> dict[str, nn.Parameter]:
    """A and B of a layer, by their names in peft's files without the prefix."""
    return {
        f"{layer.name}.lora_A.weight": layer.down,
        f"{layer.name}.lora_B.weight": layer.up,
    }


def merged(weight: Tensor, down: Tensor, up: Tensor, *, scale: float) -> Tensor:
    """W + s B A, [out, in] in the dtype of W: computed in float32 or wider, and then rounded once.

    Args:
        weight: W, [out, in].
        down: A, [rank, in].
        up: B, [out, rank].
        scale: s.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = torch.addmm(weight.to(wide), up.to(wide), down.to(wide), alpha=scale)
    return product.to(weight.dtype)


def scaled(up: Tensor, *, scale: float) -> Tensor:
    """s B, [out, rank] in the dtype of B: rounded once, and exact if s is a power of two.

    Args:
        up: B, [out, rank].
        scale: s.
    """
    wide = torch.promote_types(up.dtype, torch.float32)
    return (up.to(wide) * scale).to(up.dtype)


def weights_kind(settings: RunSettings) -> WeightsKind:
    """The class of student weights of a run."""
    if settings.lora.rank is None:
        return FullFineTuning
    return partial(LowRankAdapters, lora=settings.lora, seed=settings.run.seed)


def train_only(weights: StudentWeights, module: nn.Module) -> list[nn.Parameter]:
    """Turn off the gradients of all parameters of `module` that are not trained; returns the
    trained ones.
    """
    trained = list(weights.trained().values())
    identities = {id(parameter) for parameter in trained}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in identities)
    return trained
