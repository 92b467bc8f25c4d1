"""What a request may say, what counts in its key, and that nothing else ever comes out than a named error."""

from __future__ import annotations

import dataclasses
from typing import Any
from unicodedata import normalize

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, InvalidRequest
from shared.messages import MAX_TAGS, Question, Rules, fold, understand
from shared.profiles import Profile
from shared.settings import load

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def rules(**overrides: Any) -> Rules:
    made = Rules.of(load(profiles={"mine": Profile(scope=("user",), unordered=("docs",))}))
    return dataclasses.replace(made, **overrides)


RULES = rules(max_input_bytes=100_000)


def ask(body: Any = None, *, under: Rules = RULES, **cache: Any) -> Question:
    raw = body if isinstance(body, bytes) else orjson.dumps(HI if body is None else body)
    return understand(raw, orjson.dumps(cache) if cache else None, under)


def key(body: Any = None, *, under: Rules = RULES, **cache: Any) -> str:
    return ask(body, under=under, **cache).key


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{hello}", "body"),
    "empty": (b"", "body"),
    "not UTF-8": (b'{"input":"\xff\xfe"}', "body"),
    "NaN": (b'{"input":"x","temperature":NaN}', "body"),
    "a lone surrogate": (b'{"input":"\\ud800"}', "body"),
    "a list": (b"[1,2]", "body"),
    "a deep list": (deep(1000), "body"),
    "nested too deep to parse": (b'{"input":"x","a":' + deep(2000) + b"}", "body"),
    "nested too deep to write": (b'{"input":"x","a":' + deep(600) + b"}", "body"),
    "deep in an unordered field": (b'{"input":"x","context_ids":[' + deep(600) + b"," + deep(600) + b"]}", "body"),
    "too long": (b'{"input":"' + b"x" * 100_000 + b'"}', "body"),
    "nothing asked": (b'{"model":"m"}', "messages"),
    "no messages": (b'{"messages":[]}', "messages"),
    "messages of the wrong type": (b'{"messages":"hi"}', "messages"),
    "a message of the wrong type": (b'{"messages":["hi"]}', "messages[0]"),
    "a second message without a role": (b'{"messages":[{"role":"user","content":"x"},{"content":"y"}]}', "messages[1]"),
    "blank messages": (b'{"messages":[{"role":"user","content":"  \\n"}]}', "messages"),
    "a message without content": (b'{"messages":[{"role":"user"}]}', "messages"),
    "both": (b'{"messages":[{"role":"user","content":"x"}],"input":"y"}', "input"),
    "empty input": (b'{"input":""}', "input"),
    "blank input": (b'{"input":"  "}', "input"),
    "an empty list as input": (b'{"input":[]}', "input"),
    "input of the wrong type": (b'{"input":7}', "input"),
    "model of the wrong type": (b'{"model":7,"input":"x"}', "model"),
    "model with a space": (b'{"model":"a b","input":"x"}', "model"),
    "empty model": (b'{"model":"","input":"x"}', "model"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_malformed_body_is_refused_by_its_field(name: str) -> None:
    body, field = BAD_BODIES[name]
    with pytest.raises(InvalidRequest) as refusal:
        ask(body)
    assert refusal.value.field == field
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("cache", "field"),
    [
        ({"profile": "nope"}, "profile"),
        ({"profile": ["response"]}, "profile"),
        ({"profile": None}, "profile"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "a\nb"}, "tenant"),
        ({"tenant": "x" * 201}, "tenant"),
        ({"tenant": 7}, "tenant"),
        ({"mode": "sometimes"}, "mode"),
        ({"mode": ["default"]}, "mode"),
        ({"ttl": 0}, "ttl"),
        ({"ttl": -1}, "ttl"),
        ({"ttl": "60"}, "ttl"),
        ({"ttl": True}, "ttl"),
        ({"ttl": None}, "ttl"),
        ({"ttl": 1e12}, "ttl"),
        ({"max_age": -1}, "max_age"),
        ({"max_age": [1]}, "max_age"),
        ({"tags": "doc:42"}, "tags"),
        ({"tags": ["a b"]}, "tags"),
        ({"tags": ["a\nb"]}, "tags"),
        ({"tags": [""]}, "tags"),
        ({"tags": [7]}, "tags"),
        ({"tags": ["all"]}, "tags"),
        ({"tags": ["key:0"]}, "tags"),
        ({"tags": ["tenant:x"]}, "tags"),
        ({"tags": ["model:x"]}, "tags"),
        ({"tags": ["profile:x"]}, "tags"),
        ({"tags": ["#last"]}, "tags"),
        ({"tags": [f"t{i}" for i in range(MAX_TAGS + 1)]}, "tags"),
        ({"scope": ["user"]}, "scope"),
        ({"scope": {"planet": "earth"}}, "scope"),
        ({"profile": "context"}, "user"),
        ({"profile": "context", "scope": {"user": ""}}, "user"),
        ({"profile": "context", "scope": {"user": {}}}, "user"),
        ({"profile": "embedding"}, "input"),
        ({"max-age": 1}, "max-age"),
    ],
)
def test_a_malformed_directive_is_refused_by_its_name(cache: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        ask(**cache)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    "cache",
    [b"{", b"[]", b"\xff", b'{"ttl":NaN}', b'{"ttl":1e400}', deep(1000), b'{"tags":' + deep(900) + b"}",
     b'{"mode":' + deep(900) + b"}", b'{"profile":' + deep(900) + b"}", b'{"scope":' + deep(900) + b"}",
     b'{"' + b"x" * 50_000 + b'":1}', b'{"profile":"' + b"x" * 50_000 + b'"}'],
)  # fmt: skip
def test_malformed_directives_are_refused_briefly(cache: bytes) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        understand(orjson.dumps(HI), cache, RULES)
    assert len(str(refusal.value)) < 500
    assert len(str(refusal.value.field)) < 500


