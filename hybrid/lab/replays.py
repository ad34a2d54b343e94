"""The replays of an experiment: what there is to do, what is done, and doing the rest."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_cache.admission import Admission, SecondTouch
from gpu_cache.costs import Machine
from gpu_cache.simulator import Setting
from gpu_cache.sweep import describe_trace, provenance, result_name, sweep
from gpu_cache.teaching import taught_by_first
from gpu_cache.trace import Calls, Trace, calls
from hybrid import __version__
from hybrid.errors import ConfigError, cache_errors
from hybrid.files import disk_errors, read_json_object, write_json
from hybrid.files.traces import read_trace
from hybrid.lab.experiment import Experiment
from hybrid.lab.kept_results import KeptResults
from hybrid.lab.parts import Model
from hybrid.machine.hardware import probe

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
RESULTS, PROVENANCE = "results.jsonl", "provenance.json"
_ASK_NO_COSTS = (Admission.name, SecondTouch.name)


@dataclass(frozen=True)
class Source:
    """A trace of a model. file: as the experiment names it."""

    model: Model
    file: str
    trace: Trace
    calls: Calls

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.file}"


@dataclass(frozen=True)
class Part:
    """Replays of one trace with one machine. machine: None where what is replayed does not depend on one."""

    source: Source
    machine: str | None
    rates: Machine | None
    settings: list[Setting]

    def names(self) -> list[str]:
        digest = self.source.calls.digest()
        return [result_name(digest, setting, self.rates) for setting in self.settings]


@dataclass(frozen=True)
class Replay:
    """A result. row: as `gpu_cache.sweep.row_of` makes it; machine: that admission reckoned with."""

    model: str
    trace: str
    machine: str | None
    row: Row


@dataclass(frozen=True)
class Progressed:
    """How many replays of a trace are done."""

    name: str
    done: int
    total: int


def read_sources(experiment: Experiment) -> list[Source]:
    """Every trace of every model. Raises ConfigError for one that cannot be read, or is of another model."""
    found: list[Source] = []
    for model in experiment.models:
        where = f"{experiment.path}: [[models]] {model.name}, traces:"
        with cache_errors(where):
            traces = [
                (file, read_trace(experiment.trace_path(file), model.layers, model.experts, where))
                for file in dict.fromkeys(model.traces)
            ]
        if len(shapes := {(trace.layers, trace.experts) for _, trace in traces}) > 1:
            text = ", ".join(f"{layers} layers of {experts} experts" for layers, experts in sorted(shapes))
            raise ConfigError(
                f"{where} they have {text}; if they are of one model, give it the keys layers and experts"
            )
        with cache_errors(f"{experiment.path}: [[models]] {model.name}, train_fraction:"):
            found += [Source(model, file, trace, _calls(model, trace)) for file, trace in traces]
    return found


def _calls(model: Model, trace: Trace) -> Calls:
    every = calls(trace)
    return every if model.train_fraction is None else taught_by_first(every, model.train_fraction)


def parts_of(experiment: Experiment, sources: list[Source]) -> list[Part]:
    """All that is to be replayed. Raises ConfigError for what no cache of a model can have."""
    parts = []
    for source in sources:
        settings = experiment.settings(source.model, source.calls)
        plain = [setting for setting in settings if setting.admission in _ASK_NO_COSTS]
        costly = [setting for setting in settings if setting.admission not in _ASK_NO_COSTS]
        parts.append(Part(source, None, None, plain))
        if costly:
            parts += [Part(source, *machine, costly) for machine in experiment.machines_of(source.model).items()]
    return parts


def run(
    experiment: Experiment,
    folder: Path | None = None,
    workers: int = 1,
    progress: Progress = lambda name, done, total: None,
) -> list[Replay]:
    """Replay what is not in the folder yet; each result is kept there as soon as it is there.

    folder: None: the experiment's. progress: called with (what, done, total). Raises ConfigError.
    """
    folder = folder or experiment.folder
    began = time.monotonic()
    parts = parts_of(experiment, read_sources(experiment))
    with disk_errors(folder, ConfigError):
        folder.mkdir(parents=True, exist_ok=True)
    kept = KeptResults(folder / RESULTS)
    found: list[Replay] = []
    new = 0
    for part in parts:
        new += sum(kept.get(name) is None for name in part.names())
        report = partial(progress, part.source.name)
        with cache_errors():
            rows = sweep(part.source.calls, part.settings, part.rates, workers, kept, report)
        found += _replays(part, rows)
    about = {"replays": len(found), "replayed": new, "seconds": round(time.monotonic() - began, 1)}
    write_json(folder / PROVENANCE, {**_provenance(experiment, parts), **about})
    return found


def status(experiment: Experiment, folder: Path | None = None) -> list[Progressed]:
    """How far the replays of every trace are. Raises ConfigError."""
    kept = _kept(folder or experiment.folder)
    done: dict[str, list[bool]] = {}
    for part in parts_of(experiment, read_sources(experiment)):
        done.setdefault(part.source.name, []).extend(kept.get(name) is not None for name in part.names())
    return [Progressed(name, sum(found), len(found)) for name, found in done.items()]


def kept_replays(experiment: Experiment, sources: list[Source], folder: Path | None = None) -> list[Replay]:
    """All results, from the folder. Raises ConfigError if some are missing."""
    folder = folder or experiment.folder
    kept = _kept(folder)
    found, missing = list[Replay](), 0
    for part in parts_of(experiment, sources):
        rows = [kept.get(name) for name in part.names()]
        missing += sum(row is None for row in rows)
        found += _replays(part, [row for row in rows if row is not None])
    if missing:
        total = missing + len(found)
        raise ConfigError(
            f"{folder}: {missing} of {total} replays are not there, or are of other traces or code; "
            f"`hybrid experiment run {experiment.path}` makes them"
        )
    return found


def kept_provenance(experiment: Experiment, folder: Path | None = None) -> Row:
    """What the last run wrote of itself. Raises ConfigError if there was none."""
    return read_json_object((folder or experiment.folder) / PROVENANCE)


def _kept(folder: Path) -> KeptResults:
    """What a folder has; one that is not there has nothing."""
    return KeptResults(folder / RESULTS if folder.is_dir() else None)


def _replays(part: Part, rows: list[Row]) -> Iterator[Replay]:
    for row in rows:
        yield Replay(part.source.model.name, part.source.file, part.machine, row)


def _provenance(experiment: Experiment, parts: list[Part]) -> Row:
    """What the results depend on, and where they were made."""
    hardware, about = probe(), provenance(__version__)
    machine = {**about["machine"], "processor": hardware.cpu_model, "cores": len(hardware.cpus)}
    sources = {part.source.name: part.source for part in parts}
    traces = [
        {"model": one.model.name, "file": one.file, "sha256": _sha256(experiment.trace_path(one.file))}
        | describe_trace(one.calls)
        for one in sources.values()
    ]
    return {
        **about,
        "machine": machine,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "experiment": {"file": experiment.path.name, "sha256": _sha256(experiment.path)},
        "traces": traces,
        "ended": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
