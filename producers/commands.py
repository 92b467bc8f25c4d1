"""Commands for whoever asks: `ask` and `invalidate`."""

from __future__ import annotations

import asyncio
import sys
import time
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from shared import settings
from shared.console import print_json, reporting
from shared.errors import InvalidRequest

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


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
    model: Annotated[str | None, typer.Option(help="The model to ask; default: MILLPOND_MODEL.")] = None,
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

    The answer goes to standard output; where it came from and how long it took to standard error.

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
        typer.echo(found["text"])
        how = f"joined a call under way ({found['tier']})" if found["collapsed"] else str(found["tier"])
        aged = f", {found['age']:.0f} s old" if found["age"] >= 1 else ""
        kept = "" if found["stored"] or found["tier"] != "llm" else f", not stored ({found['detail']})"
        Console(stderr=True, highlight=False).print(
            f"{how}{aged}{kept} · {found['latency'] * 1000:.1f} ms · {found['model']}", style="dim", markup=False
        )


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
    asked: dict[str, Any] = {"prompt": text}
    if system is not None:
        messages = (("system", system), ("user", text))
        asked = {"messages": [{"role": role, "content": content} for role, content in messages]}
    async with Client(settings=settings.load(), tenant=tenant) as client:
        began = time.perf_counter()
        reply = await client.ask(**asked, **directives)
        latency = round(time.perf_counter() - began, 6)
    names = (
        "text", "tier", "collapsed", "age", "ttl", "stored", "detail", "model", "usage", "key", "request_id", "body",
    )  # fmt: skip
    return {name: getattr(reply, name) for name in names} | {"latency": latency}


def invalidate(
    tag: Annotated[list[str] | None, typer.Option(help="What the answers were tagged with; repeatable.")] = None,
    key: Annotated[str | None, typer.Option(help="One answer's key, as `ask --json` shows it.")] = None,
    profile: Annotated[str | None, typer.Option(help="All answers of a cache class.")] = None,
    tenant: Annotated[str | None, typer.Option(help="All answers of a tenant.")] = None,
    model: Annotated[str | None, typer.Option(help="All answers of a model.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All answers.")] = False,
    as_json: Json = False,
) -> None:
    """Forget answers: whatever is asked after this returns is never answered from what was stored before.

    Several options forget what matches any of them.

    Example: millpond invalidate --tag doc:42

    Exit codes: 0 done, 2 nothing or something invalid named, 3 Redis unavailable, 1 anything else.
    """
    with reporting(as_json):
        if not (tag or key or profile or tenant or model or everything):
            raise InvalidRequest(
                "name what to forget: --tag, --key, --profile, --tenant, --model or --all", field="tags"
            )
        named: dict[str, Any] = {"key": key, "profile": profile, "tenant": tenant, "model": model}
        labels = [*sorted(set(tag or [])), *(f"{name}:{value}" for name, value in named.items() if value)]
        labels += ["all"] if everything else []
        chosen = settings.load()
        log = asyncio.run(_invalidate(chosen, tags=tag or [], everything=everything, **named))
        if profile and profile not in chosen.all_profiles:
            typer.echo(
                f"millpond: warning: no profile {profile!r} in this shell's settings; if the workers know none either, "
                f"nothing was stored under it (known here: {', '.join(sorted(chosen.all_profiles))})",
                err=True,
            )
        if as_json:
            print_json({"invalidated": log, "labels": labels, "partitions": len(log)})
        else:
            typer.echo(f"forgotten: {', '.join(labels)}; in {len(log)} partition{'s' if len(log) > 1 else ''}")


async def _invalidate(chosen: settings.Settings, **what: Any) -> dict[int, str]:
    from producers.client import Client

    async with Client(settings=chosen) as client:
        return await client.invalidate(**what)
