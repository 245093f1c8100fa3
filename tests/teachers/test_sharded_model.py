"""A teacher that is divided over two and three processes, compared with the same teacher in one."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

from hybridrl.core.errors import ConfigError
from hybridrl.launch.preflight import check_divisible
from hybridrl.models.loading import load_model
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.teachers.scorer import Scorer
from tests.support.graph import save_tiny
from tests.support.ranks import run_ranks
from tests.support.sharded_teacher_job import EVIDENCE, batch_of, settings_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder with the models and the results of the ranks, by the number of ranks: two ranks
    with a tied model, and three with an untied one.

    Neither 2 nor 3 divides the vocabulary of 23 tokens, and 3 does not divide the 4 heads.
    """
    folders = {ranks: tmp_path_factory.mktemp(f"sharded-{ranks}") for ranks in (2, 3)}
    for ranks, folder in folders.items():
        save_tiny(folder / "student", 0)
        save_tiny(folder / "teacher", 1, tied=ranks == 2)
    places = [f"{ranks}:{folder}" for ranks, folder in folders.items()]
    run_ranks("sharded_teacher_job.py", *places)
    return folders


@pytest.fixture(params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def folder(folders: dict[int, Path], ranks: int) -> Path:
    return folders[ranks]


@pytest.mark.parametrize("kind", EVIDENCE)
def test_every_kind_of_evidence_equals_that_of_one_device(folder: Path, ranks: int, kind: str):
    settings = settings_for(folder, kind)
    evidence, rule = scoring(settings, "main")
    one = Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    _, expected = one.score(batch_of())
    scores = np.load(folder / f"{ranks}-{kind}.npz")
    assert np.abs(scores["logprobs"] - expected.logprobs).max() < 1e-5
    assert scores["rows"].shape == expected.rows.shape
    assert np.allclose(scores["rows"], expected.rows, rtol=0, atol=1e-5)
    assert scores["ids"].tolist() == expected.support_ids.tolist()
    assert expected.logprobs.any()


def test_no_rank_reads_or_holds_more_than_its_rows_and_the_output_embedding(
    folder: Path, ranks: int
):
    teacher = load_model(str(folder / "teacher"))
    whole = sum(p.nbytes for p in teacher.parameters())
    head = teacher.get_output_embeddings().weight.nbytes
    figures = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    one_row_each = sum(p[:1].nbytes for p in teacher.parameters())
    assert all(0 < f["read"] <= whole / ranks + one_row_each for f in figures)
    assert sum(f["read"] for f in figures) >= whole
    assert all(f["held"] <= whole / ranks + one_row_each + head + 4 * 128 for f in figures)


def test_ranks_that_were_given_different_sequences_raise_instead_of_mixing_them(
    folder: Path, ranks: int
):
    for rank in range(ranks):
        figures = json.loads((folder / f"{ranks}-{rank}.json").read_text())
        assert "different sequences" in figures["different"]


def test_a_kind_of_model_whose_layers_are_not_divided_is_refused(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=23)).save_pretrained(
        tmp_path
    )
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"
    base = ["experiment=quickstart", f"run.dir={tmp_path}", f"teachers.main.path={tmp_path}"]
    settings = load_config([*base, "+teachers.main.devices=2"])
    with pytest.raises(ConfigError, match=r"teachers\.main\.devices=2: .*GPT2LMHeadModel"):
        check_divisible(settings, "main")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("+teachers.main.devices=0", r"devices=0: must be at least 1"),
        (
            "+teachers.main.devices=2 teachers.main.path=null +teachers.main.model=t.py:T",
            r"devices=2: .*runs in one process",
        ),
    ],
)
def test_a_number_of_devices_that_cannot_be_is_refused(tmp_path: Path, overrides: str, text: str):
    with pytest.raises(ConfigError, match=text):
        load_config(["experiment=quickstart", f"run.dir={tmp_path}", *overrides.split()])
