"""Whether torch.compile can make C++ code on this machine."""

import os
import shutil
import warnings
from functools import lru_cache


def torch_compiler() -> str | None:
    """The path of the C++ compiler that torch.compile starts; None: there is none.

    torch takes the whole of CXX as the name of one program, so "ccache g++" is none.
    """
    return shutil.which(os.environ.get("CXX", "g++"))


@lru_cache
def has_compiler() -> bool:
    """Whether torch.compile finds a C++ compiler; warns where it does not.

    Without a compiler, the rows of the loss are computed eagerly.
    """
    available = torch_compiler() is not None
    if not available:
        warnings.warn(
            "no C++ compiler (g++, or CXX): the loss over the vocabulary runs eagerly, several "
            "times slower",
            stacklevel=2,
        )
    return available
