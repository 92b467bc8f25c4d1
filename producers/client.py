"""The asynchronous client: publish a request, await its one outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from producers.computing import Computing
from producers.connection import Directives
from producers.invalidation import Invalidation, Order, append, checked, counted, labels_of
from producers.reply import Reply
from shared.errors import InvalidRequest
from shared.messages import MAX_DEADLINE, Mode, seconds
from shared.profiles import EMBEDDING_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Client(Computing):
    """A connection to a Millpond deployment, for one event loop.

        async with Client() as pond:
            reply = await pond.ask("What is a millpond?", model="gpt-4o-mini")

    `url` (else the settings' server, else the running embedded one) names the Redis server; `tenant` and `profile`
    are defaults for every request. Thousands of requests may wait at once on its two connections.

    `degraded` says what happens when Redis has been out of reach for `degrade_after` seconds. `fail`: requests wait for
    it until their own deadline. `cache-only`: they are answered with what this client itself has seen and is still
    fresh, else with `Unavailable`. `direct`: else by the provider, called from this process (needs the extra
    `workers`), once for all who ask the same here. Such replies say `degraded`. It passes by itself when Redis answers.
    What others invalidate while Redis is away, this client cannot know; its own `invalidate` raises `Unavailable` then.
    """

    async def ask(
        self,
        /,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        input: Any = None,  # noqa: A002 (the name of the API's own field)
        model: str | None = None,
        profile: str | None = None,
        tenant: str | None = None,
        mode: Mode | None = None,
        ttl: float | None = None,
        max_age: float | None = None,
        tags: Sequence[str] = (),
        scope: Mapping[str, str] | None = None,
        experiment: str | None = None,
        variant: str | None = None,
        unit: str | None = None,
        timeout: float | None = None,
        **fields: Any,
    ) -> Reply:
        """Ask, and await the answer.

        Give a `prompt`, or OpenAI-style `messages`, or `input`; further `fields` go into the request's body as they
        are (and count in the key). `ttl` and `max_age` bound how long the answer may be served and how old a stored
        one may be, `timeout` how long to wait here, all in seconds. Without `model` the workers' default is asked.
        `mode`: `default`; `refresh` (recompute and store); `only-if-cached`; `no-store` (read, but do not store);
        `bypass` (neither). `experiment` and `variant` are labels the request is counted under; without a `variant` one
        the deployment declares is drawn by its `unit`, a user's id for instance.

        Raises:
            InvalidRequest: a field is wrong; `.field` names it.
            Overloaded: refused before it was accepted; `.retry_after` seconds.
            DeadlineExceeded: no outcome within `timeout`.
            NotCached: nothing is stored for an `only-if-cached` request.
            ProviderError: or one of its kinds, when the provider failed.
            Unavailable: no server could be reached to connect.
        """
        if (prompt is None) + (messages is None) + (input is None) != 2:
            raise InvalidRequest("give exactly one of prompt, messages or input", field="prompt")
        body: dict[str, Any] = {} if model is None else {"model": model}
        if prompt is not None:
            if not isinstance(prompt, str) or not prompt.strip():
                raise InvalidRequest("prompt must be a text, and not empty", field="prompt")
            body["messages"] = [{"role": "user", "content": prompt}]
        elif messages is not None:
            body["messages"] = messages
        else:
            body["input"] = input
        if fields:
            body.update(fields)
        return await self.ask_body(
            body,
            profile=profile,
            tenant=tenant,
            mode=mode,
            ttl=ttl,
            max_age=max_age,
            tags=tags,
            scope=scope,
            experiment=experiment,
            variant=variant,
            unit=unit,
            timeout=timeout,
        )

    async def ask_body(
        self, /, body: Mapping[str, Any] | bytes, *, timeout: float | None = None, **directives: Unpack[Directives]
    ) -> Reply:
        """Ask with an OpenAI-style body (a mapping, or its JSON), sent as it is. Otherwise as `ask`."""
        encoded = body if isinstance(body, bytes) else self._encode(body, "body")
        reply = await self._request(encoded, directives, timeout)
        assert isinstance(reply, Reply)  # noqa: S101 (only who offers to compute is asked to)
        return reply

    async def embed(
        self,
        /,
        texts: str | Sequence[str],
        *,
        model: str = EMBEDDING_MODEL,
        profile: str = "embedding",
        timeout: float | None = None,
        **fields: Any,
    ) -> NDArray[np.float32]:
        """Return the vectors of texts: float32, shape (n, dimensions); of one text given as such, (dimensions,).

        Each text is cached by itself, normalised as the profile says: only those never seen are computed, repeated
        ones once. Directives (`tenant`, `tags`, `ttl`, …) are as in `ask`; further `fields` (`dimensions`) go into
        the provider's body. Needs NumPy (`pip install 'millpond[numpy]'`).

        Raises:
            InvalidRequest: a text is empty, or no text; a field is wrong.
            ProviderError: or another of `ask`'s errors, when a text has no vector.
        """
        from producers.embeddings import checked, matrix

        several = checked(texts)
        told = {name: fields.pop(name) for name in list(fields) if name in Directives.__annotations__}
        bodies = {text: {"model": model, "input": text} | fields for text in several}
        work = (self.ask_body(body, profile=profile, timeout=timeout, **told) for body in bodies.values())
        found = dict(zip(bodies, await asyncio.gather(*work, return_exceptions=True), strict=True))
        vectors = matrix([found[text] for text in several])
        return vectors[0] if isinstance(texts, str) else vectors

    async def invalidate(
        self,
        *,
        tags: Sequence[str] = (),
        key: str | None = None,
        profile: str | None = None,
        tenant: str | None = None,
        model: str | None = None,
        prefix: str | None = None,
        everything: bool = False,
        dry_run: bool = False,
        wait: float | None = None,
        reason: str = "",
        by: str | None = None,
    ) -> Invalidation:
        """Forget every answer that carries any of what is named; `prefix`: any tag that begins with it.

        Once it returns, no request published afterwards, by anyone, is answered from an entry or a computation that
        began before it. `dry_run` forgets nothing and counts what it would concern. With `wait`, it also waits so many
        seconds for the invalidation worker to delete the answers physically, and tells how many there were; see
        `Invalidation`. `reason` and `by` (default: this client's id) are kept in the audit.

        Raises:
            InvalidRequest: nothing, or something malformed, was named.
            Unavailable: not every partition's log holds it; call again (twice does no harm).
            DeadlineExceeded: a `dry_run` that nobody counted in time: no invalidation worker runs.
        """
        labels = labels_of(
            tags=tags, key=key, profile=profile, tenant=tenant, model=model, prefix=prefix, everything=everything
        )
        limit = None if wait is None else seconds(wait, "wait", least=0.0, most=MAX_DEADLINE)
        order = checked(Order(labels, by or self._id, reason, dry_run))
        link, _ = await self._connected()
        written = await append(link, self._partitions, order, log_limit=self._settings.invalidation_limit)
        if self._fallback is not None and not dry_run:
            self._fallback.invalidated()
        return await counted(link, written, limit)
