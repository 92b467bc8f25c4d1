"""The simulated provider: answers without a model, at a configured speed, and says so.

It is what runs when no API key is configured, and what tests and benchmarks count calls with: every call appends one
line to `simulated_journal` before it begins to wait, and one with the time it took when it answers. The text is plain
English about the question's own words, always the same for the same request; it never calls a tool. Nothing inside a
prompt steers it, only settings do.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import random
import re
import struct
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from shared.answers import joined, objects
from shared.errors import ContentFiltered, ProviderError, RateLimited
from shared.providers.base import Call, Completion
from shared.providers.prose import answer, tokens
from shared.settings import Settings

NAME = "simulated"

_UNANSWERED = frozenset({"user", "metadata"})  # what does not change an answer
_MAXIMA = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_DIMENSIONS = 1536
_SPREAD = 8  # coordinates that one feature of a text moves


class SimulatedProvider:
    """A stand-in for an LLM. Its answers' `model`, `system_fingerprint` and ids carry the word "simulated"."""

    def __init__(self, settings: Settings, name: str = NAME) -> None:
        self.name = name
        self._settings = settings
        self._chance = random.Random(settings.simulated_seed)
        if settings.simulated_journal is not None:
            settings.simulated_journal.parent.mkdir(parents=True, exist_ok=True)

    async def complete(self, call: Call) -> Completion:
        """Answer one call after the first-token delay and the time its longest choice takes to write.

        Raises:
            ProviderError: with status 503, at the configured failure rate, after the first-token delay; with the
                status that `simulated_outage` says, at once.
        """
        arrived = time.perf_counter()  # uvloop's own clock stands still within a turn, and counts whole milliseconds
        settings, began = self._settings, asyncio.get_running_loop().time()
        sha = fingerprint(call)
        prompt = list(_prompt(call.body))
        if settings.simulated_journal is not None:
            _record(settings.simulated_journal, self.name, call.endpoint, sha, prompt[-1] if prompt else "")
        await self._outage()
        fails = self._chance.random() < settings.simulated_failure_rate
        if call.endpoint == "embeddings":
            body, written = _embeddings(call.body), 0
        else:
            shape = _chat if call.endpoint == "chat/completions" else _response
            body, written = shape(call.body, prompt, sha, settings.simulated_tokens)
        await _until(began + settings.simulated_first_token)
        if fails:
            raise ProviderError(
                "simulated failure: the simulated provider fails at MILLPOND_SIMULATED_FAILURE_RATE; try again",
                status=503,
                provider=self.name,
            )
        await _until(began + settings.simulated_first_token + written / settings.simulated_tokens_per_second)
        completion = Completion.read(orjson.dumps(body))
        if settings.simulated_journal is not None:
            line = {"sha": sha, "elapsed": time.perf_counter() - arrived}
            asyncio.get_running_loop().call_soon(_append, settings.simulated_journal, line)
        return completion

    async def _outage(self) -> None:
        """Fail, or never answer, if the outage file says so of this provider."""
        trouble = trouble_of(self.name, self._settings.simulated_outage)
        if trouble == "hang":
            await asyncio.Event().wait()
        if trouble:
            status = int(trouble)
            kind = {429: RateLimited, 451: ContentFiltered}.get(status, ProviderError)
            raise kind(f"simulated outage of {self.name} ({status})", status=status, provider=self.name)

    async def close(self) -> None:
        """Nothing to give up."""


def trouble_of(name: str, outage: Path | None) -> str:
    """Return how a provider fails by an outage file: an HTTP status, `hang`, or "" when it does not."""
    try:
        lines = [line.split() for line in outage.read_text().splitlines()] if outage is not None else [["", ""]]
    except FileNotFoundError:
        return ""
    if not any(lines):
        return "503"
    return next((line[1] if len(line) > 1 else "503" for line in lines if line and line[0] == name), "")


async def _until(moment: float) -> None:
    """Sleep until the loop's clock reads `moment`: what was computed meanwhile does not add to the delay."""
    await asyncio.sleep(max(moment - asyncio.get_running_loop().time(), 0.0))


def calls(journal: Path) -> list[dict[str, Any]]:
    """Return every call a journal holds, oldest first.

    Each has `time` (epoch seconds), `pid`, `endpoint`, `sha`, `prompt` and the `provider` by name. This is the
    providers' own count of calls. A journal that does not exist yet holds none.
    """
    return [line for line in _lines(journal) if "elapsed" not in line]


def durations(journal: Path) -> dict[str, float]:
    """Return the provider's own time, in seconds, of the calls it answered, by their `sha`."""
    return {line["sha"]: line["elapsed"] for line in _lines(journal) if "elapsed" in line}


def fingerprint(call: Call) -> str:
    """Return 128 bits (hex) that equal requests share: of the endpoint and all body fields that change an answer."""
    asked = {name: value for name, value in call.body.items() if name not in _UNANSWERED}
    text = json.dumps([call.endpoint, asked], sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _record(journal: Path, name: str, endpoint: str, sha: str, prompt: str) -> None:
    line = {"time": time.time(), "pid": os.getpid(), "endpoint": endpoint, "sha": sha, "prompt": prompt[:120]}
    _append(journal, line | {"provider": name})


def _append(journal: Path, line: dict[str, Any]) -> None:
    descriptor = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, json.dumps(line).encode() + b"\n")  # one write: lines of several processes never mix
    finally:
        os.close(descriptor)


