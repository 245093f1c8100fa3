"""A TCP port on which a server of this machine can listen a while later."""

import random
import socket
from collections.abc import Sequence

PORTS = range(20_000, 32_768)
"""Ports below those that Linux assigns to outgoing connections and to servers that ask for any port
(from 32768 by default), and above those of Ray's workers (10002 to 19999), so that no process is
assigned one of them between the search for a free port and the start of the server.
"""
MOST_TRIES = 100


def free_port(candidates: Sequence[int] | None = None) -> int:
    """The first port of `candidates` on which no process listens; by default the candidates are a
    random choice of PORTS.

    Raises:
        OSError: none of them is free.
    """
    # Not the shared generator of `random`: two runs with the same seed would choose the same ports.
    ports = candidates or random.SystemRandom().sample(PORTS, MOST_TRIES)
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port was found between {min(ports)} and {max(ports)}")
