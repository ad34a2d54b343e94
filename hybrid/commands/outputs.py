"""The files of a run: whole, written whatever ends it, and never a reason for it to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from hybrid.errors import HybridError
from hybrid.machine.meters import Meters
from hybrid.serving.recorder import (
    BREAKDOWN_COLUMNS,
    CACHEHIT_COLUMNS,
    POWER_COLUMNS,
    TOKEN_COLUMNS,
    Recorder,
    write_csv,
)

if TYPE_CHECKING:
    from hybrid.engine.experts.report import CacheReport
    from hybrid.serving.llm import LLM


class Wanted(Protocol):
    """Paths of the files to write, None for those that are not wanted."""

    @property
    def breakdown_csv(self) -> Path | None: ...
    @property
    def cachehit_csv(self) -> Path | None: ...
    @property
    def token_csv(self) -> Path | None: ...
    @property
    def power_csv(self) -> Path | None: ...
    @property
    def trace(self) -> Path | None: ...
    @property
    def cache_save(self) -> Path | None: ...


class Outputs:
    """Observes a run while it is entered, and writes its files when it is left: by SIGTERM too, which ends the run as
    Ctrl-C does; after other errors the trace alone. A file that cannot be written is reported once, by `warn`, and the
    run goes on.
    """

    def __init__(self, wanted: Wanted, llm: LLM, warn: Callable[[str], None]) -> None:
        self._wanted, self._llm, self._warn = wanted, llm, warn
        metered = wanted.token_csv or wanted.power_csv
        self.recorder = Recorder(Meters(llm.engine.plan.cpus) if metered else None)
        self._stack = ExitStack()

    def __enter__(self) -> Outputs:
        self._llm.observe(self.recorder)
        if self._wanted.trace:
            self._trace(self._wanted.trace)
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, _interrupt)
            self._stack.callback(signal.signal, signal.SIGTERM, before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None or isinstance(error, KeyboardInterrupt):  # another error leaves what was there
            self._write()

    def cache_report(self) -> CacheReport | None:
        """What the expert cache did; None without one."""
        experts = self._llm.engine.experts
        if experts is None:
            return None
        from hybrid.engine.experts.report import report

        return report(experts)

    def _trace(self, path: Path) -> None:
        """Written as steps run: it may be larger than memory."""
        from gpu_cache.trace_writer import TraceWriter

        writer = self._stack.enter_context(TraceWriter(path, lambda line: self._warn(f"note: {line}")))
        routes = self._llm.engine.routes
        assert routes is not None
        observe = partial(setattr, routes, "observer")
        self._llm.run(partial(observe, writer.write))
        self._stack.callback(self._llm.run, partial(observe, None))  # before the file is closed

    def _write(self) -> None:
        wanted, recorder = self._wanted, self.recorder
        self._write_csv(wanted.breakdown_csv, BREAKDOWN_COLUMNS, recorder.breakdown_rows)
        self._write_csv(wanted.cachehit_csv, CACHEHIT_COLUMNS, recorder.cachehit_rows)
        self._write_csv(wanted.token_csv, TOKEN_COLUMNS, recorder.token_rows)
        self._write_csv(wanted.power_csv, POWER_COLUMNS, recorder.power_rows)
        if path := wanted.cache_save:
            self._attempt(lambda: self._llm.engine.save_experts(path))

    def _write_csv(
        self, path: Path | None, columns: Sequence[str], rows: Callable[[], Iterable[Sequence[Any]]]
    ) -> None:
        if path is not None:
            self._attempt(lambda: write_csv(path, columns, rows()))

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except HybridError as error:
            self._warn(f"note: {error}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
