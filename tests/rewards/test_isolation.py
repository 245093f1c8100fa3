"""Every process that a reward function starts ends with the call or with the pool. The output and
the exceptions of a function are shortened and escaped before they reach a log.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridrl.core.errors import ConfigError
from hybridrl.core.plain_text import described, plain
from hybridrl.rewards import guard
from hybridrl.rewards.pool import Failure, FailureKind, RewardCall, RewardPool

ROOT = Path(__file__).parent.parent.parent

# `mark` is in the environment of every process that a call starts, in any session.
USER_FILE = """
import os, subprocess, sys, time

def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "1000"])
        os._exit(0)

def starts(completions, mark, how):
    os.environ["HYBRIDRL_TEST_MARK"] = mark[0]
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    subprocess.Popen(["setsid", "--fork", "sleep", "1000"])
    subprocess.Popen(["timeout", "1000", "sleep", "1000"])
    subprocess.Popen(["sh", "-c", "trap '' TERM HUP INT; sleep 1000 & sleep 1000 & exit"])
    chain = "import os, time\\nwhile True:\\n if os.fork(): os._exit(0)\\n os.setsid()"
    subprocess.Popen([sys.executable, "-c", chain])
    daemon()
    time.sleep(0.3)
    if how[0] == "hangs":
        time.sleep(1000)
    if how[0] == "exits":
        os._exit(0)
    return [1.0]

def open_sockets(completions):
    inherited = "cd /proc/self/fd; for f in *; do readlink $f; done | grep -c socket:"
    shell = subprocess.Popen(inherited, shell=True, close_fds=False, stdout=subprocess.PIPE)
    return [int(shell.communicate()[0])] * len(completions)

def exit_zero(completions):
    if "x" in completions:
        os._exit(0)
    return [1.0] * len(completions)

def closes_everything(completions):
    if "x" in completions:
        os.closerange(3, 1000)
    return [1.0] * len(completions)

class NoName(type):
    @property
    def __name__(cls):
        raise SystemExit("no name")

class Nameless(Exception, metaclass=NoName):
    def __reduce__(self):
        return (os._exit, (7,))

class Wide(Exception):
    def __str__(self):
        raise KeyboardInterrupt

def raises(completions):
    for c in completions:
        if c == "long":
            raise ValueError("y" * 100_000_000)
        if c == "terminal":
            title = "\\x1b[2J\\x1b]0;owned\\x07"
            raise ValueError(title + "\\nERROR forged line\\r\\u202e\\u2028\\ud800")
        if c == "nameless":
            raise Nameless("a")
        if c == "wide":
            raise Wide
    return [1.0] * len(completions)

class Loud:
    def __repr__(self):
        return "\\x1b[2J" * 10_000_000

def returns_loud(completions):
    return [Loud()] * len(completions)

def floods(completions):
    for _ in range(20):
        os.write(1, b"z" * 1_000_000)
    os.write(2, b"\\n")
    return [1.0] * len(completions)

def prints(completions):
    print("first\\x1b[2J")
    os.system("echo from a shell")
    print("last\\rERROR forged", file=sys.stderr)
    return [1.0] * len(completions)

def forges_answers(completions):
    import gc
    from multiprocessing.connection import Connection
    for item in gc.get_objects():
        if isinstance(item, Connection) and not item.closed:
            item.send_bytes(completions[0].encode())
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def user_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("user") / "isolated.py"
    path.write_text(USER_FILE)
    return path


def open_pool(user_file: Path, name: str, timeout_s: float = 20.0) -> RewardPool:
    calls = {name: RewardCall(function=f"{user_file}:{name}", options={})}
    return RewardPool(calls, processes=1, timeout_s=timeout_s, max_timeouts=0.5)


def marked(mark: str) -> list[int]:
    """The ids of the processes that have the mark in their environment."""
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HYBRIDRL_TEST_MARK={mark}".encode() in environ.read_bytes().split(b"\0"):
                pids.append(int(environ.parent.name))
        except OSError:  # it has ended meanwhile, or belongs to the kernel
            continue
    return pids


def has_processes(mark: str, count: int) -> bool:
    """Whether at least `count` marked processes exist at some moment within 10 s."""
    end = time.monotonic() + 10
    while len(marked(mark)) < count and time.monotonic() < end:
        time.sleep(0.02)
    return len(marked(mark)) >= count


