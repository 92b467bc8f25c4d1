"""Vectors from replies: what `Client.embed` gives, in NumPy's form whoever answered."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from producers.reply import Reply
from shared.answers import first_of
from shared.errors import InvalidRequest, ProviderError


def checked(texts: str | Sequence[str]) -> list[str]:
    """Return the texts as a list; raise `InvalidRequest` if any is empty, or no text."""
    several = [texts] if isinstance(texts, str) else list(texts)
    for at, text in enumerate(several):
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequest("each must be a text, and not empty", field=f"texts[{at}]")
    return several


def matrix(replies: Sequence[Reply | BaseException]) -> NDArray[np.float32]:
    """Return float32 vectors as rows, shape (n, dimensions); (0, 0) for none.

    Raises:
        BaseException: the first that stands in a reply's place.
        ProviderError: a reply holds no vector, or they differ in length.
    """
    rows = []
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
        rows.append(vector(reply.value, reply.provider))
    if len({len(row) for row in rows}) > 1:
        raise ProviderError("the provider's vectors differ in length", provider=None)
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def vector(value: Any, provider: str | None) -> NDArray[np.float32]:
    """Return one float32 vector, shape (dimensions,), from a stored array or a provider's JSON (numbers or base64)."""
    if isinstance(value, dict):
        value = first_of(value.get("data")).get("embedding")
    try:
        found = np.frombuffer(b64decode(value), "<f4") if isinstance(value, str) else np.asarray(value, np.float32)
    except (ValueError, TypeError, binascii.Error):
        found = np.empty(0, np.float32)
    found = found.reshape(-1) if found.ndim == 2 and len(found) == 1 else found
    if found.ndim != 1 or not found.size:
        raise ProviderError("the provider's answer holds no vector", provider=provider)
    return found.astype(np.float32, copy=False)
