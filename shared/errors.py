"""Every error Millpond raises on purpose.

    MillpondError
    ├── ConfigError            a setting is wrong, or disagrees with the deployment
    ├── InvalidRequest         the request itself is wrong; `field` names where
    ├── Overloaded             refused before it was accepted; try again after `retry_after` seconds
    ├── DeadlineExceeded       (a TimeoutError) no outcome arrived before the caller's own deadline
    ├── NotCached              `mode="only-if-cached"` and nothing was cached
    ├── Superseded             a `put` came too late: what it was computed from was invalidated, or a newer one is there
    ├── ComputeError           the application that computed a value for all who asked raised
    ├── Unavailable            (a ConnectionError) Redis could not be reached
    ├── Poisoned               the message repeatedly killed its workers and was dead-lettered
    └── ProviderError          the LLM provider answered with an error; `status` is its HTTP status
        ├── RateLimited        429; `retry_after` seconds when the provider said so
        ├── ProviderTimeout    no answer within the attempt or total time-out
        ├── ProviderUnreachable  no connection to the provider
        └── ContentFiltered    the provider refused the content

On the wire an error is one JSON object: `{"code", "message", ...}` with the code of its class and the fields
its class declares (see `to_wire`, `from_wire`).
"""

from __future__ import annotations

from typing import Any, ClassVar


class MillpondError(Exception):
    """Base of all errors raised on purpose; `code` is stable and travels on the wire."""

    code: ClassVar[str] = "internal"
    #: further attributes that travel on the wire when they are set
    details: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        for name in self.details:
            setattr(self, name, details.pop(name, None))
        if details:
            raise TypeError(f"{type(self).__name__} has no detail named {', '.join(details)}")

    def to_wire(self) -> dict[str, Any]:
        """Return the JSON object that carries this error on a reply channel."""
        wire = {"code": self.code, "message": self.message}
        wire.update({n: v for n in self.details if (v := getattr(self, n)) is not None})
        return wire


class ConfigError(MillpondError):
    """A setting is wrong or disagrees with what the deployment was born with."""

    code = "config"
    details = ("field",)
    field: str | None


class InvalidRequest(MillpondError):
    """The request is malformed; `field` names the offending field."""

    code = "invalid_request"
    details = ("field",)
    field: str | None


class Overloaded(MillpondError):
    """Refused because a queue is at its limit; nothing was accepted. Retry after `retry_after` seconds."""

    code = "overloaded"
    details = ("retry_after",)
    retry_after: float | None


class DeadlineExceeded(MillpondError, TimeoutError):
    """The caller's own deadline passed before an outcome arrived."""

    code = "deadline_exceeded"


class NotCached(MillpondError):
    """Nothing is cached for an `only-if-cached` request; `epoch` is the newest invalidation its worker knew of."""

    code = "not_cached"
    details = ("epoch",)
    epoch: str | None


class Superseded(MillpondError):
    """A value was not stored: it was invalidated since it began to be computed, or a newer one is there."""

    code = "superseded"


class ComputeError(MillpondError):
    """The application that computed a value for all who asked raised; `kind` is the name of its exception."""

    code = "compute_error"
    details = ("kind",)
    kind: str | None


class Unavailable(MillpondError, ConnectionError):
    """Redis could not be reached."""

    code = "unavailable"


class Poisoned(MillpondError):
    """The message was delivered too often without an outcome and lies in the dead letters."""

    code = "poisoned"


class ProviderError(MillpondError):
    """The LLM provider answered with an error."""

    code = "provider_error"
    details = ("status", "provider", "retry_after")
    status: int | None
    provider: str | None
    retry_after: float | None
    #: whether a circuit breaker has counted it: one failed batch is one failure (not on the wire)
    counted: bool = False
    #: what `retryable` is of every error of a kind; None: its status tells
    passes: ClassVar[bool | None] = None

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed: by its kind, else 408, 409, 429 and 5xx may, other 4xx never."""
        if self.passes is not None:
            return self.passes
        return self.status is not None and (self.status in (408, 409, 429) or self.status >= 500)


class RateLimited(ProviderError):
    """The provider answered 429."""

    code = "rate_limited"
    passes = True


class ProviderTimeout(ProviderError):
    """The provider did not answer in time."""

    code = "provider_timeout"
    passes = True  # the next attempt may be faster


class ProviderUnreachable(ProviderError):
    """No connection to the provider could be made, or it broke."""

    code = "provider_unreachable"
    passes = True  # connections come back


class ContentFiltered(ProviderError):
    """The provider refused the content of the request."""

    code = "content_filtered"
    passes = False  # the same content is refused again


def _tree(base: type[MillpondError]) -> dict[str, type[MillpondError]]:
    known = {base.code: base}
    for sub in base.__subclasses__():
        known.update(_tree(sub))
    return known


_BY_CODE = _tree(MillpondError)
#: Every code an error may have.
CODES = tuple(_BY_CODE)


def from_wire(wire: dict[str, Any]) -> MillpondError:
    """Build the error that `to_wire` described; an unknown code becomes a plain `MillpondError`."""
    kind = _BY_CODE.get(str(wire.get("code")), MillpondError)
    return kind(str(wire.get("message", "")), **{n: wire[n] for n in kind.details if n in wire})
