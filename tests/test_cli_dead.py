"""`millpond dead`: dead letters are listed, shown, tried again and discarded."""

from __future__ import annotations

import json

from shared.keys import PartitionKeys
from tests import command_line
from tests.command_line import await_that, run, run_json
from tests.conftest import Server

deployment = command_line.deployment


def bury(server: Server, fields: dict[str, str], stream: str) -> str:
    names = PartitionKeys(0)
    letter = {"reason": "delivered 5 times without an outcome", "stream": stream, "id": "1-1", "deliveries": "5"}
    pairs = [part for pair in (letter | {f"m:{n}": v for n, v in fields.items()}).items() for part in pair]
    with server.connect() as connection:
        found: bytes = connection.execute_command("XADD", names.dead, "*", *pairs)
        return found.decode()


BODY = json.dumps({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Try me again"}]})


def test_dead_letters_are_listed_shown_and_retried_as_requests(deployment: str, server: Server) -> None:
    request = {"id": "r1", "reply": "", "deadline": "1000", "body": BODY}
    letter_id = bury(server, request, PartitionKeys(0).requests)
    (listed,) = run_json("dead", "list", url=deployment)["letters"]
    assert (listed["id"], listed["deliveries"], listed["retryable"]) == (letter_id, 5, True)
    shown = run_json("dead", "show", letter_id, url=deployment)
    assert shown["message"]["body"]["messages"][0]["content"] == "Try me again"
    assert run_json("dead", "retry", letter_id, url=deployment) == {"retried": [letter_id], "left": []}
    assert run_json("dead", "list", url=deployment) == {"letters": []}
    run_json("dead", "show", letter_id, url=deployment, status=2)
    with server.connect() as connection:
        await_that(lambda: connection.execute_command("HGET", "mp:stats", "stored") == b"1")
    assert run_json("ask", "Try me again", url=deployment)["tier"] in ("l1", "l2")


def test_a_dead_fill_is_retried_as_a_request_with_its_directives(deployment: str, server: Server) -> None:
    spec = json.dumps({"cache": {"tenant": "acme", "tags": ["doc:7"]}})
    fill = {"key": "0" * 32, "token": "t", "epoch": "0-0", "body": BODY, "spec": spec}
    bury(server, fill, PartitionKeys(0).fills)
    hopeless = bury(server, {"nonsense": "no body"}, PartitionKeys(0).fills)
    done = run_json("dead", "retry", "--all", url=deployment)
    assert (len(done["retried"]), done["left"]) == (1, [hopeless])
    assert "1 left alone, no request in them" in run("dead", "retry", "--all", url=deployment).stdout
    with server.connect() as connection:
        await_that(lambda: connection.execute_command("HGET", "mp:stats", "stored") == b"1")
    mine = run_json("ask", "Try me again", "--tenant", "acme", url=deployment)
    assert mine["tier"] in ("l1", "l2")
    assert len(run_json("dead", "list", url=deployment)["letters"]) == 1


def test_dead_letters_are_discarded_one_or_all(server: Server) -> None:
    ids = [bury(server, {"nonsense": str(n)}, PartitionKeys(0).fills) for n in range(4)]
    assert [letter["retryable"] for letter in run_json("dead", "list", url=server.url)["letters"]] == [False] * 4
    assert run_json("dead", "discard", ids[1], url=server.url) == {"discarded": [ids[1]]}
    run_json("dead", "discard", ids[1], url=server.url, status=2)
    run_json("dead", "discard", url=server.url, status=2)
    assert run("dead", "discard", "--all", "--partition", "0", url=server.url).stdout == "3 discarded\n"
    assert run_json("dead", "list", url=server.url) == {"letters": []}
