"""Each use of a library's internals, tested on the library's own classes. ZeRO-3's attributes exist
only in a process group, so tests/policy/test_learner.py covers them.

If the first test fails after an upgrade, compare hybridrl/weights/library_internals.py with the new
version, then change SEEN.
"""

import inspect
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import vllm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import link_hp_params
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from hybridrl.weights.library_internals import (
    SEEN,
    begin_reload,
    end_reload,
    fragment_span,
    fragment_values,
    has_transfer_backend,
    is_sharded,
    left_out,
    set_adam,
    set_adam_steps,
    transfer_engine,
    whole_shape,
)


def test_the_installed_libraries_are_those_that_the_reaches_were_written_for():
    versions = {library.__name__: library.__version__ for library in (deepspeed, torch, vllm)}
    assert {name: version.split("+")[0] for name, version in versions.items()} == SEEN


def test_a_rank_of_zero_1_or_2_holds_the_stretch_that_deepspeed_gave_it():
    """Two ranks share ten numbers, of which the first four belong to `a` and the others to `b`.
    This is the second rank, which holds the last five: elements 1 to 5 of `b`.
    """
    a, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 3))
    share = torch.arange(5, 10).float()
    link_hp_params(
        lp_param_list=[a, b],
        flat_hp_partition=share,
        gradient_dict={},
        offload_gradient_dict={},
        use_offload=False,
        param_group_index=0,
        partition_start=5,
        partition_size=5,
        dp_group=None,
    )
    lazy_init_hp_params_optimizer_state([a, b], share, {share: {"exp_avg": -share}})
    assert fragment_span(a) == (0, 0)
    assert fragment_span(b) == (1, 5)
    assert fragment_values(b, None).tolist() == [5, 6, 7, 8, 9]
    assert fragment_values(b, "exp_avg").tolist() == [-5, -6, -7, -8, -9]
    fragment_values(b, None)[0] = 50
    assert share[0] == 50, "it is the optimizer's own memory"


def test_a_parameter_that_deepspeed_has_not_seen_is_an_error_and_not_an_empty_share():
    with pytest.raises(KeyError, match="_hp_mapping"):
        fragment_span(nn.Parameter(torch.zeros(3)))


def test_a_parameter_that_is_not_sharded_has_its_own_shape():
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert not is_sharded(parameter) and whole_shape(parameter) == (2, 3)


def test_adam_corrects_its_bias_as_after_so_many_steps():
    """With moments 0.1 and 0.01 after the gradient 1, decay rates 0.9 and 0.99, and a step count
    that was raised by 7, the step is lr * 0.1 / (1 - 0.9**8) / sqrt(0.01 / (1 - 0.99**8)).
    """
    weight = nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.99), weight_decay=0, fused=True)
    weight.grad = torch.zeros(1)
    adam.step()
    set_adam_steps(SimpleNamespace(optimizer=adam), 7)
    weight.grad = torch.ones(1)
    adam.step()
    expected = -0.1 / (1 - 0.9**8) / (0.01 / (1 - 0.99**8)) ** 0.5
    assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_adam_steps_with_the_settings_that_it_is_given():
    """After the first gradient, 2, the moments are 0.5 * 0 + 0.5 * 2 = 1 and 0.75 * 0 + 0.25 * 4 =
    1, with bias correction 2 and 4; so the step from 1 is -lr * (2 / 2 + 0.5 * 1).
    """
    weight = nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0, fused=True)
    zero = SimpleNamespace(optimizer=adam, clip_grad=1.0)
    set_adam(zero, betas=(0.5, 0.75), weight_decay=0.5, clip=3.0)
    weight.grad = torch.full((1,), 2.0)
    adam.step()
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + 0.5), rel=1e-5)
    moments = adam.state[weight]
    assert moments["exp_avg"].item() == 1 and moments["exp_avg_sq"].item() == 1
    assert zero.clip_grad == 3


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_an_optimizer_of_deepspeed_clips_by_its_attribute(kind: type):
    """That the value is used to clip gradients is tested on a learner."""
    assert "/ self.clip_grad" in inspect.getsource(kind), (
        f"{kind.__name__} does not clip by `clip_grad` any more"
    )


def test_vllm_lists_its_transfer_backends():
    assert has_transfer_backend(WeightTransferEngineFactory, "nccl")
    assert not has_transfer_backend(WeightTransferEngineFactory, "none of that name")


@pytest.mark.parametrize("kind", [DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3])
def test_an_optimizer_of_deepspeed_keeps_whether_it_left_a_step_out(kind: type):
    """The effect of a step that is left out is tested on a learner."""
    assert "self.overflow = False" in inspect.getsource(kind.__init__), (
        f"{kind.__name__} does not keep `overflow` any more"
    )
    assert left_out(SimpleNamespace(optimizer=None, overflow=True))


def test_a_worker_of_vllm_has_its_side_of_weight_transfer():
    assert "self.weight_transfer_engine: " in inspect.getsource(Worker.__init__), (
        "vLLM's worker does not keep `weight_transfer_engine` any more"
    )
    side = object()
    assert transfer_engine(SimpleNamespace(weight_transfer_engine=side)) is side


def test_vllm_loads_a_layer_anew_into_the_memory_that_it_has():
    def load(param: nn.Parameter, values: Tensor) -> None:  # vLLM passes `param` by this name
        param.data.copy_(values)

    model = nn.Linear(2, 2, bias=False)
    memory = model.weight
    memory.weight_loader = load
    record_metadata_for_reloading(model)  # vLLM does this when it loads a model from disk
    begin_reload(model)
    model.weight.weight_loader(model.weight, torch.full((2, 2), 3.0))
    end_reload(model, SimpleNamespace(dtype=torch.float32))
    assert model.weight is memory and memory.tolist() == [[3.0, 3.0], [3.0, 3.0]], (
        "vLLM's layerwise reload does not write into the memory of the parameter any more"
    )


def test_the_end_of_vllms_own_update_removes_adapters_so_they_are_loaded_by_another_call():
    assert "reset_lora_state" in inspect.getsource(Worker.finish_weight_update)
    assert "remove_all_adapters" in inspect.getsource(LoRAModelRunnerMixin.reset_lora_state)
