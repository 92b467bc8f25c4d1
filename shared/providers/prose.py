"""English for the simulated provider: plain sentences about a question's words, the same ones for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

_TOKEN = re.compile(r"\s*\w{1,12}|\s*[^\w\s]+|\s+$")
_WORD = re.compile(r"[^\W\d_]{3,}(?:['’-][^\W\d_]+)*")

_COMMON = frozenset(
    re.findall(
        r"\S+",
        """about above after again all also and any are ask asked because been before being below between both but can
    could did does doing don't down during each few for from get give had has have having help her here hers him his
    how i'd i'm into its it's just know let like make many may me might more most much must need not now off once one
    only other our out over own please question same say she should some such tell than that the their them then there
    these they this those through too under until very want was way we were what what's when where which while who
    whom why will with would you your""",
    )
)

# A subject may be any word of a question, so each one follows a preposition: no verb has to agree with it.
_OPENINGS = (
    "The short answer about {a} is that much depends on what you know about {b}.",
    "You asked about {a}, and the best place to start is with {b}.",
    "With questions about {a}, it usually pays to think of {b} first.",
    "There are two sides to {a}: what is written down, and what people do about {b} in practice.",
    "Most doubts about {a} can be settled with a closer look at {b}.",
)

_SENTENCES = (
    "In practice it helps to look at {a} together with {b}, because each affects the other.",
    "First, write down what you already know about {a}, including any dates, amounts and reference numbers.",
    "Then compare it with what you were told about {b}, and note where the two disagree.",
    "If anything about {a} is unclear, ask for it in writing, since a spoken promise is hard to rely on later.",
    "A common mistake is to decide about {a} before anyone has looked into {b}.",
    "As a rule of thumb, allow {n} working days for {a}, and a little longer around holidays.",
    "Costs vary with {a}, but a difference of more than {n} percent is worth asking about.",
    "Keep a copy of everything that has to do with {b}, even if it seems minor today.",
    "If a third party has a say in {a}, confirm that they have the same information you do.",
    "Separate what is urgent about {a} from what can wait until you know more about {b}.",
    "Should there be news about {b} in the meantime, the earlier answer about {a} may no longer hold.",
    "Some providers have one department for {a} and another for {b}, so ask who is responsible.",
    "You can usually check for yourself what has happened about {a} in under {n} minutes.",
    "If that does not help, the next step is to go through {b} with someone in person.",
    "There is rarely a reason to hurry with {a} before the details on {b} have been confirmed.",
    "For an exact figure, look for {a} in your most recent statement.",
    "Two people can read the same terms on {b} differently, so quote the passage you rely on.",
    "After about {n} days it is reasonable to ask again about {a}.",
    "None of this changes what you have already agreed on {b}.",
    "In short, take it step by step with {a}, and then turn to {b}.",
)


def tokens(text: str) -> list[str]:
    """Cut a text into tokens: words with the space before them, runs of punctuation. They join to the text again."""
    return _TOKEN.findall(text)


def answer(question: str, length: int, seed: str) -> str:
    """Return sentences about `question`, at least one, of up to about `length` tokens; the same for the same seed."""
    chance = random.Random(seed)
    written: list[str] = []
    budget = length
    for sentence in _sentences(_subjects(question), chance):
        budget -= len(tokens(sentence)) + (not written)
        if written and budget < 0:
            break
        written.append(sentence)
    return " ".join(written)


def _sentences(subjects: list[str], chance: random.Random) -> Iterator[str]:
    yield _filled(_pick(_OPENINGS, chance), subjects, chance)
    while True:
        for sentence in sorted(_SENTENCES, key=lambda _: chance.random()):
            yield _filled(sentence, subjects, chance)


def _filled(sentence: str, subjects: list[str], chance: random.Random) -> str:
    a = _pick(subjects, chance)
    b = _pick([subject for subject in subjects if subject != a], chance)
    return sentence.format(a=a, b=b, n=2 + int(chance.random() * 19))


def _subjects(question: str) -> list[str]:
    """Return what the question is about: its uncommon words, in order, and at least two subjects."""
    opened = question.lstrip()
    if opened[1:2].islower():
        opened = opened[0].lower() + opened[1:]
    subjects = list(dict.fromkeys(w for w in _WORD.findall(opened) if w.casefold() not in _COMMON))[:12]
    return subjects + ["the details you gave", "the usual terms"][: max(0, 2 - len(subjects))]


def _pick(options: tuple[str, ...] | list[str], chance: random.Random) -> str:
    return options[int(chance.random() * len(options))]
