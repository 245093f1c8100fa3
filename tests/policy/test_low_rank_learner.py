"""The real Learner with adapters: two ranks that use ZeRO 1, 2 and 3 in turn, one rank, and three
ranks; also one and two ranks that compute the scores of the student before training.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hybridrl.models.adapters import add_adapters
from hybridrl.models.loading import load_model
from hybridrl.models.output_head import output_weight
from hybridrl.settings.lora import LoraConfig
from hybridrl.settings.models import ModelConfig
from hybridrl.weights.fragments import PARTS
from hybridrl.weights.hugging_face import checkpoint_tensors
from hybridrl.weights.parameters import LowRankAdapters
from tests.policy.test_learner import (
    equal,
    next_steps,
    result,
    save_models,
    saved_state,
    weight_distance,
    written_out_loss,
)
from tests.support.learner_job import ADAPTED, KINDS, LR
from tests.support.ranks import run_ranks

STATES = ["lora-one", *ADAPTED]
LORA = LoraConfig(rank=4)
KIND = partial(LowRankAdapters, lora=LORA, seed=0)
MOVES = {
    "lora-zero1-to-one": "lora-zero1",
    "lora-zero3-to-one": "lora-zero3",
    "lora-zero1-to-three": "lora-zero1",
    "lora-zero3-to-three": "lora-zero3",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, and with the files that the process groups have written."""
    folder = save_models(tmp_path_factory.mktemp("adapted"))
    run_ranks(
        "learner_job.py",
        str(folder),
        "2:two_ranks_adapted",
        "1:one_rank_adapted",
        "3:three_ranks_adapted",
        "1:one_rank_sharing",
        "2:two_ranks_sharing",
    )
    return folder


def test_two_steps_are_two_steps_of_a_plain_training_loop_over_the_adapters(folder: Path):
    model = load_model(str(folder / "student"))
    add_adapters(model, LORA, seed=0)
    head = output_weight(load_model(str(folder / "teacher"))).detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = written_out_loss(model, head)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    learned = result(folder, "lora-one")
    assert learned["loss"] == pytest.approx(losses, abs=1e-5)
    assert learned["loss"][1] < learned["loss"][0]
    layers = {m: p for m, p in model.named_modules() if hasattr(p, "base_layer")}
    expected = load_file(folder / "lora-untouched.safetensors")
    for name, layer in layers.items():
        expected[f"{name}.weight"] = layer.get_delta_weight("default") + layer.base_layer.weight
    expected = {name: tensor.detach() for name, tensor in expected.items()}
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert weight_distance(folder, "lora-one", expected) < 1e-5
    assert weight_distance(folder, "lora-one", "lora-untouched") > 1e-4


def test_a_learner_with_new_adapters_has_the_weights_of_its_model(folder: Path):
    untouched = load_file(folder / "lora-untouched.safetensors")
    assert equal(untouched, load_file(folder / "student" / "model.safetensors"))


@pytest.mark.parametrize("case", ["lora-zero1", "lora-zero3"])
def test_loss_and_weights_do_not_depend_on_ranks_and_stage(folder: Path, case: str):
    one, other = result(folder, "lora-one"), result(folder, case)
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert weight_distance(folder, case, "lora-one") < 1e-5


def test_dropout_changes_the_steps(folder: Path):
    assert weight_distance(folder, "lora-zero2", "lora-one") > 1e-5


@pytest.mark.parametrize("case", STATES)
def test_a_step_after_loading_is_bit_for_bit_the_step_that_would_have_come(folder: Path, case: str):
    straight, resumed = next_steps(folder, case)
    assert resumed == straight


@pytest.mark.parametrize("case", STATES)
def test_another_job_of_a_learner_is_bit_for_bit_that_of_a_new_one(folder: Path, case: str):
    new, begun = result(folder, case), result(folder, f"{case}-begun")
    assert begun["digest"] == new["digest"] and begun["metrics"] == new["metrics"]


