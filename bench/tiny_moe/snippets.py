"""Code-like text and lists, so that the corpus has a third domain with its own vocabulary and layout."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import world

REQUESTS: tuple[tuple[str, str], ...] = (
    ("adds two numbers", "def add(a, b):\n    return a + b"),
    ("subtracts two numbers", "def subtract(a, b):\n    return a - b"),
    ("multiplies two numbers", "def multiply(a, b):\n    return a * b"),
    ("doubles a number", "def double(n):\n    return n * 2"),
    ("squares a number", "def square(n):\n    return n * n"),
    ("returns the bigger of two numbers", "def bigger(a, b):\n    if a > b:\n        return a\n    return b"),
    ("checks if a number is even", "def is_even(n):\n    return n % 2 == 0"),
    ("counts to ten", "for i in range(1, 11):\n    print(i)"),
    ("prints hello", 'print("Hello!")'),
    ("says hello to a name", 'def hello(name):\n    print("Hello, " + name + "!")'),
    (
        "sums a list",
        "def total(items):\n    result = 0\n    for item in items:\n        result = result + item\n    return result",
    ),
    (
        "computes a factorial",
        "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)",
    ),
    (
        "computes Fibonacci numbers",
        "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)",
    ),
    ("reverses a list", "def reverse(items):\n    return items[::-1]"),
    (
        "counts the items of a list",
        "def count(items):\n    n = 0\n    for item in items:\n        n = n + 1\n    return n",
    ),
)
NAMES = ["total", "value", "count", "result", "number", "size", "score", "price", "width", "height", "index"]
LISTS = ["items", "values", "numbers", "animals", "colours", "names", "words", "fruits"]
OPERATORS = {"+": "add", "-": "subtract", "*": "multiply"}


def arithmetic(rng: random.Random) -> str:
    """A two-argument function and a call that prints a correct result."""
    sign, verb = rng.choice(list(OPERATORS.items()))
    a, b = rng.sample(["a", "b", "x", "y", "n", "m", *NAMES], 2)
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    value = {"+": left + right, "-": left - right, "*": left * right}[sign]
    doc = rng.choice(["", f'    """Returns {a} {sign} {b}."""\n'])
    return f"def {verb}({a}, {b}):\n{doc}    return {a} {sign} {b}\n\nprint({verb}({left}, {right}))  # {value}"


def loop(rng: random.Random) -> str:
    """A counting loop with its output as a comment."""
    start, length = rng.randint(0, 5), rng.randint(2, 6)
    name = rng.choice(["i", "n", "k", *NAMES])
    numbers = ", ".join(str(n) for n in range(start, start + length))
    return f"for {name} in range({start}, {start + length}):\n    print({name})  # {numbers}"


def words(rng: random.Random) -> str:
    """A list of words from one group, and a loop over it."""
    group = rng.choice(sorted(world.GROUPS))
    chosen = rng.sample(world.GROUPS[group], 3)
    name = rng.choice([world.PLURALS[group], rng.choice(LISTS)])
    tail = rng.choice(
        [
            f"for item in {name}:\n    print(item)",
            f"print(len({name}))  # 3",
            f"print({name}[0])  # {chosen[0]}",
        ]
    )
    return f"{name} = {json.dumps(chosen)}\n{tail}"


def branch(rng: random.Random) -> str:
    """An if/else on a number."""
    name, limit = rng.choice(NAMES), rng.randint(1, 20)
    value = rng.randint(0, 20)
    word = "big" if value > limit else "small"
    return f'{name} = {value}\nif {name} > {limit}:\n    print("big")\nelse:\n    print("small")\n# {word}'


def accumulate(rng: random.Random) -> str:
    """A function that folds a list."""
    name, items = rng.choice(NAMES), rng.choice(LISTS)
    sign, start = rng.choice([("+", 0), ("*", 1)])
    return (
        f"def compute(items):\n    {name} = {start}\n    for item in items:\n"
        f"        {name} = {name} {sign} item\n"
        f"    return {name}\n\n{items} = {[rng.randint(1, 9) for _ in range(3)]}\nprint(compute({items}))"
    )


def record(rng: random.Random) -> str:
    """A JSON object about an animal."""
    kind = rng.choice(sorted(world.ANIMALS))
    home, sound, legs, baby, food, _, colour = world.ANIMALS[kind]
    data = {
        "kind": kind,
        "home": home,
        "sound": sound,
        "legs": world.NUMBERS.index(legs) if legs != "no" else 0,
        "baby": baby,
        "food": food,
        "colour": colour,
    }
    keys = rng.sample(list(data), rng.randint(2, 5))
    return json.dumps(
        {key: data[key] for key in ["kind", *(k for k in keys if k != "kind")]}, indent=rng.choice([None, 2])
    )


def shopping(rng: random.Random) -> str:
    """A bulleted or numbered list."""
    group = rng.choice(["fruit", "vegetable", "toy", "tool"])
    chosen = rng.sample(world.GROUPS[group], rng.randint(3, 5))
    if rng.random() < 0.5:
        return f"{world.PLURALS[group].capitalize()}:\n" + "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))
    return "Shopping list:\n" + "\n".join(f"- {rng.randint(2, 9)} {item}s" for item in chosen if item[-1] not in "yh")


def roll_call(rng: random.Random) -> str:
    """A list of made-up words that comes twice: nothing teaches copying from the context sooner."""
    names = [world.invented_name(rng) for _ in range(rng.randint(4, 14))]
    if rng.random() < 0.5:
        return f"names = {json.dumps(names)}\nprint(names)  # {json.dumps(names)}"
    lines = "".join(f"- {name}\n" for name in names)
    return f"Names:\n{lines}Again:\n{lines}".rstrip()


MAKERS: tuple[Callable[[random.Random], str], ...] = (
    arithmetic,
    loop,
    words,
    branch,
    accumulate,
    record,
    shopping,
    roll_call,
)


def snippet(rng: random.Random) -> str:
    """One to three pieces of code or list text."""
    pieces = [rng.choice(MAKERS)(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    if rng.random() < 0.35:
        pieces.append(rng.choice(REQUESTS)[1])
    return "\n\n".join(pieces) + "\n"
