"""Arguments of rollout.engine: which of them vLLM accepts, and which are set by the run itself."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs

from hybridrl.core.errors import ConfigError
from hybridrl.rollout import engine_arguments
from hybridrl.rollout.engine_arguments import (
    DECIDED_BY,
    FIXED,
    answer,
    ask_vllm,
    check_engine_arguments,
    check_installed,
)


def test_a_mistyped_argument_is_refused_with_the_nearest_name():
    """A child process asks vLLM for the names, as in a run."""
    with pytest.raises(
        ConfigError,
        match=r"^rollout\.engine\.max_num_batched_token: vLLM has no such argument; did you mean "
        r"max_num_batched_tokens\?$",
    ):
        check_engine_arguments({"kv_cache_dtype": "fp8", "max_num_batched_token": 8192})


def test_a_value_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_arguments, "ask_vllm", lambda arguments, setting: answer(arguments))
    with pytest.raises(
        ConfigError,
        match=r"^rollout\.engine\.block_size=16k: vLLM rejects this value: Input should be a valid "
        r"integer; correct it$",
    ):
        check_engine_arguments({"block_size": "16k"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dtype", r"^rollout\.engine\.dtype: is decided by model\.dtype; set that instead$"),
        ("seed", r"^rollout\.engine\.seed: is decided by run\.seed; set that instead$"),
        ("trust_remote_code", "code in a model's folder is never run; leave it out$"),
        ("scheduling_policy", "the requests have priorities; leave it out$"),
    ],
)
def test_an_argument_that_the_run_decides_is_refused(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_engine_arguments({name: None})


def test_every_argument_that_the_run_decides_is_one_of_vllm():
    names = {field.name for field in fields(EngineArgs)}
    assert {*DECIDED_BY, *FIXED} <= names
    assert not {*DECIDED_BY} & {*FIXED}


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("max_num_batched_tokens", 8192, None),
        ("max_num_batched_tokens", "8192", "Input should be a valid integer"),
        ("async_scheduling", False, None),
        ("async_scheduling", "no", "Input should be a valid boolean"),
        ("cpu_offload_gb", 4, None),
        ("kv_cache_dtype", "fp9", "Input should be 'auto', 'float16', "),
        ("attention_backend", "FLASH_ATTN", None),
        ("compilation_config", {"cudagraph_capture_sizes": [1, 8]}, None),
        ("compilation_config", {"capture": [1, 8]}, "capture: Unexpected keyword argument"),
        ("hf_overrides", {"head_dtype": "float32"}, None),
        ("quantization", "fp8", None),
    ],
)
def test_values_are_compared_with_vllms_own_types(name: str, value: Any, refusal: str | None):
    message = answer({name: value}).refusals.get(name)
    assert message is None if refusal is None else (message or "").startswith(refusal)


def test_a_value_that_a_class_of_vllm_cannot_read_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
):
    """A list names no backend. A class may also raise an exception that is not pydantic's."""
    assert "attention_backend" in answer({"attention_backend": ["FLASH_ATTN"]}).refusals

    def raises(name: str, value: Any) -> None:
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(engine_arguments, "typed", raises)
    refusals = answer({"quantization": "fp8"}).refusals
    assert refusals == {"quantization": "NotImplementedError: not on this machine"}


def test_a_child_process_that_does_not_answer_is_reported_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first child says nothing but white space, the second one takes too long."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho '  ' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ConfigError, match=r"vLLM cannot be imported here \(exit code 3\); install"):
        ask_vllm({"block_size": 16}, "rollout.engine")
    monkeypatch.setattr(engine_arguments, "IMPORT_S", 0.0)
    with pytest.raises(ConfigError, match=r"because importing vLLM takes more than 0 s here; rep"):
        ask_vllm({"block_size": 16}, "rollout.engine")


def test_without_vllm_no_engine_is_started_on_this_machine(monkeypatch: pytest.MonkeyPatch):
    check_installed()
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"package vllm, .*'hybridrl\[cpu\]', or 'hybridrl\[gpu\]'"
    ):
        check_installed()
