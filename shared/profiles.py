"""Profiles: named cache classes. What goes in the key, for how long, and which text is folded together."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


class Profile(BaseModel):
    """One cache class. Times in seconds.

    `ttl` how long an answer is fresh (the soft expiry); for `stale_while_revalidate` seconds more (the hard expiry) it
    is served at once, marked stale, while one refresh runs; for `stale_if_error` seconds after that only when the
    provider fails, or is slower than `soft_timeout`. `early_refresh` is the beta of XFetch (0: never early).
    `negative_ttl` how long a provider's error is answered without asking again, doubled with each failure in a row.
    `probation` how long a new answer stays in Redis unless it proves popular (it stays in PostgreSQL).

    `providers` the chain asked for a miss, as `NAME:MODEL` (empty: the deployment's provider and the request's model);
    `resolver` an import string `module:function` that the LLM pool runs instead; `on_error` what the others who wait
    get when an application's own computation raises: its error, or the next of them computes.

    `scope` the fields that must be present in a request's scope (or its
    body) and count in the key; `last_messages` how many of the newest messages count (system messages always do,
    all of them when unset); `normalise` fold case, white space and closing punctuation of the user's text;
    `unordered` body fields whose list order has no meaning; `endpoint` which API answers a miss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttl: float = Field(default=DAY, ge=0.001, le=366 * DAY)
    stale_while_revalidate: float = Field(default=0.0, ge=0, le=366 * DAY)
    stale_if_error: float = Field(default=0.0, ge=0, le=366 * DAY)
    soft_timeout: float | None = Field(default=None, gt=0)
    early_refresh: float = Field(default=1.0, ge=0, le=100)
    negative_ttl: float = Field(default=1.0, ge=0, le=60)
    probation: float = Field(default=10 * MINUTE, ge=1)
    providers: tuple[str, ...] = ()
    resolver: str | None = Field(default=None, pattern=r"^[\w.]+:[\w.]+$")
    on_error: Literal["raise", "elect"] = "raise"
    scope: tuple[str, ...] = ()
    last_messages: int | None = Field(default=None, ge=1)
    normalise: bool = False
    unordered: tuple[str, ...] = ("context_ids",)
    endpoint: Literal["auto", "embeddings"] = "auto"


#: The profiles that ship; a deployment overrides or adds its own under `[profiles.NAME]`.
BUILT_IN: dict[str, Profile] = {
    "response": Profile(ttl=DAY, stale_if_error=HOUR),
    "chat": Profile(ttl=30 * MINUTE, last_messages=7),  # the message and the three turns before it
    "conversation": Profile(ttl=15 * MINUTE, scope=("conversation_id",), last_messages=1),
    "market": Profile(ttl=HOUR, stale_if_error=HOUR),
    "intent": Profile(ttl=HOUR, stale_if_error=HOUR, normalise=True, last_messages=1),
    "retrieval": Profile(ttl=DAY),
    "embedding": Profile(ttl=7 * DAY, normalise=True, endpoint="embeddings"),
    "context": Profile(ttl=HOUR, scope=("user",)),
    "workflow": Profile(ttl=30 * DAY, stale_if_error=DAY, scope=("workflow",)),
}
DEFAULT_PROFILE = "response"
#: The model of texts to embed that name none.
EMBEDDING_MODEL = "text-embedding-3-small"
