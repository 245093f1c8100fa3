"""Ray actors, calls with timeouts, placement and the typed worker groups; the only package that
imports ray.
"""

import os

# Read when ray is imported. Otherwise a call after Ray's end, such as one of the thread of a
# checkpoint, would start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
