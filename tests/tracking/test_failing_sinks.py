"""A tracker that raises SystemExit, and a stop signal that arrives while a tracker works."""

import signal

import pytest

from hybridrl.tracking.sink import Sinks


class Ending:
    """A sink that counts the rows it receives, and raises SystemExit with a code at each of
    them.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        self.rows = 0

    def log(self, metrics: dict[str, float]) -> None:
        self.rows += 1
        raise SystemExit(self.code)


def test_a_stop_signal_that_arrives_inside_a_tracker_ends_the_run_and_not_the_tracker():
    sink = Ending(signal.SIGTERM)
    sinks = Sinks(required=[], optional={"the tracker": sink})
    for rows in (1, 2):
        with pytest.raises(SystemExit):
            sinks.log({"train/step": 0})
        assert sink.rows == rows


@pytest.mark.parametrize("code", [0, 1])
def test_a_tracker_that_ends_the_process_is_switched_off_instead(code: int):
    sink = Ending(code)
    sinks = Sinks(required=[], optional={"the tracker": sink})
    sinks.log({"train/step": 0})
    sinks.log({"train/step": 1})
    assert sink.rows == 1
