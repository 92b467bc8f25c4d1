"""What can be replayed, when it arrives, and the workload that comes with the demo."""

from __future__ import annotations

import gzip
import itertools
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from producers.replay import arrivals, make_demo, workload
from producers.replay.workload import Request
from shared.errors import InvalidRequest


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts(path: Path, **options: Any) -> list[str]:
    return [request.body["messages"][0]["content"] for request in workload.read(path, **options).requests]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '"one"\n\n"two"\n'),
        ("a.jsonl", '{"prompt": "one", "source": "x"}\n{"prompt": "two"}'),
        ("a.jsonl.gz", '{"messages": [{"role": "user", "content": "one"}]}\n"two"\n'),
        ("a.txt", "one\n  two \n\n"),
        ("a.csv", "seq,key\n1,one\n2,two\n"),
        ("a.csv.gz", "prompt,key\none,1\ntwo,2\n"),
        ("mark.jsonl", '\ufeff"one"\n"two"\n'),
        ("mark.jsonl.gz", '\ufeff{"prompt": "one"}\n"two"\n'),
        ("mark.txt", "\ufeffone\ntwo\n"),
        ("mark.csv", "\ufeffkey\none\ntwo\n"),
    ],
)
def test_every_shape_of_file_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    assert texts(write(tmp_path / name, content)) == ["one", "two"]


def test_a_batch_line_is_its_body_unchanged(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0, "metadata": {"a": 1}}
    line = {"custom_id": "7", "method": "POST", "url": "/v1/chat/completions", "body": body}
    [request] = workload.read(write(tmp_path / "b.jsonl", orjson.dumps(line))).requests
    assert request == Request(body)


def test_a_batch_of_embeddings_uses_the_embedding_profile(tmp_path: Path) -> None:
    line = {"custom_id": "7", "method": "POST", "url": "/v1/embeddings", "body": {"model": "e", "input": "q"}}
    [request] = workload.read(write(tmp_path / "b.jsonl", orjson.dumps(line))).requests
    assert request == Request({"model": "e", "input": "q"}, profile="embedding")


