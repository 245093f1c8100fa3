"""Starts the pool's child processes without secrets and without the owner's main script.

This file uses three internals of multiprocessing, as of Python 3.11 to 3.13:

- SpawnProcess._Popen starts the process; overriding it is the only way to run code around the
  start.
- A spawned process runs the file of sys.modules["__main__"] again, which may import torch or ray,
  unless that module has no file at the time of the start.
- Each end of a Pipe() is a Unix socket, so that its waits can be limited.
"""

import os
import socket
import struct
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.popen_spawn_posix import Popen
from multiprocessing.process import BaseProcess

from hybridrl.core.redact import without_secrets


@contextmanager
def without_main_script() -> Iterator[None]:
    """A context in which a spawned process finds no main script to run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class BareProcess(SpawnProcess):
    """A spawned process that inherits no secret environment variable and does not run the main
    script.
    """

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        with without_main_script(), without_secrets():
            return SpawnProcess._Popen(process_obj)


class BareContext(SpawnContext):
    """A multiprocessing context whose processes are BareProcess."""

    Process = BareProcess


def limit_waits(connection: Connection, seconds: float) -> None:
    """Make reads and writes of one end of a Pipe() fail after `seconds` without progress."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))  # a struct timeval
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
