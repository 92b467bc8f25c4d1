"""Named points at which a fault test lets this process kill or stop itself.

`MILLPOND_FAULT=kill@after_land` ends the process with SIGKILL the first time it passes that point;
`stop@before_land:3` freezes it with SIGSTOP the third time. Unset, a point costs one comparison.
"""

from __future__ import annotations

import os
import signal

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_action, _, _rest = os.environ.get("MILLPOND_FAULT", "").partition("@")
_point, _, _count = _rest.partition(":")
_left = int(_count or 1)


def fault_point(name: str) -> None:
    """Fail here if the environment says so."""
    global _left
    if name == _point:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), _SIGNALS[_action])
