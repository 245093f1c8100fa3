"""The model that a scorer runs: a Hugging Face model, or a user's own class."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described
from hybridrl.core.user_files import load_from_file
from hybridrl.models.decoder_layers import compile_layers, set_products
from hybridrl.models.loading import head_rows, load_model, load_output_head
from hybridrl.models.output_head import output_weight
from hybridrl.settings.choices import Attention
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.sharded_model import ReplicaRank, ShardedModel, join_replica


class TeacherModel(Protocol):
    """A language model whose logits are states @ head^T. It is never trained.

    Letters: B sequences of at most T tokens, padded on the right; hidden size H; vocabulary V.
    """

    @property
    def head(self) -> Tensor:
        """[V, H] float32 or bfloat16, rows in the order of the student's tokens."""
        ...

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, H]: the state at t, times head^T, gives the logits of the token at t + 1.

        Args:
            input_ids, attention_mask, position_ids: [B, T] int64, on the device of the scorer, on
                which the states must be too; the mask is 0 in the padding.
        """
        ...


class LocalModel:
    """A Hugging Face model on one device."""

    def __init__(self, model: PreTrainedModel, setting: str) -> None:
        self.model = model
        self._head = output_weight(model, setting=setting).detach()

    @property
    def head(self) -> Tensor:
        return self._head

    def states(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state


def load_teacher(
    settings: RunSettings, teacher: str, device: torch.device, place: ReplicaRank | None = None
) -> TeacherModel:
    """The model of teachers.<teacher>, on the device.

    Args:
        place: this process's rank in a replica with several devices, all of which make this call;
            None: the replica has one device.

    Raises:
        ConfigError: the model cannot be loaded, or a user's class is not a TeacherModel.
    """
    own_class = settings.teachers[teacher].model
    if own_class is not None:
        return _of_users_file(settings, teacher, own_class)
    model = settings.teacher_model(teacher)
    setting = settings.model_setting(teacher)
    if place is not None:
        limits = settings.deadlines
        join_replica(place, device, max(limits.start_s, limits.score_s))
    loaded = load_model(
        model.path,
        model.dtype,
        model.revision,
        setting=setting,
        attention=model.attention,
        shards=1 if place is None else place.ranks,
    )
    loaded.to(device).eval()
    set_products(loaded, settings.train.products, device)
    if place is not None:
        return ShardedModel(loaded, f"{setting}={model.path}", place)
    if model.attention is Attention.auto:
        compile_layers(loaded, tokens=settings.rollout.sequence_limit, packed=False, learns=False)
    return LocalModel(loaded, f"{setting}={model.path}")


def load_teacher_head(settings: RunSettings, teacher: str) -> Tensor:
    """The output embedding of teachers.<teacher> alone, on the CPU: [V, H], or with more rows.

    Raises:
        ConfigError: as load_teacher.
    """
    own_class = settings.teachers[teacher].model
    if own_class is not None:
        return _of_users_file(settings, teacher, own_class).head
    model = settings.teacher_model(teacher)
    setting = settings.model_setting(teacher)
    return load_output_head(model.path, model.dtype, model.revision, setting=setting)


@torch.no_grad()
def check_own_models(settings: RunSettings) -> None:
    """Load the teachers that are classes of the user, and try each on one token.

    Raises:
        ConfigError: as load_teacher; or the class raises, or returns states of another shape.
    """
    device = torch.device("cpu")
    for name in settings.scored_teachers:
        own_class = settings.teachers[name].model
        if own_class is None:
            continue
        field = f"teachers.{name}.model={own_class}"
        model = load_teacher(settings, name, device)
        one = torch.ones(1, 1, dtype=torch.int64)
        expected = (1, 1, model.head.shape[1])
        try:
            states = model.states(one, one, torch.zeros_like(one))
        except Exception as error:
            raise ConfigError(
                f"{field}: its method states raised {described(error)} for the single token 1; "
                "correct the class"
            ) from error
        if not isinstance(states, Tensor) or states.shape != expected:
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ConfigError(
                f"{field}: its method states returned {shape} for one token; return a tensor "
                f"[B, T, H], here {expected}"
            )


def _of_users_file(settings: RunSettings, teacher: str, name: str) -> TeacherModel:
    field = f"teachers.{teacher}.model={name}"
    try:
        model = load_from_file(field, name, kind="class")()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{field}: creating an instance raised {described(error)}; correct the class, which "
            "must be instantiable without arguments"
        ) from error
    lacking = [part for part in ("head", "states") if not hasattr(model, part)]
    if lacking:
        raise ConfigError(
            f"{field}: its class has no {' and no '.join(lacking)}; "
            "hybridrl/teachers/README.md shows a class that has both"
        )
    rows = head_rows(settings.model.path, settings.model.revision)
    if not isinstance(model.head, Tensor) or model.head.ndim != 2 or len(model.head) < rows:
        shape = tuple(model.head.shape) if isinstance(model.head, Tensor) else type(model.head)
        raise ConfigError(
            f"{field}: its head is {shape}, must be a tensor [V, H] with a row for each of the "
            f"{rows} tokens of model.path={settings.model.path}"
        )
    return model
