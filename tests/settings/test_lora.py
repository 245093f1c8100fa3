"""The settings of adapters, and a run that is continued with other ones."""

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.run_dir.setting_changes import changes
from hybridrl.settings.choices import WeightTransfer
from hybridrl.settings.compose import load_config
from hybridrl.settings.run import RunSettings


def settings(*overrides: str) -> RunSettings:
    return load_config(["run.dir=here", "experiment=quickstart", *overrides])


def test_without_a_rank_all_weights_train():
    assert settings().lora.rank is None


@pytest.mark.parametrize(
    ("overrides", "scale"),
    [(["lora.rank=8"], 2.0), (["lora.rank=8", "lora.alpha=4"], 0.5), (["lora.rank=1"], 2.0)],
)
def test_the_product_of_adapters_is_scaled_by_alpha_over_the_rank(
    overrides: list[str], scale: float
):
    assert settings(*overrides).lora.scale == scale


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["lora.rank=0"], r"^lora\.rank=0: must be at least 1, or null to train all weights"),
        (["lora.rank=-4"], r"^lora\.rank=-4: must be at least 1"),
        (["lora.rank=2.5"], r"lora\.rank=2\.5: .*Integer"),
        (["lora.rank=4", "lora.alpha=0"], r"^lora\.alpha=0(\.0)?: must be positive and finite"),
        (["lora.rank=4", "lora.alpha=inf"], r"^lora\.alpha=inf: must be positive and finite"),
        (["lora.rank=4", "lora.dropout=1"], r"^lora\.dropout=1(\.0)?: must be a fraction"),
        (["lora.rank=4", "lora.dropout=-0.1"], r"^lora\.dropout=-0\.1: must be a fraction"),
        (["lora.alpha=16"], r"^lora\.alpha=16\.0: has no effect without adapters; set lora\.rank"),
        (["lora.targets=[q_proj]"], r"^lora\.targets=\['q_proj'\]: has no effect without"),
        (["lora.dropout=0.1"], r"^lora\.dropout=0\.1: has no effect without adapters"),
        (["lora.sync=adapter"], r"^lora\.sync=adapter: has no effect without adapters; set lora\."),
        (
            ["lora.rank=513", "lora.sync=adapter"],
            r"^lora\.sync=adapter: vLLM's engines accept adapters up to rank 512, but "
            r"lora\.rank=513; lower it, or set lora\.sync=merged$",
        ),
    ],
)
def test_a_setting_that_means_nothing_is_refused(overrides: list[str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        settings(*overrides)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.rank=8", "lora.rank"),
        ("lora.alpha=1", "lora.alpha"),
        ("lora.targets=[q_proj]", "lora.targets"),
    ],
)
def test_a_run_is_not_continued_with_other_adapters(override: str, key: str):
    assert list(changes(settings("lora.rank=4"), settings("lora.rank=4", override))) == [key]


def test_a_run_continues_with_the_other_way_to_the_engines():
    merged, alone = settings("lora.rank=513"), settings("lora.rank=4", "lora.sync=adapter")
    assert (merged.lora.travels_alone, alone.lora.travels_alone) == (False, True)
    assert not changes(settings("lora.rank=4"), alone)


def test_adapters_by_themselves_travel_through_the_object_store():
    sent = settings("lora.rank=4", "lora.sync=adapter").weight_transfer(on_cpu=False)
    assert sent is WeightTransfer.object_store
    assert settings("lora.rank=4").weight_transfer(on_cpu=False) is WeightTransfer.nccl
