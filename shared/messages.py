"""The wire: what a request says, how it is understood, what a fill and a reply look like.

`understand` is the only reader of requests. It is a pure function of its bytes and the deployment's rules, so a
worker may remember its results. docs/protocol.md describes the same for other languages.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args

import orjson

from shared.errors import InvalidRequest
from shared.experiments import assign
from shared.profiles import DEFAULT_PROFILE, Profile
from shared.settings import Experiment, Settings

Mode = Literal["default", "refresh", "only-if-cached", "no-store", "bypass"]

SCHEMA = 1
MAX_TAGS = 32
MAX_TTL = 366 * 86400.0
MAX_DEADLINE = 3600.0
_MODES = get_args(Mode)
_RESERVED = ("key:", "profile:", "tenant:", "model:", "prefix:", "#")
_LABEL = re.compile(r"[^\s\x00-\x1f\x7f\ud800-\udfff]{1,200}")
_UNKEYED = frozenset({"stream", "stream_options", "user", "metadata", "model"})
_DIRECTIVES = frozenset(
    {"profile", "tenant", "mode", "ttl", "max_age", "tags", "scope", "experiment", "variant", "unit", "lead"}
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a deployment decides about requests."""

    profiles: Mapping[str, Profile]
    model: str
    model_versions: Mapping[str, str]
    max_input_bytes: int
    cache_enabled: bool
    experiments: Mapping[str, Experiment]

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """Return the rules of these settings."""
        return cls(
            profiles=settings.all_profiles,
            model=settings.model,
            model_versions=settings.model_versions,
            max_input_bytes=settings.max_input_bytes,
            cache_enabled=settings.cache_enabled,
            experiments=settings.experiments,
        )