def remaining(mark: str) -> list[int]:
    """The marked processes that have not ended after 10 s."""
    end = time.monotonic() + 10
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.02)
    return marked(mark)


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["control group", "process by process"])
@pytest.mark.parametrize("how", ["hangs", "exits", "answers"])
def test_sessions_orphans_and_a_chain_of_forks_end_with_the_call_or_with_the_pool(
    user_file: Path, monkeypatch: pytest.MonkeyPatch, how: str, group: str
) -> None:
    if group == "process by process":
        monkeypatch.setenv(guard.NO_CONTROL_GROUP, "1")  # the guard, a process, inherits it
    mark = f"{os.getpid()}-{how}-{group}"
    # The chain of forks takes a whole core, so a call that ends by itself gets a long time limit.
    pool = open_pool(user_file, "starts", timeout_s=2.0 if how == "hangs" else 60.0)
    try:
        (outcome,) = pool.call("starts", {"completions": ["a"], "mark": [mark], "how": [how]})
        if how == "answers":
            assert outcome == 1.0
            # At least: sleep, the one of setsid, timeout and its sleep, and the two of sh.
            assert has_processes(mark, 6)
        else:
            kind = FailureKind.timeout if how == "hangs" else FailureKind.died
            assert isinstance(outcome, Failure) and outcome.kind is kind
            assert remaining(mark) == []
    finally:
        pool.close()
    assert remaining(mark) == []


def test_a_program_that_a_function_starts_inherits_no_connection_of_the_pool(
    user_file: Path,
) -> None:
    pool = open_pool(user_file, "open_sockets")
    try:
        assert pool.call("open_sockets", {"completions": ["a"]}) == [0.0]
    finally:
        pool.close()


OWNER = """
import multiprocessing, os, signal, sys, threading, time
from hybridrl.rewards.pool import RewardCall, RewardPool

calls = {"starts": RewardCall(function=sys.argv[1], options={})}
pool = RewardPool(calls, processes=1, timeout_s=60, max_timeouts=0.5)
call = {"completions": ["a"], "mark": [sys.argv[2]], "how": ["answers"]}
assert pool.call("starts", call) == [1.0]
for child in multiprocessing.active_children():  # as Ray kills the children of a worker
    child.kill()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_remains_of_an_owner_that_is_killed_together_with_its_children(
    user_file: Path, tmp_path: Path
) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    mark = f"{os.getpid()}-owner"
    process = subprocess.run(
        [sys.executable, script, f"{user_file}:starts", mark],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert remaining(mark) == []


def test_a_closed_pool_has_removed_its_control_group(
    user_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"{os.getpid()}-closed"
    monkeypatch.setenv("HYBRIDRL_TEST_MARK", mark)  # other tests have pools at the same time
    pool = open_pool(user_file, "exit_zero")
    groups = [group for pid in marked(mark) for group in groups_of(pid)]
    pool.close()
    assert [group for group in groups if group.exists()] == []


def groups_of(pid: int) -> list[Path]:
    """The control groups that the guard with this pid has created."""
    return list(Path("/sys/fs/cgroup").glob(f"**/hybridrl-reward-{pid}"))


@pytest.mark.parametrize("name", ["exit_zero", "closes_everything"])
def test_a_call_that_ends_its_process_or_connection_counts_as_died_and_not_as_a_timeout(
    user_file: Path, name: str
) -> None:
    pool = open_pool(user_file, name, timeout_s=300.0)
    try:
        first, second, third = pool.call(name, {"completions": ["a", "x", "b"]})
    finally:
        pool.close()
    assert (first, third) == (1.0, 1.0)
    assert isinstance(second, Failure) and second.kind is FailureKind.died
    if name == "exit_zero":
        assert second.text == "the process ended with exit code 0"


# -- text ------------------------------------------------------------------------------------------


def test_plain_text_is_short_and_has_no_character_that_a_terminal_interprets() -> None:
    assert plain("a\n\x1b[2J\u202eb\ud800") == r"a\n\x1b[2J\u202eb\ud800"
    assert plain("Zürich 東京") == "Zürich 東京"
    # "... (1000 characters)" has 21 characters, and "... (20 characters)" has 19.
    assert plain("y" * 1000, limit=50) == "y" * 29 + "... (1000 characters)"
    assert plain("\0" * 20, limit=50) == r"\x00" * 7 + r"\x0... (20 characters)"
    assert plain(plain("\0" * 9999)) == plain("\0" * 9999)


def test_an_exception_is_described_although_its_type_and_message_run_code() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit

    assert described(Mute("a")) == "Mute"
    assert described(ValueError("a\nb")) == r"ValueError: a\nb"


def test_the_text_of_an_exception_arrives_short_and_escaped(user_file: Path) -> None:
    pool = open_pool(user_file, "raises")
    try:
        texts = []
        for completion in ("long", "terminal", "nameless", "wide"):
            (outcome,) = pool.call("raises", {"completions": [completion]})
            assert isinstance(outcome, Failure) and outcome.kind is FailureKind.raised
            texts.append(outcome.text)
    finally:
        pool.close()
    long, terminal, nameless, wide = texts
    # 500 characters: "ValueError: " has 12, the ending has 26.
    assert long == f"ValueError: {'y' * 462}... (100000012 characters)"
    assert terminal == (
        r"ValueError: \x1b[2J\x1b]0;owned\x07\nERROR forged line\r\u202e\u2028\ud800"
    )
    assert nameless == "an exception whose type has no readable name: a"
    assert wide == "Wide"


def test_a_value_whose_text_is_long_and_full_of_escapes_is_shown_short_and_escaped(
    user_file: Path,
) -> None:
    pool = open_pool(user_file, "returns_loud")
    try:
        (outcome,) = pool.call("returns_loud", {"completions": ["a"]})
    finally:
        pool.close()
    assert isinstance(outcome, Failure) and outcome.kind is FailureKind.invalid
    assert outcome.text.isprintable() and len(outcome.text) < 400


@pytest.mark.parametrize(
    "forged",
    [
        '{"values": [' + "[" * 5000,
        '{"values": [' + "9" * 400 + "]}",
        '{"text": [1], "wrong_result": false}',
        '{"text": "no more"}',
        "5",
    ],
    ids=["deep", "400 digits", "text of a number", "half", "number"],
)
def test_a_forged_answer_fails_its_call_and_no_other(user_file: Path, forged: str) -> None:
    pool = open_pool(user_file, "forges_answers")
    try:
        (outcome,) = pool.call("forges_answers", {"completions": [forged]})
        (second,) = pool.call("forges_answers", {"completions": [forged]})
    finally:
        pool.close()
    assert isinstance(outcome, Failure) and outcome.kind is FailureKind.died
    assert isinstance(second, Failure) and second.kind is FailureKind.died


@pytest.mark.parametrize(
    "forged",
    ["{}", '{"forger": {}}', '{"forger": {"accepted": 5, "required": [], "any_column": true}}'],
)
def test_a_forged_signature_is_refused(tmp_path: Path, forged: str) -> None:
    """The file writes it while it is loaded."""
    (tmp_path / "own.py").write_text(
        "import gc\nfrom multiprocessing.connection import Connection\n"
        "for item in gc.get_objects():\n"
        "    if isinstance(item, Connection) and not item.closed:\n"
        f"        item.send_bytes({forged.encode()!r})\n"
        "def forger(completions): return [1.0] * len(completions)\n"
    )
    with pytest.raises(ConfigError, match="the function disturbed the pipe that carries"):
        open_pool(tmp_path / "own.py", "forger")


def test_a_replaced_child_loads_within_the_time_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call of both responses ends its child, and the replacement's file is never loaded to its
    end. Half a second of the call remains, by a clock that stands still, although a child may load
    for an hour.
    """
    (tmp_path / "own.py").write_text(
        "import os, threading\n"
        f"mark = {str(tmp_path / 'loaded')!r}\n"
        "if os.path.exists(mark):\n"
        "    threading.Event().wait()\n"
        "open(mark, 'w').close()\n"
        "def ends(completions): os._exit(0)\n"
    )
    calls = {"ends": RewardCall(function=f"{tmp_path}/own.py:ends", options={})}
    pool = RewardPool(
        calls, processes=1, timeout_s=60.0, max_timeouts=1.0, budget_s=0.5, load_s=3600.0
    )
    monkeypatch.setattr("hybridrl.rewards.pool.time", SimpleNamespace(monotonic=lambda: 0.0))
    try:
        outcomes = pool.call("ends", {"completions": ["a", "b"]})
    finally:
        pool.close()
    text = "its process was still loading when 0.5 s had passed"
    assert outcomes == [Failure(kind=FailureKind.timeout, text=text)] * 2


