"""Speculative decoding: a step computes guessed tokens behind the known one, and those that are chosen anyway are kept.

Every row is sampled as without guesses, with the same random numbers, and a guess counts only where it is what was
chosen. So the tokens are those without speculation; what was computed of wrong guesses is overwritten.

A guess costs more where experts are many: each row brings its own, and a step reads the union. Whether guesses pay is
therefore decided for every step, from how often those of a request came true and how long steps of so many rows took.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hybrid.serving.guesses import Guesses
from hybrid.serving.request import Job, Request
from hybrid.serving.step_seconds import StepSeconds

if TYPE_CHECKING:
    from hybrid.engine.engine import Engine

COUNTS = (1, 2, 4, 8, 16, 32)  # guesses of a request in a step
MARGIN = 1.05  # by how much guesses must promise more tokens a second: measurements are that noisy


class Speculation:
    """Decides for every step of a scheduler which guesses it computes.

    A recurrent state goes back to tokens of a run alone (`StateLayout`), so that guesses end where a run does. There
    are none where it matters what is computed: with routes that are recorded or told, and with an expert cache, whose
    steps are to be those of its simulator.
    """

    def __init__(self, engine: Engine) -> None:
        plan, self._engine = engine.plan, engine
        self._wanted = plan.speculate and plan.cache is None
        self._run = plan.kv.run
        self._phase = engine.spec.length_phase
        self._seconds = StepSeconds(engine.step_bytes)

    def guess(self, running: Sequence[Job], room: int) -> None:
        """Give the requests of a step that reads no prompt guesses if that pays, at most `room` of them."""
        routes = self._engine.routes
        if not self._wanted or not self._seconds.known or (routes and routes.matter):
            return
        requests = [job for job in running if isinstance(job, Request) and self._may_guess(job)]
        made = [(request, request.guess(self._most(request))) for request in requests]
        made = [(request, guesses) for request, guesses in made if guesses]
        if not made:
            return
        drafts = [(request.guesses, len(guesses)) for request, guesses in made]
        count = worth_guessing(self._seconds, drafts, len(running), room)
        for request, guesses in made:
            if count:
                request.place(guesses[:count])
            else:
                request.guesses.give_up()

    def tell(self, rows: int, seconds: float) -> None:
        """A step of so many rows, none of a prompt, took so long."""
        self._seconds.tell(rows, seconds)

    def _most(self, request: Request) -> int:
        """Guesses behind the known token, which `computed` others come before."""
        return COUNTS[-1] if self._run is None else min(COUNTS[-1], self._run - 1 - request.computed % self._run)

    def _may_guess(self, request: Request) -> bool:
        """Tokens behind a step's must have the keys that its own have."""
        return self._phase(request.length + COUNTS[-1]) == request.phase


def worth_guessing(seconds: StepSeconds, drafts: Sequence[tuple[Guesses, int]], rows: int, room: int) -> int:
    """How many guesses each request should have in a step of `rows` rows beside them, where `room` more fit; 0 where
    they do not pay. drafts: of the requests that have guesses, how many.
    """
    best, rate = 0, rows / seconds.expected(rows)
    for count in COUNTS:
        counts = [min(count, made) for _, made in drafts]
        if sum(counts) > room:
            break
        tokens = rows + sum(guesses.expected(n) - 1 for (guesses, _), n in zip(drafts, counts, strict=True))
        faster = tokens / seconds.expected(rows + sum(counts))
        if faster > rate * (1 if best else MARGIN):
            best, rate = count, faster
    return best