def test_directives_are_bounded_like_the_body() -> None:
    tags = orjson.dumps({"tags": ["x" * 100_000]})
    with pytest.raises(InvalidRequest, match="limit"):
        understand(orjson.dumps(HI), tags, RULES)


def test_what_is_understood() -> None:
    question = ask(tenant="acme", ttl=1.5, max_age=0, tags=["b", "a", "b"], mode="refresh")
    assert (question.tenant, question.model, question.profile) == ("acme", "m", "response")
    assert (question.ttl_ms, question.max_age_ms) == (1500, 0)
    assert question.own_tags == ("a", "b")
    assert question.tags == ("profile:response", "tenant:acme", "model:m", "a", "b")
    assert (question.reads, question.stores) == (False, True)
    assert len(question.key) == 32


@pytest.mark.parametrize(
    ("mode", "reads", "stores"),
    [
        ("default", True, True),
        ("refresh", False, True),
        ("only-if-cached", True, False),
        ("no-store", True, False),
        ("bypass", False, False),
    ],
)
def test_what_a_mode_may_do(mode: str, reads: bool, stores: bool) -> None:
    question = ask(mode=mode)
    assert (question.reads, question.stores) == (reads, stores)


def test_the_switch_turns_every_mode_that_may_compute_into_bypass() -> None:
    off = rules(cache_enabled=False)
    assert {ask(under=off, mode=m).mode for m in ("default", "refresh", "no-store")} == {"bypass"}
    asked = ask(under=off, mode="only-if-cached")  # wants no call, with or without a cache
    assert (asked.mode, asked.reads, asked.stores) == ("only-if-cached", False, False)


@pytest.mark.parametrize(
    ("body", "profile", "endpoint"),
    [
        (HI, "response", "chat/completions"),
        ({"input": "hi"}, "response", "responses"),
        ({"input": "hi"}, "embedding", "embeddings"),
    ],
)
def test_who_answers(body: dict[str, Any], profile: str, endpoint: str) -> None:
    assert ask(body, profile=profile).endpoint == endpoint


