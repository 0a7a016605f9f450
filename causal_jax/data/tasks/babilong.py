"""BABILong's QA2 and QA3: where a thing is, told by facts that lie scattered in a long text.

    ... Mary took the apple. ... John went to the garden. ... Mary went to the kitchen. ...
    qa2  Where is the apple? kitchen                     two supporting facts
    qa3  Where was the apple before the kitchen? hallway     three supporting facts

A world is played: people walk between rooms, take things, drop them; things go where their carrier
goes. Every sentence of the story stands in its order somewhere in the filler, whose sentences speak
of nobody in it. The answer is one word.

bAbI, arXiv 1502.05698, tasks 2 and 3; BABILong, arXiv 2406.10149. Deviation: the filler is a small
grammar's prose (`sniah`), not books; the story is as short as the question allows, plus `extra`
moves of others; the text opens in mid-sentence, so that lengths are exact.
"""

from dataclasses import dataclass

import numpy as np

from causal_jax.data.tasks._base import tasks
from causal_jax.data.tasks._text import TextTask, last_bytes
from causal_jax.data.tasks.sniah import _ADJECTIVES, _FORMS, _NOUNS, _VERBS, _one

_PEOPLE = ("Mary", "John", "Daniel", "Sandra")
_ROOMS = ("kitchen", "garden", "hallway", "bathroom", "office", "bedroom")
_THINGS = ("apple", "football", "milk")


@tasks.register("babilong")
@dataclass(frozen=True)
class Babilong(TextTask):
    """Follow a thing through a story.

    Args:
        length: bytes of prompt and answer together.
        kind: "qa2" or "qa3".
        extra: moves of other people among the facts that matter.
    """

    length: int = 768
    kind: str = "qa2"
    extra: int = 3

    def __post_init__(self):
        self.need(self.kind in ("qa2", "qa3"), "kind", "qa2 or qa3")
        self.need(self.extra >= 0, "extra", "at least 0")
        least = 40 * (4 + self.extra) + 60
        self.need(self.length >= least, "length", f"story and question can take {least} bytes")

    @property
    def draws(self) -> int:
        """The story, the places of its sentences, and what the filler is made of."""
        return 8 + 3 * self.extra + (4 + self.extra) + 6 * (self.length // 20 + 1)

    def _text(self, u: np.ndarray) -> tuple[str, str]:
        story, question, answer = self._story(u[:8], u[8 : 8 + 3 * self.extra].reshape(-1, 3))
        facts = len(story)
        u = u[8 + 3 * self.extra :]
        room = self.length - sum(map(len, story)) - len(question) - len(answer)
        lists = (_ADJECTIVES, _NOUNS, _VERBS, _ADJECTIVES, _NOUNS)
        drawn = u[4 + self.extra :].reshape(-1, 6)
        hay = last_bytes([_one(_FORMS, d[5]).format(*map(_one, lists, d[:5])) for d in drawn], room)
        bounds = [0] + [i + 2 for i in range(room - 1) if hay[i : i + 2] == ". "]
        cuts = sorted(bounds[int(x * len(bounds))] for x in u[:facts])
        parts = [hay[a:b] for a, b in zip([0, *cuts], [*cuts, room])]
        woven = "".join(part + fact for part, fact in zip(parts, [*story, ""]))
        return woven + question, answer

    def _story(self, u: np.ndarray, others: np.ndarray) -> tuple[list[str], str, str]:
        """Sentences in order, question, answer."""
        hero, thing = _one(_PEOPLE, u[0]), _one(_THINGS, u[1])
        rooms = [_ROOMS[i] for i in np.argsort(u[2:8], kind="stable")]
        story = [f"{hero} took the {thing}. ", f"{hero} went to the {rooms[0]}. "]
        if self.kind == "qa3":
            story += [f"{hero} went to the {rooms[1]}. ", f"{hero} dropped the {thing}. "]
        people = [p for p in _PEOPLE if p != hero]
        things = [t for t in _THINGS if t != thing]
        for a, b, c in others:
            who = people[int(a * 3)]
            # half of them walk, the others touch another thing: neither moves the one asked for
            kind, left = divmod(b * 2, 1)
            if kind < 1:
                said = f"{who} went to the {_one(_ROOMS, left)}. "
            else:
                said = (
                    f"{who} {'took' if left < 0.5 else 'dropped'} the {things[int(left * 4) % 2]}. "
                )
            story.insert(int(c * (len(story) + 1)), said)
        if self.kind == "qa2":
            return story, f"Where is the {thing}?", f" {rooms[0]}"
        return story, f"Where was the {thing} before the {rooms[1]}?", f" {rooms[0]}"
