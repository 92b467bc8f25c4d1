"""L2: the answers in Redis. The calls of the scripts that read them, write them back and have them computed anew.

Each takes any number of one partition's answers; what comes back is in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from shared.keys import PartitionKeys
from shared.link import Command
from shared.messages import Question, spec_of
from shared.scripts import SCRIPTS, Arg

#: A refresh that nobody has taken up for this long (ms) is given up.
_REFRESH_MS = 600_000


class Kept(NamedTuple):
    """An answer that PostgreSQL kept. `own_tags` are those of the request it is to answer, if any."""

    key: str
    entry: bytes
    life_ms: int
    own_tags: Sequence[str] = ()


class Refresh(NamedTuple):
    """An answer to be computed anew. `too_old_ms`: unless it is younger; None: unless there is one.

    `tags` are those of the answer it replaces: who asks now need not be who tagged it.
    """

    question: Question
    body: bytes
    cache: bytes | None
    token: str
    too_old_ms: int | None = None
    tags: Sequence[str] = ()


def fetch(k: PartitionKeys, asked: Sequence[Question]) -> Command:
    """Return the call that looks for the answers to these questions; before them comes the fence."""
    names = [k.tags, *(k.entry(question.key) for question in asked)]
    return SCRIPTS["fetch"].call(names, [part for q in asked for part in (q.key, "\n".join(q.own_tags))])


def rehydrate(k: PartitionKeys, fence: bytes, found: Sequence[Kept]) -> Command:
    """Return the call that writes these back where that is allowed; `fence` as it was before PostgreSQL was asked."""
    args: list[Arg] = [fence]
    for one in found:
        args += [one.key, one.entry, one.life_ms, "\n".join(one.own_tags)]
    return SCRIPTS["rehydrate"].call([k.tags, *(k.entry(one.key) for one in found)], args)


def revalidate(k: PartitionKeys, most: int, wanted: Iterable[Refresh]) -> Command:
    """Return the call that has these computed, if they are not already and less than `most` wait for that."""
    names, args = [k.refreshes, k.tags], list[Arg]([most, _REFRESH_MS])
    for question, body, cache, token, too_old_ms, kept in wanted:
        key, tags = question.key, "\n".join(dict.fromkeys((*question.tags, *kept)))
        names += [k.entry(key), k.flight(key), k.failed(key)]
        args += [key, token, body, spec_of(question, cache), tags, question.ttl_ms]
        args.append("" if too_old_ms is None else too_old_ms)
    return SCRIPTS["revalidate"].call(names, args)