def test_a_line_may_say_when_where_and_for_whom(tmp_path: Path) -> None:
    line = {"prompt": "q", "at": 1.5, "profile": "intent", "tenant": "t", "model": "m"}
    [request] = workload.read(write(tmp_path / "b.jsonl", orjson.dumps(line))).requests
    assert request == Request({"messages": [{"role": "user", "content": "q"}], "model": "m"}, 1.5, "intent", "t")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a JSON list"),
        ("{}", "an object with nothing in it"),
        ('{"question": "q"}', "an object with question"),
        ('{"prompt": 3}', "the prompt is not a text"),
        ('"  "', "the prompt is not a text"),
        ('{"messages": []}', "`messages` is not a list of at least one"),
        ('{"messages": "q"}', "`messages` is not a list"),
        ('{"input": ""}', "the body has neither `messages` nor a non-empty `input`"),
        ('{"body": 1}', "`body` is not an object"),
        ('{"custom_id": "1", "method": "GET", "url": "/v1/responses", "body": {"input": "q"}}', "`method` is 'GET'"),
        ('{"custom_id": "1", "method": "POST", "url": "/v1/images", "body": {"input": "q"}}', "`url` is '/v1/images'"),
        ('{"prompt": "q", "at": "soon"}', "`at` is not a number"),
        ('{"prompt": "q", "tenant": 1}', "`tenant` is not a string"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_what_was_expected(tmp_path: Path, line: str, complaint: str) -> None:
    file = write(tmp_path / "bad.jsonl", f'"fine"\n{line}\n"fine too"\n')
    with pytest.raises(InvalidRequest) as caught:
        workload.read(file)
    message = caught.value.message
    assert message.startswith(f"bad.jsonl:2: {complaint}")
    assert "expected a JSON string" in message
    assert "--skip-bad" in message


def test_skip_bad_counts_and_goes_on(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.jsonl", '"one"\n{oops\n{}\n"two"\n')
    found = workload.read(file, skip_bad=True)
    assert (len(found.requests), found.skipped) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jsonl", b"", "no requests in it"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "must be UTF-8"),
        ("table.csv", b"a,b\n1,2\n", "needs a column `key` or `prompt`"),
        ("prompts.parquet", b"PAR1", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_replayed_says_what_to_do(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        workload.read(write(tmp_path / name, content))


def test_a_directory_is_not_a_file_of_requests(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is a directory; give a file"):
        workload.read(tmp_path)


def test_a_table_of_times_that_never_come_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"a\.csv:3: `ts_s` is 'inf'"):
        workload.read(write(tmp_path / "a.csv", "key,ts_s\none,1\ntwo,inf\n"))


def test_a_file_called_gz_that_is_not_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'"plain"\n')
    with pytest.raises(InvalidRequest, match=r"gzipped if and only if it ends in \.gz"):
        workload.read(tmp_path / "a.jsonl.gz")


def test_limit_stops_reading_before_a_bad_line(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '"one"\n"two"\n{oops\n'), limit=2) == ["one", "two"]


def asked(count: int, *, timed: bool = False) -> list[Request]:
    return [Request({"input": str(n)}, at=float(n) if timed else None) for n in range(count)]


def test_zipf_draws_follow_their_law_and_their_seed() -> None:
    requests = asked(500)
    drawn = workload.draw(requests, 50_000, 1.1, random.Random(5))
    counts = [n for _, n in Counter(str(r.body) for r in drawn).most_common()]
    weights = [rank**-1.1 for rank in range(1, 501)]
    assert counts[0] / 50_000 == pytest.approx(weights[0] / sum(weights), rel=0.05)
    assert counts[0] / counts[9] == pytest.approx(10**1.1, rel=0.15)
    assert drawn == workload.draw(requests, 50_000, 1.1, random.Random(5))


@pytest.mark.parametrize("text", ["zipf:x", "uniform:1", "zipf:-1", "zipf:nan", "1.1"])
def test_a_wrong_repeat_says_how_to_write_it(text: str) -> None:
    with pytest.raises(InvalidRequest, match="write zipf:S"):
        workload.parse_repeat(text)


def test_going_through_a_file_again_lets_its_clock_go_on() -> None:
    times = [request.at or 0.0 for request in workload.extend(asked(3, timed=True), 7)]
    assert times == sorted(times)
    assert len(set(times)) == 7


def test_a_trace_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert arrivals.read_trace(write(tmp_path / "t.csv", "\ufeffts_s\n1\n3\n")) == [0.0, 2.0]


def test_a_trace_starts_at_zero_in_order_and_plays_again_when_it_ends(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.csv.gz", "ts_s,input_tokens\n12.0,1\n10.0,2\n14.0,3\n")
    times = arrivals.read_trace(trace)
    assert times == [0.0, 2.0, 4.0]
    assert arrivals.repeat_trace(times, 5) == [0.0, 2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("at\n1\n", "needs a column `ts_s`"),
        ("ts_s\n1\nsoon\n", r"t\.csv:3: `ts_s` is 'soon'"),
        ("ts_s\n", "no arrival"),
    ],
)
def test_a_bad_trace_is_refused_by_name_and_line(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        arrivals.read_trace(write(tmp_path / "t.csv", content))


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    times = arrivals.poisson(200.0, 20_000, random.Random(3))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.05)


def test_the_files_own_times_count_unless_something_else_is_asked_for() -> None:
    requests = [Request({"input": "a"}, at=5.0), Request({"input": "b"}, at=9.0)]
    none: dict[str, Any] = {"trace": None, "rate": None, "flat_out": False, "rng": random.Random(1)}
    assert arrivals.schedule(requests, speedup=2.0, **none) == [0.0, 2.0]
    assert arrivals.schedule(requests, speedup=2.0, **none | {"flat_out": True}) is None
    assert arrivals.schedule(asked(2), speedup=1.0, **none) is None


def test_the_bundled_workload_is_what_its_writer_writes(tmp_path: Path) -> None:
    make_demo.write(tmp_path / "again.jsonl.gz")
    both = [gzip.decompress(path.read_bytes()) for path in (tmp_path / "again.jsonl.gz", make_demo.WORKLOAD)]
    assert both[0] == both[1]


def test_the_bundled_workload_has_the_mix_it_claims() -> None:
    rows = make_demo.build()
    kinds = Counter(row["kind"] for row in rows)
    assert kinds == {"repeat": 800, "reworded": 600, "unique": 600}
    seen: set[str] = set()
    for row in rows:
        text = row["body"]["messages"][1]["content"]
        assert (text in seen) == (row["kind"] == "repeat")
        seen.add(text)


def test_the_bundled_workload_has_bursts_of_one_question_at_one_moment() -> None:
    moments = Counter((row["at"], row["body"]["messages"][1]["content"]) for row in make_demo.build())
    assert sum(count >= 5 for count in moments.values()) >= 10


def test_a_hundred_thousand_lines_are_read_and_scheduled_in_seconds(tmp_path: Path) -> None:
    lines = b"".join(b'{"prompt":"question %d"}\n' % n for n in range(100_000))
    began = time.process_time()
    requests = workload.read(write(tmp_path / "a.jsonl", lines)).requests
    drawn = workload.draw(requests, 100_000, 1.1, random.Random(1))
    arrivals.schedule(drawn, trace=None, rate=1000.0, flat_out=False, speedup=1.0, rng=random.Random(1))
    assert time.process_time() - began < 10
