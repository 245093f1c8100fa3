"""DeepSpeed's extension in C++ for sums over the ranks of one CPU, compiled at its first use.

torch marks a build by a file "lock", for which every other process waits without a limit. A process
that is killed while it compiles leaves that file, and no later run would start. So a build here
holds a lock of the operating system, which is released when its process ends. A file "lock" that is
still there when a process gets that lock was left by a killed build, and is removed.
"""

import logging
import os
from pathlib import Path

from deepspeed.comm.torch import build_shm_op
from filelock import FileLock
from torch.utils.cpp_extension import get_default_build_root

from hybridrl.core.errors import HybridRLError

BUILD_S = 600.0
"""For the build of another process; one takes 15 to 60 s."""
LEFT = "lock"

log = logging.getLogger(__name__)


class ExtensionError(HybridRLError):
    """Another process has been compiling an extension for too long."""


def build_extension() -> None:
    """Compile and load the extension, if there is none from an earlier run. On a GPU nothing is
    compiled.

    Raises:
        ExtensionError: another process has been compiling it for longer than BUILD_S.
    """
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".hybridrl.lock"
    try:
        with FileLock(place, timeout=BUILD_S):
            remove_left_locks(folder)
            build_shm_op()
    except TimeoutError as error:
        raise ExtensionError(
            f"{place}: another process has held it for {BUILD_S:g} s while it compiles an "
            "extension of DeepSpeed; end that process, or set TORCH_EXTENSIONS_DIR to another "
            "folder"
        ) from error


def extensions_folder() -> Path:
    """The folder that holds one folder for each extension."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_left_locks(folder: Path) -> None:
    """Remove the marks of builds that ended with their process. torch's default folder has one
    more level, for the version of Python.
    """
    for left in [*folder.glob(f"*/{LEFT}"), *folder.glob(f"*/*/{LEFT}")]:
        log.warning("%s: left by a process that ended while it compiled; removed", left)
        left.unlink(missing_ok=True)
