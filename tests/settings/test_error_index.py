"""The page of error sentences, which are read from the source code in the order of the checks."""

import re
import sys
from pathlib import Path
from types import FrameType

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.launch.preparation import preflight
from hybridrl.settings.compose import load_config
from hybridrl.settings.error_index import checks_called, file_of, own_checks, page
from hybridrl.settings.error_sentences import ErrorSentence, error_sentences, unread_errors
from tests.support.graph import tiny_settings

PAGE = Path(__file__).parent.parent.parent / "hybridrl" / "settings" / "README.md"

SOURCE = """
WORDS = ("red", "blue")

def remedy_for(near):
    if near:
        return f"did you mean {near[0]}?"
    return "see the list"

def check(self, settings, size):
    for name in ("width", "height"):
        if getattr(self, name) < 1:
            raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
    if self.colour not in WORDS:
        raise ConfigError(f"colour={self.colour}: must be {' or '.join(WORDS)}; " + remedy_for([]))
    kind = "large" if size > 3 else "small"
    raise DataError(f"row {len(self.rows)}: is {kind}. Leave it out")

def passes_on(answer):
    raise ConfigError(answer)

def of_another_kind():
    raise ValueError("not listed")
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "checks.py").write_text(SOURCE)
    return tmp_path


def test_sentences_are_read_with_their_alternatives_and_a_word_for_each_value(
    package: Path,
) -> None:
    assert error_sentences(package) == [
        ErrorSentence(subject=subject, rule=rule, remedy=remedy, file="checks.py")
        for subject, rule, remedy in [
            ("{width, height}={value}", "must be positive", ""),
            ("colour={colour}", "must be red or blue", "did you mean {near}?"),
            ("colour={colour}", "must be red or blue", "see the list"),
            ("", "row {rows}: is large / small", "Leave it out"),
        ]
    ]


def test_a_sentence_that_only_the_running_program_knows_is_counted(package: Path) -> None:
    assert unread_errors(package) == ["checks.py: passes_on"]


@pytest.fixture(scope="module")
def patterns() -> list[str]:
    """The sentences of the page as regular expressions, without those that are only
    placeholders.
    """
    texts = {
        ": ".join(filter(None, (s.subject, "; ".join(filter(None, (s.rule, s.remedy))))))
        for s in error_sentences()
    }
    patterns = [re.sub(r"\\\{.*?\\\}", ".*", re.escape(text)) for text in texts]
    return [p for p in patterns if re.search(r"\w{3}", p.replace(".*", "")) and len(p) > 20]


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=-1",
        "train.steps=0",
        "train.stepz=3",
        "model.dtype=float16",
        "algorithm.support=sampled algorithm.data_fraction=0.5",
        "+tracking.sinks.mine=3",
        "reward.timeout_s=inf",
    ],
)
def test_a_sentence_that_a_user_gets_is_on_the_page(override: str, patterns: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["experiment=quickstart", "run.dir=x", *override.split()])
    message = str(raised.value)
    assert [p for p in patterns if re.fullmatch(p, message)], message


def place(frame: FrameType) -> tuple[str, str]:
    """The file in the package and the name of the function that a frame executes."""
    return frame.f_code.co_filename.rpartition("/hybridrl/")[2], frame.f_code.co_name


def test_the_checks_before_a_run_are_listed_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    listed = [
        (check.file, check.name) for check in checks_called(file_of("preflight"), "preflight")
    ]
    names = {name for _, name in listed}
    seen: dict[tuple[str, str], None] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        # This runs for every call in the process, so functions of other names are skipped first.
        if event == "call" and frame.f_code.co_name in names and place(frame) in listed:
            outer = frame.f_back
            while outer is not None and place(outer) not in listed:
                outer = outer.f_back
            if outer is None:  # no other check has called this one
                seen[place(frame)] = None

    sys.setprofile(watch)
    try:
        preflight(tiny_settings(tmp_path))
    finally:
        sys.setprofile(None)
    assert len(listed) > 10 and list(seen) == listed


def test_sections_are_listed_in_the_order_in_which_they_are_built() -> None:
    keys = [key for key, _ in own_checks()]
    assert keys[:2] == ["run", "model"]
    assert keys.index("algorithm.ratio") < keys.index("algorithm") < keys.index("train")


def test_the_page_of_error_sentences_is_up_to_date() -> None:
    command = "python -m hybridrl.settings.error_index > hybridrl/settings/README.md"
    assert PAGE.read_text() == page(), command
