"""Planted facts: sentences with a subject and a five-digit value, questions, and distractors.

Everything is drawn from a given `random.Random`, so the same seed gives the same text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_FIRST = [
    "Vel",
    "Tor",
    "Bran",
    "Quil",
    "Mar",
    "Sten",
    "Hol",
    "Dra",
    "Fen",
    "Gal",
    "Ister",
    "Jor",
    "Kel",
    "Lun",
    "Mor",
    "Nar",
    "Pel",
    "Rav",
    "Sul",
    "Thal",
    "Ul",
    "Ver",
    "Wil",
    "Yar",
    "Zan",
    "Ash",
    "Bel",
    "Cor",
    "Dun",
    "Eld",
    "Gor",
    "Orv",
]
_SECOND = [
    "mar",
    "nic",
    "dale",
    "wick",
    "ton",
    "vik",
    "holm",
    "ster",
    "gard",
    "mond",
    "lin",
    "ros",
    "tek",
    "bury",
    "fell",
    "mere",
    "stad",
    "dor",
    "van",
    "lock",
    "thorn",
    "ham",
    "field",
    "nor",
    "sund",
    "berg",
    "cott",
    "moor",
    "den",
    "ford",
    "gate",
    "port",
]
NAMES = tuple(first + second for first in _FIRST for second in _SECOND)
"""Names of subjects. Each is one token of the demo tokenizer."""
PLACES = [
    "archive",
    "harbour",
    "library",
    "station",
    "museum",
    "warehouse",
    "clinic",
    "observatory",
    "bakery",
    "garage",
    "hotel",
    "school",
    "theatre",
    "laboratory",
    "market",
    "chapel",
    "factory",
    "office",
    "depot",
    "tower",
    "bridge",
    "airport",
    "stadium",
    "gallery",
    "kitchen",
    "cellar",
    "vault",
    "workshop",
    "farm",
    "mill",
    "court",
    "prison",
    "palace",
    "hospital",
    "academy",
    "foundry",
    "brewery",
    "quarry",
    "lighthouse",
    "cemetery",
]
ATTRIBUTES = ("access code", "serial number", "locker number", "registration number")
STATEMENTS = (
    "The {attribute} for the {subject} is {value}.",
    "Please note that the {attribute} of the {subject} is {value}.",
    "At the {subject} the {attribute} has been set to {value}.",
    "Visitors to the {subject} are given the {attribute} {value}.",
    "For the {subject}, the {attribute} on file is {value}.",
)
DISTRACTORS = (
    "The {subject} was rebuilt at a cost of {value} crowns.",
    "Last year {value} people visited the {subject}.",
    "Invoice {value} from the {subject} is still unpaid.",
    "The {subject} lies {value} steps from the old road.",
)
QUESTION = "\nQuestion: What is the {attribute} for the {subject}?\nAnswer: "
"""What a model is asked after the context; the value and a newline follow."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted fact."""

    subject: str
    attribute: str
    value: str
    statement: str

    @property
    def question(self) -> str:
        """The prompt that follows the context, ending where the value begins."""
        return QUESTION.format(attribute=self.attribute, subject=self.subject)


def draw_facts(count: int, rng: random.Random) -> list[Fact]:
    """Draw facts about subjects of different names; places and attributes recur.

    Raises:
        ValueError: more facts than there are names.
    """
    if count > len(NAMES):
        raise ValueError(
            f"expected at most {len(NAMES)} facts, got {count}; there is a fact a name"
        )
    facts = []
    for name in rng.sample(NAMES, count):
        subject = f"{name} {rng.choice(PLACES)}"
        fields = {"attribute": rng.choice(ATTRIBUTES), "value": draw_value(rng)}
        statement = rng.choice(STATEMENTS).format(subject=subject, **fields)
        facts.append(Fact(subject=subject, statement=statement, **fields))
    return facts


def draw_distractors(count: int, avoid: Sequence[Fact], rng: random.Random) -> list[str]:
    """Draw sentences with numbers that answer no question, about subjects nobody asks for."""
    taken = {fact.subject.split()[0] for fact in avoid}
    free = [name for name in NAMES if name not in taken]
    return [
        rng.choice(DISTRACTORS).format(
            subject=f"{name} {rng.choice(PLACES)}", value=draw_value(rng)
        )
        for name in rng.sample(free, count)
    ]


def draw_value(rng: random.Random) -> str:
    """Draw five digits."""
    return "".join(rng.choices("0123456789", k=5))


def sentences(passage: str) -> list[str]:
    """Split a passage into sentences, each with the white space that leads it."""
    pieces = []
    for line in passage.split("\n"):
        parts = re.split(r"(?<=[.!?:;]) +", line)
        pieces += ["\n" + parts[0]] + [" " + part for part in parts[1:]]
    return pieces


def weave(text: Sequence[T], planted: Sequence[T], rng: random.Random) -> list[T]:
    """Place the planted pieces between pieces of text, uniformly, in the order given."""
    places = sorted(rng.randrange(1, len(text) + 1) for _ in planted)
    woven: list[T] = []
    start = 0
    for place, piece in zip(places, planted, strict=True):
        woven += [*text[start:place], piece]
        start = place
    return [*woven, *text[start:]]
