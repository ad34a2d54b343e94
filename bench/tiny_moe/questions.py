"""Question makers: each returns one or more (question, answer) pairs, follow-ups included."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import world
from grammar import expand, sections
from snippets import REQUESTS
from talk import TALK, UNKNOWN, UNKNOWN_ANSWER, UNKNOWN_SLOTS

Pairs = list[tuple[str, str]]
Maker = Callable[[random.Random, bool], Pairs]
WORDINGS = sections(Path(__file__).with_name("wordings.txt"))
FOLLOW = "[And {x}?|What about {x}?|How about {x}?|And what about {x}?]"
NOISES = {"nothing": "A {x} makes almost no sound.", "a deep song": "A whale sings a deep song."}


def pick(name: str, rng: random.Random, held_out: bool, **slots: str) -> str:
    """A wording from `wordings.txt`."""
    return pick_from(WORDINGS[name], rng, held_out, **slots)


def pick_from(wordings: Sequence[str], rng: random.Random, held_out: bool, **slots: str) -> str:
    """A wording of the question; the last of each list is asked only by the evaluation."""
    return expand(wordings[-1] if held_out else rng.choice(wordings[:-1]), rng, slots)


def colour(rng: random.Random, held_out: bool) -> Pairs:
    """What colour is a lemon?"""
    things = {f"a {thing}": shade for thing, shade in world.COLOURS.items()} | world.MASS_COLOURS
    first, second = rng.sample(sorted(things), 2)
    answer = "{x} is {shade}."
    pairs = [
        (
            pick("colour", rng, held_out, x=first),
            expand(answer, rng, {"x": first, "shade": things[first]}),
        )
    ]
    if rng.random() < 0.3:
        follow = expand(FOLLOW, rng, {"x": second})
        pairs.append((follow, expand(answer, rng, {"x": second, "shade": things[second]})))
    return pairs


# topic: the answer; the facts stand in the same order in the table of animals
ANIMAL_TOPICS = {
    "home": "{x} lives {fact}.",
    "sound": "{x} says {fact}.",
    "legs": "{x} has {fact} legs.",
    "baby": "A baby {k} is called a {fact}.",
    "food": "{x} eats {fact}.",
    "skin": "{x} has {fact}.",
    "colour": "{x} is {fact}.",
}
PRONOUN_FOLLOW = {
    "home": "[Where does it live?|And where does it live?]",
    "sound": "What [sound|noise] does it make?",
    "legs": "[How many legs does it have?|And how many legs?]",
    "food": "[What does it eat?|And what does it eat?]",
    "colour": "What colour is it?",
    "baby": "What is its baby called?",
}


def plural(kind: str) -> str:
    """The plural of an animal kind."""
    irregular = {"mouse": "mice", "sheep": "sheep", "fish": "fish", "wolf": "wolves", "fox": "foxes"}
    return irregular.get(kind, kind + "s")


def _animal_answer(topic: str, kind: str, rng: random.Random) -> str:
    """The sentence that states one fact about one animal."""
    fact = world.ANIMALS[kind][list(ANIMAL_TOPICS).index(topic)]
    answer = NOISES.get(fact, ANIMAL_TOPICS[topic]) if topic == "sound" else ANIMAL_TOPICS[topic]
    answer = answer.replace("{x}", "a {k}") if "a {x}" not in answer.lower() else answer.replace("{x}", "{k}")
    return expand(answer, rng, {"k": kind, "fact": fact})


def animal(rng: random.Random, held_out: bool) -> Pairs:
    """Facts about animals, with "and a frog?" and "what does it eat?" follow-ups."""
    topic = rng.choice(list(ANIMAL_TOPICS))
    kind, other = rng.sample(sorted(world.ANIMALS), 2)
    question = pick(f"animal_{topic}", rng, held_out, x=f"a {kind}", k=kind, s=plural(kind))
    pairs = [(question, _animal_answer(topic, kind, rng))]
    roll = rng.random()
    if roll < 0.2:
        pairs.append((expand(FOLLOW, rng, {"x": f"a {other}"}), _animal_answer(topic, other, rng)))
    elif roll < 0.4:
        again = rng.choice([name for name in PRONOUN_FOLLOW if name != topic])
        pairs.append((expand(PRONOUN_FOLLOW[again], rng), _animal_answer(again, kind, rng)))
    return pairs


def can(rng: random.Random, held_out: bool) -> Pairs:
    """Can a penguin fly?"""
    skill = rng.choice(list(world.SKILLS))
    able = rng.random() < 0.5
    kind = rng.choice(world.SKILLS[skill][0 if able else 1])
    question = pick("can", rng, held_out, x=f"a {kind}", skill=skill, s=plural(kind))
    answer = f"Yes, a {kind} can {skill}." if able else f"No, a {kind} cannot {skill}."
    return [(question, expand(answer, rng))]


def opposite(rng: random.Random, held_out: bool) -> Pairs:
    """What is the opposite of hot?"""
    words = dict(pair for entry in world.OPPOSITES for pair in _both_ways(entry))
    first, second = rng.sample(sorted(words), 2)
    pairs = [(pick("opposite", rng, held_out, x=first), f"The opposite of {first} is {words[first]}.")]
    if rng.random() < 0.3:
        pairs.append((expand(FOLLOW, rng, {"x": second}), f"The opposite of {second} is {words[second]}."))
    return pairs


def _both_ways(entry: str) -> list[tuple[str, str]]:
    left, right = entry.split("-")
    return [(left, right), (right, left)]


def sums(rng: random.Random, held_out: bool) -> Pairs:
    """What is 2 + 3?"""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    plus = rng.random() < 0.65
    if not plus:
        a, b = max(a, b), min(a, b)
    result = a + b if plus else a - b
    sign, word = ("+", "plus") if plus else ("-", "minus")
    if rng.random() < 0.25:
        left, right, value = world.NUMBERS[a], world.NUMBERS[b], world.NUMBERS[result]
        answer = f"{left} {word} {right} is {value}."
        sign = word
    else:
        left, right, answer = str(a), str(b), f"{a} {sign} {b} = {result}."
    return [(pick("sums", rng, held_out, a=left, b=right, sign=sign, word=word), expand(answer, rng))]


def sequence(rng: random.Random, held_out: bool) -> Pairs:
    """What comes after Monday?"""
    row, cyclic = rng.choice(
        [
            (world.DAYS, True),
            (world.MONTHS, True),
            (world.SEASONS, True),
            (world.NUMBERS, False),
            ([str(n) for n in range(21)], False),
        ]
    )
    place = rng.randrange(0 if cyclic else 1, len(row) - (0 if cyclic else 1))
    after = rng.random() < 0.65
    target = row[(place + (1 if after else -1)) % len(row)]
    word = "after" if after else "before"
    return [
        (
            pick("sequence", rng, held_out, x=row[place], w=word),
            expand(f"{target} comes {word} {row[place]}.", rng),
        )
    ]


def use(rng: random.Random, held_out: bool) -> Pairs:
    """What do you do with a spoon?"""
    thing = rng.choice(sorted(world.USES))
    plural_thing = thing in ("soap", "scissors")
    name, pronoun = (thing, "it" if thing == "soap" else "them") if plural_thing else (f"a {thing}", "it")
    question = pick("use", rng, held_out, x=name).replace("is scissors", "are scissors")
    return [(question, expand(f"You use {name} to {world.USES[thing]}.", rng, {"it": pronoun}))]


def where(rng: random.Random, held_out: bool) -> Pairs:
    """Where do people read books?"""
    action = rng.choice(sorted(world.WHERE))
    return [(pick("where", rng, held_out, x=action), f"You can {action} {world.WHERE[action]}.")]


def bigger(rng: random.Random, held_out: bool) -> Pairs:
    """Which is bigger, a mouse or a horse?"""
    i, j = sorted(rng.sample(range(len(world.BY_SIZE)), 2))
    if j - i < 2:
        j = i + 2 if i + 2 < len(world.BY_SIZE) else j
    small, big = world.BY_SIZE[i], world.BY_SIZE[j]
    first, second = rng.sample([f"a {small}", f"a {big}"], 2)
    up = rng.random() < 0.7
    question = pick("bigger", rng, held_out, x=first, y=second, w="bigger" if up else "smaller")
    answer = f"A {big} is bigger than a {small}." if up else f"A {small} is smaller than a {big}."
    return [(question, expand(answer, rng))]


def category(rng: random.Random, held_out: bool) -> Pairs:
    """Is a plum a fruit? Name three tools."""
    group, other = rng.sample(sorted(world.GROUPS), 2)
    if rng.random() < 0.5:
        first, second, third = rng.sample(world.GROUPS[group], 3)
        question = pick("category_list", rng, held_out, x=world.PLURALS[group])
        return [(question, f"Three {world.PLURALS[group]} are {first}, {second} and {third}.")]
    thing = rng.choice([t for t in world.GROUPS[group] if t != "orange"])
    article = "" if group == "colour" else "a "
    question = pick("category", rng, held_out, x=article + thing, g=group, o=other)
    return [(question, expand(f"{article}{thing} is a {group}.", rng))]


def count_fact(rng: random.Random, held_out: bool) -> Pairs:
    """How many days are in a week?"""
    key = rng.choice(sorted(world.COUNTS))
    first, second = key.split("|")
    wordings = (f"How many {first}?", f"How many {second}?", f"Do you know how many {first}?")
    return [(pick_from(wordings, rng, held_out), world.COUNTS[key])]


def reverse(rng: random.Random, held_out: bool) -> Pairs:
    """Which animal says moo? What is a kitten?"""
    kind = rng.choice(sorted(world.ANIMALS))
    home, sound, legs, baby, _, _, _ = world.ANIMALS[kind]
    same_sound = [k for k, facts in world.ANIMALS.items() if facts[1] == sound]
    if rng.random() < 0.5 and len(same_sound) == 1 and sound not in NOISES:
        return [(pick("reverse_sound", rng, held_out, f=sound), expand(f"a {kind} says {sound}.", rng))]
    same_baby = [k for k, facts in world.ANIMALS.items() if facts[3] == baby]
    if len(same_baby) == 1 and "baby" not in baby:
        return [
            (
                pick("reverse_baby", rng, held_out, x=f"a {baby}"),
                expand(f"a {baby} is a baby {kind}.", rng),
            )
        ]
    return describe(rng, held_out)


def describe(rng: random.Random, held_out: bool) -> Pairs:
    """Tell me about foxes."""
    kind = rng.choice(sorted(world.ANIMALS))
    home, _, legs, _, food, _, _ = world.ANIMALS[kind]
    question = pick("describe", rng, held_out, x=f"a {kind}", s=plural(kind))
    answer = f"a {kind} is an animal with {legs} legs. It lives {home} and eats {food}."
    return [(question, expand(answer, rng))]


def words(rng: random.Random, held_out: bool) -> Pairs:
    """Plurals and rhymes."""
    if rng.random() < 0.6:
        word = rng.choice(sorted(world.PLURAL_FORMS))
        answer = f"The plural of {word} is {world.PLURAL_FORMS[word]}."
        return [(pick("plural", rng, held_out, x=word), answer)]
    first, second = rng.choice(world.RHYMES).split("-")
    return [(pick("rhyme", rng, held_out, x=first), f"{second} rhymes with {first}.".capitalize())]


def truth(rng: random.Random, held_out: bool) -> Pairs:
    """Is a lemon yellow?"""
    things = {f"a {thing}": shade for thing, shade in world.COLOURS.items()} | world.MASS_COLOURS
    thing = rng.choice(sorted(things))
    said = (
        things[thing] if rng.random() < 0.5 else rng.choice([c for c in world.GROUPS["colour"] if c != things[thing]])
    )
    lead = "Yes" if said == things[thing] else "No"
    answer = expand(f"{thing} is {things[thing]}.", rng)
    return [(pick("truth", rng, held_out, x=thing, c=said), f"{lead}, {answer[0].lower() + answer[1:]}")]


def more(rng: random.Random, held_out: bool) -> Pairs:
    """Which is more, 3 or 7?"""
    low, high = sorted(rng.sample(range(21), 2))
    first, second = rng.sample([low, high], 2)
    up = rng.random() < 0.7
    question = pick("more", rng, held_out, x=str(first), y=str(second), w="bigger" if up else "smaller")
    return [(question, f"{high} is bigger than {low}." if up else f"{low} is smaller than {high}.")]


def general(rng: random.Random, held_out: bool) -> Pairs:
    """A few capitals and everyday facts."""
    key = rng.choice(sorted(world.FACTS))
    first, second = key.split("|")
    wordings = (f"What {first}?", f"What {second}?", f"Do you know what {first}?")
    return [(pick_from(wordings, rng, held_out), world.FACTS[key])]


def count_up(rng: random.Random, held_out: bool) -> Pairs:
    """Count to five."""
    top = rng.randint(3, 10)
    question = pick("count_up", rng, held_out, n=rng.choice([str(top), world.NUMBERS[top]]))
    return [(question, ", ".join(str(n) for n in range(1, top + 1)) + ".")]


def repeat(rng: random.Random, held_out: bool) -> Pairs:
    """Repeat after me: red fox."""
    pool = [*world.GIRLS, *world.BOYS, *world.ANIMALS, *world.PLACES, *world.COLOURS, *world.COLOURS.values()]
    invented = [world.invented_name(rng)] if rng.random() < 0.3 else []
    phrase = " ".join([*rng.sample(pool, rng.randint(1, 4)), *invented])
    return [(pick("repeat", rng, held_out, x=phrase), phrase)]


def which_of(rng: random.Random, held_out: bool) -> Pairs:
    """Which of these is a fruit: hammer, plum or cat?"""
    groups = rng.sample([name for name in world.GROUPS if name != "colour"], 3)
    things = [rng.choice([thing for thing in world.GROUPS[group] if thing != "orange"]) for group in groups]
    x, y, z = rng.sample(things, 3)
    question = pick("which_of", rng, held_out, g=groups[0], x=x, y=y, z=z)
    return [(question, f"The {things[0]} is a {groups[0]}.".replace("a animal", "an animal"))]


def small_talk(rng: random.Random, held_out: bool) -> Pairs:
    """Greetings, thanks and questions about the model itself; see `talk.py` for the wordings."""
    wordings, answers = rng.choice(TALK)
    question = pick_from((*wordings, wordings[-1]) if len(wordings) == 1 else wordings, rng, held_out)
    return [(question, expand(rng.choice(answers), rng))]


def unknown(rng: random.Random, held_out: bool) -> Pairs:
    """Questions outside the small world get an honest answer."""
    slots = {name: rng.choice(options.split("|")) for name, options in UNKNOWN_SLOTS.items()}
    return [(pick_from(UNKNOWN, rng, held_out, **slots), UNKNOWN_ANSWER)]


def code(rng: random.Random, held_out: bool) -> Pairs:
    """Write a function that adds two numbers."""
    wordings, body = rng.choice(REQUESTS)
    return [(pick("code", rng, held_out, w=wordings), body)]


WEIGHTED: dict[Maker, float] = {
    colour: 9,
    animal: 26,
    can: 4,
    opposite: 9,
    sums: 14,
    sequence: 6,
    use: 5,
    where: 4,
    bigger: 5,
    category: 6,
    reverse: 5,
    describe: 5,
    words: 3,
    truth: 4,
    more: 3,
    count_fact: 3,
    general: 4,
    count_up: 2,
    small_talk: 9,
    unknown: 3,
    repeat: 2,
    which_of: 2,
    code: 3,
}
KINDS, WEIGHTS = list(WEIGHTED), list(WEIGHTED.values())