def _lines(journal: Path) -> list[dict[str, Any]]:
    try:
        lines = journal.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [orjson.loads(line) for line in lines]


def _prompt(body: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of a prompt, in order: instructions, then messages or input."""
    if isinstance(body.get("instructions"), str):
        yield body["instructions"]
    for message in objects(body.get("messages")):
        yield joined(message.get("content"))
    asked = body.get("input")
    if isinstance(asked, str):
        yield asked
    for item in asked if isinstance(asked, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            yield joined(item.get("content"))


def _prompt_tokens(body: dict[str, Any], prompt: list[str]) -> int:
    """Count a prompt as its texts, three tokens for each one's frame, three for the answer's, and the tools' JSON."""
    tools = len(tokens(json.dumps(body["tools"]))) if body.get("tools") else 0
    return sum(len(tokens(text)) + 3 for text in prompt) + 3 + tools


def _write(body: dict[str, Any], prompt: list[str], seed: str, length: int) -> tuple[str, int, bool]:
    """Return an answer's text, its tokens, and whether the request's maximum cut it short."""
    text = answer(prompt[-1] if prompt else "", length, seed)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
    for stop in stops if isinstance(stops, list) else ():
        if isinstance(stop, str) and stop:
            text = text.partition(stop)[0]
    pieces = tokens(text)
    most = _whole(body, *_MAXIMA) or len(pieces)
    return "".join(pieces[:most]), min(most, len(pieces)), most < len(pieces)


def _chat(body: dict[str, Any], prompt: list[str], sha: str, length: int) -> tuple[dict[str, Any], int]:
    """Return a chat completion's body and the tokens of its longest choice."""
    written = [_write(body, prompt, f"{sha}:{at}", length) for at in range(min(_whole(body, "n") or 1, 128))]
    prompt_tokens, completion_tokens = _prompt_tokens(body, prompt), sum(count for _, count, _ in written)
    answered = {
        "id": f"chatcmpl-simulated-{sha}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": _model(body),
        "system_fingerprint": NAME,
        "choices": [
            {
                "index": at,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "length" if cut else "stop",
            }
            for at, (text, _, cut) in enumerate(written)
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return answered, max(count for _, count, _ in written)


def _response(body: dict[str, Any], prompt: list[str], sha: str, length: int) -> tuple[dict[str, Any], int]:
    """Return a response's body (the Responses API) and its tokens."""
    text, count, cut = _write(body, prompt, f"{sha}:0", length)
    prompt_tokens, status = _prompt_tokens(body, prompt), "incomplete" if cut else "completed"
    content = {"type": "output_text", "text": text, "annotations": []}
    answered = {
        "id": f"resp_simulated_{sha}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": _model(body),
        "system_fingerprint": NAME,
        "output": [
            {
                "type": "message",
                "id": f"msg_simulated_{sha}",
                "status": status,
                "role": "assistant",
                "content": [content],
            }
        ],
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + count,
        },
    }
    return answered, count


def _embeddings(body: dict[str, Any]) -> dict[str, Any]:
    asked = body.get("input")
    single = not isinstance(asked, list) or (bool(asked) and all(isinstance(token, int) for token in asked))
    texts = [asked] if single else asked
    width = min(_whole(body, "dimensions") or _DIMENSIONS, 4096)
    packed = body.get("encoding_format") == "base64"
    data = []
    for at, text in enumerate(texts or ()):
        vector = embed(text if isinstance(text, str) else json.dumps(text), width)
        shown = base64.b64encode(struct.pack(f"<{width}f", *vector)).decode() if packed else vector
        data.append({"object": "embedding", "index": at, "embedding": shown})
    count = sum(len(text) if isinstance(text, list) else len(tokens(str(text))) for text in texts or ())
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": _model(body), "system_fingerprint": NAME, "usage": usage}


def embed(text: str, width: int) -> list[float]:
    """Return a unit vector of `width` numbers; texts that share words and parts of words lie close together."""
    vector = [0.0] * width
    words = re.findall(r"\w+", text.casefold())
    features = words * 2 + [f" {word} "[at : at + 3] for word in words for at in range(len(word))]
    for feature in features or [text]:
        digest = blake2b(feature.encode("utf-8", "replace"), digest_size=4 * _SPREAD).digest()
        for number in struct.unpack(f"<{_SPREAD}I", digest):
            vector[(number >> 1) % width] += 1.0 if number & 1 else -1.0
    norm = math.sqrt(sum(x * x for x in vector))
    if not norm:  # every move was undone by another
        return [1.0, *vector[1:]]
    return [round(x / norm, 8) for x in vector]


def _model(body: dict[str, Any]) -> str:
    return f"{NAME}/{body.get('model') or 'default'}"


def _whole(body: dict[str, Any], *names: str) -> int | None:
    """Return the first of these fields that is a whole number above zero."""
    values = (body.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
