"""Resolvers as an application would write them, for the pool to import."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np

from shared.errors import RateLimited

ANSWERS: dict[str, Any] = {
    "json": {"found": [1, 2.5, None, "ü"]},
    "text": "plain",
    "bytes": b"\x00\xff#1\n",
    "nothing": b"",
    "array": np.arange(6, dtype=">f8").reshape(2, 3)[:, ::-1],
    "object": object(),
    "objects": np.array([None]),
    "long doubles": np.zeros(1, np.longdouble),
}


def plain(body: dict[str, Any]) -> Any:
    """Answer as asked, from a thread of its own."""
    assert threading.current_thread() is not threading.main_thread()
    return _answered(body)


async def waiting(body: dict[str, Any]) -> Any:
    """Answer as asked, on the worker's loop."""
    await asyncio.sleep(0)
    return _answered(body)


def _answered(body: dict[str, Any]) -> Any:
    if body["input"] == "fail":
        raise LookupError("no such thing")
    if body["input"] == "busy":
        raise RateLimited("later", retry_after=1.0)
    return ANSWERS[body["input"]]


async def hanging(body: dict[str, Any]) -> Any:
    """Never answer."""
    await asyncio.Event().wait()
