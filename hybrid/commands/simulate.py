"""`hybrid simulate`: what expert caches of many shapes and policies would have done with a recorded trace."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybrid.commands.console import progress_bar, say, show
from hybrid.commands.flags import command, new_app
from hybrid.errors import ConfigError, cache_errors
from hybrid.settings import check_settings, required, setting

if TYPE_CHECKING:
    from gpu_cache.costs import Machine
    from gpu_cache.simulator import Setting
    from gpu_cache.trace import Calls, Trace

app = new_app()

OUTPUTS = ("table", "csv", "json")


@dataclass(frozen=True)
class SimulateOptions:
    """A trace, the caches that it is replayed through, and the machine whose speed is predicted."""

    COMMAND: ClassVar[str] = "simulate"

    trace: Path = required("CSV or parquet of `hybrid run --trace`, or expert_choices.csv.")
    nblocks: str | None = setting(None, "Indexes, as 14,16.", shown="the number of layers", metavar="LIST")
    nways: str | None = setting(None, "Slots of each.", shown="a quarter and half of the experts", metavar="LIST")
    policy: str = setting(
        "LRU,LFU,Belady,bypass-Belady",
        "Policies, or all: LRU,LFU,Belady,...; a wrong one lists them.",
        metavar="LIST",
    )
    admission: str = setting("always", "always, second-touch, break-even.", metavar="LIST")
    mapping: str = setting("modulo", "modulo, prefix, hash.", metavar="LIST")
    quota: str = setting("none", "Copies in a step at most; none for no limit.", metavar="LIST")
    copy_delay: str = setting("0", "Lookups that a copy takes beyond the next one.", metavar="LIST")
    layers: int | None = setting(None, "MoE layers of the model.", shown="what the trace has")
    experts: int | None = setting(None, "Experts of a layer.", shown="what the trace has")
    seed: int = setting(0, "Of policies that draw lots.")
    pcie_gbps: float | None = setting(None, "GB/s of copies to the device.")
    device_gbps: float | None = setting(None, "GB/s with which the device reads experts.")
    cpu_gbps: float | None = setting(None, "GB/s with which the CPU reads experts.")
    expert_mb: float | None = setting(None, "MB of an expert.")
    other_ms: float = setting(0.0, "Time of a step besides its experts.")
    layer_ms: float = setting(0.0, "Time to begin and join a layer on the device.")
    profile: Path | None = setting(None, "JSON of `hybrid bench`: its read bandwidth is that of the CPU.")
    workers: int | None = setting(None, "Processes.", minimum=1, shown="one for each processor")
    results: Path | None = setting(None, "Keep results here, and do not replay again what is there.")
    libcachesim: Path | None = setting(None, "Write the calls as CSV for libCacheSim, replay nothing.")
    convert: Path | None = setting(None, "Write the trace as CSV or parquet, replay nothing.")
    output: str = setting("table", "table, csv or json.", choices=OUTPUTS)


@command(app, "what was replayed is in the file of --results, if there is one")
def simulate(options: SimulateOptions) -> None:
    """Replay a trace through every combination of the given shapes and policies; count hits, copies and evictions.

    Belady and bypass-Belady know the future, static-best and static-layers never copy. With the rates of a machine,
    hits become predicted tokens a second.
    """
    check_settings(options)
    with cache_errors():
        machine = make_machine(options)
        _check_files({f"--{name}": getattr(options, name) for name in ("results", "libcachesim", "convert")})
        recorded = load_trace(options.trace, options.layers, options.experts)
        if _convert(recorded, options.libcachesim, options.convert):
            return
        from gpu_cache.trace import calls

        grouped = calls(recorded)
        settings = make_settings(grouped, options)
        warn_of_few_ways(grouped, settings)
        workers = options.workers or len(os.sched_getaffinity(0))
        show(FORMATS[options.output](run(grouped, settings, machine, workers, options.results)))


def load_trace(path: Path, layers: int | None, experts: int | None) -> Trace:
    """A trace, or the seed's list of expert choices, which its first line tells apart."""
    from gpu_cache.converters import from_expert_choices, is_expert_choices
    from gpu_cache.trace import read_trace

    if is_expert_choices(path):
        return from_expert_choices(path, layers, experts)
    return read_trace(path, layers, experts)


def _convert(trace: Trace, libcachesim: Path | None, convert: Path | None) -> bool:
    from gpu_cache.converters import to_libcachesim
    from gpu_cache.trace import calls
    from gpu_cache.trace_writer import write_trace

    if libcachesim is not None:
        to_libcachesim(calls(trace), libcachesim)
    if convert is not None:
        write_trace(convert, trace)
    return libcachesim is not None or convert is not None


