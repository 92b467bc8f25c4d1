"""Which answers are worth keeping, and what an answer says, for the three shapes and for any JSON at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.answers import text_of, usage_of
from shared.providers.base import ENDPOINTS, Completion
from shared.providers.gate import verdict


def chat(*messages: Any, finish_reason: Any = "stop", **fields: Any) -> dict[str, Any]:
    choices = [{"index": at, "message": m, "finish_reason": finish_reason} for at, m in enumerate(messages)]
    return {"choices": choices, **fields}


def said(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": arguments}
    return said(None, tool_calls=[{"id": "c1", "type": "function", "function": function}])


def response(*output: Any, **fields: Any) -> dict[str, Any]:
    return {"status": "completed", "output": list(output), **fields}


def message(*content: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": list(content)}


TEXT = {"type": "output_text", "text": "Yes.", "annotations": []}

CHATS = [
    ("", chat(said("Yes."))),
    ("", chat(said("Yes."), finish_reason=None)),
    ("", chat(said([{"type": "text", "text": "Yes."}]))),
    ("", chat(said(None, audio={"id": "a", "data": "…"}))),
    ("", chat(called('{"city": "Kiel"}'))),
    ("", chat(said(None, tool_calls=[{"id": "c1", "type": "custom", "custom": {"name": "x", "input": "free"}}]))),
    ("", chat(said(None, function_call={"name": "f", "arguments": "{}"}))),
    ("length", chat(said("Ye"), finish_reason="length")),
    ("content_filter", chat(said("Y"), finish_reason="content_filter")),
    ("content_filter", chat(said(None, refusal="I can't help with that."))),
    ("content_filter", chat(said([{"type": "refusal", "refusal": "No."}]))),
    ("empty", chat(said(""))),
    ("empty", chat(said(" \n"))),
    ("empty", chat(said(None))),
    ("empty", chat()),
    ("empty", {}),
    ("empty", chat(said("Yes."), said(""))),
    ("empty", chat("no message")),
    ("invalid_tool_json", chat(called('{"city": "Ki'))),
    ("invalid_tool_json", chat(called(""))),
    ("invalid_tool_json", chat(called(None))),
    ("invalid_tool_json", chat(called('["Kiel"]'))),
    ("invalid_tool_json", chat(said("Yes.", function_call={"name": "f", "arguments": "{"}))),
    ("error", {"error": {"message": "upstream failed", "code": 502}}),
    ("error", chat(said("Ye"), finish_reason="error")),
    ("error", {"choices": [{"message": said("Ye"), "error": {"code": 502}, "finish_reason": "stop"}]}),
]

RESPONSES = [
    ("", response(message(TEXT))),
    ("", response({"type": "reasoning", "summary": []}, message(TEXT), error=None)),
    ("", response({"type": "function_call", "name": "f", "arguments": "{}"})),
    ("", response({"type": "image_generation_call", "result": "…"})),
    ("length", response(message(TEXT), status="incomplete", incomplete_details={"reason": "max_output_tokens"})),
    ("length", response(message(TEXT), status="incomplete")),
    ("content_filter", response(status="incomplete", incomplete_details={"reason": "content_filter"})),
    ("content_filter", response(message({"type": "refusal", "refusal": "No."}))),
    ("empty", response()),
    ("empty", response({"type": "reasoning", "summary": []})),
    ("empty", response(message({"type": "output_text", "text": ""}))),
    ("invalid_tool_json", response({"type": "function_call", "name": "f", "arguments": "{"})),
    ("error", response(message(TEXT), status="failed")),
    ("error", response(message(TEXT), status="in_progress")),
    ("error", response(status="failed", error={"code": "server_error", "message": "…"})),
]

EMBEDDINGS = [
    ("", {"data": [{"embedding": [0.1, 0.2]}, {"embedding": "zczMPQ=="}]}),
    ("empty", {"data": []}),
    ("empty", {"data": [{"embedding": [0.1]}, {"embedding": []}]}),
    ("empty", {}),
]


@pytest.mark.parametrize(
    ("reason", "body", "endpoint"),
    [(*case, "chat/completions") for case in CHATS]
    + [(*case, "responses") for case in RESPONSES]
    + [(*case, "embeddings") for case in EMBEDDINGS],
)
def test_only_a_whole_answer_is_storable(reason: str, body: dict[str, Any], endpoint: str) -> None:
    assert verdict(body, endpoint) == reason
    assert verdict(json.dumps(body).encode(), endpoint) == reason


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"text"', b"\xff\xfe", b'{"choices": ['])
def test_a_body_that_is_no_json_object_is_not_storable(body: bytes) -> None:
    assert verdict(body, "chat/completions") == "not_json"


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("Yes.", chat(said("Yes."))),
        ("First.", chat(said("First."), said("Second."))),
        ("Yes. No.", chat(said([{"type": "text", "text": "Yes. "}, {"type": "text", "text": "No."}]))),
        ("", chat(called("{}"))),
        ("Yes.Yes.", response({"type": "reasoning"}, message(TEXT), message(TEXT))),
        ("", {"data": [{"embedding": [0.1]}]}),
        ("", {}),
    ],
)
def test_the_text_of_an_answer_is_found_in_every_shape(text: str, body: dict[str, Any]) -> None:
    assert text_of(body) == text


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, (7, 3)),
        ({"input_tokens": 7, "output_tokens": 3}, (7, 3)),
        ({"prompt_tokens": 7, "total_tokens": 7}, (7, 0)),
        ({"prompt_tokens": True, "completion_tokens": -3}, (0, 0)),
        ({"prompt_tokens": "7", "completion_tokens": None}, (0, 0)),
        (None, (0, 0)),
    ],
)
def test_usage_is_read_in_both_vocabularies(usage: Any, counted: tuple[int, int]) -> None:
    assert usage_of({"usage": usage}) == counted


_FIELDS = ["choices", "message", "content", "tool_calls", "function_call", "function", "arguments", "refusal"]
_FIELDS += ["audio", "finish_reason", "error", "output", "status", "incomplete_details", "reason", "type", "text"]
_FIELDS += ["data", "embedding", "usage", "prompt_tokens", "output_tokens", "model"]
_NAMES = st.sampled_from(_FIELDS)
_WORDS = st.sampled_from(["stop", "length", "message", "function_call", "text", "incomplete", "completed", "{}", "{"])
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _WORDS
    | st.text(max_size=8)
)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_NAMES | st.text(max_size=3), inner, min_size=1, max_size=5)
    ),
    max_leaves=25,
)
_BODIES = st.dictionaries(_NAMES, _JSON, max_size=6)


@settings(max_examples=400, deadline=None)
@given(body=_BODIES, endpoint=st.sampled_from(ENDPOINTS))
def test_no_json_makes_the_readers_of_answers_raise(body: dict[str, Any], endpoint: str) -> None:
    raw = json.dumps(body).encode()
    assert verdict(body, endpoint) in (
        "", "length", "content_filter", "empty", "invalid_tool_json", "not_json", "error",
    )  # fmt: skip
    assert isinstance(verdict(raw, endpoint), str)
    assert isinstance(text_of(body), str)
    assert all(count >= 0 for count in usage_of(body))
    assert Completion.read(raw).body is raw


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_the_gate_raise(raw: bytes) -> None:
    assert isinstance(verdict(raw, "chat/completions"), str)
