"""Warming: answers computed before anybody asks for them, through the refreshes, which wait behind every live fill.

What L2 holds is left alone; what only PostgreSQL holds is brought back; the rest is computed, at most half a worker's
slots at once, so that a live fill finds one. Nobody waits for a warmed flight: whether it landed is looked at.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson

from shared.entry import Entry, unpack
from shared.envelope import Unreadable
from shared.errors import InvalidRequest, Unavailable
from shared.keys import PRESSURE, PartitionKeys, partition_of, worker
from shared.link import Link
from shared.messages import Question, Rules, understand
from shared.settings import Settings
from shared.tiers import l2

if TYPE_CHECKING:
    from asyncpg import Pool

_POLL = 0.1
#: Keys asked about in one step.
_BATCH = 64
_PRESSED = 1.0

_FIND = "SELECT key, entry FROM answers WHERE key = ANY($1::bytea[]) AND expires > now()"
_OFTEN = """
SELECT encode(often.key, 'hex') AS key, profile, tenant, tags, prompt::text AS prompt,
  (extract(epoch FROM fresh - created) * 1000)::bigint AS ttl_ms
FROM (
  SELECT key, sum(hits) AS hits FROM top_keys WHERE hour >= $1 GROUP BY key ORDER BY 2 DESC, 1 LIMIT $2
) AS often LEFT JOIN answers USING (key) ORDER BY often.hits DESC, 1"""


@dataclass(frozen=True, slots=True)
class Wish:
    """A request whose answer is wanted: its body, its cache directives (JSON) and what they mean."""

    question: Question
    body: bytes
    cache: bytes | None


@dataclass(slots=True)
class Account:
    """What a warming came to. Each wish counts once: `repeated` are those of a key already wished for.

    `present` lay in Redis, `restored` came back from PostgreSQL, `warmed` were computed (`dollars`; `unpriced` of them
    of no known price); `under_way` were being computed for somebody else; `backing_off` have just failed; `failed` were
    tried (`errors` by code); `unfinished` were not ended when the warming was.
    """

    wishes: int
    repeated: int = 0
    present: int = 0
    restored: int = 0
    warmed: int = 0
    under_way: int = 0
    backing_off: int = 0
    failed: int = 0
    unfinished: int = 0
    dollars: float = 0.0
    unpriced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def settled(self) -> int:
        """How many wishes need nothing more."""
        return (
            self.repeated + self.present + self.restored + self.warmed + self.under_way + self.backing_off + self.failed
        )

    @property
    def complete(self) -> bool:
        """Whether every wish's answer is there, or on its way."""
        return not (self.backing_off or self.failed or self.unfinished)


