"""What a client meets at the edges of what it expects: workers that start late, clocks that stop, cuts and cancels."""

from __future__ import annotations

import asyncio
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest

from producers.blocking import BlockingClient
from shared.errors import DeadlineExceeded, InvalidRequest, Unavailable
from shared.scripts import SCRIPTS
from tests import faults_support
from tests.faults_support import Pond, answers, body_of, outcomes, until
from tests.proxy import Proxy

pond = faults_support.pond

PROMPT = "What is a fish ladder?"
FAST: dict[str, Any] = {"simulated_first_token": 0.0}


def in_four(pond: Pond) -> Pond:
    """Return the deployment seen as one of four partitions."""
    return Pond(pond.url, pond.redis, pond.options | {"partitions": 4})


def test_a_blocking_client_used_after_its_close_is_unavailable(tmp_path: Path) -> None:
    client = BlockingClient(f"unix://{tmp_path}/none.sock")
    client.close()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for use in (
            lambda: client.ask(PROMPT),
            lambda: client.ask_body(body_of(PROMPT)),
            lambda: client.invalidate(everything=True),
            client.__enter__,
        ):
            with pytest.raises(Unavailable, match="make a new one"):
                use()
        gc.collect()
    assert [str(one.message) for one in warned] == []


async def test_a_client_that_comes_first_leaves_the_partitions_to_the_workers(pond: Pond) -> None:
    pond = in_four(pond)
    async with pond.client(partitions=None) as client, pond.working("lookup", "llm", **FAST):
        await answers([client.ask(f"{PROMPT} ({n})") for n in range(12)])
        ids = await client.invalidate(everything=True)
        assert sorted(ids) == [0, 1, 2, 3]
        assert all(pond.redis.xrange(k.invalidations, ids[k.partition], ids[k.partition]) for k in pond.all_names())
        found = await answers([client.ask(f"{PROMPT} ({n})") for n in range(12)])
    assert {reply.tier for reply in found} == {"llm"}


async def test_a_profile_only_the_workers_know_is_answered_from_every_partition(pond: Pond) -> None:
    pond = in_four(pond)
    profiles = {"faq": {"ttl": 60}}
    async with pond.working("lookup", "llm", profiles=profiles, **FAST), pond.client() as client:
        first = await answers([client.ask(f"{PROMPT} ({n})", profile="faq") for n in range(12)])
        again = await answers([client.ask(f"{PROMPT} ({n})", profile="faq") for n in range(12)])
    assert all(0 < reply.ttl <= 60 for reply in first)
    assert {reply.tier for reply in again} <= {"l1", "l2"}
    assert pond.calls() == 12


async def test_a_profile_nobody_knows_is_refused_by_the_workers(pond: Pond) -> None:
    pond = in_four(pond)
    async with pond.working("lookup"), pond.client() as client:
        with pytest.raises(InvalidRequest, match="unknown profile") as refusal:
            await client.ask(PROMPT, profile="faq")
    assert refusal.value.field == "profile"


@pytest.mark.parametrize("field", ["tenant", "profile", "mode"])
async def test_an_empty_directive_is_wrong_and_not_the_default(pond: Pond, field: str) -> None:
    directive: dict[str, Any] = {field: ""}
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        await client.ask(PROMPT)
        with pytest.raises(InvalidRequest) as refusal:
            await client.ask(PROMPT, **directive)
    assert refusal.value.field == field


async def test_a_clock_that_stood_still_is_set_by_the_server_s(pond: Pond) -> None:
    """A suspended machine's monotonic clock stands still: told in it, every deadline has passed already."""
    async with pond.working("lookup", "llm", **FAST), pond.client() as client:
        assert client._channel is not None
        client._channel.clock_offset -= 3600
        async with asyncio.timeout(5):
            while isinstance((await outcomes([client.ask(PROMPT)]))[0], DeadlineExceeded):
                pass
        await client.ask(PROMPT)


@pytest.mark.parametrize("reached", ["millpond-client", "millpond-client-read"])
async def test_a_connect_that_is_cancelled_leaves_no_connection_open(pond: Pond, reached: str) -> None:
    before = _connections(pond)
    async with Proxy.to(pond.url) as proxy:
        proxy.delay = 0.05
        client = pond.client(proxy.url)
        connecting = asyncio.create_task(client.connect())
        await until(lambda: _connections(pond, reached) - before, "one connection is open")
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        await until(lambda: _connections(pond) <= before, "every connection is closed", timeout=5)


def _connections(pond: Pond, *names: str) -> set[str]:
    """Return the ids of the connections of clients, or of those with these names."""
    wanted = names or ("millpond-client", "millpond-client-read")
    return {found["id"] for found in pond.redis.client_list() if found["name"] in wanted}


async def test_a_request_that_may_have_been_accepted_is_never_called_refused(pond: Pond) -> None:
    """It was accepted and the reply lost; published again it finds the stream full, of itself."""
    publish = SCRIPTS["publish"].sha.encode()
    async with Proxy.to(pond.url) as proxy, pond.client(proxy.url, request_limit=1) as client:
        before = _scripts_run(pond)
        proxy.cut_after(lambda data: publish in data)
        asked = asyncio.create_task(client.ask(PROMPT))
        await until(lambda: _scripts_run(pond) >= before + 2, "it was published again")
        assert (proxy.cuts, pond.length("requests")) == (1, 1)
        async with pond.working("lookup", "llm", **FAST):
            await answers([asked])
            await pond.settled()
    assert pond.calls() == 1


def _scripts_run(pond: Pond) -> int:
    return int(pond.redis.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])
