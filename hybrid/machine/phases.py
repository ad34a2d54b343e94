"""Named phases for profilers: nvtx ranges of the domain `hybrid`, if nvtx is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def _nvtx() -> Any:
    if find_spec("nvtx") is None:
        return None
    import nvtx

    return nvtx


_NVTX = _nvtx()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Mark the code inside as a phase."""
    if _NVTX is None:
        yield
        return
    with _NVTX.annotate(name, domain="hybrid"):
        yield


def phased(name: str) -> Callable[[Method], Method]:
    """Mark a whole method as a phase. Without nvtx the method is returned unchanged."""

    def mark(method: Method) -> Method:
        if _NVTX is None:
            return method

        @wraps(method)
        def marked(*arguments: Any) -> Any:
            with phase(name):
                return method(*arguments)

        return marked  # type: ignore[return-value]

    return mark
