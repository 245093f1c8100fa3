"""Decoder layers as compiled graphs: what they give, for which shapes, and when not."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hybridrl.models import decoder_layers
from hybridrl.models.decoder_layers import TRACED_TOKENS, attends_plainly, compile_layers

HIDDEN = decoder_layers.COMPILE_FROM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and graphs that other tests cannot have made."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.compiler.reset()
    yield
    torch.set_num_threads(threads)


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
    return LlamaForCausalLM(config).to(dtype).eval()


def padded(rows: int, tokens: int) -> dict[str, Tensor]:
    """The last row is half as long as the others."""
    ids = torch.randint(
        0, 64, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens)
    )
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(tokens).repeat(rows, 1),
    }


def hidden_and_gradient(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden states of what is no padding, and the gradient of the sum of their squares at all
    parameters.
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[
        inputs["attention_mask"] > 0
    ]
    hidden.float().square().sum().backward()
    gradient = torch.cat([p.grad.float().flatten() for p in model.base_model.parameters()])
    model.zero_grad(set_to_none=True)
    return hidden.detach().float(), gradient


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def test_compiled_layers_are_as_near_to_fp32_as_the_layers_of_transformers():
    plain, compiled, exact = model_of(), model_of(), model_of().float()
    plain.set_attn_implementation("eager")
    assert compile_layers(compiled, tokens=100, packed=False, learns=True)
    for inputs in (padded(3, 17), padded(1, 9)):
        wanted, near, found = (
            hidden_and_gradient(model, inputs) for model in (exact, plain, compiled)
        )
        for k in range(2):
            assert (
                relative_error(found[k], wanted[k]) < 1.2 * relative_error(near[k], wanted[k]) < 0.1
            )


def test_the_first_batch_decides_nothing_as_the_graphs_are_there_before_it():
    counters = torch._dynamo.utils.counters
    found = []
    for shapes in ([(3, 17)], [(40, 5), (2, 90), (1, 33), (3, 17)]):
        torch.compiler.reset()
        compile_layers(model := model_of(), tokens=100, packed=False, learns=True)
        counters.clear()
        for shape in shapes:
            with torch.no_grad():
                model.base_model(**padded(*shape), use_cache=False)
            last = hidden_and_gradient(model, padded(*shape))
        assert counters["stats"]["unique_graphs"] == 0
        found.append(last)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_packed_sequences_have_graphs_of_their_own_and_attend_to_themselves_alone():
    model = model_of()
    compile_layers(model, tokens=100, packed=True, learns=False)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        ids = padded(1, 12)["input_ids"]
        positions = torch.tensor([[*range(5), *range(7)]])
        both = model.base_model(
            input_ids=ids, attention_mask=None, position_ids=positions, use_cache=False
        ).last_hidden_state
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        second = model_of().base_model(input_ids=ids[:, 5:], use_cache=False).last_hidden_state
    assert relative_error(both[:, 5:].float(), second.float()) < 0.02


SMALL, FP32, LARGE = model_of(HIDDEN // 2), model_of(dtype=torch.float32), model_of()


@pytest.mark.parametrize(
    ("model", "tokens"), [(SMALL, 100), (FP32, 100), (LARGE, 1025)], ids=["small", "fp32", "long"]
)
def test_layers_stay_as_they_are_where_compiling_them_does_not_pay(
    model: PreTrainedModel, tokens: int
):
    assert not compile_layers(model, tokens=tokens, packed=False, learns=True)
    assert all(layer._compiled_call_impl is None for layer in model.base_model.layers)
    assert model.config._attn_implementation == "sdpa"
    assert attends_plainly(model, tokens) == (model.config.hidden_size < HIDDEN)


def test_layers_that_the_compiler_fails_on_run_as_they_are(
    monkeypatch, caplog: pytest.LogCaptureFixture
):
    model, inputs = model_of(), padded(2, TRACED_TOKENS)
    before = model.base_model(**inputs, use_cache=False).last_hidden_state

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction\nand a page more")

    monkeypatch.setattr(decoder_layers, "trace", fail)
    assert not compile_layers(model, tokens=100, packed=False, learns=True)
    assert (
        "LlamaForCausalLM: its layers run as they are, for compiling them failed: no such "
        "instruction" in caplog.text
    )
    assert "a page more" not in caplog.text
    assert torch.equal(model.base_model(**inputs, use_cache=False).last_hidden_state, before)


def test_layers_that_branch_on_what_they_compute_run_as_they_are(caplog: pytest.LogCaptureFixture):
    model, inputs = model_of(), padded(2, 9)
    forward = (last := model.base_model.layers[-1]).forward

    def doubled_where_positive(*args: Tensor, **kwargs: object) -> Tensor:
        hidden = forward(*args, **kwargs)
        return 2 * hidden if float(hidden.sum()) > 0 else hidden

    last.forward = doubled_where_positive
    before = model.base_model(**inputs, use_cache=False).last_hidden_state
    assert not compile_layers(model, tokens=100, packed=False, learns=False)
    assert "its layers run as they are" in caplog.text
    assert torch.equal(model.base_model(**inputs, use_cache=False).last_hidden_state, before)
