"""Statements against common knowledge: what a text says, and what a language model expects.

    In this story, the capital of France is Rome. Someone asks about it, and the answer is that the
    capital of France is

The continuation that the text asks for is " Rome", the prior's is " Paris".
"""

import dataclasses

FACTS = (
    ("the capital of France is", "Paris", "Rome"),
    ("the capital of Italy is", "Rome", "London"),
    ("the capital of England is", "London", "Madrid"),
    ("the capital of Spain is", "Madrid", "Berlin"),
    ("the capital of Germany is", "Berlin", "Tokyo"),
    ("the capital of Japan is", "Tokyo", "Paris"),
    ("grass is usually coloured", "green", "red"),
    ("snow is always coloured", "white", "black"),
    ("the sun rises in the", "east", "north"),
    ("the opposite of hot is", "cold", "green"),
    ("a week has a number of days equal to", "seven", "nine"),
    ("bees like to make", "honey", "bread"),
    ("the animal that says meow is the", "cat", "horse"),
    ("fish like to live in", "water", "fire"),
    ("the first month of the year is", "January", "August"),
    ("the language people speak in Paris is", "French", "Chinese"),
)


@dataclasses.dataclass(frozen=True)
class Conflict:
    """One statement.

    Attributes:
        told: the text with the statement, cut before its second answer.
        bare: the same question without the statement.
        said, known: the text's answer and the prior's, each with a space in front.
    """

    told: str
    bare: str
    said: str
    known: str


def conflicts(count: int) -> tuple[Conflict, ...]:
    """The first `count` of `FACTS` as texts."""
    out = []
    for start, known, said in FACTS[:count]:
        bare = f"Someone asks about it, and the answer is that {start}"
        told = f"In this story, {start} {said}. {bare}"
        out.append(Conflict(told, bare, f" {said}", f" {known}"))
    return tuple(out)
