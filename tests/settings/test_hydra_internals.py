"""The errors and objects of Hydra and OmegaConf that hydra_internals.py reads, made by the
libraries themselves.

If the first test fails after an upgrade, compare hybridrl/settings/hydra_internals.py with the new
version, then change SEEN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybridrl.settings.hydra_internals import (
    SEEN,
    adds_existing_key,
    first_line,
    is_unknown_choice,
    is_unknown_key,
    is_unquoted_list,
    parsed,
    unparsed_override,
)


@dataclass
class Schema:
    lr: float = 1.0


@pytest.fixture
def error_of(tmp_path: Path) -> Callable[[str], Exception]:
    """A function that returns Hydra's error for an override; the settings are `lr` and the group
    `method`.
    """
    (tmp_path / "config.yaml").write_text("defaults: [{method: grpo}, _self_]\nlr: 1\n")
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "grpo.yaml").write_text("gamma: 0\n")

    def compose_with(override: str) -> Exception:
        GlobalHydra.instance().clear()
        with (
            pytest.raises(Exception) as caught,
            initialize_config_dir(config_dir=str(tmp_path), version_base="1.3"),
        ):
            compose("config", overrides=[override])
        return caught.value

    return compose_with


def test_the_installed_libraries_are_those_that_were_read():
    installed = {name: ".".join(version(name).split(".")[:2]) for name in SEEN}
    assert installed == SEEN, "read settings/hydra_internals.py again, then change SEEN"


def test_a_key_that_does_not_exist_is_told_apart_from_a_wrong_value(error_of):
    cause = error_of("lrr=2").__cause__
    assert isinstance(cause, OmegaConfBaseException) and cause.full_key == "lrr", (
        "Hydra does not pass OmegaConf's error on as the cause any more"
    )
    assert is_unknown_key(cause), (
        f"OmegaConf names a key that is not in a struct otherwise: {cause}"
    )
    schema = OmegaConf.structured(Schema)
    with pytest.raises(OmegaConfBaseException) as unknown:
        OmegaConf.merge(schema, {"lrr": 2})
    assert is_unknown_key(unknown.value), (
        f"OmegaConf names a key that is not in a class otherwise: {unknown.value}"
    )
    with pytest.raises(OmegaConfBaseException) as wrong:
        OmegaConf.merge(schema, {"lr": "high"})
    assert not is_unknown_key(wrong.value)


@pytest.mark.parametrize(
    ("override", "recognised"),
    [
        ("+lr=2", adds_existing_key),
        ("method=gpro", is_unknown_choice),
        ("lr=1,2", is_unquoted_list),
        ("lr=2)", unparsed_override),
    ],
)
def test_each_error_of_hydra_is_recognised_by_its_own_function_alone(
    error_of, override: str, recognised: Callable[[Exception], object]
):
    error = error_of(override)
    functions = (adds_existing_key, is_unknown_choice, is_unquoted_list, unparsed_override)
    assert [function for function in functions if function(error)] == [recognised], (
        f"Hydra's error about {override} reads otherwise: {error}"
    )


def test_an_override_without_a_value_is_named_as_it_was_given(error_of):
    assert unparsed_override(error_of("lr=2)")) == "lr=2)"


def test_the_first_line_of_an_error_without_text_is_its_type():
    assert first_line(ValueError("a\nb")) == "a" and first_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("lr=2", "lr", 2),
        ("+teachers.a.path=x", "teachers.a.path", "x"),
        ("~method", "method", None),
    ],
)
def test_an_override_is_read_as_key_and_value(override: str, key: str, value: object):
    (found,) = parsed([override])
    assert (found.key, found.value()) == (key, value)
    assert not found.is_sweep and not found.is_range and found.choices() is None


@pytest.mark.parametrize("override", ["lr=a,b c", "lr=choice(a,b c)"])
def test_a_sweep_over_choices_is_an_override_for_each(override: str):
    (found,) = parsed([override])
    assert found.is_sweep and not found.is_range
    assert found.choices() == ["lr=a", r"lr=b\ c"]


@pytest.mark.parametrize(
    ("override", "is_range"),
    [("lr=range(1,3)", True), ("lr=interval(0,1)", True), ("method=glob(*)", False)],
)
def test_another_sweep_has_no_choices(override: str, is_range: bool):
    (found,) = parsed([override])
    assert found.is_sweep and found.choices() is None and found.is_range is is_range
