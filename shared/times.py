"""Moments as people write them on a command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from shared.errors import InvalidRequest

_SPAN = re.compile(r"(\d{1,5})([mhdw])")
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def moment(text: str, field: str, now: datetime) -> datetime:
    """Read `90m`, `24h`, `7d`, `2w` (before now) or an ISO date or time, UTC unless it says otherwise."""
    if found := _SPAN.fullmatch(text.strip()):
        return now - int(found[1]) * _UNITS[found[2]]
    try:
        read = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InvalidRequest(
            f"--{field} is {text[:40]!r}; write a span such as 24h or 7d, or a date such as 2026-11-01", field=field
        ) from None
    return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
