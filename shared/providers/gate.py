"""The quality gate: which answers are worth keeping. Every answer is delivered; only a storable one is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from shared.answers import joined, objects

#: Why a response of the Responses API ended early, in the gate's words.
_INCOMPLETE = {"max_output_tokens": "length", "content_filter": "content_filter"}
_FINISH = {"length": "length", "content_filter": "content_filter", "error": "error"}


def verdict(body: bytes | dict[str, Any], endpoint: str) -> str:
    """Return "" when the answer may be stored, else the first reason why not.

    `length` (cut off), `content_filter` (filtered or refused), `empty`, `invalid_tool_json` (a tool call whose
    arguments are no JSON object), `not_json` (the body is no JSON object), `error` (the body reports a failure, or a
    state that is not final). All choices of a chat completion count. Never raises.
    """
    answer = _parsed(body)
    if answer is None:
        return "not_json"
    if answer.get("error"):
        return "error"
    judge = {"responses": _response, "embeddings": _embeddings}.get(endpoint, _chat)
    return next((reason for reason in judge(answer) if reason), "")


def _parsed(body: bytes | dict[str, Any]) -> dict[str, Any] | None:
    try:
        answer = body if isinstance(body, dict) else orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return answer if isinstance(answer, dict) else None


def _chat(answer: dict[str, Any]) -> Iterator[str]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        yield "empty"
        return
    for choice in choices:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            yield "empty"
            continue
        yield "error" if choice.get("error") else ""
        yield _named(_FINISH, choice.get("finish_reason"), "")
        yield from _message(message)


def _message(message: dict[str, Any]) -> Iterator[str]:
    """Judge one chat message. Parts of a content list that carry no text (audio, images) are content too."""
    content = message.get("content")
    parts = list(objects(content))
    if message.get("refusal") or any(part.get("refusal") for part in parts):
        yield "content_filter"
    called = message.get("tool_calls") or message.get("function_call")
    said = joined(content).strip() or any(part.get("type", "text") != "text" for part in parts) or message.get("audio")
    if not said and not called:
        yield "empty"
    functions = [call["function"] for call in objects(message.get("tool_calls")) if "function" in call]
    if "function_call" in message and message["function_call"] is not None:
        functions.append(message["function_call"])
    for function in functions:
        yield _arguments(function)


def _arguments(function: object) -> str:
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str) and _parsed(arguments.encode("utf-8", "replace")) is not None:
        return ""
    return "invalid_tool_json"


def _response(answer: dict[str, Any]) -> Iterator[str]:
    status = answer.get("status", "completed")
    if status == "incomplete":
        details = answer.get("incomplete_details")
        yield _named(_INCOMPLETE, details.get("reason") if isinstance(details, dict) else None, "length")
    elif status != "completed":
        yield "error"  # failed, cancelled, or still queued or in progress
    said = False
    for item in objects(answer.get("output")):
        kind = item.get("type", "message")
        if kind == "message":
            parts = list(objects(item.get("content")))
            if any(part.get("refusal") for part in parts):
                yield "content_filter"
            said = said or bool(joined(item.get("content")).strip())
        elif kind == "function_call":
            yield _arguments(item)
            said = True
        elif kind != "reasoning":  # a thought alone is no answer; a call of any other tool is
            said = True
    if not said:
        yield "empty"


def _embeddings(answer: dict[str, Any]) -> Iterator[str]:
    data = answer.get("data")
    if not isinstance(data, list) or not data:
        yield "empty"
        return
    for item in data:
        vector = item.get("embedding") if isinstance(item, dict) else None
        yield "" if isinstance(vector, list | str) and vector else "empty"  # base64 when the request asked for it


def _named(names: dict[str, str], value: object, default: str) -> str:
    return names.get(value, default) if isinstance(value, str) else default