class Kind(NamedTuple):
    """What a request is, as far as statistics tell requests apart."""

    profile: str
    tenant: str
    model: str
    experiment: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A request understood. `tags` are all it is invalidated by, save `all` and its own `key:`."""

    key: str
    profile: str
    tenant: str
    model: str
    mode: Mode
    ttl_ms: int
    max_age_ms: int | None
    stale_ms: int
    error_ms: int
    probation_ms: int
    soft_timeout_ms: int
    negative_ms: int
    own_tags: tuple[str, ...]
    tags: tuple[str, ...]
    endpoint: str
    kind: Kind
    #: beta of XFetch
    early_refresh: float
    #: whether the asking application computes a miss itself
    lead: bool
    #: whether there is a cache at all
    enabled: bool
    #: whether whatever valid entry its key has answers it: it brings no label of its own and no wish about age
    any_entry: bool = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        wishes = self.own_tags or self.lead or self.max_age_ms is not None
        object.__setattr__(self, "any_entry", self.reads and not wishes)

    @property
    def reads(self) -> bool:
        """Whether a stored entry may answer."""
        return self.enabled and self.mode not in ("refresh", "bypass")

    @property
    def stores(self) -> bool:
        """Whether the computed answer may be stored."""
        return self.mode in ("default", "refresh")


def understand(body: bytes, cache: bytes | None, rules: Rules) -> Question:
    """Read a request's body and cache directives (both JSON objects, UTF-8).

    Raises:
        InvalidRequest: with the offending `field`.
    """
    content = _json_object(body, "body", rules.max_input_bytes)
    directives = _json_object(cache, "cache", rules.max_input_bytes) if cache else {}
    for name in directives:
        if name not in _DIRECTIVES:
            known = ", ".join(sorted(_DIRECTIVES))
            raise InvalidRequest(f"unknown cache directive {_shown(name)}; known: {known}", field=name[:60] or "cache")

    name = directives.get("profile", DEFAULT_PROFILE)
    profile = rules.profiles.get(name) if isinstance(name, str) else None
    if profile is None:
        known = ", ".join(sorted(rules.profiles))
        raise InvalidRequest(f"unknown profile {_shown(name)}; known: {known}", field="profile")
    tenant = label(directives.get("tenant", "default"), "tenant")
    model = label(content.get("model", rules.model), "model")
    mode = directives.get("mode", "default")
    if mode not in _MODES:
        raise InvalidRequest(f"unknown mode {_shown(mode)}; known: {', '.join(_MODES)}", field="mode")
    ttl = seconds(directives.get("ttl", profile.ttl), "ttl", least=0.001)
    max_age = directives.get("max_age")
    own = tags_of(directives.get("tags", ()))
    experiment = _named(directives, "experiment")
    return Question(
        key=_key(content, name, profile, tenant, model, directives.get("scope"), rules),
        profile=name,
        tenant=tenant,
        model=model,
        mode=mode if rules.cache_enabled or mode == "only-if-cached" else "bypass",
        ttl_ms=int(ttl * 1000),
        max_age_ms=None if max_age is None else int(seconds(max_age, "max_age", least=0.0) * 1000),
        stale_ms=int(profile.stale_while_revalidate * 1000),
        error_ms=int(profile.stale_if_error * 1000),
        probation_ms=int(profile.probation * 1000),
        soft_timeout_ms=int((profile.soft_timeout or 0) * 1000),
        negative_ms=int(profile.negative_ttl * 1000),
        own_tags=own,
        tags=(f"profile:{name}", f"tenant:{tenant}", f"model:{model}", *own),
        endpoint=_endpoint(content, profile),
        kind=Kind(name, tenant, model, experiment, _variant(content, directives, experiment, rules)),
        early_refresh=profile.early_refresh,
        lead=_truth(directives, "lead"),
        enabled=rules.cache_enabled,
    )


def spec_of(question: Question, cache: bytes | None) -> bytes:
    """Return what a fill says beside the body (JSON): how to compute it, how to keep it, what it counts as."""
    kind = question.kind
    return orjson.dumps(
        {
            "endpoint": question.endpoint,
            "model": question.model,
            "tags": question.tags,
            "ttl_ms": question.ttl_ms,
            "stale_ms": question.stale_ms,
            "error_ms": question.error_ms,
            "probation_ms": question.probation_ms,
            "soft_timeout_ms": question.soft_timeout_ms,
            "negative_ms": question.negative_ms,
            "mode": question.mode,
            "profile": kind.profile,
            "tenant": kind.tenant,
            "experiment": kind.experiment,
            "variant": kind.variant,
            "cache": orjson.Fragment(cache or b"{}"),
        }
    )


def label(value: object, field: str) -> str:
    """Return `value` if it is 1 to 200 characters without white space or control characters; else raise."""
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise InvalidRequest(
            f"{field} must be 1 to 200 characters without white space, not {_shown(value)}", field=field
        )
    return value


def _named(directives: dict[str, Any], name: str) -> str | None:
    return None if directives.get(name) is None else label(directives[name], name)


def _variant(content: dict[str, Any], directives: dict[str, Any], name: str | None, rules: Rules) -> str | None:
    """Return the variant given, else the one an experiment of the deployment's assigns to the request's unit."""
    given, unit = _named(directives, "variant"), directives.get("unit")
    if name is None and (given is not None or unit is not None):
        raise InvalidRequest("a variant, or the unit that decides it, needs its experiment", field="experiment")
    experiment = rules.experiments.get(name) if name is not None else None
    if given is not None or (experiment is None and unit is None):
        return given
    if experiment is None:
        known = ", ".join(sorted(rules.experiments)) or "none"
        raise InvalidRequest(f"no experiment {name!r} to assign a variant; known: {known}", field="experiment")
    unit = content.get(experiment.unit) if unit is None else unit
    if isinstance(unit, bool) or not isinstance(unit, str | int) or unit == "":
        raise InvalidRequest(
            f"this experiment needs a variant, a unit, or {experiment.unit!r} in the body, not {_shown(unit)}",
            field="unit",
        )
    return assign(str(name), str(unit), experiment.variants)


def _truth(directives: dict[str, Any], name: str) -> bool:
    value = directives.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be true or false, not {_shown(value)}", field=name)
    return value


def tags_of(value: object) -> tuple[str, ...]:
    """Return a request's own tags, sorted and without repeats; raise on a bad or a reserved one."""
    if not isinstance(value, list | tuple):
        raise InvalidRequest(f"tags must be a list of strings, not {_shown(value)}", field="tags")
    if len(value) > MAX_TAGS:
        raise InvalidRequest(f"at most {MAX_TAGS} tags, not {len(value)}", field="tags")
    for tag in value:
        label(tag, "tags")
        if tag == "all" or tag.startswith(_RESERVED):
            raise InvalidRequest(f"the tag {tag!r} is reserved: every answer carries it by itself", field="tags")
    return tuple(sorted(set(value)))


