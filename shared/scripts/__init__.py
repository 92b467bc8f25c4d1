"""The Lua scripts: one file per verb, each headed by its KEYS, ARGV, returns and the race it closes.

`SCRIPTS["join"].call(keys, args)` is the EVALSHA command for a `Link`, which loads every script when it connects.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files

Arg = str | bytes | int


class Script:
    """One script, ready to be called by its digest."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = sha1(source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], args: Sequence[Arg]) -> tuple[Arg, ...]:
        """Return the command that runs this script."""
        return ("EVALSHA", self.sha, len(keys), *keys, *args)


def _load() -> dict[str, Script]:
    here = files(__name__)
    common = here.joinpath("_common.lua").read_text()
    sources = {
        item.name.removesuffix(".lua"): item.read_text() for item in here.iterdir() if item.name.endswith(".lua")
    }
    return {name: Script(name, common + text) for name, text in sources.items() if name != "_common"}


SCRIPTS: dict[str, Script] = _load()
