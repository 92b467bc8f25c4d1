"""Reading what is to be replayed, one request at a time, from whatever shape people keep their prompts in.

    *.jsonl   a JSON string; `{"prompt": …}`; an OpenAI chat or responses body (`{"messages"|"input": …}`);
              an OpenAI batch line (`{"custom_id", "method", "url", "body"}`); `{"at": …, "body": …}`
    *.csv     a column `key` or `prompt` with the text, optionally `ts_s` with its arrival time
    *.txt     a prompt per line

Any of them may be gzipped (`.gz`). `at` and `ts_s` are seconds; beside `prompt` and `body` a line may also name
`model`, `profile` and `tenant`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import itertools
import math
import random
import stat
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import orjson

from producers.replay.words import counted
from shared.errors import InvalidRequest

ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
LONGEST_FIELD = 16 << 20
ENCODING = "utf-8-sig"
EXPECTED = (
    'a JSON string, {"prompt": …}, a body with "messages" or "input", '
    'or a batch line {"custom_id", "method", "url", "body"}'
)


@dataclass(frozen=True, slots=True)
class Request:
    """One request to replay: an OpenAI-style body, its arrival in seconds if known, its cache class and tenant."""

    body: dict[str, Any]
    at: float | None = None
    profile: str | None = None
    tenant: str | None = None


@dataclass(slots=True)
class Workload:
    """The requests of a file, and how many of its lines were skipped as unreadable."""

    requests: list[Request]
    skipped: int = 0


class _BadLine(ValueError):
    """What is wrong with a line; the reader adds file and line."""


def read(path: Path, *, limit: int | None = None, skip_bad: bool = False) -> Workload:
    """Read at most `limit` requests from `path`.

    Raises:
        InvalidRequest: a line is not a request (unless `skip_bad`), the file is empty or of an unknown kind; the
            message names file, line and what was expected.
        OSError: the file cannot be read.
    """
    if stat.S_ISDIR(path.stat().st_mode):
        raise InvalidRequest(f"{path} is a directory; give a file of requests in it", field=str(path))
    workload = Workload([])
    rows, parse = _reader(path)
    for number, row in rows:
        if limit is not None and len(workload.requests) >= limit:
            break
        try:
            workload.requests.append(parse(row))
        except _BadLine as problem:
            if not skip_bad:
                where = f"{path.name}:{number}"
                raise InvalidRequest(
                    f"{where}: {problem}; expected {EXPECTED}. Mend the line, or go on without it by --skip-bad",
                    field=where,
                ) from None
            workload.skipped += 1
    if not workload.requests:
        raise InvalidRequest(
            f"{path.name}: no requests in it ({counted(workload.skipped, 'unreadable line')}); "
            f"expected {EXPECTED} on each line",
            field=path.name,
        )
    return workload


@contextlib.contextmanager
def reading(path: Path) -> Iterator[IO[str]]:
    """Open a UTF-8 file, with a byte order mark or without, gzipped if its name ends in `.gz`.

    What cannot be decoded while it is read becomes an `InvalidRequest`.
    """
    compressed = path.suffix == ".gz"
    try:
        with (
            gzip.open(path, "rt", encoding=ENCODING, newline="")
            if compressed
            else path.open("rt", encoding=ENCODING, newline="")
        ) as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError, csv.Error) as problem:
        raise InvalidRequest(
            f"{path.name}: cannot be read ({problem}); it must be UTF-8 text, gzipped if and only if it ends in .gz",
            field=path.name,
        ) from None


def kind_of(path: Path) -> str:
    """Return the suffix that tells the format, without `.gz`: such as `.jsonl`."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _reader(path: Path) -> tuple[Iterator[tuple[int, Any]], Callable[[Any], Request]]:
    match kind_of(path):
        case ".jsonl" | ".ndjson" | ".json":
            return _lines(path), parse_json
        case ".txt":
            return _lines(path), _parse_text
        case ".csv":
            return _table(path), _parse_csv
    raise InvalidRequest(
        f"{path.name}: unknown kind of file; name it .jsonl, .csv or .txt (each may end in .gz)", field=path.name
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            if text := line.strip():
                yield number, text


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(LONGEST_FIELD)
    with reading(path) as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        if "key" not in columns and "prompt" not in columns:
            raise InvalidRequest(
                f"{path.name}:1: needs a column `key` or `prompt` with the text, has {', '.join(columns) or 'none'}",
                field=path.name,
            )
        for row in rows:
            yield rows.line_num, row


def parse_json(line: str | bytes) -> Request:
    """Turn one JSON line into a request. Raises a ValueError that says what is wrong with it."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as problem:
        raise _BadLine(f"not JSON ({problem})") from None
    if isinstance(row, str):
        return _prompt(row)
    if not isinstance(row, dict):
        raise _BadLine(f"a JSON {type(row).__name__}")
    if "body" in row:
        return _enveloped(row)
    if "messages" in row or "input" in row:
        return Request(_checked(row))
    if "prompt" in row:
        return _prompt(row["prompt"], **_envelope(row))
    raise _BadLine(f"an object with {', '.join(list(row)[:5]) or 'nothing in it'}")


def _enveloped(row: dict[str, Any]) -> Request:
    body = row["body"]
    if not isinstance(body, dict):
        raise _BadLine("`body` is not an object")
    if (method := row.get("method", "POST")) != "POST":
        raise _BadLine(f"`method` is {method!r}, only POST can be replayed")
    if (url := row.get("url", ENDPOINTS[0])) not in ENDPOINTS:
        raise _BadLine(f"`url` is {url!r}, only {', '.join(ENDPOINTS)} can be replayed")
    about = _envelope(row)
    if url == "/v1/embeddings" and about["profile"] is None:
        about["profile"] = "embedding"
    model = about.pop("model")
    return Request(_checked(body if model is None else body | {"model": model}), **about)


def _envelope(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {name: row.get(name) for name in ("model", "profile", "tenant")}
    for name, value in found.items():
        if value is not None and not isinstance(value, str):
            raise _BadLine(f"`{name}` is not a string")
    at = row.get("at")
    if at is not None and (isinstance(at, bool) or not isinstance(at, int | float) or at < 0):
        raise _BadLine("`at` is not a number of seconds")
    return found | {"at": at}


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise _BadLine("`messages` is not a list of at least one message object")
    elif not body.get("input"):
        raise _BadLine("the body has neither `messages` nor a non-empty `input`")
    return body


def _prompt(text: Any, *, model: str | None = None, **about: Any) -> Request:
    if not isinstance(text, str) or not text.strip():
        raise _BadLine("the prompt is not a text, or is empty")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]}
    return Request(body if model is None else body | {"model": model}, **about)


def _parse_text(line: str) -> Request:
    return _prompt(line)


def _parse_csv(row: dict[str, str]) -> Request:
    at = row.get("ts_s")
    try:
        seconds = float(at) if at else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not math.isfinite(seconds):
        raise _BadLine(f"`ts_s` is {at!r}, not a number of seconds")
    return _prompt(row.get("prompt") or row.get("key"), at=seconds)


def parse_repeat(text: str) -> float:
    """Return the exponent of a `--repeat` value such as `zipf:1.1`.

    Raises:
        InvalidRequest: it is something else.
    """
    name, _, exponent = text.partition(":")
    try:
        value = float(exponent or 1.0)
    except ValueError:
        value = -1.0
    if name != "zipf" or not 0.0 <= value <= 10.0:
        raise InvalidRequest(
            f"--repeat is {text!r}; write zipf:S with S from 0 (all alike) to 10, such as zipf:1.1", field="repeat"
        )
    return value


def draw(requests: Sequence[Request], count: int, exponent: float, rng: random.Random) -> list[Request]:
    """Draw `count` requests with Zipf popularity: the k-th most popular has weight k**-exponent.

    Which request is how popular is chance. Arrival times of the originals mean nothing to a draw and are dropped.
    """
    ranked = [replace(request, at=None) for request in requests]
    rng.shuffle(ranked)
    weights = list(itertools.accumulate(rank**-exponent for rank in range(1, len(ranked) + 1)))
    total = weights[-1]
    last = len(ranked) - 1
    return [ranked[min(bisect_right(weights, rng.random() * total), last)] for _ in range(count)]


def extend(requests: Sequence[Request], count: int) -> list[Request]:
    """Return `count` requests: the first ones, or all of them over and over, arrival times going on."""
    if count <= len(requests):
        return list(requests[:count])
    times = [request.at for request in requests if request.at is not None]
    period = max(times) * (1 + 1 / len(times)) if times else 0.0
    rounds = range(-(-count // len(requests)))
    longer = (
        request if request.at is None or not lap else replace(request, at=request.at + lap * period)
        for lap in rounds
        for request in requests
    )
    return list(itertools.islice(longer, count))


def with_model(requests: Sequence[Request], model: str) -> list[Request]:
    """Return the same requests, all put to `model`."""
    return [replace(request, body=request.body | {"model": model}) for request in requests]
