import socket
from pathlib import Path

import pytest

from hybridrl.core.free_port import PORTS, free_port


def test_a_free_port_is_none_that_the_system_gives_to_other_processes():
    """Otherwise another process could take the port before its server has started, as has
    happened.
    """
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    given = range(int(limits[0]), int(limits[1]) + 1)
    assert free_port() not in given
    assert free_port() in PORTS


def test_a_port_that_a_server_listens_on_is_passed_over():
    with socket.create_server(("127.0.0.1", free_port())) as server:
        taken = server.getsockname()[1]
        assert free_port([taken, free := free_port()]) == free
        with pytest.raises(OSError, match=f"no free TCP port was found between {taken} and"):
            free_port([taken])
