"""The small world that stories and conversations share; its contents stand in `world.txt`."""

from __future__ import annotations

import random
from pathlib import Path

from grammar import sections

_TEXT = {
    name: " ".join(lines).replace("| ", "|") for name, lines in sections(Path(__file__).with_name("world.txt")).items()
}


def _list(name: str) -> list[str]:
    return _TEXT[name].split()


def _table(name: str) -> dict[str, str]:
    """`key: value; key: value` as a dictionary."""
    rows = (row.split(":", 1) for row in _TEXT[name].split(";"))
    return {key.strip(): value.strip() for key, value in rows}


GIRLS, BOYS = _list("girls"), _list("boys")
SHE_ANIMALS, HE_ANIMALS = _list("she_animals"), _list("he_animals")
HEROES, BY_SIZE, SYLLABLES = _list("heroes"), _list("by_size"), _list("syllables")
# Heroes about whom there are no questions.
EXTRA_HEROES = _list("extra_heroes")
FEMALE_KINDS, MALE_KINDS = ("girl", "princess", "queen", "fairy"), ("boy", "prince", "king", "wizard")
DAYS, MONTHS, SEASONS, NUMBERS = _list("days"), _list("months"), _list("seasons"), _list("numbers")
PLACES, OPPOSITES, RHYMES = _list("places"), _list("opposites"), _list("rhymes")
COLOURS, MASS_COLOURS, USES, WHERE = (
    _table("colours"),
    _table("mass_colours"),
    _table("uses"),
    _table("where"),
)
PLURALS, PLURAL_FORMS, COUNTS, FACTS = (
    _table("plurals"),
    _table("plural_forms"),
    _table("counts"),
    _table("facts"),
)
GROUPS = {name: members.split() for name, members in _table("groups").items()}
# kind: home, sound, legs, baby, food, covering, colour
ANIMALS = {kind: facts.split(", ") for kind, facts in _table("animals").items()}
# skill: who can, who clearly cannot
SKILLS = {skill: [side.split() for side in who.split(" / ")] for skill, who in _table("skills").items()}
TREASURES, HOBBIES, TRAITS, SNACKS = (_TEXT[name] for name in ("treasures", "hobbies", "traits", "snacks"))


def hero_kind(rng: random.Random) -> str:
    """What kind of hero a story is about."""
    return rng.choice(["girl", "boy", "girl", "boy", *rng.sample(HEROES, 5), rng.choice(EXTRA_HEROES)])


def invented_name(rng: random.Random) -> str:
    """A name nobody has: it teaches copying a name from the prompt rather than recalling one."""
    return "".join(rng.sample(SYLLABLES, rng.choice([2, 2, 3]))).capitalize() + rng.choice(["", "", "n", "r", "s"])
