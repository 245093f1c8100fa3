"""Whether torch.compile can make C++ code on this machine."""

import os
import shutil
import warnings
from functools import lru_cache


@lru_cache
def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler; warns where it does not.

    Without a compiler, the rows of the loss are computed eagerly.
    """
    available = shutil.which(os.environ.get("CXX", "g++")) is not None
    if not available:
        warnings.warn(
            "no C++ compiler (g++, or CXX): the loss over the vocabulary runs eagerly, several "
            "times slower",
            stacklevel=2,
        )
    return available
