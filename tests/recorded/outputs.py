"""What commands write: columns of files, names in JSON, and flags."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from recorded.models import Workshop
from recorded.names import command

RUN = ("run", "--prompt", "Once upon a time", "--threads", 1, "--max-seq-len", 256, "--ignore-eos", "--numa", "off")
SIMULATED = ("--device", "simulated", "--cache-nblocks", 14, "--cache-nways", 4, "--cache-delay", 1)
STREAMED = ("--cache-stream", "on")
COMMANDS = ("run", "bench", "verify", "simulate", "plot")
Output = tuple[str, Callable[[Workshop], Any]]


def output_cases() -> Iterator[Output]:
    yield "output/files of a run", _files_of_a_run
    yield "output/files of a simulation", _files_of_a_simulation
    yield "output/json of a run", _json_of_a_run
    yield "output/json of a plan", _json_of_a_plan
    for name in COMMANDS:
        yield f"output/flags of {name}", partial(_flags, name=name)


def trace_case(workshop: Workshop, isa: str) -> dict[str, Any]:
    """Routes that a run writes, replayed; and a run that takes them in place of its routers."""
    folder = workshop.new_folder()
    trace = folder / "trace.csv"
    cache = ("--cache-dir", workshop.stores("embedded", "auto"))
    with chosen_isa(isa):
        _run(*RUN, "--max-tokens", 12, *cache, "--trace", trace, *SIMULATED, *STREAMED)
        routed = _run(*RUN, "--max-tokens", 12, "--json", *cache, "--route-trace", trace)
    replayed = _run("simulate", "--trace", trace, "--policy", "all", "--workers", 1, "--output", "csv")
    replayed = replayed.replace(str(trace), "TRACE")
    return {
        "routes": f"{_crc(re.sub(r',[^,]*$', '', trace.read_text(), flags=re.MULTILINE)):08x}",
        "replayed": f"{_crc(replayed):08x}",
        "routed": f"{_crc(json.loads(routed)['completions'][0]['text']):08x}",
    }


def warm_case(workshop: Workshop, isa: str) -> dict[str, Any]:
    """Experts that a run saves, and what a run counts that begins with them."""
    saved = workshop.new_folder() / "experts.json"
    arguments = (*RUN, "--max-tokens", 12, "--cache-dir", workshop.stores("embedded", "auto"), *SIMULATED, "--json")
    with chosen_isa(isa):
        _run(*arguments, "--cache-save", saved)
        cache = json.loads(_run(*arguments, "--cache-warm", saved))["cache"]
    names = ("calls", "hits", "loading", "misses", "fills", "evictions")
    return {
        "experts": f"{_crc(json.dumps(json.loads(saved.read_text())['experts'])):08x}",
        "counts": " ".join(str(cache[name]) for name in names),
    }


@contextmanager
def chosen_isa(isa: str) -> Iterator[None]:
    """Commands have no flag for it."""
    with patch.dict(os.environ, HYBRID_ISA=isa):
        yield


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _run(*arguments: object) -> str:
    code, out, err = command(*arguments)
    assert code == 0, err
    return out


def _files_of_a_run(workshop: Workshop) -> dict[str, str]:
    folder = workshop.new_folder()
    flags = {f"{name}-csv": folder / f"{name}.csv" for name in ("breakdown", "cachehit", "token", "power")}
    flags["trace"] = folder / "trace.csv"
    more = [word for name, path in flags.items() for word in (f"--{name}", path)]
    _run(*RUN, "--max-tokens", 3, "--cache-dir", workshop.stores("embedded", "auto"), *SIMULATED, *more)
    return {name: _first_line(path) for name, path in flags.items()}


def _files_of_a_simulation(workshop: Workshop) -> dict[str, str]:
    folder = workshop.new_folder()
    trace = folder / "trace.csv"
    _run(*RUN, "--max-tokens", 3, "--cache-dir", workshop.stores("embedded", "auto"), "--trace", trace)
    rates = [word for name in ("pcie-gbps", "device-gbps", "cpu-gbps", "expert-mb") for word in (f"--{name}", 10)]
    out = _run("simulate", "--trace", trace, "--workers", 1, *rates, "--output", "csv")
    _run("simulate", "--trace", trace, "--libcachesim", folder / "calls.csv")
    return {"simulate": out.splitlines()[0], "libcachesim": _first_line(folder / "calls.csv")}


def _first_line(path: Path) -> str:
    return path.read_text().splitlines()[0]


def _json_of_a_run(workshop: Workshop) -> list[str]:
    cache = ("--cache-dir", workshop.stores("embedded", "auto"))
    return _names(json.loads(_run(*RUN, "--max-tokens", 3, "--json", *cache, *SIMULATED)))


def _json_of_a_plan(workshop: Workshop) -> list[str]:
    return _names(json.loads(_run(*RUN, "--dry-run", "--json")))


def _names(value: Any, place: str = "") -> list[str]:
    """The names of every object in a JSON value, an object a line; of lists the first entry stands for all."""
    if isinstance(value, list):
        return _names(value[0], f"{place}[]") if value else []
    if not isinstance(value, dict):
        return []
    inner = [line for name, part in value.items() for line in _names(part, f"{place}.{name}")]
    return [f"{place or '.'}: {' '.join(value)}", *inner]


def _flags(workshop: Workshop, name: str) -> str:
    """Those that the help of a command lists."""
    help_text = _run(name, "--help")
    return " ".join(sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text))))
