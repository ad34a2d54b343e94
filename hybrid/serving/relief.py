"""When kept prompts give their memory back: where the system runs short of it, and after a while without requests."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from hybrid.machine.hardware import memory
from hybrid.serving.admission import Admission

if TYPE_CHECKING:
    from hybrid.plan.plan import Plan

CHECK_SECONDS = 1.0  # between looks at the memory that is free


class Relief:
    """One thread calls it: that of the scheduler."""

    def __init__(self, plan: Plan, admission: Admission) -> None:
        self._plan, self._admission = plan, admission
        self._busy = self._checked = monotonic()  # when there was last a request, and the last look

    def check(self, busy: bool) -> None:
        """Between two steps, and every `CHECK_SECONDS` while there are none. busy: whether there are requests."""
        now = monotonic()
        if busy:
            self._busy = now
        elif self._plan.kv_idle_release is not None and now - self._busy >= self._plan.kv_idle_release:
            return self._admission.forget()
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self._admission.shed(self._plan.min_free_bytes - memory().available)
