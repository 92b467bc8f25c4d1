"""The echo's worker, a process of its own: reads requests in batches, replies to each client once per batch.

Run as `python -m producers.bench.echo '{"url": …, "size": …}'`; every reply is `size` bytes.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

import orjson

from producers.bench.rivals import ECHO_GROUP, ECHO_REQUESTS
from shared.console import print_json
from shared.link import Command, Link
from shared.loop import run_fast

_BATCH = 256


async def work(url: str, size: int) -> None:
    """Echo until killed."""
    reading, link = Link(url, name="echo-read"), Link(url, name="echo")
    payload = b"." * size
    await link.call(("XGROUP", "CREATE", ECHO_REQUESTS, ECHO_GROUP, "0", "MKSTREAM"))
    print_json({"event": "ready"})
    read_command = (
        "XREADGROUP", "GROUP", ECHO_GROUP, "echo", "COUNT", _BATCH, "BLOCK", 1000, "STREAMS", ECHO_REQUESTS, ">",
    )  # fmt: skip
    retiring: list[bytes] = []
    while True:
        commands: list[Command] = [read_command]
        if retiring:
            commands[:0] = [("XACK", ECHO_REQUESTS, ECHO_GROUP, *retiring), ("XDEL", ECHO_REQUESTS, *retiring)]
        read = (await reading.send(commands))[-1]
        retiring = [entry_id for entry_id, _ in read[0][1]] if read else []
        if read:
            await link.send(_replies(read[0][1], payload))


def _replies(batch: list[Any], payload: bytes) -> list[Command]:
    replies: defaultdict[bytes, list[bytes]] = defaultdict(list)
    for _, fields in batch:
        message = dict(zip(fields[::2], fields[1::2], strict=True))
        replies[message[b"reply"]] += (message[b"id"], payload)
    return [("XADD", b"bench:echo:replies:" + client, "*", *pairs) for client, pairs in replies.items()]


if __name__ == "__main__":
    run_fast(work(**orjson.loads(sys.argv[1])))
