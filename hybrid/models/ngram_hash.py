"""The numbers by which n-grams are hashed to the rows of a table: they follow from the configuration of a model."""

from __future__ import annotations

import math

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # of SplitMix64, a generator of random numbers
_LAYERS_APART = 10_007  # seeds of tables


def factors_of(vocab: int, size: int, table: int, seed: int) -> tuple[int, ...]:
    """Odd factors of the tokens of an n-gram, the newest token's first: a product with any token stays below 2^63.

    table: its number among those of the model.
    """
    bound = max(1, ((1 << 63) - 1) // max(vocab, 1) // 2)
    base = seed + _LAYERS_APART * table
    return tuple(2 * (_mixed(base + _GOLDEN * (place + 1)) % bound) + 1 for place in range(size))


def _mixed(value: int) -> int:
    """One step of SplitMix64."""
    value = (value + _GOLDEN) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def primes_from(least: int, count: int) -> tuple[int, ...]:
    """The first prime numbers that are no smaller."""
    found: list[int] = []
    number = max(2, least)
    while len(found) < count:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            found.append(number)
        number += 1
    return tuple(found)
