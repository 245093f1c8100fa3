"""The page of every setting is complete and equal to conf/SETTINGS.md."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from hybridrl.settings.compose import known_keys
from hybridrl.settings.reference import Setting, commented, page, settings_of
from hybridrl.settings.run import RunSettings

PAGE = Path(__file__).parent.parent.parent / "conf" / "SETTINGS.md"


class Colour(StrEnum):
    red = "red"  # as fire
    # as the sea,
    # far from the shore
    blue = "blue"
    grey = "grey"
    # as
    # grass
    green = "green"


@dataclass(kw_only=True, slots=True)
class Entry:
    size: int = 1
    """how large
    it is"""


@dataclass(kw_only=True, slots=True)
class Section:
    colour: Colour = Colour.blue
    """of the walls"""
    rate: float = 1e-5
    silent: bool = False
    entries: dict[str, Entry] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Root:
    section: Section = field(default_factory=Section)


def test_settings_of_all_levels_are_listed_with_default_and_meaning() -> None:
    words = "`red` (as fire), `blue` (as the sea, far from the shore), `grey`, `green` (as grass)"
    assert list(settings_of(Root)) == [
        Setting(key="section.colour", default="blue", meaning=f"of the walls: {words}"),
        Setting(key="section.rate", default="1e-05", meaning=""),
        Setting(key="section.silent", default="false", meaning=""),
        Setting(key="section.entries.NAME.size", default="1", meaning="how large it is"),
    ]


def test_every_setting_of_a_run_is_listed_and_has_a_meaning() -> None:
    listed = list(settings_of(RunSettings))
    assert [s.key for s in listed if not s.meaning or s.meaning.startswith(":")] == []
    names = {s.key.partition(".NAME")[0] for s in listed}
    keys = known_keys()
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    schedules = ("algorithm.imitation_weight.", "algorithm.reward_weight.")
    assert [key for key in leaves if key not in names and not key.startswith(schedules)] == []


def test_a_listing_gets_the_meaning_of_each_setting_above_it() -> None:
    listing = (
        "usage: hybridrl\ntrain:\n  steps: 100\nteachers:\n  main:\n    schedule:\n      "
        "kind: step\neval:\n  sets:\n    hard:\n      samples: 1\n"
    )
    assert commented(listing).splitlines() == [
        "usage: hybridrl",
        "train:",
        "  # batches to learn from; each is one optimizer update, or several of them",
        "  steps: 100",
        "teachers:",
        "  main:",
        "    # multiplies the weight",
        "    schedule:",
        "      kind: step",
        "eval:",
        "  sets:",
        "    hard:",
        "      # responses to each prompt, for avg@k and pass@k",
        "      samples: 1",
    ]


def test_the_page_of_settings_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "python -m hybridrl.settings.reference > conf/SETTINGS.md"