def seconds(value: object, field: str, *, least: float, most: float = MAX_TTL) -> float:
    """Return a time in seconds within its bounds; else raise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidRequest(
            f"{field} must be a number of seconds from {least:g} to {most:.0f}, not {_shown(value)}",
            field=field,
        )
    return float(value)


def _shown(value: object) -> str:
    if isinstance(value, dict | list):  # may be nested deeper than repr can follow
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_object(raw: bytes, field: str, most: int) -> dict[str, Any]:
    if len(raw) > most:
        raise InvalidRequest(
            f"{field} has {len(raw)} bytes; the limit is {most} (MILLPOND_MAX_INPUT_BYTES)", field=field
        )
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        problem = "not UTF-8" if "UTF-8" in str(error) or "utf-8" in str(error) else "not JSON"
        raise InvalidRequest(f"{field} is {problem}: {error}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field} must be a JSON object, not {_shown(value)}", field=field)
    return value


def _endpoint(content: dict[str, Any], profile: Profile) -> str:
    if profile.endpoint == "embeddings":
        if "input" not in content:
            raise InvalidRequest("this profile needs `input`: a text, or a list of texts", field="input")
        return "embeddings"
    return "chat/completions" if "messages" in content else "responses"


def _key(
    content: dict[str, Any], name: str, profile: Profile, tenant: str, model: str, scope: object, rules: Rules
) -> str:
    # Which field asks counts too: messages and input are answered in different shapes.
    question = {"messages" if "messages" in content else "input": _asked(content, profile)}
    rest = {k: v for k, v in content.items() if k not in _UNKEYED and k not in ("messages", "input")}
    for field, value in rest.items():
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            rest[field] = int(value)  # a temperature of 1 and of 1.0 are the same
    parts = [
        SCHEMA,
        name,
        tenant,
        _scoped(content, profile, scope),
        model,
        rules.model_versions.get(model, ""),
        question,
        rest,
    ]
    try:
        for field in profile.unordered:
            if isinstance(rest.get(field), list):
                rest[field] = sorted(rest[field], key=partial(orjson.dumps, option=orjson.OPT_SORT_KEYS))
        text = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise InvalidRequest(f"body is nested too deeply: {error}", field="body") from None
    if not text.isascii() and not unicodedata.is_normalized("NFC", text.decode()):
        text = orjson.dumps(_nfc(parts), option=orjson.OPT_SORT_KEYS)
    return blake2b(text, digest_size=16).hexdigest()


def _nfc(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        return {_nfc(k): _nfc(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nfc(v) for v in value]
    return value


def _scoped(content: dict[str, Any], profile: Profile, scope: object) -> dict[str, Any]:
    if scope is None:
        scope = {}
    if not isinstance(scope, dict):
        raise InvalidRequest(f"scope must be an object, not {_shown(scope)}", field="scope")
    unknown = [field for field in scope if field not in profile.scope]
    if unknown:
        raise InvalidRequest(
            f"this profile is not scoped by {unknown[0]!r}; it is by: {', '.join(profile.scope) or 'nothing'}",
            field="scope",
        )
    values = {field: scope.get(field, content.get(field)) for field in profile.scope}
    for field, value in values.items():
        if not isinstance(value, str | int) or value == "":
            raise InvalidRequest(f"this profile is scoped by {field!r}: give it in scope", field=field)
    return values


def _asked(content: dict[str, Any], profile: Profile) -> Any:
    """Return the part of the body that asks: the messages that count, or the input."""
    if "messages" in content:
        messages = content["messages"]
        if not isinstance(messages, list) or not messages:
            raise InvalidRequest("messages must be a list with at least one message", field="messages")
        for at, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise InvalidRequest("each message must be an object with a role", field=f"messages[{at}]")
        if all(_blank(message) for message in messages):
            raise InvalidRequest("messages are empty: nothing is asked", field="messages")
        if "input" in content:
            raise InvalidRequest("give messages or input, not both", field="input")
        if profile.last_messages is not None:
            newest = len(messages) - profile.last_messages
            messages = [m for at, m in enumerate(messages) if at >= newest or m["role"] in ("system", "developer")]
        return [_folded(message) for message in messages] if profile.normalise else messages
    if "input" not in content:
        raise InvalidRequest("the body needs messages or input", field="messages")
    asked = content["input"]
    if not isinstance(asked, str | list | dict) or not asked or (isinstance(asked, str) and not asked.strip()):
        raise InvalidRequest("input must be a text, a list or an object, and not empty", field="input")
    if profile.normalise and isinstance(asked, list):
        return [fold(x) if isinstance(x, str) else x for x in asked]
    return fold(asked) if profile.normalise and isinstance(asked, str) else asked


def _blank(message: dict[str, Any]) -> bool:
    content = message.get("content")
    empty = not content.strip() if isinstance(content, str) else not content
    return empty and not message.get("tool_calls")


def _folded(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": fold(content)} if message["role"] == "user" and isinstance(content, str) else message


def fold(text: str) -> str:
    """Fold what does not change an intent: case, runs of white space, closing punctuation."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(" .!?…")
