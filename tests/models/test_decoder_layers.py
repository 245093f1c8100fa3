"""Compiled decoder layers: their results, the shapes they serve, and when none are compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hybridrl.kernels.products import WideLinear
from hybridrl.models import decoder_layers
from hybridrl.models.adapters import add_adapters, without_adapters
from hybridrl.models.decoder_layers import (
    TRACED_TOKENS,
    attends_plainly,
    compile_layers,
    set_products,
)
from hybridrl.models.model_internals import attention_of, is_compiled, wrapped_layers
from hybridrl.settings.choices import Products
from hybridrl.settings.lora import LoraConfig
from tests.support.torch_graphs import forget_graphs, num_graphs

HIDDEN = decoder_layers.COMPILE_FROM


@contextmanager
def one_thread() -> Iterator[None]:
    """Run with one thread, which fixes the order of sums, and discard graphs of other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def model_of(hidden: int = HIDDEN, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]


def padded(rows: int, tokens: int) -> dict[str, Tensor]:
    """Inputs of a model in which the last row is half as long as the others, and padded."""
    generator = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(0, 64, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).repeat(rows, 1),
    }


def hidden_and_gradient(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden states without padding, and the gradient of the sum of their squares."""
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = states[inputs["attention_mask"] > 0]
    hidden.float().square().sum().backward()
    gradients = [p.grad for p in model.base_model.parameters() if p.grad is not None]
    gradient = torch.cat([g.float().flatten() for g in gradients])
    model.zero_grad(set_to_none=True)
    return hidden.detach().float(), gradient


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("chosen", "dtype", "device", "wide"),
    [
        (Products.float32, torch.bfloat16, "cpu", True),
        (Products.model, torch.bfloat16, "cpu", False),
        (Products.auto, torch.bfloat16, "cpu", False),  # a run of code before this setting existed
        (Products.float32, torch.float32, "cpu", False),
        (Products.float32, torch.bfloat16, "cuda", False),
    ],
)
def test_products_are_wide_for_bf16_models_on_cpus_where_that_is_chosen(
    chosen: Products, dtype: torch.dtype, device: str, wide: bool
):
    model = model_of(dtype=dtype)
    set_products(model, chosen, torch.device(device))
    kinds = {type(m) for m in model.base_model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {WideLinear if wide else nn.Linear}


def test_layers_with_wide_products_are_compiled_and_at_least_as_exact():
    narrow = model_of()
    narrow.set_attn_implementation("eager")
    wide = model_of()
    set_products(wide, Products.float32, torch.device("cpu"))
    assert compile_layers(wide, tokens=100, packed=False, learns=True)
    inputs = padded(3, 17)
    exact = hidden_and_gradient(model_of().float(), inputs)
    narrow_outputs = hidden_and_gradient(narrow, inputs)
    wide_outputs = hidden_and_gradient(wide, inputs)
    for k in range(2):
        limit = 1.2 * relative_error(narrow_outputs[k], exact[k])
        assert relative_error(wide_outputs[k], exact[k]) < limit < 0.1


@dataclass(frozen=True)
class Batches:
    """The batches that a compiled model has computed one after the other: shapes and results."""

    outputs: list[tuple[tuple[int, int], tuple[Tensor, Tensor]]]
    graphs: int
    """the number of graphs that were compiled for them"""


@pytest.fixture(scope="module")
def batches() -> Batches:
    """The batches of one model, shared by several tests, because compiling takes many seconds."""
    outputs = []
    with one_thread():
        model = model_of()
        assert compile_layers(model, tokens=100, packed=False, learns=True)
        forget_graphs()
        for shape in ((3, 17), (40, 5), (2, 90), (1, 9), (3, 17)):
            with torch.no_grad():
                model.base_model(**padded(*shape), use_cache=False)
            outputs.append((shape, hidden_and_gradient(model, padded(*shape))))
        return Batches(outputs, num_graphs())


def test_compiled_layers_are_as_close_to_fp32_as_the_layers_of_transformers(batches: Batches):
    plain = model_of()
    plain.set_attn_implementation("eager")
    outputs = dict(batches.outputs)
    for shape in ((3, 17), (1, 9)):
        exact = hidden_and_gradient(model_of().float(), padded(*shape))
        eager_outputs = hidden_and_gradient(plain, padded(*shape))
        for k in range(2):
            plain_error = relative_error(eager_outputs[k], exact[k])
            assert relative_error(outputs[shape][k], exact[k]) < 1.2 * plain_error < 0.1


def test_no_batch_affects_the_graphs_which_exist_before_the_first_one(batches: Batches):
    """A batch gives the same bits whether it is the first one or comes after others."""
    (shape, first), *_, (again, last) = batches.outputs
    assert shape == again and all(torch.equal(a, b) for a, b in zip(first, last, strict=True))
    assert batches.graphs == 0


def test_passes_without_adapters_are_padded_and_have_graphs_before_the_first_batch():
    model = model_of()
    add_adapters(model, LoraConfig(rank=2), 0)
    assert compile_layers(model, tokens=100, packed=True, learns=True, bare=True)
    forget_graphs()
    row = padded(1, 9) | {"attention_mask": None}
    for shape in ((3, 17), (1, 9)):
        with torch.no_grad(), without_adapters(model):
            model.base_model(**padded(*shape), use_cache=False)
        model.base_model(**row, use_cache=False).last_hidden_state.sum().backward()
    assert num_graphs() == 0


def test_packed_sequences_have_graphs_of_their_own_and_attend_only_to_themselves():
    model = model_of()
    compile_layers(model, tokens=100, packed=True, learns=False)
    forget_graphs()
    with torch.no_grad():
        ids = padded(1, 12)["input_ids"]
        positions = torch.tensor([[*range(5), *range(7)]])
        both = model.base_model(
            input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False
        ).last_hidden_state
        assert num_graphs() == 0
        second = model_of().base_model(input_ids=ids[:, 5:], use_cache=False).last_hidden_state
    assert relative_error(both[:, 5:].float(), second.float()) < 0.02


SMALL = model_of(HIDDEN // 2)
FP32 = model_of(dtype=torch.float32)
LARGE = model_of()


@pytest.mark.parametrize(
    ("model", "tokens"), [(SMALL, 100), (FP32, 100), (LARGE, 1025)], ids=["small", "fp32", "long"]
)
def test_layers_are_not_compiled_where_it_does_not_pay(model: PreTrainedModel, tokens: int):
    assert not compile_layers(model, tokens=tokens, packed=False, learns=True)
    assert not any(is_compiled(module) for module in model.modules())
    assert attention_of(model.config) == "sdpa"
    assert attends_plainly(model, tokens) == (model.config.hidden_size < HIDDEN)


def test_layers_run_eagerly_where_the_compiler_fails(monkeypatch, caplog: pytest.LogCaptureFixture):
    model = model_of()
    inputs = padded(2, TRACED_TOKENS)
    before = model.base_model(**inputs, use_cache=False).last_hidden_state

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction\nand a page more")

    monkeypatch.setattr(decoder_layers, "trace", fail)
    assert not compile_layers(model, tokens=100, packed=False, learns=True)
    reason = "LlamaForCausalLM: its layers run without compilation, which failed: no such inst"
    assert reason in caplog.text
    assert "a page more" not in caplog.text
    assert torch.equal(model.base_model(**inputs, use_cache=False).last_hidden_state, before)


def test_layers_that_branch_on_computed_values_run_eagerly(caplog: pytest.LogCaptureFixture):
    model = model_of()
    inputs = padded(2, 9)
    last = wrapped_layers(model)[-1]
    forward = last.forward

    def doubled_where_positive(*args: Tensor, **kwargs: object) -> Tensor:
        hidden = forward(*args, **kwargs)
        return 2 * hidden if float(hidden.sum()) > 0 else hidden

    last.forward = doubled_where_positive
    before = model.base_model(**inputs, use_cache=False).last_hidden_state
    assert not compile_layers(model, tokens=100, packed=False, learns=False)
    assert "its layers run without compilation" in caplog.text
    assert torch.equal(model.base_model(**inputs, use_cache=False).last_hidden_state, before)
