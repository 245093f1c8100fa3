"""The inputs of tools/bench peers and how its rows are counted; no peer is started here."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hybridrl.models.loading import load_model, load_tokenizer, stop_token_ids

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """A function that imports a module of tools/benchmarks by its name."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def module(name: str) -> ModuleType:
        return importlib.import_module(f"benchmarks.{name}")

    return module


def test_an_endless_model_never_stops_and_is_otherwise_the_model_it_was(bench, tmp_path: Path):
    folder = str(bench("peer_inputs").endless("builtin:countdown-student", tmp_path / "student"))
    tokenizer = load_tokenizer(folder)
    endless = load_model(folder)
    given = load_model("builtin:countdown-student")
    prompts = tokenizer(
        ["3 7 9=24:", "8 8 4=60:"], return_tensors="pt", padding=True, padding_side="left"
    )
    torch.manual_seed(0)
    tokens = endless.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=64,
        do_sample=True,
    )
    assert tokens.shape[1] == prompts.input_ids.shape[1] + 64
    assert 2 in tokens[:, prompts.input_ids.shape[1] :], (
        "the old end token is drawn, and does not end"
    )
    assert torch.equal(endless(prompts.input_ids).logits, given(prompts.input_ids).logits)
    assert tokenizer.eos_token_id == given.config.vocab_size and tokenizer.pad_token_id == 0


def test_without_an_end_an_endless_model_has_a_row_for_each_token_and_nothing_stops_it(
    bench, tmp_path: Path
):
    inputs = bench("peer_inputs")
    folder = inputs.without_end(inputs.endless("builtin:countdown-student", tmp_path / "student"))
    tokenizer = load_tokenizer(str(folder))
    rows = load_model(str(folder)).config.vocab_size
    assert max(tokenizer.get_vocab().values()) + 1 == rows == 23
    assert stop_token_ids(str(folder), tokenizer) == set()


def test_a_process_that_fails_is_an_error_with_the_end_of_its_output(bench):
    with pytest.raises(RuntimeError, match=r"exit status 3\nwrong turn"):
        bench("watched").run([sys.executable, "-c", "print('wrong turn'); raise SystemExit(3)"])


def test_memory_of_a_process_and_of_what_it_starts_is_summed(bench):
    hold = "import time; held = bytearray(50 * 2**20); time.sleep(2.5)"
    start = (
        "import subprocess, sys; held = bytearray(50 * 2**20); "
        f"subprocess.run([sys.executable, '-c', {hold!r}])"
    )
    seen = bench("watched").run([sys.executable, "-c", start])
    assert 100 * 2**20 < seen.peak_bytes < 160 * 2**20


def test_a_step_that_no_look_fell_into_shares_the_next_ones_cpu_seconds(bench):
    assert bench("peers").cpu_per_step({-1: 1.0, 0: 5.0, 1: 9.0, 3: 20.0, 4: 22.0}, 4) == [
        4.0,
        5.5,
        5.5,
        2.0,
    ]


def test_a_step_with_other_generation_is_ours_without_engine_and_sync(bench):
    ours = {
        "step_s": 10.0,
        "rollout_s": 3.0,
        "score_s": 1.0,
        "reward_s": 0.0,
        "learn_s": 5.0,
        "sync_s": 0.5,
    }
    step = bench("peers").with_hf_generation(ours, {"rollout_s": 6.0})
    assert step["step_s"] == 12.5 and step["computed"]
