"""One colour per way to an answer, the same in the bar, the table and the plot; told apart without colour vision."""

from __future__ import annotations

COLOURS = {
    "l1": "#0b4f7d",
    "l2": "#3f93c9",
    "semantic": "#2a9d8f",
    "l3": "#a5cfe6",
    "coalesced": "#f0b429",
    "llm": "#c8553d",
    "error": "#5b5b5b",
}
OTHER = "#8a7fb5"


def colour(way: str) -> str:
    """Return the colour of a way to an answer; errors of all codes share one."""
    return COLOURS["error"] if way.startswith("error") else COLOURS.get(way, OTHER)
