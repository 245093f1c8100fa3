"""A teacher that an engine of vLLM holds, against the same model loaded by a scorer.

The engine is started once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridrl.core.errors import ServerError
from hybridrl.rollout.engine_scorer import EngineScorer
from hybridrl.runtime.scorer_group import scoring
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings
from hybridrl.teachers.scorer import Scorer
from hybridrl.types import TokenScores
from tests.support.batches import make_batch
from tests.support.graph import save_tiny

PROMPTS = [((1, 5, 6), [(7, 8, 2), (9, 2)]), ((1, 10), [(11, 2), (12, 13, 14, 2)])]
TOPK = ("algorithm.topk.source=teacher", "algorithm.topk.k=3", "++teachers.main.evidence=support")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_tiny(folder / "student", 0)
    save_tiny(folder / "teacher", 1)
    return folder


def settings_of(folder: Path, *more: str) -> RunSettings:
    return load_config(
        [
            f"run.dir={folder}/run",
            "experiment=quickstart",
            f"model.path={folder}/student",
            f"teachers.main.path={folder}/teacher",
            "++teachers.main.evidence=drawn",
            "rollout.max_model_len=64",
            *more,
        ]
    )


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Iterator[EngineScorer]:
    small = "++teachers.main.engine={kv_cache_memory_bytes:67108864}"
    settings = settings_of(folder, small)
    evidence, rule = scoring(settings, "main")
    yield EngineScorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)


def local(folder: Path, *more: str) -> TokenScores:
    """The scores of the same model, loaded here."""
    settings = settings_of(folder, *more)
    evidence, rule = scoring(settings, "main")
    one = Scorer(settings, teacher="main", device="cpu", evidence=evidence, rule=rule)
    return one.score(make_batch(PROMPTS))[1]


@pytest.mark.parametrize("more", [(), TOPK])
def test_an_engine_gives_the_log_probs_of_the_same_model(
    folder: Path, scorer: EngineScorer, more: tuple[str, ...]
):
    """In float32, to 1e-5 nats."""
    settings = settings_of(folder, *more)
    scorer.configure(settings, *scoring(settings, "main"))
    expected = local(folder, *more)
    _, scores = scorer.score(make_batch(PROMPTS))
    assert expected.logprobs.any()
    assert np.abs(scores.logprobs - expected.logprobs).max() < 1e-5
    assert scores.support_ids.tolist() == expected.support_ids.tolist()
    assert scores.rows.shape == expected.rows.shape
    assert np.abs(scores.rows - expected.rows).max(initial=0) < 1e-5


def test_a_sequence_of_the_longest_length_is_scored_and_a_longer_one_is_refused(
    scorer: EngineScorer,
):
    """rollout.max_model_len is 64."""
    (answer,) = scorer.answers([[5] * 64])
    assert len(answer.logprobs) == 64 and answer.logprobs[1:].all()
    with pytest.raises(ServerError, match=r"^teachers\.main\.engine: .*65"):
        scorer.answers([[5, 6], [5] * 65])
    (again,) = scorer.answers([[5] * 64])
    assert again.logprobs.tolist() == answer.logprobs.tolist()
