"""Millpond, an LLM response cache on Redis Streams: however many ask the same thing, one LLM call answers them all.

    from millpond import Client

    async with Client() as client:
        reply = await client.ask("What is a millpond?")
        print(reply.text, reply.tier)

This module is the front door: the names an application imports, and the `millpond` command.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

    from producers.blocking import BlockingClient
    from producers.client import Client
    from producers.invalidation import Invalidation
    from producers.reply import Reply
    from producers.store import Found, Info
    from shared.errors import (
        ComputeError,
        ConfigError,
        ContentFiltered,
        DeadlineExceeded,
        InvalidRequest,
        MillpondError,
        NotCached,
        Overloaded,
        Poisoned,
        ProviderError,
        ProviderTimeout,
        ProviderUnreachable,
        RateLimited,
        Superseded,
        Unavailable,
    )
    from shared.settings import Settings

__all__ = [
    "BlockingClient",
    "Client",
    "ComputeError",
    "ConfigError",
    "ContentFiltered",
    "DeadlineExceeded",
    "Found",
    "Info",
    "InvalidRequest",
    "Invalidation",
    "MillpondError",
    "NotCached",
    "Overloaded",
    "Poisoned",
    "ProviderError",
    "ProviderTimeout",
    "ProviderUnreachable",
    "RateLimited",
    "Reply",
    "Settings",
    "Superseded",
    "Unavailable",
]

#: Where a name lives; what is not listed is an error. Loaded at first use, so that each command loads only its own.
_HOMES = {
    "BlockingClient": "producers.blocking",
    "Client": "producers.client",
    "Invalidation": "producers.invalidation",
    "Found": "producers.store",
    "Info": "producers.store",
    "Reply": "producers.reply",
    "Settings": "shared.settings",
}

_INTERRUPTED = 130
#: command -> the module and the attribute that implement it: a function, or a group of commands
_COMMANDS = {
    "up": ("workers.commands", "up"),
    "worker": ("workers.commands", "worker"),
    "migrate": ("workers.durable", "migrate"),
    "ask": ("producers.commands", "ask"),
    "replay": ("producers.replay_command", "replay"),
    "demo": ("producers.replay_command", "demo"),
    "invalidate": ("producers.commands", "invalidate"),
    "stats": ("workers.commands", "stats"),
    "warm": ("producers.warm_command", "warm"),
    "report": ("workers.report_command", "report"),
    "dead": ("workers.commands", "dead"),
    "bench": ("producers.bench.command", "bench"),
    "schedule": ("workers.schedule_command", "schedule"),
    "doctor": ("workers.commands", "diagnose"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "shared.errors")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("millpond")
    except PackageNotFoundError:
        return "0 (not installed)"


def main() -> None:
    """Run the `millpond` command; Ctrl-C at any moment, while it loads too, ends it without a traceback."""
    try:
        raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if raises:  # within an extension module that initialises, it can crash the process
            signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        app = _loaded()
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _run(app)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What was half made (a coroutine not begun, a loop without its parts) says nothing of it.
        warnings.simplefilter("ignore")
        sys.unraisablehook = lambda _: None
        sys.exit(_INTERRUPTED)


def _loaded() -> typer.Typer:
    try:
        import typer
    except ImportError:
        sys.exit("millpond: the command needs more than the client: pip install 'millpond[workers,embedded]'")
    app = typer.Typer(
        name="millpond",
        help="An LLM response cache on Redis Streams: one LLM call answers everyone who asks the same.",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def front(version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True)) -> None:
        if version:
            typer.echo(f"millpond {_version()}")
            raise typer.Exit

    # A command loads its own module only; anything else (help, a slip of the pen) needs all their names.
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    for name in [asked] if asked in _COMMANDS else _COMMANDS:
        module, attribute = _COMMANDS[name]
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def _run(app: typer.Typer) -> None:
    if "--json" not in sys.argv:
        app()
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # no usage error
            raise
        _print_usage_error(error)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


def _print_usage_error(error: Any) -> None:
    from shared.console import print_json
    from shared.errors import InvalidRequest

    parameter = getattr(getattr(error, "param", None), "name", None)
    print_json({"error": InvalidRequest(error.format_message(), field=parameter).to_wire()})
    error.show()  # on standard error, with the usage


if __name__ == "__main__":
    main()
