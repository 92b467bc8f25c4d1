"""A link answers everyone in order, survives whoever leaves, and is never out of step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.exceptions import RedisError, ResponseError

from shared.embedded import EmbeddedRedis
from shared.link import LINK_ERRORS, Link
from shared.scripts import SCRIPTS
from tests.conftest import Server
from tests.faults_support import until


@pytest.fixture
async def link(server: Server) -> AsyncIterator[Link]:
    made = Link(server.url, name="under-test")
    yield made
    await made.close()


def cut(server: Server, name: str = "under-test") -> None:
    """Close a link's connection from the server's side."""
    with server.connect() as connection:
        for client in connection.client_list():
            if client["name"] == name:
                connection.execute_command("CLIENT", "KILL", "ID", client["id"])


def is_blocked(server: Server) -> bool:
    """Whether the link's connection waits in a blocking command."""
    with server.connect() as connection:
        return any(c["name"] == "under-test" and "b" in c["flags"] for c in connection.client_list())


async def test_many_callers_each_get_their_own_replies(link: Link) -> None:
    found = await asyncio.gather(*(link.send([("ECHO", n), ("ECHO", -n)]) for n in range(3000)))
    assert found == [[str(n).encode(), str(-n).encode()] for n in range(3000)]


async def test_commands_posted_together_run_adjacent_and_in_order(link: Link) -> None:
    await asyncio.gather(
        *(link.send([("RPUSH", "l", n), ("RPUSH", "l", n), ("PEXPIRE", "l", 9999)]) for n in range(200))
    )
    assert await link.call(("LRANGE", "l", 0, -1)) == [str(n).encode() for n in range(200) for _ in "ab"]


async def test_what_is_posted_in_one_turn_shares_the_connection(link: Link, server: Server) -> None:
    await asyncio.gather(*(link.call(("PING",)) for _ in range(50)))
    with server.connect() as connection:
        assert sum(client["name"] == "under-test" for client in connection.client_list()) == 1


async def test_an_error_of_one_command_hides_no_other_reply(link: Link) -> None:
    one, error, other = await link.post([("ECHO", "a"), ("INCR",), ("ECHO", "b")])
    assert (one, other) == (b"a", b"b")
    assert isinstance(error, ResponseError)


async def test_send_raises_the_first_error_and_stays_in_step(link: Link) -> None:
    with pytest.raises(ResponseError):
        await link.send([("ECHO", "a"), ("NOSUCH",)])
    assert await link.call(("ECHO", "b")) == b"b"


async def test_a_cancelled_caller_leaves_the_link_in_step(link: Link) -> None:
    await link.call(("PING",))
    tasks = [asyncio.create_task(link.call(("ECHO", n))) for n in range(100)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[1::2] == [str(n).encode() for n in range(1, 100, 2)]
    assert await link.call(("ECHO", "after")) == b"after"


async def test_a_caller_cancelled_while_the_link_connects_harms_nobody(link: Link) -> None:
    first, second = (asyncio.create_task(link.call(("ECHO", n))) for n in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == b"1"


async def test_large_commands_and_replies_pass(link: Link) -> None:
    big = bytes(range(256)) * 40_000
    assert await link.call(("ECHO", big)) == big
    assert await asyncio.gather(*(link.call(("ECHO", big[:n])) for n in (0, 1, 70_000))) == [b"", big[:1], big[:70_000]]


async def test_nothing_to_send_needs_no_round_trip(link: Link) -> None:
    assert await link.send([]) == []


@pytest.mark.parametrize("value", [object(), None, 1.5j])
async def test_what_cannot_be_sent_harms_nobody_else(link: Link, value: object) -> None:
    good, bad = link.post([("ECHO", "a")]), link.post([("ECHO", value)])
    with pytest.raises(Exception):  # noqa: B017 (whatever the packer raises)
        await bad
    assert await good == [b"a"]
    assert await link.call(("ECHO", "b")) == b"b"


async def test_a_cut_connection_fails_who_waits_and_the_next_caller_connects_again(link: Link, server: Server) -> None:
    waiting = link.post([("BLPOP", "nothing", 10)])
    await asyncio.sleep(0)
    await until(lambda: is_blocked(server), "the read blocks")
    cut(server)
    with pytest.raises(LINK_ERRORS):
        await waiting
    assert await link.call(("ECHO", "again")) == b"again"


async def test_scripts_lost_by_the_server_are_loaded_with_the_next_connection(link: Link) -> None:
    command = SCRIPTS["retire"].call(["s"], ["g", "c", "1-1"])
    assert await link.call(command) == 0
    await link.call(("SCRIPT", "FLUSH"))
    with pytest.raises(LINK_ERRORS):
        await link.call(command)
    assert await link.call(command) == 0


async def test_a_reply_that_does_not_come_is_an_error_and_the_link_goes_on(server: Server) -> None:
    link = Link(server.url, name="under-test", reply_timeout=0.2)
    with pytest.raises(LINK_ERRORS):
        await link.call(("BLPOP", "nothing", 5))
    assert await link.call(("ECHO", "x")) == b"x"
    await link.close()


async def test_no_server_is_an_error_for_everyone_who_asks(tmp_path: Path) -> None:
    link = Link(f"unix://{tmp_path}/none.sock")
    found = await asyncio.gather(*(link.call(("PING",)) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, LINK_ERRORS) for error in found)
    await link.close()


async def test_a_link_finds_its_server_again(own_server: EmbeddedRedis) -> None:
    link = Link(own_server.url)
    await link.call(("PING",))
    own_server.kill()
    with pytest.raises(LINK_ERRORS):
        await link.call(("PING",))
    own_server.restart()
    assert await link.call(("PING",)) == b"PONG"
    await link.close()


async def test_a_closed_link_says_so_to_who_waits_and_who_comes(link: Link) -> None:
    waiting = link.post([("BLPOP", "nothing", 5)])
    await asyncio.sleep(0)
    await link.close()
    for future in (waiting, link.post([("PING",)])):
        with pytest.raises(LINK_ERRORS, match="closed"):
            await future
    await link.close()


async def test_a_wrong_password_is_a_named_error(own_server: EmbeddedRedis) -> None:
    link = Link(own_server.url + ("&" if "?" in own_server.url else "?") + "password=wrong")
    with pytest.raises((RedisError, OSError)):
        await link.call(("PING",))
    await link.close()
