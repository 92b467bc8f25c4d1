"""What a provider is: something that completes a call, or says by a typed error why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import orjson

from shared.answers import usage_of

Endpoint = Literal["chat/completions", "responses", "embeddings"]
ENDPOINTS: tuple[str, ...] = get_args(Endpoint)

_STREAMING = ("stream", "stream_options")


@dataclass(frozen=True, slots=True)
class Call:
    """One question to a provider: `body` as the application sent it, for at most `timeout` seconds.

    `stream` and `stream_options` are dropped: an answer is cached whole.

    Raises:
        ValueError: `endpoint` is none of `ENDPOINTS`.
    """

    endpoint: str
    body: dict[str, Any]
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise ValueError(f"endpoint must be one of {', '.join(ENDPOINTS)}, not {self.endpoint!r}")
        if any(field in self.body for field in _STREAMING):
            body = {name: value for name, value in self.body.items() if name not in _STREAMING}
            object.__setattr__(self, "body", body)


@dataclass(frozen=True, slots=True)
class Completion:
    """A provider's answer: `body` is its own JSON, byte for byte; the tokens are read from it.

    With a `value` (an entry's: `{"kind": "bytes"}`, or `{"kind": "array", "dtype", "shape"}`) the body is those bytes.
    A `judged` answer does not pass the quality gate: it is no provider's JSON.
    """

    body: bytes
    prompt_tokens: int
    completion_tokens: int
    value: dict[str, Any] | None = None
    judged: bool = False

    @classmethod
    def read(cls, body: bytes) -> Completion:
        """Read a completion from its JSON.

        Raises:
            ValueError: `body` is not a JSON object.
        """
        answer = orjson.loads(body)
        if not isinstance(answer, dict):
            raise ValueError("the answer is not a JSON object")
        prompt_tokens, completion_tokens = usage_of(answer)
        return cls(
            body=body,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )


class Provider(Protocol):
    """An LLM provider. `complete` may run many times at once; cancelling it ends the provider's work."""

    name: str

    async def complete(self, call: Call) -> Completion:
        """Answer one call.

        Raises:
            ProviderError: or one of its kinds, with `provider`, `status` and `retry_after` where they are known.
        """
        ...

    async def close(self) -> None:
        """Give up connections; calls in flight fail. Safe to call twice."""
        ...
