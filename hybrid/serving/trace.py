"""A trace of the experts that tokens take, written while a block of Python runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from hybrid.engine.engine import Engine
from hybrid.errors import CapacityError, ConfigError, RequestError
from hybrid.serving.loop import Loop


@contextmanager
def record_trace(loop: Loop, engine: Engine, path: Path, notice: Callable[[str], None] | None) -> Iterator[None]:
    """See `LLM.record_trace`."""
    from hybrid.files.traces import check_trace_output, open_trace

    path, lines = path.expanduser(), SimpleQueue[str]()
    routes = loop.run(lambda: engine.routes)
    if routes is None:
        raise ConfigError("the routes of this model cannot be seen; open it with routes=True")
    check_trace_output("record_trace", path)
    asked = engine.plan.cache is not None and engine.plan.cache.next_gate
    with open_trace(path, notice or lines.put, asked) as writer:
        loop.run(partial(setattr, routes, "observer", writer.write))
        try:
            yield
        finally:
            with suppress(RequestError):  # closed in the block: no step comes any more
                loop.run(partial(setattr, routes, "observer", None))
    if not lines.empty():
        raise CapacityError(lines.get())
