"""Commands for whoever asks: `ask` and `invalidate`."""

from __future__ import annotations

import asyncio
import getpass
import os
import platform
import re
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console

from shared import settings
from shared.console import DEADLINE, print_json, reporting
from shared.errors import InvalidRequest
from shared.profiles import DEFAULT_PROFILE, EMBEDDING_MODEL

if TYPE_CHECKING:
    from producers.invalidation import Invalidation
    from producers.reply import Reply

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

#: Numbers of a vector that a person is shown.
_FEW = 6


class Mode(StrEnum):
    """How a request uses the cache: `shared.messages.Mode`, as choices."""

    default = "default"
    refresh = "refresh"
    only_if_cached = "only-if-cached"
    no_store = "no-store"
    bypass = "bypass"


def ask(
    text: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message to go before it.")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"The model to ask; default: MILLPOND_MODEL, for embeddings {EMBEDDING_MODEL}.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="The cache class; default: response.")] = None,
    tenant: Annotated[str, typer.Option(help="Who asks: tenants never share answers.")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A field the profile is scoped by; repeatable.")
    ] = None,
    mode: Annotated[Mode, typer.Option(metavar="MODE", help=f"{', '.join(Mode)}.")] = Mode.default,
    ttl: Annotated[float | None, typer.Option(help="Keep the answer for so many seconds.")] = None,
    max_age: Annotated[float | None, typer.Option(help="Accept no answer older than so many seconds.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Invalidate the answer by this; repeatable.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Wait so many seconds at most.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a question; the answer comes from the cache, from a call already under way, or from the provider.

    The answer goes to standard output; where it came from and how long it took to standard error. With a profile of
    embeddings the text is embedded: --json shows the whole vector.

    Example: millpond ask "What is a millpond?" --tag doc:42

    Exit codes: 0 answer, 2 invalid request or setting, 3 Redis unavailable, 4 deadline passed, 5 overloaded,
    6 not cached, 7 provider error, 130 interrupted, 1 anything else.
    """
    with reporting(as_json):
        directives: dict[str, Any] = {"profile": profile, "ttl": ttl, "max_age": max_age, "tags": tag or []}
        directives |= {"model": model, "mode": mode.value, "timeout": timeout, "scope": _scope(scope or [])}
        question = _from_stdin() if text == "-" else text
        found = asyncio.run(_ask(question, system, tenant, **directives))
        if as_json:
            print_json(found)
            return
        typer.echo(_shown(found))
        how = f"joined a call under way ({found['tier']})" if found["collapsed"] else str(found["tier"])
        aged = f", {found['age']:.0f} s old" if found["age"] >= 1 else ""
        kept = "" if found["stored"] or found["tier"] != "llm" else f", not stored ({found['detail']})"
        Console(stderr=True, highlight=False).print(
            f"{how}{aged}{kept} · {found['latency'] * 1000:.1f} ms · {found['model']}", style="dim", markup=False
        )


def _shown(found: dict[str, Any]) -> str:
    """Return the text; of a vector its beginning; of what is neither, the JSON."""
    if vector := found.get("embedding"):
        few = ", ".join(f"{number:.4f}" for number in vector[:_FEW])
        return f"{found['dimensions']} dimensions: {few}{', …' if len(vector) > _FEW else ''}"
    return found["text"] or orjson.dumps(found["body"]).decode()


def _scope(given: list[str]) -> dict[str, str] | None:
    named: dict[str, str] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise InvalidRequest(f"--scope takes NAME=VALUE, such as conversation_id=42, not {pair!r}", field="scope")
        named[name] = value
    return named or None


def _from_stdin() -> str:
    """Return standard input without the line ends that close it: the same question as one given as argument."""
    try:
        return sys.stdin.buffer.read().decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8: {error}", field="prompt") from None


async def _ask(text: str, system: str | None, tenant: str, **directives: Any) -> dict[str, Any]:
    from producers.client import Client

    if not text.strip():
        raise InvalidRequest("the question must not be empty", field="prompt")
    chosen = settings.load()
    about = chosen.all_profiles.get(directives["profile"] or DEFAULT_PROFILE)
    embedding = about is not None and about.endpoint == "embeddings"
    asked: dict[str, Any] = {"prompt": text}
    if embedding:
        if system is not None:
            raise InvalidRequest("--system is for questions: this profile embeds the text alone", field="system")
        asked = {"input": text}
        directives["model"] = directives["model"] or EMBEDDING_MODEL
    elif system is not None:
        messages = (("system", system), ("user", text))
        asked = {"messages": [{"role": role, "content": content} for role, content in messages]}
    async with Client(settings=chosen, tenant=tenant) as client:
        began = time.perf_counter()
        try:
            reply = await client.ask(**asked, **directives)
        except InvalidRequest as error:
            if about is not None and error.field in about.scope:
                error.message += f": --scope {error.field}=VALUE"
            raise
        latency = round(time.perf_counter() - began, 6)
    names = (
        "text", "tier", "collapsed", "age", "ttl", "stored", "detail", "model", "usage", "key", "request_id", "body",
    )  # fmt: skip
    told = {name: getattr(reply, name) for name in names} | {"latency": latency}
    return told | _vector(reply) if embedding else told


def _vector(reply: Reply) -> dict[str, Any]:
    from producers.embeddings import vector

    found = vector(reply.value, reply.provider)
    return {"dimensions": len(found), "embedding": [float(f"{number:.9g}") for number in found]}  # float32: 9 digits


def invalidate(
    tag: Annotated[list[str] | None, typer.Option(help="What the answers were tagged with; repeatable.")] = None,
    key: Annotated[str | None, typer.Option(help="One answer's key, as `ask --json` shows it.")] = None,
    profile: Annotated[str | None, typer.Option(help="All answers of a cache class.")] = None,
    tenant: Annotated[str | None, typer.Option(help="All answers of a tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="All answers of a model.")] = None,
    prefix: Annotated[str | None, typer.Option(help="All answers with a tag that begins so, such as doc:.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All answers.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forget nothing; count what it would concern.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they are deleted, and say how many.")] = False,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the count at most.")] = 30.0,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit.")] = "",
    as_json: Json = False,
) -> None:
    """Forget answers: whatever is asked after this returns is never answered from what was stored before.

    Several options forget what matches any of them. It is in force at once, in every tier; `--wait` waits for the
    invalidation worker to delete the answers physically, from Redis (l2) and PostgreSQL (l3).

    Example: millpond invalidate --tag doc:42 --wait --reason "doc 42 was corrected"

    Exit codes: 0 done, 2 nothing or something invalid named, 3 Redis unavailable, 4 nobody counted in time (without
    `--dry-run` the invalidation is in force all the same), 1 anything else.
    """
    with reporting(as_json):
        if not (tag or key or profile or tenant or model or prefix or everything):
            raise InvalidRequest(
                "name what to forget: --tag, --key, --profile, --tenant, --model, --prefix or --all", field="tags"
            )
        named: dict[str, Any] = {"key": key, "profile": profile, "tenant": tenant, "model": model, "prefix": prefix}
        chosen = settings.load()
        how = {"dry_run": dry_run, "wait": timeout if wait or dry_run else None, "reason": reason, "by": _account()}
        given = {name: value or None for name, value in named.items()}
        found = asyncio.run(_invalidate(chosen, tags=tag or [], everything=everything, **given, **how))
        if profile and profile not in chosen.all_profiles:
            typer.echo(
                f"millpond: warning: no profile {profile!r} in this shell's settings; if the workers know none either, "
                f"nothing was stored under it (known here: {', '.join(sorted(chosen.all_profiles))})",
                err=True,
            )
        if as_json:
            print_json(
                {
                    "invalidated": {} if dry_run else found.ids,
                    "labels": found.labels,
                    "partitions": len(found),
                    "dry_run": dry_run,
                    "l1": None if dry_run else "at once",
                    "l2": found.l2,
                    "l3": found.l3,
                    "complete": found.complete,
                }
            )
        else:
            typer.echo(_told(found, wait))
        if wait and not found.complete:
            typer.echo(
                f"millpond: in force, but not deleted everywhere after {timeout:g} s: is a "
                "`millpond worker invalidation` running, and PostgreSQL? `millpond doctor` says more",
                err=True,
            )
            raise typer.Exit(DEADLINE)


def _told(found: Invalidation, waited: bool) -> str:
    counts = (
        f"l2 {_counted(found.l2)}, l3 {_counted(found.l3) if found.l3 is not None or not found.complete else 'none'}"
    )
    where = f"in {len(found)} partition{'s' if len(found) > 1 else ''}"
    if found.dry_run:
        return f"would be forgotten: {', '.join(found.labels)}; {where}: {counts} (l1 is not counted)"
    return f"forgotten: {', '.join(found.labels)}; {where}" + (f": l1 at once, {counts} deleted" if waited else "")


def _counted(count: int | None) -> str:
    return "not yet" if count is None else f"{count:,}"


def _account() -> str:
    """Return who runs this command, as the audit names him."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        name = str(os.getuid())
    return re.sub(r"\s+", "_", f"{name}@{platform.node() or 'localhost'}")[:200]


async def _invalidate(chosen: settings.Settings, **what: Any) -> Invalidation:
    from producers.client import Client

    async with Client(settings=chosen) as client:
        return await client.invalidate(**what)
