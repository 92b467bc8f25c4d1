"""What an OpenAI-style answer says: its text and its token usage, whichever of the three shapes it has.

Only the standard library: the light client reads `Reply.text` with it. Nothing here raises on odd JSON; what is not
there reads as an empty text and as zero tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_of(body: Mapping[str, Any]) -> str:
    """Return the answer's text: of a chat completion's first choice, or all text of a response.

    Embeddings, tool calls and refusals have none: the empty string.
    """
    if isinstance(body.get("choices"), list):
        message = first_of(body["choices"]).get("message")
        return joined(message.get("content")) if isinstance(message, dict) else ""
    return "".join(joined(item.get("content")) for item in objects(body.get("output")) if _is_message(item))


def usage_of(body: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens the provider counted: of the prompt, of the completion. Zero where it did not say."""
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return 0, 0
    return (
        _count(usage, "prompt_tokens", "input_tokens"),
        _count(usage, "completion_tokens", "output_tokens"),
    )


def joined(content: object) -> str:
    """Return the text of a message's content: a string, or a list of parts of which those with text count."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in objects(content) if isinstance(part.get("text"), str))


def objects(value: object) -> list[dict[str, Any]]:
    """Return the JSON objects in a list; none when it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def first_of(value: object) -> dict[str, Any]:
    """Return the first JSON object in a list, or an empty one."""
    found = objects(value)
    return found[0] if found else {}


def _is_message(item: dict[str, Any]) -> bool:
    return bool(item.get("type", "message") == "message")


def _count(usage: dict[str, Any], *names: str) -> int:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
