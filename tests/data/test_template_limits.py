"""A chat template that does not end is interrupted, or refused if it cannot be interrupted."""

import signal
import time
from collections.abc import Iterator

import pytest

from hybridrl.core.errors import DataError
from hybridrl.data.chat import ChatTemplate
from hybridrl.data.template_limits import BoundlessTemplate, bounded
from hybridrl.models.tiny import tiny_tokenizer

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWING = (
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10**(10**8) }}",
        "{% generation %}{{ 10 ** messages|length }}{% endgeneration %}",
        {"default": "a", "tool_use": "{% set x = 2**2 %}"},
    ],
)
def test_a_template_with_a_power_is_refused_before_it_runs(template: str | dict[str, str]):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"row 1: the model's chat template .*raises a number to a"):
        ChatTemplate(tokenizer, {}).prompt([{"role": "user", "content": "1"}], (), "row 1")


@pytest.mark.parametrize("template", [LOOP, GROWING])
def test_a_template_that_runs_forever_is_interrupted(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with (
        pytest.raises(BoundlessTemplate, match=r"took longer than 0\.2 s for one conversation"),
        bounded(template, seconds=0.2),
    ):
        tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """The timer signals that arrive during a test; the test's own time limit is suspended."""
    arrived: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: arrived.append(number))
    delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    yield arrived
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, delay, interval)


def test_a_timer_of_the_caller_goes_on_after_a_conversation(alarms: list[int]):
    signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    with bounded("", seconds=500):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
    delay, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 500 < delay <= 1000 and interval == 7
    assert alarms == []


def test_a_timer_of_the_caller_that_ends_during_a_conversation_goes_off_after_it(
    alarms: list[int],
):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with bounded("", seconds=500):
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        assert alarms == []
    end = time.monotonic() + 60
    while not alarms and time.monotonic() < end:
        time.sleep(0.01)
    assert alarms == [signal.SIGALRM]


def test_without_a_timer_of_the_caller_none_is_left(alarms: list[int]):
    with bounded("", seconds=500):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_keyword_arguments_and_stars_in_text_are_no_power():
    texts = ("{{ namespace(**dict(a=1)) }}", "{{ f(x, ** y) }}", "2 ** 3 {{ '2 ** 3' }}")
    assert [is_refused(text) for text in texts] == [False, False, False]
    assert is_refused("{{ 2 ** 3 }}")


def is_refused(template: str) -> bool:
    try:
        with bounded(template):
            return False
    except BoundlessTemplate:
        return True