SAME: dict[str, tuple[Any, Any]] = {
    "order of fields": (
        b'{"model":"m","seed":1,"input":"x","top_p":1}',
        b'{"top_p":1,"input":"x","seed":1,"model":"m"}',
    ),
    "white space between tokens": (b'{"model":"m","input":"x"}', b'{ "model" : "m" , "input" : "x" }'),
    "stream": (said("x"), said("x", stream=True, stream_options={"include_usage": True})),
    "user": (said("x"), said("x", user="ann")),
    "metadata": (said("x"), said("x", metadata={"trace": "1"})),
    "1 and 1.0": (said("x", temperature=1), said("x", temperature=1.0)),
    "composed and decomposed letters": (said("caf\u00e9"), said("cafe\u0301")),
    "the same in a field": (said("x", stop="\u00e9"), said("x", stop="e\u0301")),
    "order of context ids": (said("x", context_ids=["b", "a"]), said("x", context_ids=["a", "b"])),
    "order of context objects": (
        b'{"model":"m","input":"x","context_ids":[{"a":1,"b":2},{"a":0}]}',
        b'{"model":"m","input":"x","context_ids":[{"a":0},{"b":2,"a":1}]}',
    ),
    "escapes": (b'{"model":"m","input":"\\u0041"}', b'{"model":"m","input":"A"}'),
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_change_an_answer_does_not_change_the_key(name: str) -> None:
    one, other = SAME[name]
    assert key(one) == key(other)


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "the text": (said("x"), said("y")),
    "white space in the text": (said("x y"), said("x  y")),
    "case": (said("x"), said("X")),
    "the model": (said("x"), said("x") | {"model": "n"}),
    "temperature": (said("x", temperature=0), said("x", temperature=0.1)),
    "no temperature": (said("x"), said("x", temperature=0)),
    "an unknown field": (said("x"), said("x", frobnicate=1)),
    "an unknown field's value": (said("x", frobnicate=1), said("x", frobnicate=2)),
    "a number and its text": (said("x", seed=1), said("x", seed="1")),
    "true and 1": (said("x", logprobs=True), said("x", logprobs=1)),
    "null and absent": (said("x", stop=None), said("x")),
    "tools": (said("x"), said("x", tools=[{"type": "function", "function": {"name": "f"}}])),
    "order of tools": (said("x", tools=[{"a": 1}, {"b": 1}]), said("x", tools=[{"b": 1}, {"a": 1}])),
    "response_format": (said("x"), said("x", response_format={"type": "json_object"})),
    "max_tokens": (said("x", max_tokens=1), said("x", max_tokens=2)),
    "messages and the same as input": (
        {"model": "m", "messages": [{"role": "user", "content": "x"}]},
        {"model": "m", "input": [{"role": "user", "content": "x"}]},
    ),
    "an input and a list of it": ({"model": "m", "input": "x"}, {"model": "m", "input": ["x"]}),
    "a role": (said("x"), {"model": "m", "messages": [{"role": "system", "content": "x"}]}),
    "one message and two": (
        said("x"),
        {"model": "m", "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]},
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_changes_an_answer_changes_the_key(name: str) -> None:
    one, other = DIFFERENT[name]
    assert key(one) != key(other)


def test_directives_that_say_where_count_and_those_that_say_how_do_not() -> None:
    assert key() == key(mode="refresh") == key(ttl=5) == key(tags=["a"]) == key(max_age=1)
    assert len({key(), key(tenant="acme"), key(profile="market")}) == 3


def test_the_default_model_counts_like_the_same_model_named() -> None:
    under = rules(model="big")
    assert key({"input": "x"}, under=under) == key({"input": "x", "model": "big"}, under=under)


def test_a_declared_model_version_counts() -> None:
    assert key() != key(under=rules(model_versions={"m": "2"}))
    assert key() == key(under=rules(model_versions={"n": "2"}))


def test_a_scope_counts_wherever_it_is_given() -> None:
    ann = key(said("x"), profile="context", scope={"user": "ann"})
    assert ann == key(said("x", user="ann"), profile="context")
    assert ann != key(said("x"), profile="context", scope={"user": "bob"})


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    told = [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]
    return {"model": "m", "messages": [{"role": "system", "content": "be kind"}, *told]}


def test_only_the_last_turns_of_a_chat_count() -> None:
    recent = [f"turn {at}" for at in range(7)]
    assert key(conversation("a", "b", *recent), profile="chat") == key(conversation("c", "d", *recent), profile="chat")
    assert key(conversation("a", *recent[:6]), profile="chat") != key(conversation("c", *recent[:6]), profile="chat")


def test_a_system_message_always_counts() -> None:
    turns = [f"turn {at}" for at in range(9)]
    other = conversation(*turns)
    other["messages"][0]["content"] = "be brief"
    assert key(conversation(*turns), profile="chat") != key(other, profile="chat")


@pytest.mark.parametrize("text", ["What is it?", "what  is it", " WHAT IS IT ?!  ", "what is\nit…"])
def test_an_intent_is_folded(text: str) -> None:
    assert key(said(text), profile="intent") == key(said("what is it"), profile="intent")


def test_an_embedding_is_folded_and_other_inputs_are_not() -> None:
    one, other = {"model": "m", "input": ["A  b."]}, {"model": "m", "input": ["a b"]}
    assert key(one, profile="embedding") == key(other, profile="embedding")
    assert key(one) != key(other)


def test_an_own_unordered_field_is_sorted() -> None:
    one, other = said("x", docs=[1, 2], user="u"), said("x", docs=[2, 1], user="u")
    assert key(one, profile="mine") == key(other, profile="mine")
    assert key(one) != key(other)


@pytest.mark.parametrize("ttl", [0, 1e-9, 400 * 86400])
def test_a_profile_no_request_could_satisfy_is_refused_at_start(ttl: float) -> None:
    with pytest.raises(ConfigError, match="ttl"):
        load(profiles={"odd": {"ttl": ttl}})


def test_folding_is_idempotent_and_keeps_words() -> None:
    assert fold(fold("Straße  1!")) == fold("STRASSE 1") == "strasse 1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["messages", "input", "model", "context_ids", "user", "tools", "stop", "temperature", "metadata", "x"]
)
DIRECTIVES = st.sampled_from(["profile", "tenant", "mode", "ttl", "max_age", "tags", "scope"])
MESSAGE = st.fixed_dictionaries({"role": st.text() | st.just("user")}, optional={"content": JSON, "tool_calls": JSON})
BODIES = st.dictionaries(FIELDS, JSON | st.lists(MESSAGE, max_size=3), max_size=6)


@given(st.binary(max_size=200), st.none() | st.binary(max_size=100))
def test_no_bytes_raise_anything_but_invalid_request(body: bytes, cache: bytes | None) -> None:
    try:
        understand(body, cache, RULES)
    except InvalidRequest as error:
        assert error.field


@given(BODIES, st.dictionaries(DIRECTIVES, JSON, max_size=4))
def test_no_json_raises_anything_but_invalid_request(body: dict[str, Any], cache: dict[str, Any]) -> None:
    try:
        question = ask(orjson.dumps(body), **cache)
    except InvalidRequest as error:
        assert error.field
    else:
        assert question.key == key(orjson.dumps(body, option=orjson.OPT_SORT_KEYS), **cache)


TENANTS = st.from_regex(r"[A-Za-z0-9:._/\-é]{1,12}", fullmatch=True)


@given(st.text(min_size=1).filter(str.strip), TENANTS, TENANTS)
def test_tenants_never_share_a_key(text: str, one: str, other: str) -> None:
    asked = said(text)
    assert (key(asked, tenant=one) == key(asked, tenant=other)) == (normalize("NFC", one) == normalize("NFC", other))