class Warmer:
    """Warms one deployment. `rate` bounds the computations begun per second, `at_once` those under way."""

    def __init__(
        self,
        link: Link,
        settings: Settings,
        partitions: int,
        pool: Pool | None = None,
        *,
        rate: float | None = None,
        at_once: int | None = None,
    ) -> None:
        self.account = Account(0)
        self._link = link
        self._settings = settings
        self._partitions = partitions
        self._pool = pool
        self._interval = 1 / rate if rate else 0.0
        self._at_once = at_once or max(1, settings.concurrency // partitions // 2) * partitions
        self._name = f"warm-{secrets.token_hex(4)}"
        self._flights = itertools.count(1)
        self._due = 0.0
        self._begun: dict[str, tuple[PartitionKeys, bytes]] = {}

    async def run(self, wishes: Iterable[Wish], told: Callable[[Account], None] = lambda _: None) -> Account:
        """Warm all of them; `told` hears how it stands, and `account` keeps it. What was begun outlives a cancellation.

        Raises:
            Unavailable: no LLM worker lives, or none has ended a computation for twice the time one may take.
        """
        asked = list(wishes)
        account = self.account = Account(len(asked))
        waiting = deque({wish.question.key: wish for wish in asked}.values())
        account.repeated = account.wishes - len(waiting)
        began = moved = time.monotonic()
        await self._alive()
        try:
            while waiting or self._begun:
                before = account.settled
                for names, batch in self._next(waiting):
                    waiting.extendleft(reversed(await self._begin(names, batch, account)))
                await self._look(account)
                account.seconds = time.monotonic() - began
                told(account)
                if account.settled != before:
                    moved = time.monotonic()
                elif time.monotonic() - moved > 2 * self._settings.total_timeout:
                    raise Unavailable("no computation has ended for a while: `millpond doctor` says what to do")
                if waiting or self._begun:
                    await asyncio.sleep(min(_POLL, self._interval) if waiting and self._interval else _POLL)
        finally:
            account.unfinished = account.wishes - account.settled
            account.seconds = time.monotonic() - began
        return account

    async def _alive(self) -> None:
        cursor = b"0"
        while True:
            cursor, found = await self._link.call(("SCAN", cursor, "MATCH", worker("llm-*"), "COUNT", 1000))
            if found:
                return
            if cursor == b"0":
                raise Unavailable("no LLM worker runs here to compute anything: millpond up, or millpond worker llm")

    def _next(self, waiting: deque[Wish]) -> list[tuple[PartitionKeys, list[Wish]]]:
        """Take what may be begun now, by partition."""
        room = min(_BATCH, self._at_once - len(self._begun))
        if self._interval:
            now = time.monotonic()
            self._due = max(self._due, now - 1.0)  # what was not used up is not saved for longer than a second
            room = min(room, int((now - self._due) / self._interval) + 1 if now >= self._due else 0)
        parts: dict[int, list[Wish]] = {}
        for _ in range(min(room, len(waiting))):
            wish = waiting.popleft()
            parts.setdefault(partition_of(wish.question.key, self._partitions), []).append(wish)
        return [(PartitionKeys(partition), batch) for partition, batch in parts.items()]

    async def _begin(self, names: PartitionKeys, batch: list[Wish], account: Account) -> list[Wish]:
        """Begin what is missing; return what there was no room for."""
        # The fence is read before PostgreSQL is asked.
        fetch = l2.fetch(names, [wish.question for wish in batch])
        (fence, *found), pressed = await self._link.send([fetch, ("EXISTS", PRESSURE)])
        missing = [wish for wish, text in zip(batch, found, strict=True) if isinstance(text, int)]
        account.present += len(batch) - len(missing)
        missing = await self._restore(names, fence, missing, account)
        if pressed and missing:
            await asyncio.sleep(_PRESSED)  # Redis is short of memory: no worker computes what nobody waits for
            return missing
        return await self._revalidate(names, missing, account) if missing else []

    async def _restore(self, names: PartitionKeys, fence: bytes, batch: list[Wish], account: Account) -> list[Wish]:
        """Bring back what PostgreSQL holds and the markers let pass; return the rest."""
        if self._pool is None or not batch:
            return batch
        wanted = {wish.question.key: wish.question for wish in batch}
        rows = await _fetch(self._pool, _FIND, [bytes.fromhex(key) for key in wanted])
        found = [(wanted[row["key"].hex()], row["entry"]) for row in rows]
        stored = [l2.Kept(question.key, text, question.probation_ms, question.own_tags) for question, text in found]
        if not stored:
            return batch
        judged = await self._link.call(l2.rehydrate(names, fence, stored))
        there = {one.key for one, valid in zip(stored, judged, strict=True) if valid}
        account.restored += len(there)
        return [wish for wish in batch if wish.question.key not in there]

    async def _revalidate(self, names: PartitionKeys, batch: list[Wish], account: Account) -> list[Wish]:
        tokens = [f"{self._name}.{next(self._flights)}" for _ in batch]
        wanted = [l2.Refresh(w.question, w.body, w.cache, token) for w, token in zip(batch, tokens, strict=True)]
        refused = []
        results = await self._link.call(l2.revalidate(names, self._settings.fill_limit, wanted))
        for wish, token, result in zip(batch, tokens, results, strict=True):
            if result == 1:
                self._begun[wish.question.key] = names, token.encode()
                self._due += self._interval
            elif result == 4:
                refused.append(wish)
            else:
                account.present += result == 0
                account.under_way += result == 2
                account.backing_off += result == 3
        return refused

    async def _look(self, account: Account) -> None:
        """See which of the begun flights have ended, and what they came to."""
        if not self._begun:
            return
        begun = list(self._begun.items())
        tokens = await self._link.send([("HGET", names.flight(key), "token") for key, (names, _) in begun])
        ended = [(key, names) for (key, (names, own)), token in zip(begun, tokens, strict=True) if token != own]
        texts = await self._link.send(
            [command for key, names in ended for command in (("GET", names.entry(key)), ("GET", names.failed(key)))]
        )
        for (key, _), text, failure in zip(ended, texts[::2], texts[1::2], strict=True):
            del self._begun[key]
            _settle(account, _opened(key, text), failure)


async def _fetch(pool: Pool, query: str, *arguments: Any) -> list[Any]:
    from shared.database import DATABASE_ERRORS, cannot_reach

    try:
        rows: list[Any] = await pool.fetch(query, *arguments)
    except DATABASE_ERRORS as error:
        raise Unavailable(cannot_reach(error)) from None
    return rows


def _opened(key: str, text: bytes | None) -> Entry | None:
    try:
        return unpack(key, text) if text else None
    except Unreadable:
        return None


def _settle(account: Account, entry: Entry | None, failure: bytes | None) -> None:
    if entry is None:
        code = "not_stored"
        if failure:
            code = str(orjson.loads(failure.partition(b"\n")[2]).get("code", code))
        account.failed += 1
        account.errors[code] = account.errors.get(code, 0) + 1
        return
    account.warmed += 1
    account.unpriced += entry.cost is None
    account.dollars += entry.cost or 0.0
    account.prompt_tokens += entry.tokens[0]
    account.completion_tokens += entry.tokens[1]


def wish_for(body: dict[str, Any], cache: dict[str, Any], rules: Rules) -> Wish:
    """Return the wish for a request's answer.

    Raises:
        InvalidRequest: it is no request, or one whose answer would not be stored.
    """
    raw, directives = orjson.dumps(body), orjson.dumps(cache) if cache else None
    question = understand(raw, directives, rules)
    if question.mode != "default" or question.lead:
        raise InvalidRequest("only an answer that is stored can be warmed", field="mode")
    return Wish(question, raw, directives)


async def most_asked(pool: Pool, since: datetime, most: int, rules: Rules) -> tuple[list[Wish], int]:
    """Return wishes for the answers hit most since then, and how many of those cannot be asked again.

    That is, whose prompt was not stored, or whose key has changed since: another model version, another profile.
    """
    wishes: list[Wish] = []
    rows = await _fetch(pool, _OFTEN, since, most)
    for row in rows:
        wish = _again(row, rules) if row["prompt"] is not None else None
        if wish is not None:
            wishes.append(wish)
    return wishes, len(rows) - len(wishes)


def _again(row: Any, rules: Rules) -> Wish | None:
    try:
        wish = wish_for(orjson.loads(row["prompt"]), {"profile": row["profile"], "tenant": row["tenant"]}, rules)
    except InvalidRequest:
        return None
    question = wish.question
    if question.key != row["key"]:
        return None
    # Its own tags and time to live, or what was asked with them could no longer be invalidated, or would live too long.
    own = tuple(sorted(set(row["tags"]) - set(question.tags)))
    return replace(
        wish, question=replace(question, own_tags=own, tags=(*question.tags, *own), ttl_ms=max(1, row["ttl_ms"]))
    )
