"""Many replays of one trace: in parallel processes, each with a name of what it depends on, so that it can be kept."""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpu_cache.admission import Costs
from gpu_cache.costs import Machine, Work, cpu_only, predict, work_of
from gpu_cache.intervals import blocks_of, interval, sums_of
from gpu_cache.policies import known_policy
from gpu_cache.simulator import SCHEDULES, Result, Setting, policy_names, replay
from gpu_cache.source import source_digest
from gpu_cache.trace import Calls

Row = dict[str, Any]
Report = Callable[[int, int], None]

_COLUMNS = ("step", "sequence", "layer", "start", "expert", "score")
_NAMED, _TEACHER = "named", "teacher"  # folders of other calls of `Calls`
_calls: Calls  # of a worker process


class Kept(Protocol):
    """Results of earlier sweeps, to which new ones are added as they come."""

    def get(self, name: str) -> Row | None: ...
    def add(self, name: str, row: Row, trace: str, code: str) -> None: ...


def sweep(
    calls: Calls,
    settings: Sequence[Setting],
    machine: Machine | None = None,
    workers: int = 1,
    kept: Kept | None = None,
    report: Report = lambda done, total: None,
) -> list[Row]:
    """Replay every setting; rows in the order of the settings, as `row_of` makes them.

    kept: what it has is not replayed again, and what is new is added at once, so that an interrupted sweep goes on
    where it stopped. report: called with (done, total). Raises CacheError for a setting that no cache can have.
    """
    for setting in settings:
        setting.check(calls, _costs(machine))
    digest = calls.digest()
    names = [result_name(digest, setting, machine) for setting in settings]
    rows = {name: row for name in names if kept is not None and (row := kept.get(name)) is not None}
    todo = {name: setting for name, setting in zip(names, settings, strict=True) if name not in rows}
    done = len(set(names)) - len(todo)
    report(done, done + len(todo))
    for name, row in _run(calls, todo, machine, workers):
        rows[name] = row
        if kept is not None:
            kept.add(name, row, digest, _source(todo[name]))
        done += 1
        report(done, len(set(names)))
    return [rows[name] for name in names]


def result_name(digest: str, setting: Setting, machine: Machine | None) -> str:
    """A name for the result of these calls, this setting, this machine, and the code that replays it."""
    parts = [_source(setting), digest, astuple(setting), machine and astuple(machine)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _source(setting: Setting) -> str:
    """A name for the source that a result depends on; schedules are a part of the simulator."""
    name = known_policy(setting.policy, policy_names())
    return source_digest(None if name in SCHEDULES else name, setting.admission, setting.prefetch)


def describe_trace(calls: Calls) -> Row:
    """What results depend on of a trace."""
    shape = {"layers": calls.layers, "experts": calls.experts, "steps": calls.steps, "calls": calls.total}
    teacher = {} if calls.teacher is None else {"teacher": describe_trace(calls.teacher)}
    return {"digest": calls.digest(), **shape, **teacher}


def provenance(version: str) -> Row:
    """What results depend on besides trace and parameters. version: of the program."""
    machine = {"system": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    return {"version": version, "code": source_digest(None), "machine": machine}


def row_of(calls: Calls, result: Result, machine: Machine | None) -> Row:
    """A result as JSON has it: parameters, totals, hits and calls by layer and by block of the trace, a confidence
    interval of the hit rate, how layers were split between device and CPU (`Work`), and what a machine makes of it.
    """
    row: Row = asdict(result.setting)
    row["slots"], row["steps"] = result.setting.nblocks * result.setting.nways, result.steps
    for name in ("calls", "hits", "loading", "misses", "fills", "evictions"):
        row[name] = int(getattr(result, name).sum())
    row["prefetched"], row["prefetch_used"] = result.prefetched, result.used
    row["hit_rate"] = round(result.hit_rate, 6)
    blocks = blocks_of(calls)
    hits, total = sums_of(blocks, result.found), sums_of(blocks, result.groups)
    row["hit_rate_low"], row["hit_rate_high"] = interval(hits, total) or (None, None)
    row["block_calls"], row["block_hits"] = total.tolist(), hits.tolist()
    row["upper_bound"] = result.upper_bound
    row["layer_calls"], row["layer_hits"] = result.calls.tolist(), result.hits.tolist()
    work = work_of(result)
    row["splits"] = work.splits.tolist()
    return row if machine is None else {**row, **speeds_of(work, machine)}


def work_of_row(row: Row) -> Work:
    return Work(row["steps"], row["fills"], np.array(row["splits"]))


def speeds_of(work: Work, machine: Machine) -> Row:
    """What a machine makes of a replay, as JSON has it."""
    prediction = predict(work, machine)
    parts = {"layers": prediction.layers, "copy": prediction.copy, "other": prediction.other}
    return {
        "tokens_per_second": round(prediction.tokens_per_second, 4),
        "cpu_tokens_per_second": round(cpu_only(work, machine).tokens_per_second, 4),
        "step_ms": {name: round(1e3 * seconds, 4) for name, seconds in parts.items()},
    }


def _run(calls: Calls, todo: dict[str, Setting], machine: Machine | None, workers: int) -> Iterator[tuple[str, Row]]:
    """Replay in this process, or in as many others as are of use; results as they come."""
    workers = min(workers, len(todo))
    if workers <= 1:
        for name, setting in todo.items():
            yield name, row_of(calls, replay(calls, setting, _costs(machine)), machine)
        return
    with tempfile.TemporaryDirectory(prefix="hybrid-sweep-") as folder:
        _save(calls, Path(folder))
        shape = (folder, calls.layers, calls.experts)
        with ProcessPoolExecutor(workers, get_context("spawn"), _open, shape) as pool:
            futures = {pool.submit(_replay_one, setting, machine): name for name, setting in todo.items()}
            try:
                yield from _completed(futures)
            finally:
                pool.shutdown(cancel_futures=True)


def _completed(futures: dict[Future[Row], str]) -> Iterator[tuple[str, Row]]:
    waiting = set(futures)
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ended:
            yield futures[future], future.result()


def _save(calls: Calls, folder: Path) -> None:
    for column in _COLUMNS:
        np.save(folder / f"{column}.npy", getattr(calls, column))
    for name, more in ((_NAMED, calls.named), (_TEACHER, calls.teacher)):
        if more is not None:
            (folder / name).mkdir()
            _save(more, folder / name)


def _load(folder: Path, layers: int, experts: int) -> Calls:
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS}
    named = _load(folder / _NAMED, layers, experts + 1) if (folder / _NAMED).is_dir() else None
    teacher = _load(folder / _TEACHER, layers, experts) if (folder / _TEACHER).is_dir() else None
    return Calls(**columns, layers=layers, experts=experts, named=named, teacher=teacher)


def _open(folder: str, layers: int, experts: int) -> None:
    """The workers share the columns through the page cache. Ctrl-C ends them without a word."""
    global _calls
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _calls = _load(Path(folder), layers, experts)


def _costs(machine: Machine | None) -> Costs | None:
    return None if machine is None else machine.costs


def _replay_one(setting: Setting, machine: Machine | None) -> Row:
    return row_of(_calls, replay(_calls, setting, _costs(machine)), machine)
