"""Ray actors, calls with timeouts, placement and the typed worker groups; the only package that
imports ray.
"""

import os

# Ray reads this variable when it is imported. Without it, a call after Ray's shutdown, e.g. from
# the thread that finishes a checkpoint, would start another Ray.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
