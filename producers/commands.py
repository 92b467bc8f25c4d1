"""Commands for whoever asks: `ask` and `invalidate`."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from shared import settings
from shared.console import print_json, reporting
from shared.errors import InvalidRequest
from shared.messages import Mode

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def ask(
    text: Annotated[str, typer.Argument(help="The question.")],
    model: Annotated[str | None, typer.Option(help="The model to ask; default: MILLPOND_MODEL.")] = None,
    profile: Annotated[str | None, typer.Option(help="The cache class; default: response.")] = None,
    tenant: Annotated[str, typer.Option(help="Who asks: tenants never share answers.")] = "default",
    mode: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Mode))}.")] = "default",
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
    6 not cached, 7 provider error, 1 anything else.
    """
    with reporting(as_json):
        directives: dict[str, Any] = {"profile": profile, "ttl": ttl, "max_age": max_age, "tags": tag or []}
        found = asyncio.run(_ask(text, tenant, model=model, mode=mode, timeout=timeout, **directives))
        if as_json:
            print_json(found)
            return
        typer.echo(found["text"])
        how = f"joined a call under way ({found['tier']})" if found["collapsed"] else str(found["tier"])
        aged = f", {found['age']:.0f} s old" if found["age"] >= 1 else ""
        kept = "" if found["stored"] or found["tier"] != "llm" else ", not stored"
        Console(stderr=True, highlight=False).print(
            f"{how}{aged}{kept} · {found['latency'] * 1000:.1f} ms · {found['model']}", style="dim", markup=False
        )


async def _ask(text: str, tenant: str, **directives: Any) -> dict[str, Any]:
    from producers.client import Client

    async with Client(settings=settings.load(), tenant=tenant) as client:
        began = time.perf_counter()
        reply = await client.ask(text, **directives)
        latency = round(time.perf_counter() - began, 6)
    names = ("text", "tier", "collapsed", "age", "ttl", "stored", "model", "usage", "key", "request_id")
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
        log = asyncio.run(_invalidate(tags=tag or [], everything=everything, **named))
        if as_json:
            print_json({"invalidated": log})
        else:
            typer.echo(f"done, in {len(log)} partition{'s' if len(log) > 1 else ''}")


async def _invalidate(**what: Any) -> dict[int, str]:
    from producers.client import Client

    async with Client(settings=settings.load()) as client:
        return await client.invalidate(**what)