def printed_by(user_file: Path, name: str) -> list[str]:
    """The lines that reach the owner's stdout and stderr."""
    script = (
        "from hybridrl.rewards.pool import RewardCall, RewardPool\n"
        f"calls = {{'r': RewardCall(function={f'{user_file}:{name}'!r}, options={{}})}}\n"
        "pool = RewardPool(calls, processes=1, timeout_s=60, max_timeouts=0.5)\n"
        "print(pool.call('r', {'completions': ['a']}), flush=True)\n"
        "pool.close()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=True,
    )
    return sorted(process.stdout.decode().splitlines())


def test_printed_lines_are_marked_and_escaped(user_file: Path) -> None:
    assert printed_by(user_file, "prints") == [
        "[1.0]",
        "reward function prints: first\\x1b[2J",
        "reward function prints: from a shell",
        "reward function prints: last\\rERROR forged",
    ]


def test_a_flood_on_stdout_is_truncated_and_neither_stops_the_call_nor_fills_a_log(
    user_file: Path,
) -> None:
    lines = printed_by(user_file, "floods")
    assert "[1.0]" in lines
    assert sum(len(line) for line in lines) < 2 * guard.OUTPUT_BYTES
    dropped = 20_000_001 - guard.OUTPUT_BYTES  # 20 million bytes and a line break are written
    assert any(f"... {dropped} further bytes are not shown" in line for line in lines)
