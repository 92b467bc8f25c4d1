"""Writes the bundled demo workload: `python -m producers.replay.make_demo [--seed N] [--requests N] [FILE]`.

Two thousand questions over about forty seconds, put to a support desk and an estate agency: 40 % repeat a text asked
before, 30 % ask an earlier question in other words, 30 % are new. Part of the repeats come in bursts, the same
question from many people within a tenth of a second. The same seed writes the same lines.
"""

from __future__ import annotations

import argparse
import gzip
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import orjson

HERE = Path(__file__).parent
PHRASES = HERE / "demo_phrases.toml"
WORKLOAD = HERE / "demo_workload.jsonl.gz"

REPEATED, REWORDED = 0.40, 0.30
BURSTS = 14
BURST_SIZES = (12, 36)
BURST_WIDTH = 0.1
REQUESTS_PER_SECOND = 50.0

Kind = Literal["repeat", "reworded", "unique"]


@dataclass(slots=True)
class Question:
    """One meaning: a topic with its slots filled, and the texts in which it was asked so far."""

    app: str
    phrasings: list[str]
    slots: dict[str, str]
    asked: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Asked:
    """One line of the workload; `at` in seconds."""

    at: float
    kind: Kind
    app: str
    text: str


class Writer:
    """Makes up questions; every choice comes from one seeded source."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        phrases = tomllib.loads(PHRASES.read_text(encoding="utf-8"))
        self.systems: dict[str, str] = phrases["systems"]
        self._pools: dict[str, list[str]] = phrases["slots"]
        self._topics: list[dict[str, Any]] = phrases["topic"]
        self._open = [topic for topic in self._topics if _slots(topic)]
        self._fixed = [topic for topic in self._topics if not _slots(topic)]
        self.random.shuffle(self._fixed)
        self._known: set[tuple[str, ...]] = set()
        self._texts: set[str] = set()
        self.questions: list[Question] = []
        self.history: list[tuple[str, str]] = []

    def unique(self, *, popular: bool = False) -> tuple[str, str]:
        """Return (app, text) of a question nobody asked before; `popular` prefers one that everybody shares."""
        if self._fixed and (popular or self.random.random() < 0.08):
            topic = self._fixed.pop()
        else:
            topic = self.random.choice(self._open)
        while True:
            slots = {name: self._fill(name) for name in _slots(topic)}
            identity = (topic["phrasings"][0], *slots.values())
            if identity not in self._known:
                break
            topic = self.random.choice(self._open)
        self._known.add(identity)
        question = Question(topic["app"], self.random.sample(topic["phrasings"], len(topic["phrasings"])), slots)
        self.questions.append(question)
        return self._say(question)

    def reworded(self) -> tuple[str, str]:
        """Return (app, text) of an earlier question in words not used for it so far."""
        while True:
            question = self.random.choice(self.questions)
            if len(question.asked) < len(question.phrasings):
                return self._say(question)

    def repeat(self) -> tuple[str, str]:
        """Return (app, text) of something asked before; what was asked often is asked more often."""
        return self.random.choice(self.history)

    def _say(self, question: Question) -> tuple[str, str]:
        while True:
            phrasing = question.phrasings[len(question.asked) % len(question.phrasings)]
            text = self._voice(phrasing.format_map(question.slots))
            if text not in self._texts:
                break
        self._texts.add(text)
        question.asked.append(text)
        return question.app, text

    def _fill(self, slot: str) -> str:
        if slot == "order":
            return f"FH-{self.random.randrange(40_000, 99_999)}"
        if slot == "number":
            return str(self.random.randrange(1, 120))
        return self.random.choice(self._pools[slot])

    def _voice(self, text: str) -> str:
        """Say it as one of many people would: politely, hastily, or without looking at the keyboard."""
        chance = self.random.random()
        if chance < 0.12:
            plain = text[1].islower() and not text.startswith("I ")
            text = text[0].lower() + text[1:] if plain else text
            return f"{self.random.choice(('Hi', 'Hello', 'Good morning', 'Hey there'))}, {text}"
        if chance < 0.22:
            return f"{text} {self.random.choice(('Thanks!', 'Thank you.', 'Many thanks in advance', 'It is urgent.'))}"
        if chance < 0.30:
            return text.lower().rstrip("?.!")
        if chance < 0.36:
            return self._slip(text)
        return text

    def _slip(self, text: str) -> str:
        """Swap two neighbouring letters inside one longer word."""
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) > 5 and word.isalpha()]
        if not long:
            return text
        at = self.random.choice(long)
        word, cut = words[at], self.random.randrange(1, len(words[at]) - 2)
        words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        return " ".join(words)


def _slots(topic: dict[str, Any]) -> list[str]:
    names: dict[str, None] = {}
    for phrasing in topic["phrasings"]:
        names.update({name: None for _, name, _, _ in Formatter().parse(phrasing) if name})
    return list(names)


def build(requests: int = 2000, seed: int = 7) -> list[dict[str, Any]]:
    """Return the lines of a workload of `requests` requests, sorted by `at`.

    Each is `{"at": seconds, "kind": "repeat"|"reworded"|"unique", "body": chat body}`.
    """
    writer = Writer(seed)
    duration = requests / REQUESTS_PER_SECOND
    rng = writer.random
    bursts = sorted(rng.uniform(0.06, 0.97) * duration for _ in range(max(1, BURSTS * requests // 2000)))
    sizes = [rng.randint(*BURST_SIZES) for _ in bursts]
    repeats = round(requests * REPEATED) - sum(sizes) + len(sizes)
    reworded = round(requests * REWORDED)
    unique = requests - round(requests * REPEATED) - reworded - len(sizes)
    if min(repeats, unique) < 1:
        raise ValueError(f"{requests} requests are too few for {len(sizes)} bursts; ask for at least 100")
    counts: tuple[tuple[Kind, int], ...] = (("repeat", repeats), ("reworded", reworded), ("unique", unique))
    kinds: list[Kind] = [kind for kind, count in counts for _ in range(count)]
    rng.shuffle(kinds)
    # The first lines have nothing to repeat or reword.
    for place in range(5):
        swap = kinds.index("unique", place)
        kinds[place], kinds[swap] = kinds[swap], kinds[place]
    times = sorted(rng.uniform(0.0, duration) for _ in kinds)
    lines: list[Asked] = []
    waiting = list(zip(bursts, sizes, strict=True))
    for at, kind in zip(times, kinds, strict=True):
        while waiting and waiting[0][0] <= at:
            lines += _burst(writer, *waiting.pop(0))
        app, text = {"repeat": writer.repeat, "reworded": writer.reworded, "unique": writer.unique}[kind]()
        writer.history.append((app, text))
        lines.append(Asked(at, kind, app, text))
    for left in waiting:
        lines += _burst(writer, *left)
    lines.sort(key=lambda line: line.at)
    return [_row(line, writer.systems[line.app]) for line in lines]


def _burst(writer: Writer, at: float, size: int) -> list[Asked]:
    app, text = writer.unique(popular=True)
    writer.history += [(app, text)] * 3
    # Half of a burst falls on one instant, the rest trails within BURST_WIDTH.
    late = [max(0.0, writer.random.uniform(-BURST_WIDTH, BURST_WIDTH)) for _ in range(size - 1)]
    return [Asked(at, "unique", app, text)] + [Asked(at + wait, "repeat", app, text) for wait in late]


def _row(line: Asked, system: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": line.text}]
    return {"at": round(line.at, 3), "kind": line.kind, "body": {"messages": messages}}


def write(path: Path, requests: int = 2000, seed: int = 7) -> int:
    """Write the workload to `path` (gzipped JSONL) and return its number of lines."""
    rows = build(requests, seed)
    data = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(data, 9, mtime=0))
    return len(rows)


def main() -> None:
    """Entry of `python -m producers.replay.make_demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=WORKLOAD)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    print(f"{write(given.file, given.requests, given.seed)} requests written to {given.file.name}")


if __name__ == "__main__":
    main()
