"""What every command does alike: print one result, or one error and the exit code that says what it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import orjson
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    MillpondError,
    NotCached,
    Overloaded,
    ProviderError,
    Unavailable,
)

OTHER = 1
CONFIG = 2
UNAVAILABLE = 3
DEADLINE = 4
INTERRUPTED = 130
_CODES: tuple[tuple[type[MillpondError], int], ...] = (
    (InvalidRequest, CONFIG),
    (ConfigError, CONFIG),
    (Unavailable, UNAVAILABLE),
    (DeadlineExceeded, DEADLINE),
    (Overloaded, 5),
    (NotCached, 6),
    (ProviderError, 7),
)


def exit_code(error: MillpondError) -> int:
    """Return the exit code of an error: 0 stays for success, 1 for what has none of its own."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), OTHER)


def masked(url: str) -> str:
    """Return a URL without its password, whether in its user part or its query."""
    parts = urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc:
        account, _, host = netloc.rpartition("@")
        user, colon, _ = account.partition(":")
        netloc = f"{user}{colon and ':***'}@{host}"
    query = "&".join(
        f"{name}=***" if "password" in name else f"{name}={value}" if value else name
        for name, _, value in (field.partition("=") for field in parts.query.split("&") if field)
    )
    return f"{parts.scheme}://{netloc}{parts.path}" + (f"?{query}" if query else "")


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line, at once."""
    sys.stdout.write(orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode() + "\n")
    sys.stdout.flush()


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn an expected error into a message (or `{"error": {...}}`) and its exit code; no traceback."""
    try:
        yield
    except MillpondError as error:
        _report(error, as_json)
    except (RedisConnectionError, RedisTimeoutError, ConnectionError) as error:
        _report(Unavailable(f"cannot reach Redis: {error}; `millpond doctor` says what to do"), as_json)
    except RedisError as error:
        _report(MillpondError(f"Redis refused a command: {error}; `millpond doctor` says what to do"), as_json)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _report(error: MillpondError, as_json: bool) -> None:
    if as_json:
        print_json({"error": error.to_wire()})
    else:
        sys.stderr.write(f"millpond: {error.message}\n")
    raise SystemExit(exit_code(error)) from None
