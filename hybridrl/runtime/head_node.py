"""Checks of Ray's own processes: the head's service (GCS), which places and replaces workers, and
this machine's raylet.

A run cannot go on without them.

If the head is gone, Ray waits for a minute, while calls between processes go on, and then ends this
process from within: no sink is closed and no message says why. So the driver checks the connection
itself and ends the run before that.
"""

import socket
import time

import ray

from hybridrl.core.errors import ClusterLost
from hybridrl.runtime.ray_internals import is_alive, node_id

CHECK_S = 1.0
SILENCE_S = 20.0
"""A head that restarts within this time is not lost. It is well below Ray's own 60 s, because
closing the run takes time too.
"""


class Head:
    """Checks whether the head of the present Ray connection accepts connections.

    Args:
        check_s: at most one connection is tried in this time.
        silence_s: the head is lost if it accepts no connection for this time.
    """

    def __init__(self, *, check_s: float = CHECK_S, silence_s: float = SILENCE_S) -> None:
        self._check_s = check_s
        self.silence_s = silence_s
        self._next_check = 0.0
        self._address: str | None = None
        self._silent_since: float | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the last connection failed. A call that needs the head would then wait for a
        minute.
        """
        return self._silent_since is not None

    def check(self, address: str | None = None) -> None:
        """Try a connection, unless the last attempt was less than `check_s` ago.

        Args:
            address: HOST:PORT; None: that of the Ray that this process is connected to.

        Raises:
            ClusterLost: no connection was accepted for `silence_s`.
        """
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + self._check_s
        address = address or ray.get_runtime_context().gcs_address
        if address != self._address or takes_connections(address):
            self._address = address
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now
        elif now >= self._silent_since + self.silence_s:
            raise ClusterLost(
                f"Ray's head at {address} has not answered for {now - self._silent_since:.0f} s, "
                "so that no worker can be started or replaced"
            )


def check_own_node() -> None:
    """Check in the head's records that this machine is alive. Call it when a worker has died: all
    workers die with the node of the driver that owns them.

    Raises:
        ClusterLost: the raylet of this machine is gone.
    """
    own_id = ray.get_runtime_context().get_node_id()
    if any(node_id(record) == own_id and not is_alive(record) for record in ray.nodes()):
        raise ClusterLost(
            "Ray's process on this machine, the raylet, is gone and with it every worker of this "
            "run"
        )


def takes_connections(address: str) -> bool:
    """Whether a process accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CHECK_S).close()
    except OSError:
        return False
    return True


HEAD = Head()
"""The head of the Ray that this process is connected to; there is one at a time."""
