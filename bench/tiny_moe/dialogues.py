"""Conversations about the small world: paraphrased questions, follow-ups and story requests.

Every kind of question keeps its last wording out of the training text, so that `evaluate.py` can ask it
unseen.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import questions
from grammar import expand
from stories import Tale, tale
from world import BOYS, EXTRA_HEROES, GIRLS, HE_ANIMALS, HEROES, SHE_ANIMALS, invented_name

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly helper.",
    "You are a kind teacher. Answer in short sentences.",
    "Answer the question.",
    "You answer questions about the world in simple words.",
    "You are Tiny, a small model.",
    "You are a helpful assistant. Be brief.",
    "You are a storyteller who also answers questions.",
    "Be polite.",
)
PREFIXES = (
    "",
    "",
    "",
    "",
    "",
    "",
    "Please tell me: ",
    "Hey, ",
    "Can you tell me: ",
    "Question: ",
    "So, ",
    "Tell me, ",
)
STORY_ASKS = (
    "Tell me a story about a {kind}{named}.",
    "[Can|Could] you tell me a story about a {kind}{named}?",
    "Please [write|tell] a [short |little |]story about a {kind}{named}.",
    "I want [to hear |]a story about a {kind}{named}.",
    "Make up a story about a {kind}{named}.",
    "Write a story [about|with] a {kind}{named}.",
    "A story about a {kind}{named}, please.",
    "Do you know a story about a {kind}{named}?",
)
ANY_STORY = (
    "Tell me a story.",
    "[Can|Could] you tell me a [short |]story?",
    "Please tell me a [bedtime |]story.",
    "I want to hear a story.",
    "Write a short story.",
    "Another story, please.",
    "Tell me something nice.",
)
# Answers that offer a story, and how one accepts.
OFFERS = ("Would you like another one?", "Would you like to hear a story?")
YES = ("Yes", "Yes, please.", "Yes please!", "Sure.", "Ok", "Of course!", "I would like that.")


@dataclass(frozen=True)
class Turn:
    """One exchange."""

    user: str
    assistant: str


def roughen(question: str, rng: random.Random) -> str:
    """Types a question the way people do: sometimes lower case, without the mark, or with a lead-in."""
    prefix = rng.choice(PREFIXES)
    text = prefix + (question[0].lower() + question[1:] if prefix.endswith(", ") and question[:2] != "I " else question)
    if rng.random() < 0.3:
        text = text.lower()
    elif rng.random() < 0.03:
        text = text.upper()
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    return text


def ask(rng: random.Random, held_out: bool = False) -> list[Turn]:
    """One question with its answer, and sometimes a follow-up that only makes sense after it."""
    kind = rng.choices(questions.KINDS, weights=questions.WEIGHTS)[0]
    verbatim = held_out or kind is questions.repeat
    return [Turn(q if verbatim else roughen(q, rng), a) for q, a in kind(rng, held_out)]


def story_turn(rng: random.Random) -> list[Turn]:
    """A request for a story, with or without a hero, and sometimes a question about it."""
    chapters = 2 if rng.random() < 0.1 else 1
    if rng.random() < 0.25:
        told = tale(rng, chapters=chapters)
        request = expand(rng.choice(ANY_STORY), rng)
    else:
        kind = rng.choice(["girl", "boy", *HEROES, rng.choice(EXTRA_HEROES)])
        pool = {"girl": GIRLS, "boy": BOYS}.get(kind, SHE_ANIMALS + HE_ANIMALS)
        name = (invented_name(rng) if rng.random() < 0.2 else rng.choice(pool)) if rng.random() < 0.5 else None
        named = f" {rng.choice(['named', 'called'])} {name}" if name else ""
        request = expand(rng.choice(STORY_ASKS), rng, {"kind": kind, "named": named})
        told = tale(rng, kind, name, chapters)
    request = request.replace("story", "long story") if chapters > 1 else request
    request = request.lower() if rng.random() < 0.2 and told.hero.name not in request else request
    turns = [Turn(request.rstrip(".?") if rng.random() < 0.2 else request, told.text)]
    return turns + [about_story(rng, told)] * (rng.random() < 0.4)


def about_story(rng: random.Random, told: Tale) -> Turn:
    """A question whose answer stands in the story above."""
    hero, friend = told.hero, told.friend
    pairs = (
        (
            "[Who was the story about?|Who is the hero of the story?|Who was it about?]",
            f"It was about a {hero.kind} named {hero.name}.",
        ),
        (f"What was the name of the {hero.kind}?", f"The {hero.kind} was named {hero.name}."),
        (f"[Who was the friend of {hero.name}?|Who did {hero.name} meet?]", f"{friend.name}."),
        (
            "[I like this story.|Nice story!|That was nice.|What a nice story!]",
            "Thank you! Would you like another one?",
        ),
    )
    question, answer = rng.choice(pairs)
    return Turn(roughen(expand(question, rng), rng), expand(answer, rng))


def name_turn(rng: random.Random) -> list[Turn]:
    """Remembers what the user said: a name, a pet or a favourite colour."""
    name = rng.choice(GIRLS + BOYS) if rng.random() < 0.7 else invented_name(rng)
    hello = expand("[Hello|Hi|Good morning|Hey][,|.|!|] [my name is|I am|I'm] {n}.", rng, {"n": name})
    turns = [
        Turn(
            hello,
            expand("Nice to meet you, {n}! [How can I help you?|What can I do for you?]", rng, {"n": name}),
        )
    ]
    turns += [turn for _ in range(rng.choice([0, 0, 1, 2])) for turn in ask(rng)]
    question = rng.choice(["What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"])
    return [*turns, Turn(roughen(question, rng), f"Your name is {name}.")]


def conversation(rng: random.Random) -> list[Turn]:
    """Mostly one to four exchanges, sometimes many, so that long chats are no surprise."""
    makers: list[Callable[[random.Random], list[Turn]]] = [ask, story_turn, name_turn]
    turns: list[Turn] = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, rng.randint(6, 14)])):
        turns += rng.choices(makers, weights=[84, 10, 6])[0](rng)
        if turns[-1].assistant.endswith(OFFERS) and rng.random() < 0.6:
            turns.append(Turn(roughen(rng.choice(YES), rng), tale(rng).text))
    return turns


def render(turns: list[Turn], system: str | None = None, generate: bool = False) -> str:
    """The chat template, in Python; `export.py` checks that the Jinja template agrees."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    for turn in turns:
        text += f"<|im_start|>user\n{turn.user}<|im_end|>\n<|im_start|>assistant\n"
        text += "" if generate and turn is turns[-1] else f"{turn.assistant}<|im_end|>\n"
    return text


def chat(rng: random.Random) -> str:
    """One rendered conversation, with a system message in two cases of five."""
    return render(conversation(rng), rng.choice(SYSTEMS) if rng.random() < 0.4 else None)
