"""How a lookup worker puts what no tier holds aboard a flight: the commands, and what they came to."""

from __future__ import annotations

from typing import Any

import orjson

from shared import keys
from shared.entry import Entry
from shared.keys import PartitionKeys
from shared.link import Command
from shared.messages import Question, spec_of
from shared.outbox import waiter
from shared.scripts import SCRIPTS
from shared.settings import Settings
from shared.tiers import l2
from workers.batch import Ask

#: How the token of a flight begins that an application computes: no fill stands for it.
LED = "lead-"

_GRACE_MS = 5000


class Joining:
    """Writes the joins and refreshes of one consumer, each with a token that nobody else gives."""

    def __init__(self, partition_keys: PartitionKeys, settings: Settings, group: str, name: str) -> None:
        self._keys = partition_keys
        self._settings = settings
        self._owner = (group, name)
        self._flights = 0

    def _token(self, prefix: str = "") -> str:
        self._flights += 1
        return f"{prefix}{self._owner[1]}.{self._flights}"

    def join(self, question: Question, asks: list[Ask], now_ms: int) -> Command:
        """Return the command that puts these requests aboard."""
        first, k, key = asks[0], self._keys, question.key
        bypass = question.mode == "bypass"
        oldest = 0 if question.max_age_ms is None else now_ms - question.max_age_ms
        lease_ms = int(self._settings.compute_lease * 1000) if question.lead else 0
        # What an application computes is counted nowhere.
        counted = () if lease_ms else (question.kind.experiment, question.kind.variant)
        token = f"{first.client}.{first.request_id.decode()}" if bypass else self._token(LED if lease_ms else "")
        return SCRIPTS["join"].call(
            [
                k.requests, k.fills, k.entry(key), k.flight(key), k.tags, k.waiters(key, ""), k.failed(key),
                k.refreshes,
            ],
            [
                *self._owner, key, token, question.mode, oldest, question.ttl_ms, int(question.stores),
                max(ask.deadline_ms for ask in asks) + _GRACE_MS, self._settings.fill_limit,
                first.body, spec_of(first.question, first.cache), "\n".join(question.tags), lease_ms, keys.LLM_GROUP,
                *(part for ask in asks for part in (ask.message_id, waiter(ask.client, ask.request_id, *counted))),
            ],
        )  # fmt: skip

    def refresh(self, stale: list[tuple[Ask, Entry]]) -> Command:
        """Return the command that has answers computed anew, unless younger than these; their tags are kept."""
        wanted = [
            l2.Refresh(ask.question, ask.body, ask.cache, self._token(), entry.created_ms, entry.tags)
            for ask, entry in stale
        ]
        return l2.revalidate(self._keys, self._settings.fill_limit, wanted)


def lead_payload(question: Question, result: list[Any], lease: float, partition: int) -> tuple[str, bytes, bytes]:
    """Return the client, request id and payload that make an application compute its request itself."""
    _, token, _, who, epoch, tags, ttl_ms = result
    client, request_id = who.split(b" ")
    lead = {
        "token": token.decode(),
        "epoch": epoch.decode(),
        "key": question.key,
        "partition": partition,
        "lease": lease,
        "ttl_ms": int(ttl_ms),
        "stale_ms": question.stale_ms,
        "error_ms": question.error_ms,
        "probation_ms": question.probation_ms,
        "tags": tags.decode().split("\n"),
        "model": question.model,
    }
    return client.decode(), request_id, orjson.dumps({"lead": lead})
