"""Workloads of the scenarios: the lead-qualification workflow.

A workflow handles one conversation with a lead: sixteen steps ask about what all leads of a property share (its
dossier, the market, the agency's criteria), two about the lead himself. The original's prompts are not public: the
number of steps and the lengths of the texts are chosen such that a workflow without a cache takes about 93,000 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from producers.bench.questions import Messages

PROPERTIES = 8
SHARED_BY_ALL = (
    "How has the market moved in the last quarter?",
    "Which of our criteria decide most in this market?",
    "What do buyers in this market ask first?",
    "Which objections come up most, and what answers them?",
)
SHARED_BY_PROPERTY = (
    "Summarise this property for a lead.",
    "For whom is this property a good match?",
    "For whom is it none, and why?",
    "How does its price compare with the market?",
    "What will it cost per month, all in?",
    "Which documents must a lead bring?",
    "Which of our criteria does it meet, and which not?",
    "What should be said about schools, transport and noise?",
    "Which questions qualify a lead for it?",
    "How should those questions be weighted?",
    "What would make a lead decide quickly?",
    "When can it be seen, and how is a viewing prepared?",
)
OWN = (
    "Extract this lead's budget, dates, household and needs from the conversation.",
    "Score this lead against the criteria, and say what to do next.",
)
STEPS = len(SHARED_BY_ALL) + len(SHARED_BY_PROPERTY) + len(OWN)
#: Characters of the texts; a token of the simulated provider's is about five of them.
_MARKET, _CRITERIA, _DOSSIER, _MARKET_WIDE, _CONVERSATION = 11_000, 6_000, 9_400, 26_400, 7_500


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a workflow; `own` if it concerns this lead alone."""

    messages: Messages
    tags: tuple[str, ...]
    own: bool


class Texts:
    """Long texts that differ, cut from ordinary technical English."""

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self._prose = " ".join(" ".join(topics.values()).split())

    def piece(self, number: int, length: int) -> str:
        """Return `length` characters, others for another number."""
        at = number * 7919 % (len(self._prose) - length)
        return self._prose[at : at + length]


def workflow(number: int, texts: Texts) -> Iterator[Step]:
    """Yield the requests of workflow `number`, in order."""
    which = number % PROPERTIES
    criteria = f"Our criteria.\n{texts.piece(1, _CRITERIA)}"
    market = f"The market.\n{texts.piece(2, _MARKET)}"
    dossier = f"Property {which}.\n{texts.piece(100 + which, _DOSSIER)}"
    wide = f"The market, in full.\n{texts.piece(3, _MARKET_WIDE - _CRITERIA)}"
    for question in SHARED_BY_ALL:
        yield Step(_messages(f"{criteria}\n\n{wide}", question), ("market",), own=False)
    for question in SHARED_BY_PROPERTY:
        yield Step(_messages(f"{criteria}\n\n{market}\n\n{dossier}", question), (f"property:{which}",), own=False)
    said = f"Conversation with lead {number}.\n{texts.piece(1000 + number, _CONVERSATION)}"
    for question in OWN:
        yield Step(_messages(f"{criteria}\n\n{said}", question), (f"lead:{number}",), own=True)


def _messages(context: str, question: str) -> Messages:
    return [{"role": "system", "content": context}, {"role": "user", "content": question}]
