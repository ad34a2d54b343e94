"""Short children's stories from a grammar: an opening, a plot with cause and effect, and a closing line."""

from __future__ import annotations

import random
from dataclasses import dataclass

import world
from grammar import choose, expand
from plots import PLOTS


@dataclass(frozen=True)
class Character:
    """Someone in a story; `kind` is "girl", "boy" or an animal."""

    name: str
    kind: str
    female: bool


PRONOUNS = {True: ("she", "her", "her", "herself"), False: ("he", "him", "his", "himself")}

OPENINGS = (
    "[once upon a time|once upon a time|once upon a time|once|long ago|many years ago], there was a "
    "{trait} {kind} named {hero}. {he} lived {home}[.|. {he} loved to {hobby}.|, and {he} loved to {hobby}.]",
    "once upon a time, there [lived|was] a {trait} {kind} [named|called] {hero}. [{he} liked to {hobby}. |"
    "{hero} [loved|liked] to {hobby} [all day long|every day|with {his} friends]. |Everyone liked {hero}. |]",
    "{hero} was a {trait} {kind} who [lived {home}|loved to {hobby}]. ",
    "[{home}, there lived a {trait} {kind} named {hero}|there once was a {trait} {kind} called {hero}]. "
    "[{he} had a good friend named {friend}. |Every [day|morning], {he} liked to {hobby}. |]",
    "once upon a time, [in a [small|quiet|green|far away] [village|forest|valley]|near a big {place}|"
    "not far from here], there lived a {kind} named {hero}. {hero} was very {trait2}"
    "[.|, and {he} loved to {hobby}.]",
    "this is a story about a {kind} named {hero}. ",
    "",
    "",
)
KID_HOMES = (
    "in a [small|little|red|white|cosy|tall] house [near the {place}|by the {place}|at the end of the street|"
    "with {his} [mother|father|grandmother|parents]|in the village]"
)
CLOSINGS = (
    "[from that day on|after that day|ever since], {hero} and {friend} were [the best of friends|always kind "
    "to each other|never apart].",
    "{hero} [smiled and felt|was] [very |so |]happy.",
    "that night, {hero} [slept very well|went to bed with a smile|dreamed of the {place}|was too happy to sleep].",
    "it was [the best day ever|a very good day|a day that {hero} would never forget].",
    "and they all lived happily ever after.",
    "[in the evening|when the sun went down|then], {hero} [went home|walked home|ran home] and told [{his} "
    "[mother|father|family]|everyone] [all about it|what had happened].",
    '{hero} [laughed|smiled]. "[What a day|That was fun|Today was a good day|I am so happy]!" {he} said. ',
    "",
)


def character(rng: random.Random, kind: str | None = None, name: str | None = None, taken: str = "") -> Character:
    """Draws a character; a known name decides the pronoun, so that it stays the same in the whole corpus."""
    kind = kind or world.hero_kind(rng)
    if name in world.GIRLS + world.SHE_ANIMALS + world.BOYS + world.HE_ANIMALS:
        return Character(str(name), kind, name in world.GIRLS + world.SHE_ANIMALS)
    female = kind in world.FEMALE_KINDS or (kind not in world.MALE_KINDS and rng.random() < 0.5)
    if name or rng.random() < 0.12:
        return Character(name or world.invented_name(rng), kind, female)
    girls, boys = world.SHE_ANIMALS, world.HE_ANIMALS
    if kind in ("girl", "boy"):
        girls, boys = world.GIRLS, world.BOYS
    pool = girls if female else boys
    return Character(rng.choice([entry for entry in pool if entry != taken]), kind, female)


def slots(rng: random.Random, hero: Character, friend: Character) -> dict[str, str]:
    """Everything a plot may name; drawn once per story, so that entities stay consistent."""
    he, him, his, himself = PRONOUNS[hero.female]
    fhe, fhim, fhis, _ = PRONOUNS[friend.female]
    place, place2 = rng.sample(world.PLACES, 2)
    thing, thing2 = (choose(f"[{world.TREASURES}]", rng) for _ in range(2))
    trait, trait2 = rng.sample(world.TRAITS.split("|"), 2)
    values = {
        "hero": hero.name,
        "kind": hero.kind,
        "he": he,
        "him": him,
        "his": his,
        "himself": himself,
        "friend": friend.name,
        "fkind": friend.kind,
        "fhe": fhe,
        "fhim": fhim,
        "fhis": fhis,
        "place": place,
        "place2": place2,
        "thing": thing,
        "thing2": thing2,
        "snack": choose(world.SNACKS, rng),
        "hobby": rng.choice(world.HOBBIES.split("|")),
        "trait": trait,
        "trait2": trait2,
    }
    home = world.ANIMALS[hero.kind][0] if hero.kind in world.ANIMALS else KID_HOMES
    values["home"] = expand(home, rng, values)
    values["home"] = values["home"][0].lower() + values["home"][1:]
    values["He"], values["Fhe"], values["His"] = he.capitalize(), fhe.capitalize(), his.capitalize()
    return values


@dataclass(frozen=True)
class Tale:
    """A story and whom it is about, for questions afterwards."""

    text: str
    hero: Character
    friend: Character


def tale(rng: random.Random, kind: str | None = None, name: str | None = None, chapters: int = 1) -> Tale:
    """A complete story; every chapter is a new plot with the same hero and a new friend."""
    hero = character(rng, kind, name)
    friend = character(rng, taken=hero.name)
    texts = []
    for number, plot in enumerate(rng.sample(PLOTS, chapters)):
        other = character(rng, taken=hero.name) if number else friend
        opening = rng.choice(OPENINGS if kind is None else OPENINGS[:2]) if number == 0 else ""
        values = slots(rng, hero, other)
        # Part by part: each begins a sentence, whatever punctuation the part before it ends with.
        parts = [expand(part, rng, values) for part in (opening, plot, rng.choice(CLOSINGS))]
        texts.append(" ".join(part for part in parts if part))
    return Tale("\n\n".join(texts), hero, friend)


def story(rng: random.Random) -> str:
    """The text of a story, in one case of six with two chapters."""
    return tale(rng, chapters=2 if rng.random() < 0.16 else 1).text