def make_settings(calls: Calls, options: SimulateOptions) -> list[Setting]:
    """Every combination, each once. Raises ConfigError for a list that is none."""
    from gpu_cache.policies import known_policy
    from gpu_cache.simulator import SCHEDULES, Setting, policy_names

    ways = sorted({max(1, calls.experts // 4), max(1, calls.experts // 2)})
    words = policy_names() if options.policy.lower() == "all" else _words("--policy", options.policy)
    policies = [known_policy(word, policy_names()) for word in words]
    grid = product(
        [calls.layers] if options.nblocks is None else _counts("--nblocks", options.nblocks),
        ways if options.nways is None else _counts("--nways", options.nways),
        _words("--mapping", options.mapping),
        [None if word == "none" else _count("--quota", word) for word in _words("--quota", options.quota)],
        policies,
        _words("--admission", options.admission),
        _counts("--copy-delay", options.copy_delay),
    )
    settings = [
        Setting(n, m, p, "always" if p in SCHEDULES else a.lower(), g.lower(), q, d, options.seed)
        for n, m, g, q, p, a, d in grid
    ]
    return list(dict.fromkeys(settings))


def warn_of_few_ways(calls: Calls, settings: list[Setting]) -> None:
    few = sorted({setting.nways for setting in settings if setting.nways < calls.largest})
    if few:
        say(
            f"warning: a layer asks for up to {calls.largest} experts in a step, which an index of "
            f"{', '.join(map(str, few))} ways cannot hold together: what it lacks goes to the CPU"
        )


def make_machine(options: SimulateOptions) -> Machine | None:
    """The machine of the cost model, None if no rate is given. Raises ConfigError when some are missing."""
    from gpu_cache.costs import Machine

    rates = {name: getattr(options, name) for name in ("pcie_gbps", "device_gbps", "cpu_gbps", "expert_mb")}
    if options.profile is not None and rates["cpu_gbps"] is None:
        rates["cpu_gbps"] = _read_bandwidth(options.profile)
    given = {name: rate for name, rate in rates.items() if rate is not None}
    if not given:
        return None
    missing = [f"--{name.replace('_', '-')}" for name in rates if name not in given]
    if missing:
        raise ConfigError(f"predicting speed also needs {', '.join(missing)}; give all four rates or none")
    expert_bytes = given.pop("expert_mb") * 1e6
    return Machine(**given, expert_bytes=expert_bytes, other_ms=options.other_ms, layer_ms=options.layer_ms)


def _read_bandwidth(profile: Path) -> float:
    try:
        return float(json.loads(profile.read_bytes())["machine"]["read_gbps"])
    except OSError as error:
        raise ConfigError(f"--profile {profile} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--profile {profile} has no read bandwidth; make it with `hybrid bench --output json > FILE`"
        ) from None


def run(
    calls: Calls, settings: list[Setting], machine: Machine | None, workers: int, kept: Path | None
) -> dict[str, Any]:
    """Replay and describe: {"provenance": ..., "cost_model": ..., "results": [...]}."""
    from gpu_cache.sweep import provenance, sweep
    from hybrid import __version__

    with progress_bar() as progress:
        rows = sweep(calls, settings, machine, workers, kept, lambda done, total: progress("replays", done, total))
    model = None if machine is None else asdict(machine)
    return {"provenance": provenance(calls, __version__), "cost_model": model, "results": rows}


def to_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2)


def to_csv(report: dict[str, Any]) -> str:
    """One line a replay; what JSON has by layer or part is left out."""
    rows = report["results"]
    columns = [name for name, value in rows[0].items() if not isinstance(value, list | dict)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


PARAMETERS = ("nblocks", "nways", "mapping", "quota", "delay", "policy", "admission")
COUNTED = {
    "hits": lambda row: f"{row['hit_rate']:.1%}",
    "of the bound": lambda row: _share_of_bound(row),
    "copies a step": lambda row: f"{row['fills'] / row['steps']:.2f}",
    "loading": lambda row: f"{row['loading'] / row['calls']:.1%}",
}


def to_table(report: dict[str, Any]) -> str:
    """A markdown table; parameters that are the same everywhere stand above it."""
    rows, trace = report["results"], report["provenance"]["trace"]
    varied = [name for name in PARAMETERS if name == "policy" or len({str(row[name]) for row in rows}) > 1]
    fixed = ", ".join(f"{name} {_text(rows[0][name])}" for name in PARAMETERS if name not in varied)
    bounds = {_place(row): row["upper_bound"] for row in rows if row["policy"] == "bypass-Belady"}
    rows = [{**row, "steps": trace["steps"], "bound": bounds.get(_place(row))} for row in rows]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        **{name: lambda row, name=name: _text(row[name]) for name in varied},  # type: ignore[misc]
        **COUNTED,
    }
    if "tokens_per_second" in rows[0]:
        columns["tokens/s"] = lambda row: f"{row['tokens_per_second']:.2f}"
    lines = [
        f"{trace['calls']} calls of {trace['layers']} layers x {trace['experts']} experts in {trace['steps']} steps"
        + (f"; {fixed}" if fixed else ""),
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "".join("---|" if name in ("policy", "admission", "mapping") else "---:|" for name in columns),
    ]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    if "cpu_tokens_per_second" in rows[0]:
        lines += ["", f"with every expert on the CPU: {rows[0]['cpu_tokens_per_second']:.2f} tokens/s"]
    return "\n".join(lines)


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a bound depends on; delays do not lower it."""
    return row["nblocks"], row["nways"], row["mapping"], row["quota"]


def _share_of_bound(row: dict[str, Any]) -> str:
    return f"{row['hits'] / row['bound']:.1%}" if row["bound"] else "-"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


FORMATS: dict[str, Callable[[dict[str, Any]], str]] = dict(zip(OUTPUTS, (to_table, to_csv, to_json), strict=True))


def _words(flag: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{flag} {text!r} is not a list; write words with commas between them")
    return words


def _counts(flag: str, text: str) -> list[int]:
    return [_count(flag, word) for word in _words(flag, text)]


def _count(flag: str, word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ConfigError(f"{flag} has {word!r:.80}, which is not a whole number; write a list as 14,16") from None


def _check_files(files: dict[str, Path | None]) -> None:
    for flag, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{flag} {path}: there is no directory {path.parent}; make it first")
        if path is not None and path.is_dir():
            raise ConfigError(f"{flag} {path} is a directory; name a file")