@pytest.mark.parametrize("case", STATES)
def test_a_checkpoint_holds_adapters_and_their_optimizer_state_alone(folder: Path, case: str):
    saved = saved_state(folder, case)
    assert equal(saved, load_file(folder / f"{case}-gathered.safetensors"))
    ends = {name.rpartition("lora_")[2] for name in saved}
    assert ends == {"A.weight", "B.weight"}
    model = load_model(str(folder / "student"))
    layers = 7 * model.config.num_hidden_layers
    assert len(saved) == len(PARTS) * 2 * layers
    whole = sum(p.numel() for p in model.parameters())
    assert sum(t.numel() for t in saved.values()) < 0.1 * len(PARTS) * whole


@pytest.mark.parametrize("case", MOVES)
def test_ranks_and_stage_may_change_and_the_state_stays_equal_bit_by_bit(folder: Path, case: str):
    saved = MOVES[case]
    assert equal(saved_state(folder, case), saved_state(folder, saved))
    assert result(folder, f"{case}-loaded")["digest"] == result(folder, saved)["digest"]
    moved, stayed = result(folder, case), result(folder, f"{saved}-straight")
    assert moved["loss"] == pytest.approx(stayed["loss"], abs=1e-5)
    assert weight_distance(folder, case, f"{saved}-straight") < 1e-5


@pytest.mark.parametrize("case", ADAPTED)
def test_an_export_of_a_checkpoint_is_the_learners_own_merged_student(folder: Path, case: str):
    exported = load_file(folder / f"{case}-export" / "model.safetensors")
    published = load_file(folder / f"{case}.safetensors")
    assert equal({name: tensor.float() for name, tensor in exported.items()}, published)
    model = ModelConfig(path=str(folder / "student"))
    dtype = "bfloat16" if "bf16" in case else "float32"
    tensors = checkpoint_tensors(folder / f"{case}-state", model, dtype, kind=KIND)
    assert equal(tensors, exported)


def test_the_expensive_diagnostics_measure_the_gradients_of_the_adapters(folder: Path):
    (found,) = result(folder, "lora-diagnosed")["metrics"]
    assert found["grad/dense_parameter_norm"] > 0 and abs(found["grad/cosine"]) < 1


# -- the student before training as a teacher ------------------------------------------------------


def test_a_learner_without_its_adapters_scores_bit_for_bit_as_a_scorer_does(folder: Path):
    same = result(folder, "shared-evidence")["same"]
    assert all(found[0] for found in same.values()), "each kind of evidence says something"
    assert {kind: found[1:] for kind, found in same.items()} == dict.fromkeys(KINDS, [True] * 3)


def test_a_learner_that_scores_takes_the_steps_that_it_takes_with_a_scorer(folder: Path):
    own, apart = result(folder, "shared-one"), result(folder, "apart-one")
    assert own["digest"] == apart["digest"]
    assert own["metrics"] == apart["metrics"]
    assert own["metrics"][0]["kl/token"] == 0 < own["metrics"][1]["kl/token"]
    heldout, expected = result(folder, "shared-evidence")["heldout"]
    assert heldout == expected and heldout["eval/kl_token"] > own["metrics"][1]["kl/token"]


def test_all_updates_of_a_batch_have_scores_of_the_student_before_training(folder: Path):
    own, apart = result(folder, "shared-several"), result(folder, "apart-several")
    assert own["metrics"][1]["kl/token"] > 0.01 and own["metrics"][1]["train/updates"] == 4
    assert own["loss"] == pytest.approx(apart["loss"], abs=1e-6)
    assert own["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-5)
    assert weight_distance(folder, "shared-several", "apart-several") < 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_that_score_for_different_numbers_of_sequences_wait_for_each_other(
    folder: Path, stage: int
):
    one, two = result(folder, "shared-one"), result(folder, f"shared-zero{stage}")
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert weight_distance(folder, f"shared-zero{stage}", "shared-one") < 1e-5


def test_a_resumed_learner_scores_with_the_student_before_training(folder: Path):
    straight, resumed = (result(folder, f"shared-zero3-{end}") for end in ("straight", "resumed"))
    assert resumed["digest"] == straight["digest"]
    assert resumed["metrics"] == straight["metrics"]
