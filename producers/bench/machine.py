"""On what a figure was measured: without it a figure means little."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import sleep
from typing import Any

_PACKAGES = ("millpond", "redis", "hiredis", "uvloop", "orjson", "zstandard")
_LOOK = 0.5


def describe() -> dict[str, Any]:
    """Return processor, cores this process may use, memory, system and Python; nothing that names the machine."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of this program and of the libraries that matter here."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def busy() -> float:
    """Return which share of all processors other programs use just now (0 to 1); 0 where that cannot be told.

    Call it while nothing of one's own runs; it looks for half a second.
    """
    before = _ticks()
    if before is None:
        return 0.0
    sleep(_LOOK)
    after = _ticks()
    assert after is not None  # noqa: S101 (it was there before)
    total = after[0] - before[0]
    return round(1 - (after[1] - before[1]) / total, 3) if total else 0.0


def _ticks() -> tuple[int, int] | None:
    """Return all processors' ticks since boot, and the idle ones among them."""
    try:
        ticks = [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return sum(ticks), ticks[3] + ticks[4]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
