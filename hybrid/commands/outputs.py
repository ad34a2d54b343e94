"""The files of a run: whole, written whatever ends it, and never a reason for it to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hybrid.commands.signals import Interruptible, Terminated
from hybrid.errors import HybridError
from hybrid.files import check_output, csv_kind
from hybrid.machine.meters import Meters
from hybrid.serving.generation_times import (
    CLOCK_COLUMNS,
    CLOCK_NAME,
    TIMES_COLUMNS,
    TIMES_NAME,
    clock_rows,
    time_rows,
)
from hybrid.serving.recorder import (
    BREAKDOWN_COLUMNS,
    CACHEHIT_COLUMNS,
    POWER_COLUMNS,
    TOKEN_COLUMNS,
    Recorder,
    Summary,
    write_csv,
)

if TYPE_CHECKING:
    from hybrid.engine.experts.report import CacheReport
    from hybrid.serving.llm import LLM

T = TypeVar("T")
CSV_FILES = {
    "breakdown-csv": BREAKDOWN_COLUMNS,
    "cachehit-csv": CACHEHIT_COLUMNS,
    "token-csv": TOKEN_COLUMNS,
    "power-csv": POWER_COLUMNS,
}


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
    """Observes a run, and writes its files when it has ended: by a signal too, and then without being cut short by
    another one, and when nobody reads its text any more; after other errors the trace alone. A file that cannot be
    written is reported once, by `warn`, and the run goes on.
    """

    def __init__(self, wanted: Wanted, llm: LLM, warn: Callable[[str], None]) -> None:
        self._wanted, self._llm, self._warn = wanted, llm, warn
        metered = wanted.token_csv or wanted.power_csv
        self.recorder = Recorder(Meters(llm.engine.plan.processors) if metered else None)

    def record(self, body: Callable[[], T]) -> T:
        """Run the body and write what it made the engine do."""
        with Interruptible() as interruptible, ExitStack() as stack:
            self._llm.observe(self.recorder)
            stack.push(self._write)
            if self._wanted.trace:
                self._trace(self._wanted.trace, stack)
            return interruptible.run(body)

    def summary(self) -> Summary:
        engine = self._llm.engine
        experts = engine.experts
        cached = experts.geometry.nblocks if experts is not None and experts.geometry.mapping == "prefix" else None
        return self.recorder.summary(engine.load_seconds, engine.plan.isa, engine.plan.threads, cached)

    def cache_report(self) -> CacheReport | None:
        """What the expert cache did; None without one."""
        experts = self._llm.engine.experts
        if experts is None:
            return None
        from hybrid.engine.experts.report import report

        return report(experts)

    def _trace(self, path: Path, stack: ExitStack) -> None:
        """Written as steps run: it may be larger than memory."""
        try:
            stack.enter_context(self._llm.record_trace(path, lambda line: self._warn(f"note: {line}")))
        except HybridError as error:
            self._warn(f"note: {error}")

    def _write(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not (error is None or isinstance(error, KeyboardInterrupt | Terminated | OSError)):
            return  # another error leaves what was there; an OSError is a reader, or a terminal, that is gone
        wanted, recorder = self._wanted, self.recorder
        self._write_csv(wanted.breakdown_csv, BREAKDOWN_COLUMNS, recorder.breakdown_rows)
        self._write_csv(wanted.cachehit_csv, CACHEHIT_COLUMNS, recorder.cachehit_rows)
        self._write_times(wanted.token_csv)
        self._write_csv(wanted.power_csv, POWER_COLUMNS, recorder.power_rows)
        if path := wanted.cache_save:
            self._attempt(lambda: self._llm.engine.save_experts(path))

    def _write_times(self, path: Path | None) -> None:
        """Of a name that another program's readers look for, in its columns, and with the file that it has beside."""
        if path is None or path.name != TIMES_NAME:
            return self._write_csv(path, TOKEN_COLUMNS, self.recorder.token_rows)
        steps = self.recorder.decoding
        self._write_csv(path, TIMES_COLUMNS, lambda: time_rows(steps))
        self._write_csv(path.with_name(CLOCK_NAME), CLOCK_COLUMNS, lambda: clock_rows(steps))

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


def check_outputs(wanted: Wanted) -> None:
    """Raise ConfigError for the first path where no such file can be written, before a model is loaded."""
    for flag, columns in CSV_FILES.items():
        path = getattr(wanted, flag.replace("-", "_"))
        if flag == "token-csv" and path is not None and path.name == TIMES_NAME:
            check_output("--token-csv", path.with_name(CLOCK_NAME), csv_kind(CLOCK_COLUMNS))
            columns = TIMES_COLUMNS
        check_output(f"--{flag}", path, csv_kind(columns))
    if wanted.trace:
        from hybrid.files.traces import check_trace_output

        check_trace_output("--trace", wanted.trace)
    if wanted.cache_save:
        from hybrid.engine.experts.warm_start import WARM_KIND

        check_output("--cache-save", wanted.cache_save, WARM_KIND)
