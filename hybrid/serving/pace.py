"""How many tokens of prompts a step may have beside texts that are being produced, so that these keep their pace."""

from __future__ import annotations

from collections.abc import Callable

from hybrid.serving.step_seconds import StepSeconds

STRETCH = 1.2  # how much longer than without a prompt a step may take, where no limit is given
SHARE = 0.25  # of the speed of a prompt that is read alone: what it keeps then, even if steps take longer
CAUTION = 0.95  # of a limit that is given: steps of one size do not all take as long
MEMORY = 0.5  # what older steps weigh beside the newest: sequences become longer while a prompt is read
_NO_LIMIT = 0.0


class Pace:
    """Chooses from what steps of so many rows took lately, and what it costs that rows of long sequences attend to more
    tokens: a chunk behind 30,000 tokens takes several times as long as one at the beginning.

    limit: seconds that a step should take at most; 0: no limit; None: as `STRETCH` and `SHARE` say. work: what a step
    of so many rows has to do, in any unit.
    """

    def __init__(self, work: Callable[[int], float], limit: float | None = None) -> None:
        self._limit = limit
        self._seconds = StepSeconds(work, MEMORY)

    def tell(self, rows: int, seconds: float, pairs: float = 0.0) -> None:
        """A step of so many rows took so long. pairs: of a row and a token that it attends to."""
        self._seconds.tell(rows, seconds, pairs)

    def prompt_rows(self, decoding: int, room: int, pairs: float = 0.0, depth: int = 0) -> int:
        """How many of `room` rows of prompts a step may have that produces `decoding` tokens; at least one.

        pairs: those of the produced tokens. depth: tokens before the rows of the prompt.
        """
        if not decoding or not room or not self._seconds.known or self._limit == _NO_LIMIT:
            return room

        def seconds(rows: int) -> float:
            return self._seconds.expected(decoding + rows, pairs + pairs_of(rows, depth))

        if self._limit is not None:
            return _most(seconds, room, CAUTION * self._limit)
        most = _most(seconds, room, STRETCH * seconds(0))
        wanted = SHARE * room / seconds(room)  # rows a second
        fast = (rows for rows in _sizes(room) if rows / seconds(rows) >= wanted)
        return max(most, next(fast, room))


def pairs_of(rows: int, depth: int) -> float:
    """Of rows that follow each other behind `depth` tokens, and the tokens that they attend to."""
    return rows * (depth + (rows + 1) / 2)


def _most(seconds: Callable[[int], float], room: int, limit: float) -> int:
    """The largest size of a chunk up to which a step keeps to a limit."""
    most = 1
    for rows in _sizes(room):
        if seconds(rows) > limit:
            break
        most = rows
    return most


def _sizes(room: int) -> list[int]:
    """Sizes of chunks to choose from, ascending: finer ones would not be told apart by what is measured."""
    sizes = [size for power in range(room.bit_length()) for size in (1 << power, 3 << power >> 1) if size < room]
    return sorted({*sizes, room})
