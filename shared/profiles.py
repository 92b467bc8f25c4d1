"""Profiles: named cache classes. What goes in the key, for how long, and which text is folded together."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


class Profile(BaseModel):
    """One cache class. Times in seconds.

    `ttl` how long an answer may be served; `scope` the fields that must be present in a request's scope (or its
    body) and count in the key; `last_messages` how many of the newest messages count (system messages always do,
    all of them when unset); `normalise` fold case, white space and closing punctuation of the user's text;
    `unordered` body fields whose list order has no meaning; `endpoint` which API answers a miss.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttl: float = Field(default=DAY, ge=0.001, le=366 * DAY)
    scope: tuple[str, ...] = ()
    last_messages: int | None = Field(default=None, ge=1)
    normalise: bool = False
    unordered: tuple[str, ...] = ("context_ids",)
    endpoint: Literal["auto", "embeddings"] = "auto"


#: The profiles that ship; a deployment overrides or adds its own under `[profiles.NAME]`.
BUILT_IN: dict[str, Profile] = {
    "response": Profile(ttl=DAY),
    "chat": Profile(ttl=30 * MINUTE, last_messages=7),  # the message and the three turns before it
    "conversation": Profile(ttl=15 * MINUTE, scope=("conversation_id",), last_messages=1),
    "market": Profile(ttl=HOUR),
    "intent": Profile(ttl=HOUR, normalise=True, last_messages=1),
    "retrieval": Profile(ttl=DAY),
    "embedding": Profile(ttl=7 * DAY, normalise=True, endpoint="embeddings"),
    "context": Profile(ttl=HOUR, scope=("user",)),
    "workflow": Profile(ttl=30 * DAY, scope=("workflow",)),
}
DEFAULT_PROFILE = "response"
