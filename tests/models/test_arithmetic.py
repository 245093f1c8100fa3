"""The arithmetic that is chosen for a machine if the settings leave the choice open."""

import pytest
import torch
from transformers import LlamaConfig

from hybridrl.kernels.products import Processor
from hybridrl.models import arithmetic
from hybridrl.models.arithmetic import dtype_notice, dtype_on, with_arithmetic
from hybridrl.settings.choices import Products
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings

SMOLLM2 = "model.path=builtin:smollm2-135m-instruct"
TINY = "model.path=builtin:countdown-student"


def settings_of(*overrides: str) -> RunSettings:
    return load_config(
        [
            "run.dir=here",
            "data.task=countdown",
            "algorithm=grpo",
            "cluster.device=cpu",
            "+reward.functions.countdown.function=countdown",
            "+teachers.a.path=null",
            *overrides,
        ]
    )


@pytest.mark.parametrize(
    ("kind", "stored", "width", "dtype"),
    [
        (Processor.amx, torch.bfloat16, 576, "bfloat16"),
        (Processor.amd_bf16, torch.float16, 256, "bfloat16"),
        (Processor.amd_bf16, torch.float32, 576, "float32"),
        (Processor.amd_bf16, None, 576, "float32"),
        (Processor.amd_bf16, torch.bfloat16, 192, "float32"),
        (Processor.intel_bf16, torch.bfloat16, 576, "float32"),
        (Processor.without_bf16, torch.bfloat16, 576, "float32"),
        (Processor.other, torch.bfloat16, 576, "float32"),
    ],
)
def test_on_a_cpu_a_wide_model_stored_in_half_precision_is_computed_in_it_where_that_is_faster(
    kind: Processor, stored: torch.dtype | None, width: int, dtype: str
):
    assert dtype_on(kind, LlamaConfig(hidden_size=width, dtype=stored)) == dtype


@pytest.mark.parametrize(
    ("model", "processor", "dtype", "stage"),
    [
        (SMOLLM2, Processor.amd_bf16, "bfloat16", 2),
        (SMOLLM2, Processor.intel_bf16, "float32", 1),
        (TINY, Processor.amd_bf16, "float32", 1),  # hidden size 128
    ],
)
def test_the_choice_takes_the_place_of_auto_and_the_zero_stage_and_the_teachers_follow_it(
    monkeypatch: pytest.MonkeyPatch, model: str, processor: Processor, dtype: str, stage: int
):
    monkeypatch.setattr(arithmetic, "processor", lambda: processor)
    settings = settings_of(model, "+teachers.b={dtype: float32}")
    chosen = with_arithmetic(settings, None)
    assert chosen.model.dtype == dtype and chosen.learner.zero_stage == stage
    assert chosen.teacher_model("a").dtype == dtype
    assert chosen.teacher_model("b").dtype == "float32"


def test_on_gpus_it_is_bfloat16_whatever_the_model_and_the_processor(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(arithmetic, "processor", lambda: Processor.without_bf16)
    chosen = with_arithmetic(settings_of("model.path=me/gone", "cluster.device=cuda"), None)
    assert chosen.model.dtype == "bfloat16" and chosen.train.products is Products.model


def test_a_run_keeps_the_dtype_of_its_first_machine_and_one_that_is_set_is_used(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(arithmetic, "processor", lambda: Processor.amd_bf16)
    first = with_arithmetic(settings_of(SMOLLM2), None)
    monkeypatch.setattr(arithmetic, "processor", lambda: Processor.intel_bf16)
    assert with_arithmetic(settings_of(SMOLLM2), first).model.dtype == "bfloat16"
    assert with_arithmetic(settings_of(SMOLLM2, "model.dtype=bfloat16"), None).model.dtype == (
        "bfloat16"
    )


def test_activations_are_recomputed_on_gpus_unless_it_is_set_and_a_run_keeps_its_choice():
    on_gpus = settings_of(TINY, "cluster.device=cuda")
    first = with_arithmetic(on_gpus, None)
    assert first.learner.gradient_checkpointing is True
    assert with_arithmetic(settings_of(TINY), None).learner.gradient_checkpointing is False
    assert with_arithmetic(settings_of(TINY), first).learner.gradient_checkpointing is True
    off = settings_of(TINY, "cluster.device=cuda", "learner.gradient_checkpointing=false")
    assert with_arithmetic(off, first).learner.gradient_checkpointing is False


def test_the_notice_names_the_choice_and_both_rates():
    assert dtype_notice("float32", Processor.intel_bf16) == (
        "model.dtype=auto: float32; on a processor with AVX512-BF16 without AMX, two cores reach "
        "155 GFLOP/s in bfloat16 and 253 in float32"
    )
    assert dtype_notice("float32", Processor.other).endswith("which dtype is faster is not known")
