"""What the interleavings know of requests and flights, and the dump they look at."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.errors import ProviderError
from shared.messages import Mode

DUMP = """
local out = {}
for _, name in ipairs(KEYS) do
  local kind = redis.call('TYPE', name).ok
  if kind ~= 'none' then
    local row = { name, kind, redis.call('PEXPIRETIME', name) }
    if kind == 'string' then row[4] = redis.call('GET', name)
    elseif kind == 'list' then row[4] = redis.call('LRANGE', name, 0, -1)
    elseif kind == 'hash' then row[4] = redis.call('HGETALL', name)
    else
      row[4] = redis.call('XRANGE', name, '-', '+')
      local pending = {}
      local groups = redis.pcall('XINFO', 'GROUPS', name)
      for _, group in ipairs(groups) do
        for _, p in ipairs(redis.call('XPENDING', name, group[2], '-', '+', 100)) do
          pending[#pending + 1] = { p[1], p[2], p[4] }
        end
      end
      row[5] = pending
    end
    out[#out + 1] = row
  end
end
return out
"""
KEEP_MS = 60_000
TTL_MS = 600_000
ERROR = ProviderError("the provider failed", status=500)


class Violation(AssertionError):
    """An invariant does not hold."""


def must(holds: object, what: str) -> None:
    """Raise `Violation` unless it holds."""
    if not holds:
        raise Violation(what)


@dataclass(slots=True)
class Ask:
    """A request: what it wants, when it was published, and which flight's outcome it is to be told."""

    id: str
    tags: tuple[str, ...] = ()
    mode: Mode = "default"
    published: int = -1
    message: bytes = b""
    aboard: str = ""

    @property
    def reads(self) -> bool:
        """Whether a stored answer may answer it."""
        return self.mode in ("default", "no-store")

    @property
    def shared(self) -> bool:
        """Whether it shares its flight."""
        return self.mode != "bypass"

    @property
    def stores(self) -> bool:
        """Whether its answer may be stored."""
        return self.mode in ("default", "refresh")


@dataclass(slots=True)
class Flight:
    """What history knows of one computation."""

    token: str
    began: int
    tags: set[str]
    shared: bool
    store: bool
    #: the request it began for; '' when it is a refresh
    began_for: str = ""
    waiters: list[str] = field(default_factory=list)
    ended: str = ""
    #: the flight whose answer stands in for the one it has not
    spare: str = ""
    computed: int = 0
    reclaimed: int = 0


class LostLease(Exception):
    """The actor lost its lease and stops."""
